"""Elementwise activations, and how each is known by the name of its operation."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from rgap.nn.activation import Activation, Inverse
from rgap.nn.non_monotone import GELU, Hardswish, Mish, SiLU


def _each(error: Tensor, x: Tensor) -> Tensor:
    """The error in a shape that goes with x."""
    return error if error.dim() == x.dim() else error.reshape(-1, *[1] * (x.dim() - 1))


QUIET, LOUD = 3.0, 1000.0
"""So many errors away from a bound a value may still be noise; so many away it is none."""
BEYOND, ENOUGH = 10.0, 24
"""What lies beyond the bound is noise for certain: where it is so many values, noise on the bound's inner side does not
reach this many times as far as theirs."""


def _beyond_noise(distance: Float[Tensor, "s *shape"], error: Tensor) -> Tensor:
    """Which values are not at the bound, for all that noise did to them.

    Errors are estimates: where noise ends and values begin is told by the widest gap between their distances, no
    nearer than what noise took beyond the bound, and not many times farther.
    """
    size = distance / error.expand(distance.shape).clamp(min=torch.finfo(distance.dtype).tiny)
    limits = []
    for own in size:
        beyond = -own[own < 0]
        noise = len(beyond) >= ENOUGH
        quiet = min(max(QUIET, float(beyond.max())), LOUD) if noise else QUIET
        loud = min(LOUD, BEYOND * quiet) if noise else LOUD
        between = own[(own > quiet) & (own < loud)]
        ends = torch.cat([own.new_tensor([quiet]), between.sort().values, own.new_tensor([loud])])
        widest = int((ends[1:] / ends[:-1]).argmax())
        limits.append((ends[widest] * ends[widest + 1]).sqrt())
    return size > torch.stack(limits).reshape(-1, *[1] * (distance.dim() - 1))


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


@dataclass(frozen=True, eq=False)
class PReLU(Activation):
    """f(z) = z for z > 0, slope * z otherwise, with a positive slope for each channel of z."""

    negative_slopes: Float[Tensor, " channels"]
    homogeneous = True
    kinked = True

    def _of(self, z: Float[Tensor, "s channels ..."]) -> Tensor:
        """The slope below zero of each value."""
        return self.negative_slopes.to(z).reshape(-1, *[1] * (z.dim() - 2)).expand(z.shape)

    def __call__(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, z, self._of(z) * z)

    def slope(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, torch.ones_like(z), self._of(z))

    def other_side(self, slope: Tensor) -> Tensor:
        return torch.where(slope == 1, self._of(slope), torch.ones_like(slope))

    def invert(self, x: Tensor, error: Tensor) -> Inverse:
        return Inverse(torch.where(x > 0, x, x / self._of(x)), self.slope(x), None)


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
        active = _beyond_noise(x, _each(error, x)).to(x)
        return Inverse(x * active, active, active)


@dataclass(frozen=True)
class Hardtanh(Activation):
    """f(z) = scale z + shift between two bounds, and the bound beyond them; ReLU6 is z between 0 and 6, and Hardsigmoid
    z / 6 + 1 / 2 between 0 and 1.

    An output at a bound tells only that z is beyond it: its weight row is dropped.
    """

    low: float = -1.0
    high: float = 1.0
    scale: float = 1.0
    shift: float = 0.0
    between: float = 1.0
    """The slope between the bounds, which torch's Hardsigmoid has in float32 whatever its values are."""
    kinked = True

    @property
    def nonnegative(self) -> bool:  # type: ignore[override]
        return self.low >= 0

    def __call__(self, z: Tensor) -> Tensor:
        return (self.scale * z + self.shift).clamp(self.low, self.high)

    def slope(self, z: Tensor) -> Tensor:
        x = self.scale * z + self.shift
        return self.between * ((x > self.low) & (x < self.high)).to(z)

    def invert(self, x: Tensor, error: Tensor) -> Inverse:
        # A bound comes back as noise of the size of the error around it.
        error = _each(error, x)
        active = (_beyond_noise(x - self.low, error) & _beyond_noise(self.high - x, error)).to(x)
        slope = self.between * active
        return Inverse((x - self.shift) / self.scale * active, slope, slope)

    def __str__(self) -> str:
        if self == HARDSIGMOID:
            return "hardsigmoid"
        return "relu6" if (self.low, self.high) == (0.0, 6.0) else f"hardtanh({self.low:g}, {self.high:g})"


