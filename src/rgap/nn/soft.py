"""Kinked activations with their kinks rounded off, while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class SoftKinks(TorchFunctionMode):
    """Replaces ReLU and LeakyReLU, a z + (1 - a) max(z, 0), by a z + (1 - a) w log(1 + exp(z / w)), with w the width
    times the root mean square of z. The gradient of a loss is then a smooth function of the input."""

    def __init__(self, width: float):
        super().__init__()
        self.width = width

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (functional.relu, torch.relu, Tensor.relu):
            return self._rounded(args[0], 0.0)
        if func is functional.leaky_relu:
            return self._rounded(args[0], args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01))
        return func(*args, **kwargs)

    def _rounded(self, z: Tensor, slope: float) -> Tensor:
        width = self.width * z.detach().square().mean().sqrt().clamp(min=torch.finfo(z.dtype).tiny)
        return slope * z + (1 - slope) * width * functional.softplus(z / width)
