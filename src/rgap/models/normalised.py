"""The normalisation that clients apply before a model, as part of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


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
    # Seen where the model is printed, and where two models are told apart by that.
    described = model.extra_repr()
    model.extra_repr = lambda: f"{described}, (x - {tuple(mean)}) / {tuple(std)}".lstrip(", ")  # type: ignore[method-assign]
    return model
