"""Activations with two inputs for one output: they fall to a minimum and rise from there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from rgap.nn.activation import Activation, Inverse


class NonMonotone(Activation):
    """A smooth activation that falls to a minimum and rises from there: outputs between it and 0 have two inputs.

    `invert` names the upper one, `lower` the other; the constraints of the layer before decide between them.
    """

    non_monotone = True
    argmin: float
    """Where the minimum is."""
    silent: float = -math.inf
    """Below it all outputs are zero, and tell nothing more."""

    def invert(self, x: Tensor, error: Tensor) -> Inverse:
        z = self._between(x, torch.full_like(x, self.argmin), x.clamp(min=0) + 2.0, rising=True)
        # Near the minimum z moves far for a small move of x: the slope states the row in x.
        slope = self.slope(z)
        return Inverse(z, slope, slope.clamp(min=0.0, max=1.0))

    def lower(self, x: Float[Tensor, "s *shape"]) -> Float[Tensor, "s *shape"]:
        """The input below the minimum, of outputs below 0; elsewhere the upper one's place, the minimum's, is kept."""
        z = self._between(x, torch.full_like(x, LOWEST), torch.full_like(x, self.argmin), rising=False)
        return torch.where(x < 0, z, self.argmin)

    def _between(self, x: Tensor, low: Tensor, high: Tensor, rising: bool) -> Tensor:
        """Where f(z) = x, by bisection: to the last digit, whatever the slope."""
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            above = (self(middle) > x) == rising
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2


LOWEST, BISECTIONS = -40.0, 64
"""Below -40 GELU, SiLU and Mish are zero to float64; 64 halvings of 40 are less than its rounding."""


@dataclass(frozen=True)
class GELU(NonMonotone):
    """f(z) = z Phi(z), or with tanh in place of Phi where ``approximate`` says so."""

    approximate: str = "none"

    @property
    def argmin(self) -> float:  # type: ignore[override]
        return -0.7524614220710162 if self.approximate == "tanh" else -0.7517915246935645

    def __call__(self, z: Tensor) -> Tensor:
        return functional.gelu(z, approximate=self.approximate)

    def slope(self, z: Tensor) -> Tensor:
        if self.approximate == "none":
            phi: Tensor = torch.special.ndtr(z)
            return phi + z * (-0.5 * z * z).exp() / math.sqrt(2 * math.pi)
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(scale * (z + cubic * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t) * (1 + t) * scale * (1 + 3 * cubic * z * z)


@dataclass(frozen=True)
class SiLU(NonMonotone):
    """f(z) = z / (1 + exp(-z))."""

    argmin = -1.2784645427610738

    def __call__(self, z: Tensor) -> Tensor:
        return functional.silu(z)

    def slope(self, z: Tensor) -> Tensor:
        rising, falling = torch.sigmoid(z), torch.sigmoid(-z)
        return rising * (1 + z * falling)


@dataclass(frozen=True)
class Mish(NonMonotone):
    """f(z) = z tanh(log(1 + exp(z)))."""

    argmin = -1.1924312145154753

    def __call__(self, z: Tensor) -> Tensor:
        return functional.mish(z)

    def slope(self, z: Tensor) -> Tensor:
        # With q = exp(-2 log(1 + exp(z))), tanh is (1 - q) / (1 + q), without what cancels.
        rising, falling = torch.sigmoid(z), torch.sigmoid(-z)
        q = falling.square()
        return rising * (1 + falling) / (1 + q) + 4 * z * rising * q / (1 + q).square()


@dataclass(frozen=True)
class Hardswish(NonMonotone):
    """f(z) = z min(max(z + 3, 0), 6) / 6 (Howard et al. 2019)."""

    argmin = -1.5
    silent = -3.0

    def __call__(self, z: Tensor) -> Tensor:
        return functional.hardswish(z)

    def slope(self, z: Tensor) -> Tensor:
        return torch.where(z < 3, z / 3 + 0.5, 1.0).to(z) * (z > -3)
