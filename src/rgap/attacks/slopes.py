"""Values and slopes of many systems at once, whatever the model's code does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rgap.target import GradientFunction, Target

LossOf = Callable[[GradientFunction], Callable[..., Tensor]]
"""From the gradient as a function to the loss of one system, a function of its point and more."""

REUSED = 2**24
"""Bytes of the parameters' gradients of all systems that run together on a processor: memory that is given back and
touched anew at each step takes two to three times as long as the step."""

_REFUSED: WeakKeyDictionary[Target, dict[torch.dtype, str]] = WeakKeyDictionary()


def slopes(
    target: Target,
    dtype: torch.dtype,
    loss_of: LossOf,
    shared: Sequence[bool],
    at_once: int,
    reads: Sequence[str] = (),
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of the points of s systems, (s, d), and more, to their slopes and values.

    torch.func runs all systems together. Of code that it does not take (branches on values, writes in place, recurrent
    layers) plain automatic differentiation runs one system after another, and so it does with a single system, which
    takes torch.func twice as long.

    Args:
        shared: of each further argument, whether it is one for all systems.
        at_once: systems that run together, at the most; it bounds the memory.
        reads: as in `Target.gradient_function`.
    """
    plain = loss_of(target.gradient_function(dtype, plain=True, reads=reads))

    def each(points: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        found = []
        for s, row in enumerate(points):
            own = (argument if one else _row(argument, s) for argument, one in zip(more, shared, strict=True))
            point = row.detach().clone().requires_grad_()
            value = plain(point, *own)
            [slope] = torch.autograd.grad(value, [point], allow_unused=True)
            found.append((torch.zeros_like(point) if slope is None else slope, value.detach()))
        return torch.stack([slope for slope, _ in found]), torch.stack([value for _, value in found])

    at_once = together(target, dtype, at_once)
    if at_once == 1:
        return each
    dims = (0, *(None if one else 0 for one in shared))
    loss = loss_of(target.gradient_function(dtype, reads=reads))
    batched = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=dims, chunk_size=at_once, randomness="different")
    return lambda points, *more: (each if len(points) == 1 else batched)(points, *more)


def together(target: Target, dtype: torch.dtype, most: int) -> int:
    """How many systems run together best: one where torch.func does not take the model, and of a large model few."""
    if refused(target, dtype):
        return 1
    if target.device.type != "cpu":
        return most
    parameters = sum(each.numel() for each in target.parameters.values())
    return min(most, max(1, REUSED // (dtype.itemsize * max(1, parameters))))


def refused(target: Target, dtype: torch.dtype) -> str:
    """Why torch.func does not take the model; empty if it does."""
    known = _REFUSED.setdefault(target, {})
    if dtype not in known:
        gradient = target.gradient_function(dtype)
        labels = len(target.loss.labels) or 1
        x = torch.zeros(1, target.batch_size, *target.input_shape, dtype=dtype, device=target.device)

        def size(x: Tensor) -> Tensor:
            return torch.stack(
                [g.square().sum() for g in gradient(x, x.new_full((len(x), labels), 0.5)).values()]
            ).sum()

        known[dtype] = ""
        try:
            torch.func.vmap(torch.func.grad(size), randomness="different")(x)
        except Exception as error:
            known[dtype] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return known[dtype]


def _row(argument: Any, s: int) -> Any:
    return {name: each[s] for name, each in argument.items()} if isinstance(argument, dict) else argument[s]
