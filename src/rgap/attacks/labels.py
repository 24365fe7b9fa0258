"""Which labels an update was computed with.

The last layer has g = dl/do, the gradient of the outputs o, in its own: grad b = g and grad W = g x', with x' the
features that it reads. The label decides the signs of g.

- One sample: B. Zhao, K. R. Mopuri and H. Bilen, *iDLG: Improved Deep Leakage from Gradients*, arXiv:2001.02610, 2020.
- Several: see `rgap.attacks.label_counts`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.attacks.label_counts import counts
from rgap.attacks.label_layer import LastLayer, Unreadable, last_layer, sent
from rgap.inversion.output import of_layer
from rgap.nn.losses import CrossEntropy, Loss, MarginLoss
from rgap.target import Target
from rgap.update import Update

MOST = 1000
"""More label vectors than that are not tried one by one."""


@dataclass(frozen=True)
class Candidates:
    """The labels that nothing rules out; a gradient does not tell the order of its samples."""

    labels: tuple[Float[Tensor, " b"], ...]
    """In float64, the likeliest first where there is a likelier one."""
    assumption: str
    """Where they come from, in a sentence."""


def one_hot(loss: Loss, labels: Float[Tensor, " b"]) -> Float[Tensor, "b labels"]:
    """Distributions that are certain of these labels; the labels themselves where they cannot be listed."""
    if not loss.labels:
        return labels[:, None]
    return (labels.cpu()[:, None] == torch.tensor(loss.labels, dtype=labels.dtype)).to(labels.dtype)


def candidates(target: Target, update: Update) -> Candidates:
    """The labels that an attack has to try.

    Raises:
        ValueError: the last layer tells nothing, and there are too many label vectors to try them all.
    """
    b = update.samples(target)
    if b == 1:
        return of_one(target, update)
    try:
        found = counts(target, update)
    except ValueError as unknown:
        every = math.comb(len(target.loss.labels) + b - 1, b)
        if every > MOST:
            raise ValueError(
                f"there are {every} ways to label {b} samples, expected {MOST} or fewer: {unknown}. Use an attack that "
                "optimises the labels with the input"
            ) from unknown
        choices = combinations_with_replacement(target.loss.labels, b)
        labels = tuple(torch.tensor(choice, dtype=torch.float64) for choice in choices)
        return Candidates(labels, f"all {every} ways to label {b} samples are tried: {unknown}")
    assumption = (
        "how often each label occurs is estimated from the last layer's gradient; of batches of noise, "
        f"{found.accuracy:.0%} of the labels come out right"
    )
    return Candidates((found.labels,), assumption)


def of_one(target: Target, update: Update) -> Candidates:
    """The labels of an update that is taken for one sample's, whatever batch size it states."""
    try:
        last = last_layer(target)
    except Unreadable as reason:
        if not target.loss.labels:
            raise ValueError(f"the labels of the {target.loss.name} loss cannot be listed: {reason}") from reason
        return _some(target.loss.labels, f"all labels are tried: {reason}")
    grad, bias = sent(update, last.weight_name), sent(update, last.bias_name)
    if not isinstance(target.loss, MarginLoss) and not last.plain:
        return _by_roots(last, update, grad)
    if bias is not None:
        signal, source = bias, "the last layer's bias gradient"
    elif grad is None:
        return _some(target.loss.labels, "all labels are tried: the last layer's gradient is zero, or not sent")
    elif last.nonnegative is not None:
        signal, source = grad.sum(1), f"the sign of the last gradient ({last.nonnegative} is >= 0)"
    elif isinstance(target.loss, CrossEntropy):
        return _opposed(grad)
    else:
        return _some(target.loss.labels, "both labels are tried: the sign of the last layer's input is not known")
    if isinstance(target.loss, MarginLoss):
        label = -1.0 if float(signal) > 0 else 1.0  # dl/dmu < 0
        return _some((label,), f"the label is read off {source}")
    return _negative(signal, source)


def _by_roots(last: LastLayer, update: Update, grad: Tensor | None) -> Candidates:
    """The labels of all candidates that the last layer's gradient has; see `rgap.inversion.output`."""
    if grad is not None:
        bias = sent(update, last.bias_name)
        device = last.weight.device
        found = of_layer(
            last.loss,
            last.weight,
            last.bias,
            grad.to(device),
            None if bias is None else bias.to(device),
            update.precision,
        )
        if len(found.labels):
            return _some(tuple(dict.fromkeys(found.labels.tolist())), found.assumptions[0])
    if not last.loss.labels:
        raise ValueError(f"the labels of the {last.loss.name} loss cannot be listed, and the gradient tells none")
    return _some(last.loss.labels, "all labels are tried: the last layer's gradient tells none")


def _some(labels: tuple[float, ...], assumption: str) -> Candidates:
    return Candidates(tuple(torch.tensor([y], dtype=torch.float64) for y in labels), assumption)


def _negative(signal: Float[Tensor, " labels"], source: str) -> Candidates:
    """Of p - y the only negative entry, that of the label. Where p is 1 but for its rounding, that entry is zero."""
    below = (signal < 0).nonzero().flatten().tolist()
    if len(below) == 1:
        return _some((float(below[0]),), f"the label is read off {source}")
    if not below:
        zero = (signal == 0).nonzero().flatten().tolist()
        return _some(tuple(map(float, zero)), f"labels that {source} does not exclude are tried")
    above = (signal > 0).nonzero().flatten().tolist()
    if len(above) == 1:
        return _some((float(above[0]),), f"the label is read off {source}, whose sign is turned: one class is positive")
    assumption = (
        f"{len(below)} classes of {source} are negative, which one sample does not give; the lowest is the label"
    )
    return _some((float(signal.argmin()),), assumption)


def _opposed(grad: Float[Tensor, "labels features"]) -> Candidates:
    """Of the rows (p_c - y_c) x' the one that is opposed to all others, that of the label."""
    largest = int(grad.square().sum(1).argmax())
    along = grad @ grad[largest]
    sides = [(along > 0).nonzero().flatten().tolist(), (along < 0).nonzero().flatten().tolist()]
    alone = [side[0] for side in sides if len(side) == 1]
    if alone and sides[1]:
        assumption = "the label is the row of the last layer's gradient that is opposed to all others"
        if len(alone) > 1:
            assumption = (
                "both rows of the last layer's gradient may be the label's: they are opposed to each other alone"
            )
        return _some(tuple(map(float, alone)), assumption)
    if not sides[1]:  # p is 1 but for its rounding
        zero = (along == 0).nonzero().flatten().tolist()
        return _some(tuple(map(float, zero)), "labels that the last layer's gradient does not exclude are tried")
    assumption = (
        "no row of the last layer's gradient is opposed to all others, as one sample's is; the largest is the label"
    )
    return _some((float(largest),), assumption)
