"""Conjugate gradients in two precisions: most products in float32, which move half the bytes, and bytes are what most
of their time goes to; what they leave is computed, and where need be solved for, in float64 (iterative refinement)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.linalg import cg

CYCLES, INNER, CLOSER = 6, 1e-5, 0.9
"""Solves in float32, each of what the one before left, and to which part of it; the last to this part of the target, so
that rounding does not make it one more."""
SLOW, KNOWN = 0.3, 2.0
"""A cycle that leaves more of what it was given, and so many times more than its own steps say, shows that the matrix
is too badly conditioned for float32."""


@dataclass(frozen=True)
class Result:
    """What conjugate gradients in either precision found."""

    x: Float[Tensor, "s ..."]
    parts: list[cg.Result]
    """Of each cycle, and of what was solved in float64."""

    @property
    def steps(self) -> int:
        return sum(part.steps for part in self.parts)

    @property
    def condition(self) -> Float[Tensor, " s"]:
        """As of `cg.Result`, the largest of all parts."""
        found = [part.condition.to(self.x) for part in self.parts]
        return reduce(torch.maximum, found, self.x.new_ones(len(self.x)))


def solve(
    fine: Callable[[Tensor], Tensor],
    fast: Callable[[Tensor], Tensor] | None,
    right: Float[Tensor, "s ..."],
    target: Float[Tensor, " s"],
    steps: int,
    *,
    cycle: int | None = None,
    patience: float | int = math.inf,
    precondition: Callable[[Tensor], Tensor] | None = None,
    project: Callable[[Tensor], Tensor] = lambda move: move,
    enough: Callable[[Tensor], bool] | None = None,
) -> Result:
    """The x of A x = right for s independent systems.

    Args:
        fine: A x in float64.
        fast: in float32; None if there is nothing faster.
        target: norms of the residuals at which it ends.
        steps: in each precision, at the most.
        cycle: steps of one cycle, at the most; None: as many as `steps`.
        patience: steps in both precisions together, at the most.
        precondition: those in float32, something like the inverse of A.
        project: of what a cycle found, what is a part of the solution.
        enough: is shown x after each step, and ends the solve by saying so.
    """
    shape, tiny = (len(right), *[1] * (right.dim() - 1)), torch.finfo(right.dtype).tiny
    x, rest, norm = torch.zeros_like(right), right, right.flatten(1).norm(dim=1)
    parts: list[cg.Result] = []
    while fast is not None and len(parts) < CYCLES:
        if not bool((norm > target).any()):
            return Result(x, parts)
        unit = norm.clamp(min=tiny).reshape(shape)
        aim = (CLOSER * target / unit.flatten()).clamp(min=INNER, max=1.0)
        until = None if enough is None else partial(_so_far, enough, x, unit)
        used = sum(part.steps for part in parts)
        most = int(min(steps - used, steps if cycle is None else cycle, patience))
        part = cg.solve(fast, (rest / unit).float(), 1.0, most, aim.float(), precondition, until)
        parts.append(part)
        patience -= part.steps
        move = unit * project(part.x.to(rest))
        new = rest - fine(move)
        left = new.flatten(1).norm(dim=1)
        known = left <= KNOWN * unit.flatten() * part.left  # as conjugate gradients go on, their residual may grow
        better = known | (left < norm)
        x = torch.where(better.reshape(shape), x + move, x)
        rest = torch.where(better.reshape(shape), new, rest)
        slow = bool((~(known | (left <= SLOW * norm)) & (norm > target)).any())  # also where it overflowed
        norm = torch.where(better, left, norm)
        if patience <= 0 or (enough is not None and enough(x)):
            return Result(x, parts)
        if slow:
            break
        if used + part.steps >= steps:
            return Result(x, parts)
    if bool((norm > target).any()):
        until = None if enough is None else partial(_so_far, enough, x, 1.0)
        parts.append(cg.solve(fine, rest, 1.0, int(min(steps, patience)), target, until=until))
        x = x + parts[-1].x
    return Result(x, parts)


def _so_far(enough: Callable[[Tensor], bool], x: Tensor, unit: Tensor | float, more: Tensor) -> bool:
    return enough(x + unit * more)
