"""Losses: cross-entropy of several classes, and those of R-GAP, Figure 1, functions of the margin mu = y * output.

The closed-form attack reads mu off the gradient. Summed over the last layer's weights, <W, grad W> = mu * dl/dmu
(Eqs. 9-11), a scalar equation whose roots are known in closed form for each margin loss here; where it has two, both
are returned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import lambertw
from torch import Tensor

RELATIVE_SLACK = 1e-6
"""How far below its minimum, relative to the size of the minimum, a product is still taken for the minimum itself."""


class Loss(ABC):
    """A loss of a model's outputs and labels, averaged over the batch."""

    @property
    @abstractmethod
    def labels(self) -> tuple[float, ...]:
        """Every label there is."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """The number of values the model must give for one sample."""

    @abstractmethod
    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a batch: outputs (b, outputs), labels (b,)."""

    @abstractmethod
    def expected(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """The mean over a batch whose labels are not certain: weights (b, labels), each row a distribution."""

    @property
    def name(self) -> str:
        """The name that update files and the command line use."""
        return _NAMES[type(self)]

    def check_labels(self, labels: Tensor) -> None:
        """Raise ValueError for a label the loss does not know."""
        wrong = [float(y) for y in labels.reshape(-1).tolist() if y not in self.labels]
        if wrong:
            raise ValueError(f"got label {wrong[0]:g}, expected {self._expected(wrong)}")

    @abstractmethod
    def _expected(self, wrong: list[float]) -> str:
        """What a label must be, for a message."""


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """l = -log softmax(outputs)[label], for labels 0 to classes - 1.

    Args:
        classes: 2 or more; the model gives one output for each.

    Raises:
        ValueError: fewer than 2 classes.
    """

    classes: int

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"got {self.classes} classes, expected 2 or more, one for each output of the model")

    @property
    def labels(self) -> tuple[float, ...]:
        return tuple(float(label) for label in range(self.classes))

    @property
    def outputs(self) -> int:
        return self.classes

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs, labels.reshape(-1).long())

    def expected(self, outputs: Tensor, weights: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs, weights)

    def _expected(self, wrong: list[float]) -> str:
        return f"a whole number from 0 to {self.classes - 1} for cross-entropy of {self.classes} classes"


class MarginLoss(Loss):
    """l(mu), a function of the margin mu = label * output, with labels -1 and 1 and a single output."""

    @property
    def labels(self) -> tuple[float, ...]:
        return (-1.0, 1.0)

    @property
    def outputs(self) -> int:
        return 1

    def _expected(self, wrong: list[float]) -> str:
        hint = "; write class 0 as -1" if 0.0 in wrong else ""
        return f"-1 or 1 for the {self.name} loss{hint}"

    @abstractmethod
    def value(self, mu: Tensor) -> Tensor: ...

    @abstractmethod
    def slope(self, mu: Tensor) -> Tensor:
        """dl/dmu, which is never positive."""

    @abstractmethod
    def roots(self, product: float) -> tuple[float, ...]:
        """Every mu with mu * dl/dmu = product and a slope other than zero, ascending; () where there is none."""

    @abstractmethod
    def margin(self, slope: float) -> float | None:
        """The mu at which dl/dmu = slope; None where no or more than one mu has it."""

    @property
    @abstractmethod
    def lowest_product(self) -> float:
        """The minimum of mu * dl/dmu: a smaller product belongs to no sample."""

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.value(labels.reshape(-1).to(outputs) * outputs.reshape(-1)).mean()

    def expected(self, outputs: Tensor, weights: Tensor) -> Tensor:
        output = outputs.reshape(-1)
        return (weights[:, 0] * self.value(-output) + weights[:, 1] * self.value(output)).mean()

    def _at_minimum(self, product: float, where: float) -> tuple[float, ...] | None:
        """The two branches meet at ``where``: rounding may push the product slightly below what is possible there."""
        if product > self.lowest_product:
            return None
        within = product >= self.lowest_product * (1 + RELATIVE_SLACK)
        return (where,) if within else ()


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


_NAMES: dict[type[Loss], str] = {
    Logistic: "logistic",
    Exponential: "exponential",
    Hinge: "hinge",
    SquaredHinge: "squared-hinge",
    CrossEntropy: "cross-entropy",
}


def by_name(name: str, classes: int | None = None) -> Loss:
    """The loss of that name.

    Args:
        classes: of cross-entropy, and of no other.

    Raises:
        ValueError: no loss has that name, the message lists those there are; or cross-entropy without classes.
    """
    if name == "cross-entropy":
        if classes is None:
            raise ValueError("cross-entropy needs the number of classes: pass classes, the model's outputs")
        return CrossEntropy(classes)
    margin: tuple[type[MarginLoss], ...] = (Logistic, Exponential, Hinge, SquaredHinge)
    for kind in margin:
        if _NAMES[kind] == name:
            return kind()
    raise ValueError(f"unknown loss {name!r}: expected one of {', '.join(sorted(_NAMES.values()))}")
