"""Through a pool: which place of its window each maximum came from, its route, and the input with it.

In front of the pool stands a layer z = W x + b; of every window the largest z is known, m, and the cotangent k of it.
For given routes all constraints are linear in x (Eqs. 15 and 16):

    z at the route's place = m,  z elsewhere in the window <= m,       K x = grad W  with k at the routes' places.

Routes are found with the input. They begin as weights p of the places, softmax(z / T), and harden as the constraints
come to be met: T follows what is still missed. While a window is undecided it is told apart from its mean by a random
vector whose covariance is known: sum over its places of p k^2 (u - mean u)(u - mean u)', u being what a place reads.
So each output's gradient rows are weighed by the inverse of the covariance of all its undecided windows: what these
may have done to them is left out, and the rest counts from the first step on. The value rows of an undecided window
ask for its mean, as far as the variance of z within the window allows.

A mean behind a kinked activation f is the same task with slopes in place of routes: of every window the mean of f(z) is
known, and each place's share of k is times f'(z). While z is in doubt f'(z) has a mean and a variance, each on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rgap.inversion.exchanges import exchanged
from rgap.inversion.prior import Prior
from rgap.inversion.rounding import rounding
from rgap.inversion.route_rows import ASTRAY, Annealing, Decided, Observed, Point, Pooled, Step
from rgap.linalg import deadline
from rgap.linalg.least_squares import null_space_probe
from rgap.nn.pools import MaxPool

# b samples, o outputs, m windows of an output, w places of a window, n places of an output.


@dataclass(frozen=True)
class Unpooled:
    """The input at which the constraints are met, or the nearest that was found."""

    x: Float[Tensor, "b ..."]
    routes: Float[Tensor, "b o m w"]
    missed: float
    """Of maxima and gradient rows, relatively, with the routes decided."""
    steps: int
    input: Float[Tensor, "b ..."] | None = None
    """The network's own, where that meets the constraints and nothing was found of what the layer reads."""


ANNEALING = Annealing()
COLDER = Annealing(temperature=1.0)
"""Fewer steps, from a start that is decided sooner."""
FROM_INPUT = Annealing(max_steps=6, patience=6, solve_rtol=0.05, solve_steps=40)
"""From the network's input, whose neighbouring values are similar: far enough to begin nearer, and no further."""
QUICK = Annealing(temperature=2.0, cooling=0.97, fading=0.8, max_steps=120, patience=40, solve_steps=60)
"""Of many unknowns, where steps take long: a prior that is gone in twenty of them, if rows are enough without."""
NEAR = Annealing(temperature=0.3, prior=0.01, patience=10, diverges=4.0)
"""From a start of a few per cent's error."""
VALUES_ONLY = Annealing(temperature=0.0, fading=0.6, max_steps=60, patience=6, progress=0.7, gradient=False)
"""Where the maxima alone determine the input: the routes of the present input, and a prior that fades fast. Where that
is the way, each step leaves two thirds of what is missed; of weights that have learned it may leave nearly all."""
SETTLED = Annealing(solve_rtol=1e-9, solve_steps=1000, single=False)
"""What few rows tell of the input, those of an annealing step leave as it is."""
RETURNS = 5e-3
"""A drawn move of the input that comes back from its rows to this part of itself is seen by them."""
NEARER = 0.1
"""Decided routes that miss less than this part of what undecided ones do are nearly all right: the search goes on from
where they lead."""
EXCHANGEABLE = 0.05
"""Below this part missed a search that ends has few routes wrong."""
CLEARLY = 0.95
"""Exchanges are looked for again where they leave less than this part of what was missed."""
ROUNDING = 0.05
"""Below this part of what right routes may miss nothing is left but rounding."""


