"""Routes that are wrong where few are.

A wrong route spoils the gradient rows of its own output, by k (v - u): u is what the place taken reads and v what the
right one does. So does a value just above zero that was taken for a zero of ReLU, by k v. Near the input both are
known. What an output's rows miss is then a sum of a few of them, of windows whose places stand nearest to each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rgap.inversion.route_rows import Decided, Observed

# b samples, o outputs, m windows of an output, w places of a window, i what a place reads, c candidates of an output.

CANDIDATES = 24
"""Places of each output that are looked at: those that are least below the ones taken."""
MOST = 40
"""Exchanges that are made and taken back until no more is gained."""
GAIN = 1e-3
"""An exchange is made that explains so much of what its output's rows still miss, squared."""
LEFT = 0.3
"""Exchanges of an output are taken together if they leave less of what its rows missed, squared."""


@dataclass(frozen=True)
class Exchanged:
    """Other routes, and what is known behind the pool with them."""

    routes: Float[Tensor, "b o m w"]
    observed: Observed


def exchanged(at: Decided) -> Exchanged | None:
    """The routes that explain what gradient rows miss; None if there are none."""
    *places, near = _nearest(at)
    moves = torch.where(near[..., None], _moves(at, *places), 0.0)
    missed = at.left.flatten(0, 1)
    made, left = _explained(missed, moves, places[0] * at.slope.shape[2] + places[1])
    made &= (left.square().sum(1) < LEFT * missed.square().sum(1))[:, None]
    if not bool(made.any()):
        return None
    sample, window, place = (each[made] for each in places)
    output = made.nonzero()[:, 0]
    routes, observed = at.slope.clone(), at.point.observed
    routes[sample, output, window] = 0.0
    routes[sample, output, window, place] = 1.0
    known, k = observed.known.clone(), observed.cotangent.clone()
    known[sample, output, window] = True
    k[sample, output, window] += observed.idle[sample, output, window]
    idle = torch.where(known, 0.0, observed.idle)
    return Exchanged(routes, replace(observed, known=known, cotangent=k, idle=idle))


def _nearest(at: Decided) -> tuple[Int[Tensor, "o c"], Int[Tensor, "o c"], Int[Tensor, "o c"], Bool[Tensor, "o c"]]:
    """The places of each output that are least below the ones taken, as sample, window and place; and whether they may
    be the right ones at all."""
    point, observed = at.point, at.point.observed
    values = point.part.pool.read(point.z, -math.inf)
    taken = values.masked_fill(at.slope == 0, -math.inf).amax(-1)
    apart = torch.where(observed.known, taken, observed.value)[..., None] - values
    apart = apart.abs().masked_fill((at.slope > 0) & observed.known[..., None], math.inf)
    nothing = torch.where(observed.known, observed.cotangent, observed.idle) == 0
    apart = apart.masked_fill(nothing[..., None], math.inf).transpose(0, 1).flatten(1)
    gap, nearest = apart.topk(min(CANDIDATES, apart.shape[1]), largest=False)
    places, windows = values.shape[3], values.shape[2]
    return nearest // (windows * places), nearest // places % windows, nearest % places, gap.isfinite()


def _moves(at: Decided, sample: Tensor, window: Tensor, place: Tensor) -> Float[Tensor, "o c i"]:
    """What each exchange adds to its output's gradient rows."""
    point, observed, pool = at.point, at.point.observed, at.point.part.pool
    output = torch.arange(len(sample), device=sample.device)[:, None]
    taken = at.slope.argmax(-1)[sample, output, window]
    there, here = (point.reads(sample, output, pool.windows[window, of]) for of in (place, taken))
    k, idle = (of[sample, output, window][..., None] for of in (observed.cotangent, observed.idle))
    return torch.where(observed.known[sample, output, window][..., None], k * (there - here), idle * there)


def _explained(
    missed: Float[Tensor, "o i"], moves: Float[Tensor, "o c i"], windows: Int[Tensor, "o c"]
) -> tuple[Bool[Tensor, "o c"], Float[Tensor, "o i"]]:
    """Which moves make up what is missed, one for each window, and what is left of it: the best one after another."""
    made = torch.zeros(moves.shape[:2], dtype=torch.bool, device=moves.device)
    same = windows[:, :, None] == windows[:, None]
    same &= ~torch.eye(same.shape[1], dtype=torch.bool, device=moves.device)
    size, left, every = moves.square().sum(-1), missed, torch.arange(len(moves), device=moves.device)
    for _ in range(MOST):
        sign = torch.where(made, -1.0, 1.0).to(moves)
        gain = 2 * sign * (moves @ left[..., None])[..., 0] - size
        gain = gain.masked_fill((same & made[:, None]).any(-1), 0.0)
        best, at = gain.max(1)
        better = best > GAIN * left.square().sum(1)
        if not bool(better.any()):
            break
        step = sign[every, at][:, None] * moves[every, at]
        left = torch.where(better[:, None], left - step, left)
        made[every[better], at[better]] ^= True
    return made, left
