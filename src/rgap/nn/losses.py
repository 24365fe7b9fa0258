"""Losses: those of several outputs, and those of R-GAP, Figure 1, functions of the margin mu = y * output.

The closed-form attack reads mu off the gradient. Summed over the last layer's weights, <W, grad W> = mu * dl/dmu
(Eqs. 9-11), a scalar equation whose roots are known in closed form for each margin loss here; where it has two, both
are returned. Of a loss of several outputs it needs k, the gradient with respect to them, as a function of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import lambertw
from torch import Tensor

RELATIVE_SLACK = 1e-6
"""How far below its minimum, relative to the size of the minimum, a product is still taken for the minimum itself."""


class Loss(ABC):
    """A loss of a model's outputs and labels, averaged over the batch."""

    @property
    @abstractmethod
    def labels(self) -> tuple[float, ...]:
        """Every label there is; () where any real number is one."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """The number of values the model must give for one sample."""

    @abstractmethod
    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a batch: outputs (b, outputs), labels (b,)."""

    @abstractmethod
    def output_gradient(
        self, outputs: Float[Tensor, "s outputs"], labels: Float[Tensor, " s"]
    ) -> Float[Tensor, "s outputs"]:
        """k: the gradient of one sample's loss with respect to its outputs, for s samples on their own."""

    @abstractmethod
    def expected(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """The mean over a batch whose labels are not certain: weights (b, labels), each row a distribution.

        Where labels cannot be listed the weights are the labels themselves, (b, 1).
        """

    @property
    def examples(self) -> tuple[float, ...]:
        """Labels to try a model with."""
        return self.labels or (0.0, 1.0)

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
    """l = -log softmax(outputs)[label], for labels 0 to classes - 1; what torch's cross_entropy is by default.

    Args:
        classes: 2 or more; the model gives one output for each.
        label_smoothing: the share of the label that is spread evenly over all classes, from 0 to below 1.
        weight: of each class, positive; None for 1 each. As in torch a batch is averaged with these weights, so that
            of one sample's loss without smoothing nothing changes.

    Raises:
        ValueError: fewer than 2 classes, or smoothing or weights that make no sense.
    """

    classes: int
    label_smoothing: float = 0.0
    weight: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"got {self.classes} classes, expected 2 or more, one for each output of the model")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"got label_smoothing {self.label_smoothing:g}, expected 0 or more and less than 1")
        if self.weight is not None and (len(self.weight) != self.classes or min(self.weight) <= 0):
            raise ValueError(f"got class weights {self.weight}, expected {self.classes} positive numbers")

    @property
    def labels(self) -> tuple[float, ...]:
        return tuple(float(label) for label in range(self.classes))

    @property
    def outputs(self) -> int:
        return self.classes

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(
            outputs, labels.reshape(-1).long(), self._weights(outputs), label_smoothing=self.label_smoothing
        )

    def _weights(self, like: Tensor) -> Tensor | None:
        return None if self.weight is None else like.new_tensor(self.weight)

    def targets(self, like: Tensor) -> Float[Tensor, "labels classes"]:
        """t of each label: the loss of one sample is -<t, log softmax(outputs)>."""
        one_hot = torch.eye(self.classes, dtype=like.dtype, device=like.device)
        weights = self._weights(like)
        # torch divides both parts by the weight of the label.
        spread = torch.ones_like(one_hot) if weights is None else weights / weights[:, None]
        return (1 - self.label_smoothing) * one_hot + self.label_smoothing / self.classes * spread

    def expected(self, outputs: Tensor, weights: Tensor) -> Tensor:
        own = self._weights(outputs)
        values = -outputs.log_softmax(1) @ self.targets(outputs).mT
        if own is None:
            return (weights * values).sum(1).mean()
        return (weights * own * values).sum() / (weights * own).sum()

    def output_gradient(
        self, outputs: Float[Tensor, "s outputs"], labels: Float[Tensor, " s"]
    ) -> Float[Tensor, "s outputs"]:
        which, part = labels.long(), 1 - self.label_smoothing
        own = torch.eye(self.classes, dtype=outputs.dtype, device=outputs.device)[which]
        p, smooth = outputs.softmax(1), self.targets(outputs)[which] - part * own
        # p_y - 1 as minus the sum of all others: the difference cancels where the model is certain and right.
        others = p * (1 - own)
        return part * (others - own * others.sum(1, keepdim=True)) + (smooth.sum(1, keepdim=True) * p - smooth)

    def _expected(self, wrong: list[float]) -> str:
        return f"a whole number from 0 to {self.classes - 1} for cross-entropy of {self.classes} classes"


