"""Models of several inputs, of which one is attacked."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


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
    # Seen where the model is printed, and where two models are told apart by that.
    described, told = model.extra_repr(), ", ".join(f"{name} {tuple(value.shape)}" for name, value in others.items())
    model.extra_repr = lambda: f"{described}, {attacked} attacked, fixed {told}".lstrip(", ")  # type: ignore[method-assign]
    return model


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Values between 0 and 1 for inputs that nobody gives."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