HARDSIGMOID = Hardtanh(0.0, 1.0, 1 / 6, 0.5, float(torch.tensor(1 / 6)))


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


@dataclass(frozen=True)
class LogSigmoid(Smooth):
    """f(z) = -log(1 + exp(-z))."""

    high = 0.0

    def __call__(self, z: Tensor) -> Tensor:
        return functional.logsigmoid(z)

    def _z(self, x: Tensor) -> Tensor:
        return x - torch.log(-torch.expm1(x))

    def _slope_at_output(self, x: Tensor) -> Tensor:
        return -torch.expm1(x)


@dataclass(frozen=True)
class ELU(Smooth):
    """f(z) = scale * z for z > 0, scale * alpha * (exp(input_scale * z) - 1) otherwise; SELU has its own alpha and
    scale, and CELU 1 / alpha for its input_scale."""

    alpha: float = 1.0
    scale: float = 1.0
    input_scale: float = 1.0

    @property
    def low(self) -> float:  # type: ignore[override]
        return -self.alpha * self.scale

    def __call__(self, z: Tensor) -> Tensor:
        return self.scale * torch.where(z > 0, z, self.alpha * torch.expm1(self.input_scale * z.clamp(max=0)))

    def _z(self, x: Tensor) -> Tensor:
        u = x / self.scale
        return torch.where(u > 0, u, torch.log1p(u.clamp(max=0) / self.alpha) / self.input_scale)

    def _slope_at_output(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, self.scale, self.input_scale * (x + self.alpha * self.scale)).to(x)

    def __str__(self) -> str:
        if self.input_scale != 1.0:
            return f"celu({self.alpha:g})"
        return f"elu({self.alpha:g})" if self.scale == 1.0 else "selu"


SELU = ELU(alpha=1.6732632423543772848170429916717, scale=1.0507009873554804934193349852946)
"""The self-normalising ELU of Klambauer et al. 2017, with its two constants."""

ACTIVATIONS: dict[str, Callable[[dict[str, Any]], Activation]] = {
    "leaky_relu": lambda a: LeakyReLU(float(a["negative_slope"])) if a["negative_slope"] else ReLU(),
    "rrelu": lambda a: LeakyReLU((float(a["lower"]) + float(a["upper"])) / 2),  # in training mode it draws
    "relu": lambda a: ReLU(),
    "sigmoid": lambda a: Sigmoid(),
    "tanh": lambda a: Tanh(),
    "softplus": lambda a: Softplus(float(a["beta"]), float(a["threshold"])),
    "elu": lambda a: ELU(float(a["alpha"]), float(a["scale"]), float(a["input_scale"])),
    "celu": lambda a: ELU(float(a["alpha"]), 1.0, 1 / float(a["alpha"])),
    "selu": lambda a: SELU,
    "log_sigmoid": lambda a: LogSigmoid(),
    # Those that a plain chain does not hold: they have two inputs for one output, or lose values.
    "hardtanh": lambda a: Hardtanh(float(a["min_val"]), float(a["max_val"])),
    "relu6": lambda a: Hardtanh(0.0, 6.0),
    "hardsigmoid": lambda a: HARDSIGMOID,
    "gelu": lambda a: GELU(str(a["approximate"])),
    "silu": lambda a: SiLU(),
    "mish": lambda a: Mish(),
    "hardswish": lambda a: Hardswish(),
}
"""By the name of the operation, from its arguments; an activation of one's own is one entry more."""
