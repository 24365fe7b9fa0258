"""Conjugate gradients for several positive semidefinite systems at once (Hestenes and Stiefel 1952), preconditioned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor


@dataclass(frozen=True)
class Solution:
    """What conjugate gradients found."""

    x: Float[Tensor, "s ..."]
    converged: Bool[Tensor, " s"]
    lengths: list[Tensor]
    """Of each step, for each system."""
    turns: list[Tensor]
    """How much of each step is in the next one."""

    @property
    def steps(self) -> int:
        return len(self.lengths)

    @property
    def condition(self) -> Float[Tensor, " s"]:
        """The ratio of the largest to the smallest eigenvalue of the preconditioned matrix that the steps saw (Ritz
        values): a lower bound, which approaches its condition on what the right side reaches."""
        return _condition(self.lengths, self.turns, self.x)


def solve(
    apply: Callable[[Tensor], Tensor],
    right: Float[Tensor, "s ..."],
    tolerance: float,
    steps: int,
    size: Float[Tensor, " s"] | None = None,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """The x of M x = right for s independent systems, of least norm where it is not unique.

    Args:
        apply: M x, system by system.
        tolerance: of the residual, relative to size.
        steps: at the most.
        size: the norms to compare with, those of right if None.
        precondition: something like the inverse of M, symmetric and positive definite; None for the identity.
    """
    shape = (len(right), *[1] * (right.dim() - 1))
    tiny = torch.finfo(right.dtype).tiny

    def dot(a: Tensor, b: Tensor) -> Float[Tensor, " s"]:
        found: Tensor = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
        return found

    x, rest = torch.zeros_like(right), right
    near = rest if precondition is None else precondition(rest)
    step, square = near, dot(rest, rest)
    product = square if precondition is None else dot(rest, near)
    target = tolerance**2 * (square if size is None else size.square())
    lengths: list[Tensor] = []
    turns: list[Tensor] = []
    for _ in range(steps):
        going = square > target
        if not bool(going.any()):
            break
        moved = apply(step)
        curved = dot(step, moved)
        # One that is done stands still while the others go on; so does one in which nothing is left to see.
        on = going & (curved > 0)
        length = torch.where(on, product / curved.clamp(min=tiny), 0.0)
        by = length.reshape(shape)
        x = torch.addcmul(x, by, step)
        rest = torch.addcmul(rest, by, moved, value=-1)
        square = torch.where(on, dot(rest, rest), square)
        before, near = product, rest if precondition is None else precondition(rest)
        product = square if precondition is None else torch.where(on, dot(rest, near), product)
        turn = torch.where(on, product / before.clamp(min=tiny), 0.0)
        step = torch.addcmul(near, turn.reshape(shape), step)
        lengths.append(length)
        turns.append(turn)
        if not bool(on.any()):
            break
    return Solution(x, square <= target, lengths, turns)


def _condition(lengths: list[Tensor], turns: list[Tensor], like: Tensor) -> Float[Tensor, " s"]:
    """From the tridiagonal matrix that the steps made of M (Lanczos)."""
    found = like.new_ones(len(like))
    if not lengths:
        return found
    lengths_, turns_ = torch.stack(lengths).double().cpu(), torch.stack(turns).double().cpu()
    for s in range(len(like)):
        # Until the first step that was none: rounding can make one, and the steps after it begin anew. A step that
        # turned the wrong way is the last that counts.
        used = min(_leading(lengths_[:, s] > 0), _leading(turns_[:, s] > 0) + 1)
        length, turn = lengths_[:used, s], turns_[:used, s]
        if used < 2:
            continue
        diagonal = 1 / length
        diagonal[1:] += turn[:-1] / length[:-1]
        beside = turn[:-1].sqrt() / length[:-1]
        least, most = (
            float(eigvalsh_tridiagonal(diagonal.numpy(), beside.numpy(), select="i", select_range=(at, at))[0])
            for at in (0, used - 1)
        )
        ratio = most / max(least, torch.finfo(torch.float64).tiny)
        found[s] = min(ratio, torch.finfo(found.dtype).max)
    return found


def _leading(true: Bool[Tensor, " n"]) -> int:
    """How many are true before the first that is not."""
    return int(true.long().cumprod(0).sum())
