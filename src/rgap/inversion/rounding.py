"""How far rounding may have moved a gradient."""

from __future__ import annotations

from torch import Tensor


def rounding(grad: Tensor, eps: float) -> Tensor:
    """The standard deviation of each value of a gradient: of its own size, and a little of the largest's.

    Args:
        eps: relative rounding.
    """
    return eps * (grad.abs() + 0.1 * grad.abs().amax())
