"""How often each label occurs in a batch.

With cross-entropy, mean(g) = mean(p) - shares of the labels (p = softmax(o)). The mean of p is taken at the mean
features that the gradient itself gives, as in K. Ma et al., *Instance-wise Batch Label Restoration via Gradients in
Federated Learning*, ICLR 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.attacks.label_layer import LastLayer, last_layer, noise_features, sent
from rgap.nn.losses import MarginLoss
from rgap.target import Target
from rgap.update import Update

PROBES = 32
"""Inputs of noise that the model is asked about: half to estimate with, half to measure how well that goes."""
SIMULATED = 100
"""Batches of noise on which an estimate of counts is measured."""
AT_ONCE = 2**22
"""Entries of their gradients of the last weight that are held at once."""
_PROBED: WeakKeyDictionary[Target, Tensor | None] = WeakKeyDictionary()
"""What the last layer reads of those inputs, which all updates of a target ask for."""


@dataclass(frozen=True)
class Counts:
    """How often each label occurs in a batch, estimated."""

    counts: dict[float, int]
    """Of every label of the loss, the number of samples."""
    accuracy: float
    """The share of labels that come out right on simulated batches of the same size: random labels, and noise as
    inputs, on this model. It is measured on noise, not on the client's data: a model that was trained on such data
    treats it differently, and the estimate may then be worse."""

    @property
    def labels(self) -> Float[Tensor, " b"]:
        """All labels, ascending."""
        return torch.tensor([y for y, count in sorted(self.counts.items()) for _ in range(count)], dtype=torch.float64)


def counts(target: Target, update: Update) -> Counts:
    """How often each label occurs, from the last layer's gradient, rounded to whole numbers by largest remainder.

    With cross-entropy the last layer needs no bias: mean(g) is then read off the rows of its weight's gradient, with
    the size that features have on noise. With a margin loss the bias gradient is compared with those that noise of
    either label gives.

    Raises:
        ValueError: the last layer's gradient tells no label; says why.
    """
    last = last_layer(target)
    grad, bias = sent(update, last.weight_name), sent(update, last.bias_name)
    if grad is None:
        raise ValueError("the last layer's gradient is zero, or not sent")
    if not isinstance(target.loss, MarginLoss) and not last.plain:
        raise ValueError(f"how often each label occurs is not estimated for the {target.loss.name} loss as it is set")
    if isinstance(target.loss, MarginLoss) and bias is None:
        raise ValueError(f"the last layer has no bias gradient, which shows the labels of a {target.loss.name} loss")
    if target not in _PROBED:
        _PROBED[target] = noise_features(target, last, PROBES)
    features = _PROBED[target]
    if features is None:
        raise ValueError("the gradient of the last layer is not what its place in the model says")
    known, simulated = features[: PROBES // 2], features[PROBES // 2 :]
    b = update.samples(target)
    shares = last.shares(known, grad.to(known.device), bias, b)
    numbers = dict(zip(target.loss.labels, whole_numbers(shares, b).tolist(), strict=True))
    return Counts(numbers, _accuracy(last, known, simulated, b, bias is not None))


def whole_numbers(shares: Float[Tensor, "*n labels"], b: int) -> Int[Tensor, "*n labels"]:
    """Whole numbers that add up to b, by largest remainder; no share is less than nothing.

    Raises:
        ValueError: the shares are no numbers.
    """
    exact = shares.clamp(min=0)
    exact = exact * (b / exact.sum(-1, keepdim=True))
    if not bool(exact.isfinite().all()):
        raise ValueError("the gradient gives shares of labels that are no finite numbers")
    numbers = exact.floor()
    place = (exact - numbers).argsort(-1, descending=True).argsort(-1)
    return (numbers + (place < b - numbers.sum(-1, keepdim=True))).long()


def _accuracy(last: LastLayer, known: Tensor, simulated: Float[Tensor, "s features"], b: int, bias: bool) -> float:
    """The share of right labels on batches of noise with random labels.

    Args:
        bias: whether the bias gradient is used.
    """
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor(last.loss.labels, dtype=torch.float64)
    drawn = [(_draw(len(simulated), b, generator), _draw(len(values), b, generator)) for _ in range(SIMULATED)]
    right, at_once = 0, max(1, AT_ONCE // last.weight.numel())
    for some in (drawn[at : at + at_once] for at in range(0, len(drawn), at_once)):
        places, which = (torch.stack(each) for each in zip(*some, strict=True))
        x = simulated[places.to(simulated.device)]
        g = last.output_gradient(x.flatten(0, 1), values[which.flatten()]).reshape(*which.shape, -1)
        found = last.shares(known, g.mT @ x / b, g.mean(1) if bias else None, b)
        truth = torch.nn.functional.one_hot(which, len(values)).sum(1)
        right += int(whole_numbers(found.cpu(), b).minimum(truth).sum())
    return right / (b * SIMULATED)


def _draw(of: int, count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    return torch.randint(of, (count,), generator=generator)
