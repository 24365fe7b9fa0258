"""What is taken for granted of inputs where constraints are missing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.linalg import psd
from rgap.linalg.least_squares import Quadratic


@dataclass(frozen=True)
class Prior(Quadratic):
    """A quadratic form of an input's deviation from a constant one: the sum of squared differences of neighbours for
    inputs (channels, height, width), of the values themselves for others."""

    shape: tuple[int, ...]
    """Of one input."""
    centre: float
    """The value of the constant input that it likes best."""

    @property
    def smooth(self) -> bool:
        return len(self.shape) == 3 and min(self.shape[1:]) >= 2

    def __call__(self, x: Tensor) -> Tensor:
        """Its matrix, of the size of an identity, times inputs: x ends in `shape`, or flattens to inputs."""
        if not self.smooth:
            return x
        picture = x.reshape(-1, *self.shape)
        found = torch.zeros_like(picture)
        for dim in (2, 3):
            count = picture.shape[dim] - 1
            apart = picture.narrow(dim, 1, count) - picture.narrow(dim, 0, count)
            found.narrow(dim, 1, count).add_(apart)
            found.narrow(dim, 0, count).sub_(apart)
        return found.reshape(x.shape)

    def matrix(self, like: Tensor, samples: int = 1) -> Float[Tensor, "u u"]:
        """The same as a matrix, for the inputs of several samples one after another."""
        size = math.prod(self.shape)
        units = torch.eye(size, dtype=like.dtype, device=like.device)
        return psd.block_diagonal([self(units)] * samples)

    def __str__(self) -> str:
        if self.smooth:
            return "where constraints are missing, neighbouring values of the input are similar"
        return f"where constraints are missing, values of the input are near {self.centre:g}"
