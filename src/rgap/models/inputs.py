"""What comes before a model, made part of it: the normalisation that clients apply, and inputs that nobody attacks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def normalised(model: nn.Module, mean: Sequence[float], std: Sequence[float], channels: int) -> nn.Module:
    """The same model, which takes (x - mean) / std of what it is given; the names of its parameters stay.

    An attack then looks for inputs as they were before, in their own range.

    Args:
        model: is changed.
        mean, std: one value for all channels, or one for each.
        channels: of an input (b, channels, ...).

    Raises:
        ValueError: another number of values, one that is not finite, or a std that is not positive.
    """
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise ValueError(f"{name}: got {len(values)} values, expected 1, or {channels} as the inputs have channels")
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{name}: got {tuple(values)}, expected finite numbers")
    if min(std) <= 0:
        raise ValueError(f"std: got {min(std):g}, expected positive numbers")

    shift, square = (torch.tensor(values, dtype=torch.float64).expand(channels) for values in (mean, std))

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x = arguments[0]
        # Written as batch norm in evaluation mode, which ranks are measured past.
        return (nn.functional.batch_norm(x, shift.to(x), square.to(x).square(), eps=0.0), *arguments[1:])

    model.register_forward_pre_hook(before)
    return _described(model, f"(x - {tuple(mean)}) / {tuple(std)}")


def fixed(model: nn.Module, attacked: str, others: Mapping[str, Tensor]) -> nn.Module:
    """The same model as one of a single input; the names of its parameters stay.

    Args:
        model: is changed.
        attacked: the input that remains, by the name it has in the model's forward.
        others: the values of the others, of one sample, by theirs.
    """

    def forward(self: nn.Module, x: Tensor) -> Any:
        rest = {name: value.to(x).expand(len(x), *value.shape) for name, value in others.items()}
        return type(self).forward(self, **{attacked: x, **rest})

    # A method, which a copy of the model has as its own; a hook would be no part of what is traced.
    model.forward = MethodType(forward, model)
    told = ", ".join(f"{name} {tuple(value.shape)}" for name, value in others.items())
    return _described(model, f"{attacked} attacked, fixed {told}")


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Values between 0 and 1 for inputs that nobody gives."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def _described(model: nn.Module, what: str) -> nn.Module:
    """The model, with words that are seen where it is printed, and where two models are told apart by that."""
    before = model.extra_repr()
    model.extra_repr = lambda: f"{before}, {what}".lstrip(", ")  # type: ignore[method-assign]
    return model
