"""Nonlinear least squares from many starts at once, by Levenberg and Marquardt's steps on the normal equations."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

LARGEST = 2**25
"""Entries of the Jacobians of all starts together, a quarter of a GiB."""


@runtime_checkable
class LeastSquares(Protocol):
    """min |r(t)|^2 over t, a vector of d unknowns, for s starts that have nothing to do with each other."""

    def select(self, index: Int[Tensor, " a"]) -> LeastSquares:
        """The problems of some of the starts."""

    def cost(self, t: Float[Tensor, "s d"]) -> Float[Tensor, " s"]:
        """|r|^2, in whatever unit makes starts comparable."""

    def normal(self, t: Float[Tensor, "s d"]) -> tuple[Float[Tensor, "s d"], Float[Tensor, "s d d"]]:
        """J' r and J' J."""


def affordable(starts: int, entries: int) -> int:
    """How many starts are taken at once where the Jacobian of one has so many entries: no fewer than eight."""
    return min(starts, max(8, LARGEST // entries))


def levenberg_marquardt(
    problem: LeastSquares,
    t: Float[Tensor, "s d"],
    max_steps: int = 60,
    found: float = 0.0,
    patience: int = 8,
    progress: float = 0.7,
) -> tuple[Float[Tensor, "s d"], Float[Tensor, " s"]]:
    """Where each start ends, and its cost.

    Args:
        found: a start whose cost is below has arrived.
        patience: a start whose cost did not fall below `progress` of what it was so many steps ago is given up.
    """
    t, cost = t.clone(), problem.cost(t)
    damping, before = torch.full_like(cost, 0.1), cost.clone()
    alive = torch.ones_like(cost, dtype=torch.bool)
    eye = torch.eye(t.shape[1], dtype=t.dtype, device=t.device)
    for step in range(max_steps):
        alive &= cost > found
        if step and step % patience == 0:
            alive &= cost < progress * before
            before = cost.clone()
        at = alive.nonzero().flatten()
        if not len(at):
            break
        active = problem.select(at)
        gradient, gram = active.normal(t[at])
        scale = damping[at] * gram.diagonal(dim1=1, dim2=2).mean(1)
        move, failed = torch.linalg.solve_ex(gram + scale[:, None, None] * eye, gradient)
        new = t[at] - move
        there = active.cost(new)
        better = (there < cost[at]) & (failed == 0)
        t[at] = torch.where(better[:, None], new, t[at])
        cost[at] = torch.where(better, there, cost[at])
        damping[at] = torch.where(better, damping[at] / 4, damping[at] * 5).clamp(1e-10, 1e8)
    return t, cost
