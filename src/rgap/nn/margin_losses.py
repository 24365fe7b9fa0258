"""The losses of R-GAP, Figure 1: functions of the margin mu = label * output.

The closed-form attack reads mu off the gradient. Summed over the last layer's weights, <W, grad W> = mu * dl/dmu
(Eqs. 9-11), a scalar equation. Each loss here has its roots in closed form; where it has two, both are returned.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import lambertw
from torch import Tensor

from rgap.linalg.roots import find_roots, minimise
from rgap.nn.loss import Loss

RELATIVE_SLACK = 1e-6
"""How far below its minimum, relative to the size of the minimum, a product is still taken for the minimum itself."""


class MarginLoss(Loss):
    """l(mu), a function of the margin mu = label * output, with labels -1 and 1 and a single output.

    One's own says `value`, which must not rise with mu; the rest is found on a grid of margins from -1e6 to 1e6.
    """

    @property
    def labels(self) -> tuple[float, ...]:
        return (-1.0, 1.0)

    @property
    def outputs(self) -> int:
        return 1

    def _expected(self, wrong: list[float]) -> str:
        if any(math.isfinite(label) and label % 1 for label in wrong):
            return f"-1 or 1 for the {self.name} loss; real values are for the loss mse"
        hint = "; write class 0 as -1, or take the loss bce" if 0.0 in wrong else ""
        return f"-1 or 1 for the {self.name} loss{hint}"

    @abstractmethod
    def value(self, mu: Tensor) -> Tensor:
        """The loss of every margin."""

    def slope(self, mu: Tensor) -> Tensor:
        """dl/dmu, which is never positive."""
        found: Tensor = torch.func.grad(lambda each: self.value(each).sum())(mu)
        return found

    def roots(self, product: float) -> tuple[float, ...]:
        """Every mu with mu * dl/dmu = product and a slope other than zero, ascending; () where there is none."""
        crossed, met = find_roots(lambda mu: mu * self.slope(mu) - product, _margins(), near=0.1 * abs(product))
        found = torch.cat([crossed, met])
        slope = self.slope(found)
        # At a jump of the slope the sign changes without a root.
        missing = (found * slope - product).abs()
        found = found[(slope < 0) & (missing <= 1e-6 * (abs(product) + slope.abs()))]
        return tuple(found.sort().values.tolist())

    def margin(self, slope: float) -> float | None:
        """The mu at which dl/dmu = slope; None where no or more than one mu has it."""
        if slope >= 0:
            return None
        found, _ = find_roots(lambda mu: self.slope(mu) - slope, _margins())
        missing = self.slope(found) - slope
        found = found[missing.abs() <= 1e-6 * abs(slope)]
        return float(found) if len(found) == 1 else None

    @property
    def lowest_product(self) -> float:
        """The minimum of mu * dl/dmu: a smaller product belongs to no sample."""
        grid = _margins()
        at = int((grid * self.slope(grid)).argmin())
        ends = grid[[max(at - 1, 0)]], grid[[min(at + 1, len(grid) - 1)]]
        mu = torch.cat([grid[[at]], minimise(lambda each: each * self.slope(each), *ends)])
        return float((mu * self.slope(mu)).min())

    def per_sample(self, outputs: Float[Tensor, "s 1"], labels: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
        return self.value(labels.to(outputs) * outputs[:, 0])

    def output_gradient(self, outputs: Float[Tensor, "s 1"], labels: Float[Tensor, " s"]) -> Float[Tensor, "s 1"]:
        sign = labels.to(outputs)[:, None]
        return sign * self.slope(sign * outputs)

    def _at_minimum(self, product: float, where: float) -> tuple[float, ...] | None:
        """The two branches meet at ``where``: rounding may move the product slightly below what is possible there."""
        if product > self.lowest_product:
            return None
        within = product >= self.lowest_product * (1 + RELATIVE_SLACK)
        return (where,) if within else ()


@cache
def _margins() -> Float[Tensor, " n"]:
    """Both signs, and as fine at one size as at another."""
    size = torch.logspace(-9, 6, 1501, dtype=torch.float64)
    return torch.cat([-size.flip(0), size.new_zeros(1), size])


def _lambert(x: float) -> tuple[float, ...]:
    """The real solutions of w * exp(w) = x, largest first; where the branches meet rounding may hide the solution."""
    if x <= -np.exp(-1.0):
        return (-1.0,)
    branches = (0, -1) if x < 0 else (0,)
    return tuple(float(lambertw(x, branch).real) for branch in branches)


@dataclass(frozen=True)
class Logistic(MarginLoss):
    """l(mu) = log(1 + exp(-mu)). The paper's Eq. 25 prints its slope as -mu/(1+exp(mu)); it is -1/(1+exp(mu))."""

    def value(self, mu: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-mu)

    def slope(self, mu: Tensor) -> Tensor:
        return -torch.sigmoid(-mu)

    @property
    def lowest_product(self) -> float:
        return -float(lambertw(np.exp(-1.0)).real)

    def roots(self, product: float) -> tuple[float, ...]:
        # -mu / (1 + e^mu) = p  <=>  mu = -p - w with w e^w = p e^-p; the branches meet at mu = 1 + W(1/e) = 1.2785.
        met = self._at_minimum(product, 1.0 - self.lowest_product)
        return tuple(-product - w for w in _lambert(product * np.exp(-product))) if met is None else met

    def margin(self, slope: float) -> float | None:
        return float(np.log1p(slope) - np.log(-slope)) if -1.0 < slope < 0.0 else None


