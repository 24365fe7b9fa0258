"""Elementwise activations, as the recursion needs them: inverted, with slope and what is known of each value."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Inverse:
    """What an activation's output tells of its input."""

    z: Float[Tensor, "s o p"]
    """The input, 0 where the output does not tell it."""
    slope: Float[Tensor, "s o p"]
    """The derivative at z (Eq. 6: k_i is W' k_(i+1) times this)."""
    weight: Float[Tensor, "s o p"] | None
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

    def other_side(self, slope: Tensor) -> Tensor:
        """The slopes on the other side of the kink; the same ones where there is no kink or no telling."""
        return slope

    @abstractmethod
    def __call__(self, z: Tensor) -> Tensor: ...

    @abstractmethod
    def slope(self, z: Tensor) -> Tensor:
        """The derivative at z, with the value that torch takes at a kink."""

    @abstractmethod
    def invert(self, x: Float[Tensor, "s o p"], error: Float[Tensor, " s"]) -> Inverse:
        """z from x, where x is known to about +-error (one figure per system)."""


@dataclass(frozen=True)
class Identity(Activation):
    """f(z) = z."""

    homogeneous = True

    def __call__(self, z: Tensor) -> Tensor:
        return z

    def slope(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)

    def invert(self, x: Tensor, error: Tensor) -> Inverse:
        return Inverse(x, torch.ones_like(x), None)

    def __str__(self) -> str:
        return "identity"


IDENTITY = Identity()


@dataclass(frozen=True)
class LeakyReLU(Activation):
    """f(z) = z for z > 0, negative_slope * z otherwise; negative_slope > 0."""

    negative_slope: float = 0.01
    homogeneous = True
    kinked = True

    def __call__(self, z: Tensor) -> Tensor:
        return functional.leaky_relu(z, self.negative_slope)

    def slope(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, torch.ones_like(z), self.negative_slope)

    def other_side(self, slope: Tensor) -> Tensor:
        return torch.where(slope == 1, self.negative_slope, torch.ones_like(slope))

    def invert(self, x: Tensor, error: Tensor) -> Inverse:
        return Inverse(torch.where(x > 0, x, x / self.negative_slope), self.slope(x), None)

    def __str__(self) -> str:
        return f"leaky_relu({self.negative_slope:g})"


@dataclass(frozen=True)
class ReLU(Activation):
    """f(z) = max(z, 0). An output of 0 tells only that z <= 0: its weight row is dropped."""

    nonnegative = True
    homogeneous = True
    kinked = True

    def __call__(self, z: Tensor) -> Tensor:
        return functional.relu(z)

    def slope(self, z: Tensor) -> Tensor:
        return (z > 0).to(z)

    def invert(self, x: Tensor, error: Tensor) -> Inverse:
        # A zero comes back as noise of the size of the error; taking it for a value would claim z = 0 exactly.
        active = (x > 10 * error[:, None, None]).to(x)
        return Inverse(x * active, active, active)

    def __str__(self) -> str:
        return "relu"


class Smooth(Activation):
    """A strictly increasing differentiable activation whose slope is a function of its output.

    A small slope means that z moves far for a small move of x. The row of such a z is weighted by the slope, which
    states the constraint in x, where the errors are even.
    """

    low: float = -math.inf
    high: float = math.inf

    @abstractmethod
    def _z(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _slope_at_output(self, x: Tensor) -> Tensor: ...

    def slope(self, z: Tensor) -> Tensor:
        return self._slope_at_output(self(z))

    def invert(self, x: Tensor, error: Tensor) -> Inverse:
        # Outputs at the very end of the range say only that z is beyond some value.
        margin = torch.finfo(x.dtype).eps * 4
        low = self.low + margin * max(1.0, abs(self.low)) if math.isfinite(self.low) else self.low
        high = self.high - margin * max(1.0, abs(self.high)) if math.isfinite(self.high) else self.high
        known = (x > low) & (x < high)
        safe = x.clamp(low, high)
        z = torch.where(known, self._z(safe), 0.0)
        slope = self._slope_at_output(safe).clamp(min=0.0)
        return Inverse(z, slope, torch.where(known, slope, 0.0))


@dataclass(frozen=True)
class Sigmoid(Smooth):
    """f(z) = 1 / (1 + exp(-z))."""

    nonnegative = True
    low, high = 0.0, 1.0

    def __call__(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    def _z(self, x: Tensor) -> Tensor:
        return torch.logit(x)

    def _slope_at_output(self, x: Tensor) -> Tensor:
        return x * (1 - x)

    def __str__(self) -> str:
        return "sigmoid"


@dataclass(frozen=True)
class Tanh(Smooth):
    """f(z) = tanh(z)."""

    low, high = -1.0, 1.0

    def __call__(self, z: Tensor) -> Tensor:
        return torch.tanh(z)

    def _z(self, x: Tensor) -> Tensor:
        return torch.atanh(x)

    def _slope_at_output(self, x: Tensor) -> Tensor:
        return 1 - x * x

    def __str__(self) -> str:
        return "tanh"


@dataclass(frozen=True)
class Softplus(Smooth):
    """f(z) = log(1 + exp(beta z)) / beta, and z itself where beta z > threshold, as torch has it."""

    beta: float = 1.0
    threshold: float = 20.0
    nonnegative = True
    low = 0.0

    def __call__(self, z: Tensor) -> Tensor:
        return functional.softplus(z, self.beta, self.threshold)

    def _z(self, x: Tensor) -> Tensor:
        u = self.beta * x
        # log(exp(u) - 1) = u + log(1 - exp(-u))
        curved = u + torch.log(-torch.expm1(-u))
        return torch.where(u > self.threshold, u, curved) / self.beta

    def _slope_at_output(self, x: Tensor) -> Tensor:
        u = self.beta * x
        return torch.where(u > self.threshold, 1.0, -torch.expm1(-u)).to(x)

    def __str__(self) -> str:
        return "softplus"


@dataclass(frozen=True)
class ELU(Smooth):
    """f(z) = scale * z for z > 0, scale * alpha * (exp(z) - 1) otherwise; SELU has its own alpha and scale."""

    alpha: float = 1.0
    scale: float = 1.0

    @property
    def low(self) -> float:  # type: ignore[override]
        return -self.alpha * self.scale

    def __call__(self, z: Tensor) -> Tensor:
        return self.scale * torch.where(z > 0, z, self.alpha * torch.expm1(z.clamp(max=0)))

    def _z(self, x: Tensor) -> Tensor:
        u = x / self.scale
        return torch.where(u > 0, u, torch.log1p(u.clamp(max=0) / self.alpha))

    def _slope_at_output(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, self.scale, x + self.alpha * self.scale).to(x)

    def __str__(self) -> str:
        return f"elu({self.alpha:g})" if self.scale == 1.0 else "selu"


SELU = ELU(alpha=1.6732632423543772848170429916717, scale=1.0507009873554804934193349852946)
"""The self-normalising ELU of Klambauer et al. 2017, with its two constants."""
