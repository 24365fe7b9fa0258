"""The derivative of a function at a point, as products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def linearised(
    function: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Callable[[Tensor], Tensor], Tensor, Callable[[Tensor], Tensor]]:
    """J v, the function's value at x, and J' u. J v is the derivative of J' u by u, whose graph is the same for every
    v; forward mode would compute the function anew for each."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        here = function(x) + 0.0 * x.sum()  # also where nothing hangs on x
        zero = torch.zeros_like(here, requires_grad=True)
        pulled = torch.autograd.grad(here, x, zero, create_graph=True)[0]

    def back(u: Tensor) -> Tensor:
        return torch.autograd.grad(here, x, u, retain_graph=True)[0]

    def along(v: Tensor) -> Tensor:
        return torch.autograd.grad(pulled, zero, v, retain_graph=True)[0]

    return along, here.detach(), back
