"""Least squares by products alone: conjugate gradients on the normal equations (Hestenes and Stiefel 1952)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def cgls(
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    right: Tensor,
    iterations: int,
    tolerance: float,
) -> Tensor:
    """The x that minimises |A x - right|, of least norm where it is not unique.

    Args:
        forward: A x, of the shape of right.
        adjoint: A' r, of the shape of x.
        tolerance: relative size of A'(right - A x) at which to stop.
    """
    rest, gradient = right, adjoint(right)
    x, step = gradient * 0, gradient
    size = first = float(gradient.square().sum())
    for _ in range(iterations):
        if size <= tolerance**2 * first or size == 0:
            break
        moved = forward(step)
        curved = float(moved.square().sum())
        if curved == 0:
            break
        length = size / curved
        x, rest = x + length * step, rest - length * moved
        gradient = adjoint(rest)
        before, size = size, float(gradient.square().sum())
        step = gradient + size / before * step
    return x