@dataclass(frozen=True)
class Exponential(MarginLoss):
    """l(mu) = exp(-mu)."""

    def value(self, mu: Tensor) -> Tensor:
        return torch.exp(-mu)

    def slope(self, mu: Tensor) -> Tensor:
        return -torch.exp(-mu)

    @property
    def lowest_product(self) -> float:
        return -float(np.exp(-1.0))

    def roots(self, product: float) -> tuple[float, ...]:
        # -mu e^-mu = p  <=>  mu = -w with w e^w = p; the branches meet at mu = 1.
        met = self._at_minimum(product, 1.0)
        return tuple(-w for w in _lambert(product)) if met is None else met

    def margin(self, slope: float) -> float | None:
        return float(-np.log(-slope)) if slope < 0.0 else None


@dataclass(frozen=True)
class Hinge(MarginLoss):
    """l(mu) = max(0, 1 - mu): slope -1 below 1, and no gradient at all from mu = 1 on."""

    def value(self, mu: Tensor) -> Tensor:
        return torch.relu(1 - mu)

    def slope(self, mu: Tensor) -> Tensor:
        return -(mu < 1).to(mu)

    @property
    def lowest_product(self) -> float:
        return -1.0

    def roots(self, product: float) -> tuple[float, ...]:
        return (-product,) if product > self.lowest_product else ()

    def margin(self, slope: float) -> float | None:
        return None  # every mu below 1 has slope -1


@dataclass(frozen=True)
class SquaredHinge(MarginLoss):
    """l(mu) = max(0, 1 - mu)^2."""

    def value(self, mu: Tensor) -> Tensor:
        return torch.relu(1 - mu) ** 2

    def slope(self, mu: Tensor) -> Tensor:
        return -2 * torch.relu(1 - mu)

    @property
    def lowest_product(self) -> float:
        return -0.5

    def roots(self, product: float) -> tuple[float, ...]:
        # 2 mu^2 - 2 mu = p on mu < 1; the branches meet at mu = 1/2.
        met = self._at_minimum(product, 0.5)
        if met is not None:
            return met
        half = np.sqrt(1 + 2 * product)
        # The small root as a quotient: 1 - half cancels.
        return tuple(float(mu) for mu in (-product / (1 + half), (1 + half) / 2) if mu < 1)

    def margin(self, slope: float) -> float | None:
        return 1 + slope / 2 if slope < 0.0 else None
