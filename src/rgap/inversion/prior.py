"""What is taken for granted of inputs where constraints are missing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.linalg import psd
from rgap.linalg.least_squares import Quadratic

COLOUR = 30.0
"""How much less neighbours in a photograph differ in colour than in brightness, squared, for each dimension of both.
Of 500 CIFAR-10 photographs nine in ten have 41 and more."""


@dataclass(frozen=True)
class Prior(Quadratic):
    """A quadratic form of an input's deviation from a constant one: the sum of squared differences of neighbours for
    inputs (channels, height, width), of the values themselves for others. Of three channels, which are taken for
    colours, what differs between them counts `COLOUR` times."""

    shape: tuple[int, ...]
    """Of one input."""
    centre: float
    """The value of the constant input that it likes best."""

    @property
    def smooth(self) -> bool:
        return len(self.shape) == 3 and min(self.shape[1:]) >= 2

    @property
    def coloured(self) -> bool:
        return self.smooth and self.shape[0] == 3

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
        if self.coloured:
            found = COLOUR * found - (COLOUR - 1) * found.mean(1, keepdim=True)
        return found.reshape(x.shape)

    def matrix(self, like: Tensor, samples: int = 1) -> Float[Tensor, "u u"]:
        """The same as a matrix, for the inputs of several samples one after another."""
        size = math.prod(self.shape)
        units = torch.eye(size, dtype=like.dtype, device=like.device)
        return psd.block_diagonal([self(units)] * samples)

    def __str__(self) -> str:
        if self.coloured:
            return (
                "where constraints are missing, neighbouring values of the input are similar, and their colours more so"
            )
        if self.smooth:
            return "where constraints are missing, neighbouring values of the input are similar"
        return f"where constraints are missing, values of the input are near {self.centre:g}"