@dataclass(frozen=True)
class MeanSquaredError(Loss):
    """l = (output - label)^2, for any real label; of several outputs the mean of the squares, the label a class.

    Args:
        outputs: of the model. With several, labels are classes from 0 to outputs - 1, and what the outputs are
            compared with is 1 for the class and 0 for all others.

    Raises:
        ValueError: fewer outputs than 1.
    """

    outputs: int = 1

    def __post_init__(self) -> None:
        if self.outputs < 1:
            raise ValueError(f"got {self.outputs} outputs, expected 1 or more")

    @property
    def labels(self) -> tuple[float, ...]:
        return () if self.outputs == 1 else tuple(float(label) for label in range(self.outputs))

    def targets(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """What the outputs are compared with, (b, outputs)."""
        if self.outputs == 1:
            return labels.reshape(-1, 1).to(outputs)
        return torch.eye(self.outputs, dtype=outputs.dtype, device=outputs.device)[labels.reshape(-1).long()]

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        outputs = outputs.reshape(-1, self.outputs)
        return (outputs - self.targets(outputs, labels)).square().mean()

    def expected(self, outputs: Tensor, weights: Tensor) -> Tensor:
        outputs = outputs.reshape(-1, self.outputs)
        if self.outputs == 1:
            return (outputs - weights).square().mean()
        # Of a label that is not certain the squares are averaged, not the label.
        return (weights.sum(1, keepdim=True) * outputs.square() - 2 * outputs * weights + weights).mean()

    def output_gradient(
        self, outputs: Float[Tensor, "s outputs"], labels: Float[Tensor, " s"]
    ) -> Float[Tensor, "s outputs"]:
        return 2 / self.outputs * (outputs - self.targets(outputs, labels))

    def check_labels(self, labels: Tensor) -> None:
        if self.outputs > 1:
            super().check_labels(labels)
        elif not bool(labels.isfinite().all()):
            raise ValueError(f"got label {float(labels[~labels.isfinite()][0]):g}, expected a number for the mse loss")

    def _expected(self, wrong: list[float]) -> str:
        return f"a whole number from 0 to {self.outputs - 1} for the mse loss of {self.outputs} outputs"


@dataclass(frozen=True)
class BinaryCrossEntropy(Loss):
    """The mean over the outputs of l = -log sigmoid(output) or -log(1 - sigmoid(output)), for yes and no.

    It is torch's binary_cross_entropy_with_logits. One label stands for all outputs: the number whose binary digits
    are theirs, the first output's the last digit. ``label`` makes it.

    Args:
        outputs: of the model, 1 to 16.

    Raises:
        ValueError: another number of outputs.
    """

    outputs: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.outputs <= MOST_BINARY:
            raise ValueError(f"got {self.outputs} outputs, expected 1 to {MOST_BINARY} for the bce loss")

    @property
    def labels(self) -> tuple[float, ...]:
        return tuple(float(label) for label in range(2**self.outputs))

    def label(self, digits: Tensor) -> Float[Tensor, " b"]:
        """The labels of samples from the outputs' own, (b, outputs) of zeros and ones."""
        return digits.double() @ 2.0 ** torch.arange(self.outputs, dtype=torch.float64, device=digits.device)

    def digits(self, labels: Tensor) -> Float[Tensor, "b outputs"]:
        """The outputs' own labels, from one number for all."""
        places = torch.arange(self.outputs, device=labels.device)
        return ((labels.reshape(-1, 1).long() >> places) & 1).double()

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        outputs = outputs.reshape(-1, self.outputs)
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs, self.digits(labels).to(outputs))

    def expected(self, outputs: Tensor, weights: Tensor) -> Tensor:
        every = self.digits(torch.tensor(self.labels, device=weights.device)).to(weights)
        outputs = outputs.reshape(-1, self.outputs)
        sure = torch.nn.functional.softplus(outputs) * weights.sum(1, keepdim=True)
        return (sure - outputs * (weights @ every)).mean()

    def output_gradient(
        self, outputs: Float[Tensor, "s outputs"], labels: Float[Tensor, " s"]
    ) -> Float[Tensor, "s outputs"]:
        one = self.digits(labels).to(outputs)
        # Of label 1 minus sigmoid(-output): sigmoid(output) - 1 cancels.
        return ((1 - one) * outputs.sigmoid() - one * (-outputs).sigmoid()) / self.outputs

    def _expected(self, wrong: list[float]) -> str:
        return f"a whole number from 0 to {2**self.outputs - 1} for the bce loss of {self.outputs} outputs"


MOST_BINARY = 16
"""Outputs of the binary cross-entropy: their labels together are 65,536."""


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

    def output_gradient(
        self, outputs: Float[Tensor, "s outputs"], labels: Float[Tensor, " s"]
    ) -> Float[Tensor, "s outputs"]:
        sign = labels.to(outputs)[:, None]
        return sign * self.slope(sign * outputs)

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
    MeanSquaredError: "mse",
    BinaryCrossEntropy: "bce",
}


def by_name(name: str, classes: int | None = None) -> Loss:
    """The loss of that name.

    Args:
        classes: the model's outputs, for cross-entropy, mse and bce; the others take a single one.

    Raises:
        ValueError: no loss has that name, the message lists those there are; or the number of outputs is missing.
    """
    several: tuple[type[CrossEntropy] | type[MeanSquaredError] | type[BinaryCrossEntropy], ...]
    several = (CrossEntropy, MeanSquaredError, BinaryCrossEntropy)
    for many in several:
        if _NAMES[many] == name:
            if classes is None:
                raise ValueError(f"{name} needs the number of classes: pass classes, the model's outputs")
            return many(classes)
    margin: tuple[type[MarginLoss], ...] = (Logistic, Exponential, Hinge, SquaredHinge)
    for kind in margin:
        if _NAMES[kind] == name:
            return kind()
    raise ValueError(f"unknown loss {name!r}: expected one of {', '.join(sorted(_NAMES.values()))}")
