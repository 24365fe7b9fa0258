"""Units in doubt, step by step: on which sides of their kinks they may stand, and what that does to the gradients.

A unit's value z is normal, and where it stands in each step is z plus what it has moved by until then, which is known
much better. So it is above zero in steps s and t at once with the probability min(P_s, P_t), and its sides in all steps
have the covariance min(P_s, P_t) - P_s P_t. Its large eigenvectors are the numbers that are in doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.inversion.smoother.steps import KinkedSteps, Middle
from rgap.nn.network import Network

LIKELY = 1e-2
"""Probability times that of the other side, from which on a unit is in doubt."""
MOST = 1500
"""Units that are, at the most."""
KEPT = 3e-3
"""Variance of a combination of sides, from which on it is a number of its own."""
BYTES = 2 * 2**30
"""For what these do to all parameters, which limits their number."""
MOVED = 0.02
"""Of a side's variance is its own in each step: how far units move is not known exactly."""


@dataclass(frozen=True, eq=False)
class Doubt:
    """Of one activation, the combinations of slopes that are in doubt, each of variance one."""

    unit: Int[Tensor, " n"]
    """Of which unit each is, by its number."""
    pattern: Float[Tensor, "n steps"]
    """What it does to that unit's slope in each step."""

    def added(self, slopes: Float[Tensor, "steps ..."], d: Float[Tensor, " n"]) -> Tensor:
        """The slopes with so much of each."""
        flat = slopes.flatten(1).index_add(1, self.unit, (self.pattern * d[:, None]).mT)
        return flat.reshape(slopes.shape)


@dataclass(frozen=True, eq=False)
class Step:
    """A step of an input whose slopes are the expected ones."""

    network: Network
    values: list[Tensor]
    slopes: dict[int, Tensor]
    cotangents: list[Tensor | None]


SlopesOf = Callable[[int, int, Tensor], Tensor]
"""Of an activation, by its place among them, in a step, for what is in front of it."""


def steps_with(steps: KinkedSteps, x: Tensor, slopes_of: SlopesOf) -> list[Step]:
    """All steps of an input, with slopes in place of its own sides'."""
    found, gradients = list[Step](), list[dict[str, Tensor]]()
    for t in range(steps.plan.steps):
        network = steps.client.network(steps.now(gradients))
        values, slopes = [x], dict[int, Tensor]()
        for at, node in enumerate(network.nodes):
            read = values[node.reads[0]]
            if at in steps.activations:
                slopes[at] = slopes_of(steps.activations.index(at), t, read)
                values.append(slopes[at] * read)
            else:
                values.append(node.op.forward(read))
        cotangents = network.cotangents(values, slopes, steps.output_gradient(values[-1]))
        made = steps.rows(network, values, cotangents)
        gradients.append({name: made[name][0] if name in made else 0 * w for name, w in steps.client.weights.items()})
        found.append(Step(network, values, slopes, cotangents))
    return found


def expected_slopes(z: Tensor, std: Tensor, below: Tensor) -> Tensor:
    """The slopes of an activation behind values of these errors. Where they are hardly in doubt they are their sides':
    a hundredth of many slopes would be as much as one on its wrong side."""
    upper = torch.special.ndtr(z / std)
    upper = torch.where(upper * (1 - upper) < LIKELY, (z > 0).to(upper), upper)
    return below + (1 - below) * upper


def in_front(steps: KinkedSteps, run: Sequence[Step]) -> list[Tensor]:
    """Of each activation, (steps, *shape)."""
    return [torch.cat([step.values[steps.reads(at)] for step in run]) for at in steps.activations]


def given(slopes: Sequence[Tensor]) -> SlopesOf:
    """Of each activation, (steps, *shape)."""
    return lambda j, t, z: slopes[j][t : t + 1]


def expecting(steps: KinkedSteps, std: Sequence[Tensor]) -> SlopesOf:
    """Those that are expected where units stand, with these errors of each activation's, (1, *shape)."""
    return lambda j, t, z: expected_slopes(z, std[j], steps.below[j])


def most_numbers(parameters: int) -> int:
    """That are in doubt at once, where all parameters take so many bytes."""
    return max(1, BYTES // parameters)


def mean_of(steps: KinkedSteps, run: Sequence[Step]) -> Middle:
    """The chain of the mean over all steps, as they count, with nothing but slopes in doubt."""

    def mean(each: Iterable[Tensor | None]) -> Tensor:
        parts = [c * value for c, value in zip(steps.shares, each, strict=True) if value is not None]
        return torch.stack(parts).sum(0)

    values = [mean(of) for of in zip(*(step.values for step in run), strict=True)]
    slopes = {at: mean(step.slopes[at] for step in run) for at in steps.activations}
    ks: list[Tensor | None] = [mean(of) for of in zip(*(step.cotangents for step in run), strict=True)]
    nothing = [torch.zeros_like(values[steps.reads(at)]) for at in steps.activations]
    return Middle(values, slopes, nothing, nothing, nothing, ks)


def doubts(steps: KinkedSteps, z: Sequence[Tensor], std: Sequence[Tensor]) -> list[Doubt]:
    """Of each activation, where it is not known on which side units stand.

    Args:
        z: in front of each activation, (steps, *shape).
        std: of these.
    """
    upper = [torch.special.ndtr(own / s).flatten(1).mT for own, s in zip(z, std, strict=True)]
    rises = [(1 - below).flatten() for below in steps.below]
    open_ = [(p * (1 - p)).amax(1) * (rise > 0) for p, rise in zip(upper, rises, strict=True)]
    least = LIKELY
    every = torch.cat(open_)
    if int((every > least).sum()) > MOST:
        least = float(every.topk(MOST).values[-1])
    parts = []
    for j, p in enumerate(upper):
        unit = (open_[j] >= least).nonzero().flatten()
        p = p[unit]
        both = torch.minimum(p[:, :, None], p[:, None, :]) - p[:, :, None] * p[:, None, :]
        both = (1 - MOVED) * both + MOVED * torch.diag_embed(p * (1 - p))
        parts.append((unit, *torch.linalg.eigh(both)))
    variances = torch.cat([variance.flatten() for _, variance, _ in parts])
    most = most_numbers(sum(g.element_size() * g.numel() for g in steps.gradient.values()))
    kept = max(KEPT, float(variances.topk(most).values[-1]) if len(variances) > most else 0.0)
    found = []
    for rise, (unit, variance, vectors) in zip(rises, parts, strict=True):
        own, at = (variance > kept).nonzero(as_tuple=True)
        of = unit[own]
        found.append(Doubt(of, rise[of, None] * vectors[own, :, at] * variance[own, at, None].sqrt()))
    return found
