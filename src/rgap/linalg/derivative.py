"""The derivative of a function at a point, as products or as a matrix.

J v is the derivative of J' u by u, whose graph is the same for every v. Forward mode would compute the function anew
for each; and torch's is slow wherever a value meets one without tangent, which takes Python code of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AT_ONCE = 2**25
"""Entries of a Jacobian of which the columns are computed together."""


def linearised(
    function: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Callable[[Tensor], Tensor], Tensor, Callable[[Tensor], Tensor]]:
    """J v, the function's value at x, and J' u."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        here = function(x) + 0.0 * x.sum()  # also where nothing hangs on x
        zero = torch.zeros_like(here, requires_grad=True)
        pulled = torch.autograd.grad(here, x, zero, create_graph=True)[0]

    def back(u: Tensor) -> Tensor:
        return torch.autograd.grad(here, x, u, retain_graph=True)[0]

    def along(v: Tensor) -> Tensor:
        """Of one v, or of as many as there are in front of its axes."""
        several = v.dim() > x.dim()
        return torch.autograd.grad(pulled, zero, v, retain_graph=True, is_grads_batched=several)[0]

    return along, here.detach(), back


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """J, (values, n), of a function from n numbers to so many values."""
    along, here, _ = linearised(function, x)
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    return torch.cat([along(each) for each in torch.split(eye, max(1, AT_ONCE // max(1, len(here))))]).mT
