"""Kinked activations with something else in their place, while a model runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class Replaced(TorchFunctionMode):
    """Replaces ReLU and LeakyReLU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (functional.relu, torch.relu, Tensor.relu):
            return self.kinked(args[0], 0.0)
        if func is functional.leaky_relu:
            return self.kinked(args[0], args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01))
        return func(*args, **kwargs)

    @abstractmethod
    def kinked(self, z: Tensor, slope: float) -> Tensor:
        """In place of the activation, whose slope below zero this is."""


class SoftKinks(Replaced):
    """a z + (1 - a) w log(1 + exp(z / w)) in place of a z + (1 - a) max(z, 0), with w the width times the root mean
    square of z. The gradient of a loss is then a smooth function of the input."""

    def __init__(self, width: float):
        super().__init__()
        self.width = width

    def kinked(self, z: Tensor, slope: float) -> Tensor:
        width = self.width * z.detach().square().mean().sqrt().clamp(min=torch.finfo(z.dtype).tiny)
        return slope * z + (1 - slope) * width * functional.softplus(z / width)


class GivenSlopes(Replaced):
    """Slopes that are given, one tensor for each activation that runs, in turn. The gradient of a loss is then a
    smooth function of the input and of them."""

    def __init__(self, slopes: Sequence[Tensor]):
        super().__init__()
        self.slopes = iter(slopes)

    def kinked(self, z: Tensor, slope: float) -> Tensor:
        return next(self.slopes).reshape(z.shape) * z


class GivenSides(Replaced):
    """Some values on given sides of their kinks, as if they stood just there: they get the slope of that side."""

    def __init__(self, sides: Mapping[int, Sequence[tuple[int, int, bool]]]):
        """
        Args:
            sides: of the activation that runs so many others later, row, unit and side of some values: whether above.
        """
        super().__init__()
        self.sides, self.at = sides, 0

    def kinked(self, z: Tensor, slope: float) -> Tensor:
        above = z > 0
        given = self.sides.get(self.at, ())
        self.at += 1
        if given:
            rows, units, sides = zip(*given, strict=True)
            above = above.clone()
            above.flatten(1)[list(rows), list(units)] = torch.tensor(sides, device=z.device)
        return torch.where(above, z, slope * z)
