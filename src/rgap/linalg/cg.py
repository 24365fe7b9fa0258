"""Conjugate gradients for several positive semidefinite systems at once (Hestenes and Stiefel 1952)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Solution:
    """What conjugate gradients found."""

    x: Float[Tensor, "s ..."]
    converged: Bool[Tensor, " s"]
    steps: int
    condition: Float[Tensor, " s"]
    """The ratio of the largest to the smallest eigenvalue that the steps saw (Ritz values): a lower bound, which
    approaches the condition of the matrix on what the right side reaches."""


def solve(
    apply: Callable[[Tensor], Tensor],
    right: Float[Tensor, "s ..."],
    tolerance: float,
    steps: int,
    size: Float[Tensor, " s"] | None = None,
) -> Solution:
    """The x of M x = right for s independent systems, of least norm where it is not unique.

    Args:
        apply: M x, system by system.
        tolerance: of the residual, relative to size.
        steps: at the most.
        size: the norms to compare with, those of right if None.
    """
    s = len(right)

    def dot(a: Tensor, b: Tensor) -> Float[Tensor, " s"]:
        return (a * b).reshape(s, -1).sum(1)

    shape = (s, *[1] * (right.dim() - 1))
    x, rest, step = torch.zeros_like(right), right, right
    square = dot(rest, rest)
    target = tolerance**2 * (square if size is None else size.square())
    lengths, turns = [], []
    for _ in range(steps):
        going = square > target
        if not bool(going.any()):
            break
        moved = apply(step)
        curved = dot(step, moved)
        # One that is done stands still while the others go on; so does one in which nothing is left to see.
        length = torch.where(going & (curved > 0), square / curved.clamp(min=torch.finfo(curved.dtype).tiny), 0.0)
        x = x + length.reshape(shape) * step
        rest = rest - length.reshape(shape) * moved
        before, square = square, torch.where(length > 0, dot(rest, rest), square)
        turn = torch.where(length > 0, square / before.clamp(min=torch.finfo(before.dtype).tiny), 0.0)
        step = rest + turn.reshape(shape) * step
        lengths.append(length)
        turns.append(turn)
        if not bool((length > 0).any()):
            break
    return Solution(x, square <= target, len(lengths), _condition(lengths, turns, right))


def _condition(lengths: list[Tensor], turns: list[Tensor], like: Tensor) -> Float[Tensor, " s"]:
    """From the tridiagonal matrix that the steps made of M (Lanczos)."""
    found = like.new_ones(len(like))
    if not lengths:
        return found
    lengths_, turns_ = torch.stack(lengths), torch.stack(turns)
    for s in range(len(like)):
        used = int((lengths_[:, s] > 0).sum())
        length, turn = lengths_[:used, s], turns_[:used, s]
        if used < 2:
            continue
        diagonal = 1 / length
        diagonal[1:] += turn[:-1] / length[:-1]
        beside = turn[:-1].sqrt() / length[:-1]
        values = torch.linalg.eigvalsh(torch.diag(diagonal) + torch.diag(beside, -1) + torch.diag(beside, 1))
        found[s] = values[-1] / values[0].clamp(min=torch.finfo(values.dtype).tiny)
    return found
