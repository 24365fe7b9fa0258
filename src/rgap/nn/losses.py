"""Every loss that rgap knows, and how one is found by its name; losses of several outputs are written here.

Of these the closed-form attack needs k, the gradient with respect to the outputs, as a function of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.nn.loss import Loss
from rgap.nn.margin_losses import Exponential, Hinge, Logistic, MarginLoss, SquaredHinge

__all__ = [
    "BinaryCrossEntropy", "BinaryCrossEntropyOfProbabilities", "CrossEntropy", "Exponential", "Hinge", "Logistic",
    "Loss", "MarginLoss", "MeanSquaredError", "NegativeLogLikelihood", "SquaredHinge", "by_name",
]  # fmt: skip

SURE = 20.0
"""A value that is as many times its rounding is not zero."""
LEAST_LOG = -100.0
"""Of a probability in the binary cross-entropy, as in torch."""
MOST_BINARY = 16
"""Outputs of the binary cross-entropy: their labels together are 65,536."""


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
    ending = "log_softmax"  # which done twice is done once

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

    def per_sample(self, outputs: Float[Tensor, "s outputs"], labels: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
        return -(self.targets(outputs)[labels.long()] * outputs.log_softmax(1)).sum(1)

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        each, classes = outputs.reshape(-1, self.classes), labels.reshape(-1).long()
        return torch.nn.functional.cross_entropy(
            each, classes, self._weights(outputs), label_smoothing=self.label_smoothing
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
        own, outputs = self._weights(outputs), outputs.reshape(-1, self.classes)
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

    @property
    def gradient_bound(self) -> float:
        return 2 * float(self.targets(torch.zeros(1)).sum(1).max())

    def gradient_rounding(
        self,
        outputs: Float[Tensor, "s outputs"],
        labels: Float[Tensor, " s"],
        shift: Float[Tensor, " s"],
        precision: float,
    ) -> Float[Tensor, "s outputs"]:
        # k is the difference of a share of the outputs' and one of the label's.
        of_label = self.targets(outputs)[labels.long()]
        of_outputs = of_label.sum(1, keepdim=True) * outputs.softmax(1)
        return precision * (of_outputs + of_label) + 2 * shift[:, None] * of_outputs

    def possible_labels(self, direction: Float[Tensor, " outputs"], precision: float) -> Float[Tensor, " t"]:
        every = super().possible_labels(direction, precision)
        if self.label_smoothing:
            return every
        # Without smoothing all entries but the label's have one sign.
        sure = direction.abs() > SURE * precision
        up, down = sure & (direction > 0), sure & (direction < 0)
        others_up, others_down = up.sum() - up.long(), down.sum() - down.long()
        return every[(others_up == 0) | (others_down == 0)]

    def projection(self, direction: Float[Tensor, " outputs"], label: Float[Tensor, ""]) -> Float[Tensor, " outputs"]:
        # Of k_y = p_y - 1 a model that is certain and right leaves rounding alone.
        if self.label_smoothing:
            return direction
        return direction.masked_fill(torch.arange(self.classes, device=direction.device) == int(label), 0.0)

    def _expected(self, wrong: list[float]) -> str:
        return f"a whole number from 0 to {self.classes - 1} for cross-entropy of {self.classes} classes"


@dataclass(frozen=True)
class NegativeLogLikelihood(CrossEntropy):
    """l = -outputs[label], of a model that ends in log_softmax: cross-entropy of what that takes; torch's nll_loss."""

    name = "nll"

    def misfit(self, outputs: Tensor) -> str:
        total = outputs.reshape(-1, self.classes).double().logsumexp(1)
        if bool((total.abs() < 1e-2).all()):
            return ""
        return "the nll loss takes log-probabilities, expected a model that ends in log_softmax; else cross-entropy"


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
    name = "mse"

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

    def per_sample(self, outputs: Float[Tensor, "s outputs"], labels: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
        return (outputs - self.targets(outputs, labels)).square().mean(1)

    def expected(self, outputs: Tensor, weights: Tensor) -> Tensor:
        if not self.labels:
            return super().expected(outputs, weights)
        outputs = outputs.reshape(-1, self.outputs)
        # Of a label that is not certain the squares are averaged, not the label.
        return (weights.sum(1, keepdim=True) * outputs.square() - 2 * outputs * weights + weights).mean()

    def output_gradient(
        self, outputs: Float[Tensor, "s outputs"], labels: Float[Tensor, " s"]
    ) -> Float[Tensor, "s outputs"]:
        return 2 / self.outputs * (outputs - self.targets(outputs, labels))

    def gradient_rounding(
        self,
        outputs: Float[Tensor, "s outputs"],
        labels: Float[Tensor, " s"],
        shift: Float[Tensor, " s"],
        precision: float,
    ) -> Float[Tensor, "s outputs"]:
        size = outputs.abs() + self.targets(outputs, labels).abs()
        return 2 / self.outputs * (precision * size + shift[:, None])

    def label_from(
        self, outputs: Float[Tensor, "s outputs"], k: Float[Tensor, "s outputs"]
    ) -> Float[Tensor, " s"] | None:
        return None if self.labels else (outputs - k / 2)[:, 0]

    def _expected(self, wrong: list[float]) -> str:
        if not self.labels:
            return super()._expected(wrong)
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
    name = "bce"

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
        digit = torch.arange(self.outputs, device=labels.device)
        return ((labels.reshape(-1, 1).long() >> digit) & 1).double()

    def per_sample(self, outputs: Float[Tensor, "s outputs"], labels: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
        targets = self.digits(labels).to(outputs)
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)

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

    @property
    def gradient_bound(self) -> float:
        return 2.0

    def gradient_rounding(
        self,
        outputs: Float[Tensor, "s outputs"],
        labels: Float[Tensor, " s"],
        shift: Float[Tensor, " s"],
        precision: float,
    ) -> Float[Tensor, "s outputs"]:
        share = outputs.sigmoid()
        of_label = self.digits(labels).to(outputs)
        slope = share * (-outputs).sigmoid()
        return (precision * (share + of_label) + 2 * shift[:, None] * slope) / self.outputs

    def label_from(
        self, outputs: Float[Tensor, "s outputs"], k: Float[Tensor, "s outputs"]
    ) -> Float[Tensor, " s"] | None:
        # k is (sigmoid(z) - y) / outputs.
        return self.label((outputs.sigmoid() - self.outputs * k).round().clamp(0, 1))

    def possible_labels(self, direction: Float[Tensor, " outputs"], precision: float) -> Float[Tensor, " t"]:
        return self.label(torch.stack([direction < 0, direction > 0]))  # k < 0 where the label is 1

    def _expected(self, wrong: list[float]) -> str:
        return f"a whole number from 0 to {2**self.outputs - 1} for the bce loss of {self.outputs} outputs"


@dataclass(frozen=True)
class BinaryCrossEntropyOfProbabilities(BinaryCrossEntropy):
    """The same of a model that ends in a sigmoid: torch's binary_cross_entropy. What that sigmoid takes is attacked."""

    ending = "sigmoid"
    name = "bce"

    def per_sample(self, outputs: Float[Tensor, "s outputs"], labels: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
        targets = self.digits(labels).to(outputs)
        return torch.nn.functional.binary_cross_entropy(outputs, targets, reduction="none").mean(1)

    def expected(self, outputs: Tensor, weights: Tensor) -> Tensor:
        every = self.digits(torch.tensor(self.labels, device=weights.device)).to(weights)
        p, yes, sure = outputs.reshape(-1, self.outputs), weights @ every, weights.sum(1, keepdim=True)
        return -(yes * p.log().clamp(min=LEAST_LOG) + (sure - yes) * (1 - p).log().clamp(min=LEAST_LOG)).mean()

    def misfit(self, outputs: Tensor) -> str:
        if bool(((outputs >= 0) & (outputs <= 1)).all()):
            return ""
        return "the loss takes probabilities, expected a model that ends in a sigmoid; else BCEWithLogitsLoss"


_MARGIN = {kind.name: kind for kind in (Logistic, Exponential, Hinge, SquaredHinge)}
SEVERAL = {kind.name: kind for kind in (CrossEntropy, NegativeLogLikelihood, MeanSquaredError, BinaryCrossEntropy)}


def by_name(name: str, classes: int | None = None) -> Loss:
    """The loss of that name.

    Args:
        classes: the model's outputs, for cross-entropy, nll, mse and bce; the others take a single one.

    Raises:
        ValueError: no loss has that name, the message lists those there are; or the number of outputs is missing.
    """
    if name in _MARGIN:
        return _MARGIN[name]()
    if name not in SEVERAL:
        raise ValueError(f"unknown loss {name!r}: expected one of {', '.join(sorted(_MARGIN | SEVERAL))}")
    if classes is None:
        raise ValueError(f"{name} needs the number of classes: pass classes, the model's outputs")
    return SEVERAL[name](classes)
