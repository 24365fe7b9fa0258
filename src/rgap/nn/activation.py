"""What an elementwise activation is to the recursion: inverted, with slope and what is known of each value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Inverse:
    """What an activation's output tells of its input."""

    z: Float[Tensor, "s *shape"]
    """The input, 0 where the output does not tell it."""
    slope: Float[Tensor, "s *shape"]
    """The derivative at z (Eq. 6: k_i is W' k_(i+1) times this)."""
    weight: Float[Tensor, "s *shape"] | None
    """How far z can be relied on: 0 where it is not known and its row is dropped, 1 where it is known as well as x,
    else the slope, which states the row in x; None means 1 everywhere."""


class Activation(ABC):
    """An elementwise function x = f(z)."""

    nonnegative: bool = False
    """Whether every output is >= 0, so that the sign of the last gradient shows the label."""
    homogeneous: bool = False
    """Whether f(a z) = a f(z) for a > 0, so that <W, grad W> is the same on both sides of it (Eq. 10)."""

    kinked: bool = False
    """Whether the slope jumps at z = 0."""

    non_monotone: bool = False
    """Whether some outputs have two inputs; see `NonMonotone`."""

    def other_side(self, slope: Tensor) -> Tensor:
        """The slopes on the other side of the kink; the same ones where there is no kink or no telling."""
        return slope

    @abstractmethod
    def __call__(self, z: Tensor) -> Tensor: ...

    @abstractmethod
    def slope(self, z: Tensor) -> Tensor:
        """The derivative at z, with the value that torch takes at a kink."""

    @abstractmethod
    def invert(self, x: Float[Tensor, "s *shape"], error: Float[Tensor, "s ..."]) -> Inverse:
        """z from x, where x is known to about +-error: one figure for each system, or for each value."""

    def __str__(self) -> str:
        return type(self).__name__.lower()
