"""Conjugate gradients for several positive semidefinite systems at once (Hestenes and Stiefel 1952), preconditioned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from rgap.linalg import deadline


@dataclass(frozen=True)
class Result:
    """What conjugate gradients found."""

    x: Float[Tensor, "s ..."]
    left: Float[Tensor, " s"]
    """The norm of the residual, as the steps carried it on: what rounding added to it is not in it."""
    converged: Bool[Tensor, " s"]
    alpha: list[Tensor]
    """The length of each step, for each system."""
    beta: list[Tensor]
    """How much of each direction is in the next one."""

    @property
    def steps(self) -> int:
        return len(self.alpha)

    @property
    def condition(self) -> Float[Tensor, " s"]:
        """The ratio of the largest to the smallest eigenvalue of the preconditioned matrix that the steps saw (Ritz
        values): a lower bound, which approaches its condition on what the right side reaches."""
        return _condition(self.alpha, self.beta, self.x)


def solve(
    apply: Callable[[Tensor], Tensor],
    right: Float[Tensor, "s ..."],
    tolerance: float,
    steps: int,
    size: Float[Tensor, " s"] | None = None,
    precondition: Callable[[Tensor], Tensor] | None = None,
    until: Callable[[Tensor], bool] | None = None,
) -> Result:
    """The x of A x = right for s independent systems, of least norm where it is not unique.

    Args:
        apply: A x, system by system.
        tolerance: of the residual, relative to size.
        steps: at the most.
        size: the norms to compare with, those of right if None.
        precondition: something like the inverse of A, symmetric and positive definite; None for the identity.
        until: is shown x after each step, and ends the iteration by saying so.
    """
    shape = (len(right), *[1] * (right.dim() - 1))
    tiny = torch.finfo(right.dtype).tiny

    def dot(a: Tensor, b: Tensor) -> Float[Tensor, " s"]:
        found: Tensor = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
        return found

    x, r = torch.zeros_like(right), right
    z = r if precondition is None else precondition(r)
    p, square = z, dot(r, r)
    product = square if precondition is None else dot(r, z)
    target = tolerance**2 * (square if size is None else size.square())
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for _ in range(steps):
        deadline.check()
        going = square > target
        if not bool(going.any()):
            break
        ap = apply(p)
        curvature = dot(p, ap)
        # One that is done stands still while the others go on; so does one in which nothing is left to see.
        on = going & (curvature > 0)
        alpha = torch.where(on, product / curvature.clamp(min=tiny), 0.0)
        by = alpha.reshape(shape)
        x = torch.addcmul(x, by, p)
        r = torch.addcmul(r, by, ap, value=-1)
        square = torch.where(on, dot(r, r), square)
        before, z = product, r if precondition is None else precondition(r)
        product = square if precondition is None else torch.where(on, dot(r, z), product)
        beta = torch.where(on, product / before.clamp(min=tiny), 0.0)
        p = torch.addcmul(z, beta.reshape(shape), p)
        alphas.append(alpha)
        betas.append(beta)
        if not bool(on.any()) or (until is not None and until(x)):
            break
    return Result(x, square.sqrt(), square <= target, alphas, betas)


def _condition(alphas: list[Tensor], betas: list[Tensor], like: Tensor) -> Float[Tensor, " s"]:
    """From the tridiagonal matrix that the steps made of A (Lanczos)."""
    found = like.new_ones(len(like))
    if not alphas:
        return found
    every_alpha, every_beta = torch.stack(alphas).double().cpu(), torch.stack(betas).double().cpu()
    for s in range(len(like)):
        # Until the first step that was none: rounding can make one, and the steps after it begin anew. A negative beta
        # is the last that counts.
        used = min(_leading(every_alpha[:, s] > 0), _leading(every_beta[:, s] > 0) + 1)
        alpha, beta = every_alpha[:used, s], every_beta[:used, s]
        if used < 2:
            continue
        diagonal = 1 / alpha
        diagonal[1:] += beta[:-1] / alpha[:-1]
        off_diagonal = beta[:-1].sqrt() / alpha[:-1]
        least, most = (
            float(eigvalsh_tridiagonal(diagonal.numpy(), off_diagonal.numpy(), select="i", select_range=(at, at))[0])
            for at in (0, used - 1)
        )
        ratio = most / max(least, torch.finfo(torch.float64).tiny)
        found[s] = min(ratio, torch.finfo(like.dtype).max)
    return found


def _leading(true: Bool[Tensor, " n"]) -> int:
    """How many are true before the first that is not."""
    return int(true.long().cumprod(0).sum())