def find_routes(
    part: Pooled,
    observed: Observed,
    prior: Prior,
    agrees: float,
    start: Float[Tensor, "b ..."],
    schedule: Annealing = ANNEALING,
    report: Callable[[int, float], None] = lambda step, missed: None,
) -> Unpooled:
    """The input and the routes.

    Args:
        agrees: what may be missed, relatively, for routes to be right.
        report: is called with the number of steps and what the constraints miss.

    Raises:
        OutOfTime: the time was up.
    """
    x, temperature, weight = start, schedule.temperature, schedule.prior
    best: Unpooled | None = None
    before, gradient_missed, lowest, last, agreed = math.inf, 1.0, math.inf, 0, schedule.max_steps
    for step in range(schedule.max_steps):
        deadline.check()
        at = Step(Point(part, observed, x), temperature, gradient_missed * schedule.gradient_share, schedule)
        hard = at.decided()
        if hard.missed <= agrees or (hard.missed < schedule.promising and step % schedule.every == 0):
            hard = _finish(hard)
        if at.missed < schedule.progress * lowest:
            lowest, last = at.missed, step
        if best is None or hard.missed < best.missed:
            best, last = Unpooled(hard.point.x, hard.windows.slope, hard.missed, step), step
            agreed = min(agreed, step) if best.missed <= agrees else agreed
        report(step, hard.missed)
        late = step - agreed >= schedule.last or step - last >= schedule.patience
        late |= at.missed > schedule.diverges * lowest
        if best.missed <= ROUNDING * agrees or late or not at.missed < ASTRAY:
            break
        if hard.missed < NEARER * at.missed:
            x, gradient_missed = hard.point.x, hard.gradient_missed
            weight *= hard.missed / at.missed
        else:
            x, gradient_missed = at.solve(prior, weight), at.gradient_missed
        power = schedule.quick if at.missed < before / 2 else 1.0
        before = at.missed
        temperature, weight = temperature * schedule.cooling**power, weight * schedule.fading**power
    assert best is not None
    if agrees < best.missed < EXCHANGEABLE and isinstance(part.pool, MaxPool):
        best = _with_exchanges(part, observed, agrees, best)
    return best


def missed_by(part: Pooled, observed: Observed, x: Float[Tensor, "b ..."]) -> float:
    """How much of what is known behind the pool an input misses, relatively."""
    return Point(part, observed, x).missed


def _finish(step: Decided) -> Decided:
    """As far as decided routes lead: each solve is exact where they are right, and shows the outputs where they are
    not."""
    best = step
    while True:
        tried = Decided(Point(step.point.part, step.point.observed, step.solve(None, 0.0)), step.schedule)
        if tried.missed < best.missed:
            best = tried
        if not (tried.missed < step.missed / 2 or tried.point.missed < step.point.missed / 2):
            return best
        step = tried


def _with_exchanges(part: Pooled, observed: Observed, agrees: float, best: Unpooled) -> Unpooled:
    """The same with routes exchanged, as long as clearly less is missed."""
    at = Decided(Point(part, observed, best.x), SETTLED)
    while at.missed > agrees:
        deadline.check()
        found = exchanged(at)
        if found is None:
            break
        x = Decided(Point(part, found.observed, at.point.x), SETTLED, found.routes).solve(None, 0.0)
        tried = Decided(Point(part, found.observed, x), SETTLED)
        if not tried.missed < CLEARLY * at.missed:
            break
        at = tried
    if at.missed < best.missed:
        return Unpooled(at.point.x, at.windows.slope, at.missed, best.steps)
    return best


def settle(
    part: Pooled, observed: Observed, x: Tensor, std: Float[Tensor, "b o m"], eps: float
) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b o n"], Bool[Tensor, "b o n"]]:
    """Where all is decided: the input as exactly as the rows tell, how far one draw of noise moves z, and which z the
    rows leave open, as those that no window reads may be.

    Args:
        std: of the pool's values.
        eps: relative rounding of the gradient.
    """
    at = Decided(Point(part, observed, x), SETTLED)
    x = at.solve(None, 0.0)
    generator = torch.Generator(device=x.device).manual_seed(0)
    draws = (torch.randn(of.shape, generator=generator, dtype=x.dtype, device=x.device) for of in (std, observed.grad))
    move = at.move(next(draws) * std, next(draws) * rounding(observed.grad, eps))
    drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    left = drawn - at.move(*at.rows(drawn))  # what the rows do not see of it
    if null_space_probe(drawn.reshape(1, -1), (drawn - left).reshape(1, -1), RETURNS):
        hidden = at.z_moved(left).abs() > RETURNS * at.z_moved(drawn).square().mean().sqrt()
    else:
        hidden = torch.zeros_like(at.point.z, dtype=torch.bool)
    return x, at.z_moved(move), hidden
