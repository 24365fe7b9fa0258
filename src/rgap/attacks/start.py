"""Where a search for the input begins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.target import Target


class Start(ABC):
    """Where the search begins."""

    @abstractmethod
    def draw(self, shape: tuple[int, ...], target: Target, generator: torch.Generator) -> Tensor:
        """A first guess of this shape (b, *input_shape), on the CPU."""


@dataclass(frozen=True)
class Normal(Start):
    """Independent normal values; by default around the middle of the value range, a quarter of it wide."""

    mean: float | None = None
    deviation: float | None = None

    def draw(self, shape: tuple[int, ...], target: Target, generator: torch.Generator) -> Tensor:
        low, high = target.value_range or (-2.0, 2.0)
        mean = (low + high) / 2 if self.mean is None else self.mean
        deviation = (high - low) / 4 if self.deviation is None else self.deviation
        return mean + deviation * torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Uniform(Start):
    """Independent values from the value range, or from 0 to 1 if it is not known."""

    def draw(self, shape: tuple[int, ...], target: Target, generator: torch.Generator) -> Tensor:
        low, high = target.value_range or (0.0, 1.0)
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Tiled(Start):
    """Uniform values on a small square, repeated over the whole picture; of what is no picture as `Uniform`.

    Args:
        size: of the square.
    """

    size: int = 4

    def draw(self, shape: tuple[int, ...], target: Target, generator: torch.Generator) -> Tensor:
        if len(shape) != 4:
            return Uniform().draw(shape, target, generator)
        height, width = shape[2:]
        tile = Uniform().draw((*shape[:2], self.size, self.size), target, generator)
        times = (1, 1, -(-height // self.size), -(-width // self.size))
        return tile.repeat(times)[..., :height, :width]


@dataclass(frozen=True, eq=False)
class Near(Start):
    """A given input, with a little noise.

    Args:
        inputs: (b, *input_shape).
        deviation: of the noise.
    """

    inputs: Tensor
    deviation: float = 0.0

    def draw(self, shape: tuple[int, ...], target: Target, generator: torch.Generator) -> Tensor:
        if tuple(self.inputs.shape) != shape:
            raise ValueError(f"got a start of shape {tuple(self.inputs.shape)}, expected {shape}")
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return self.inputs.detach().cpu().double() + self.deviation * noise
