"""Which labels an update was computed with.

The last layer has g = dl/do, the gradient of the outputs o, in its own: grad b = g and grad W = g x', with x' the
features that it reads. The label decides the signs of g.

- One sample: B. Zhao, K. R. Mopuri and H. Bilen, *iDLG: Improved Deep Leakage from Gradients*, arXiv:2001.02610, 2020.
- Several: with cross-entropy, mean(g) = mean(p) - shares of the labels (p = softmax(o)). The mean of p is taken at the
  mean features that the gradient itself tells, as in K. Ma et al., *Instance-wise Batch Label Restoration via
  Gradients in Federated Learning*, ICLR 2023.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.attacks.base import residual_tolerance
from rgap.inversion.output import of_layer
from rgap.nn.losses import CrossEntropy, Loss, MarginLoss
from rgap.target import Target
from rgap.update import Update

PROBES = 32
"""Inputs of noise that the model is asked about: half to estimate with, half to measure how well that goes."""
SIMULATED = 100
"""Batches of noise on which an estimate of counts is measured."""
MOST = 1000
"""More label vectors than that are not tried one by one."""


@dataclass(frozen=True)
class Candidates:
    """The labels that nothing rules out; a gradient does not tell the order of its samples."""

    labels: tuple[Float[Tensor, " b"], ...]
    """In float64, the likeliest first where there is a likelier one."""
    assumption: str
    """Where they come from, in a sentence."""


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
    said = (
        "how often each label occurs is estimated from the last layer's gradient; of batches of noise, "
        f"{found.accuracy:.0%} of the labels come out right"
    )
    return Candidates((found.labels,), said)


def of_one(target: Target, update: Update) -> Candidates:
    """The labels of an update that is taken for one sample's, whatever batch size it states."""
    last = _last(target)
    if isinstance(last, str):
        if not target.loss.labels:
            raise ValueError(f"the labels of the {target.loss.name} loss cannot be listed: {last}")
        return _some(target.loss.labels, f"all labels are tried: {last}")
    grad, bias = _told(update, last.weight_name), _told(update, last.bias_name)
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


def _by_roots(last: _Last, update: Update, grad: Tensor | None) -> Candidates:
    """The labels of all candidates that the last layer's gradient has; see `rgap.inversion.output`."""
    if grad is not None:
        bias = _told(update, last.bias_name)
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


def _told(update: Update, name: str) -> Tensor | None:
    """The gradient of that name; None if it was not sent, or withheld by sending zeros."""
    grad = update.gradients.get(name)
    return grad.double() if grad is not None and grad.any() else None


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
    said = f"{len(below)} classes of {source} are negative, which one sample does not give; the lowest is the label"
    return _some((float(signal.argmin()),), said)


def _opposed(grad: Float[Tensor, "labels features"]) -> Candidates:
    """Of the rows (p_c - y_c) x' the one that is opposed to all others, that of the label."""
    largest = int(grad.square().sum(1).argmax())
    along = grad @ grad[largest]
    sides = [(along > 0).nonzero().flatten().tolist(), (along < 0).nonzero().flatten().tolist()]
    alone = [side[0] for side in sides if len(side) == 1]
    if alone and sides[1]:
        said = "the label is the row of the last layer's gradient that is opposed to all others"
        if len(alone) > 1:
            said = "both rows of the last layer's gradient may be the label's: they are opposed to each other alone"
        return _some(tuple(map(float, alone)), said)
    if not sides[1]:  # p is 1 but for its rounding
        zero = (along == 0).nonzero().flatten().tolist()
        return _some(tuple(map(float, zero)), "labels that the last layer's gradient does not exclude are tried")
    said = "no row of the last layer's gradient is opposed to all others, as one sample's is; the largest is the label"
    return _some((float(largest),), said)


def counts(target: Target, update: Update) -> Counts:
    """How often each label occurs, from the last layer's gradient, rounded to whole numbers by largest remainder.

    With cross-entropy the last layer needs no bias: mean(g) is then read off the rows of its weight's gradient, with
    the size that features have on noise. With a margin loss the bias gradient is compared with those that noise of
    either label gives.

    Raises:
        ValueError: the last layer's gradient tells no label; says why.
    """
    last = _last(target)
    if isinstance(last, str):
        raise ValueError(last)
    grad, bias = _told(update, last.weight_name), _told(update, last.bias_name)
    if grad is None:
        raise ValueError("the last layer's gradient is zero, or not sent")
    if not isinstance(target.loss, MarginLoss) and not last.plain:
        raise ValueError(f"how often each label occurs is not estimated for the {target.loss.name} loss as it is set")
    if isinstance(target.loss, MarginLoss) and bias is None:
        raise ValueError(f"the last layer has no bias gradient, which shows the labels of a {target.loss.name} loss")
    features = _features(target, last, PROBES)
    if features is None:
        raise ValueError("the gradient of the last layer is not what its place in the model says")
    known, simulated = features[: PROBES // 2], features[PROBES // 2 :]
    b = update.samples(target)
    shares = last.shares(known, grad.to(known.device), bias, b)
    numbers = dict(zip(target.loss.labels, whole_numbers(shares, b), strict=True))
    return Counts(numbers, _accuracy(last, known, simulated, b, bias is not None))


def whole_numbers(shares: Float[Tensor, " labels"], b: int) -> list[int]:
    """Whole numbers that add up to b, by largest remainder; no share is less than nothing."""
    exact = shares.clamp(min=0)
    exact = exact * (b / exact.sum())
    numbers = exact.floor()
    more = (exact - numbers).argsort(descending=True)[: b - int(numbers.sum())]
    numbers[more] += 1
    return [int(n) for n in numbers.tolist()]


def _accuracy(last: _Last, known: Tensor, simulated: Float[Tensor, "s features"], b: int, bias: bool) -> float:
    """The share of right labels on batches of noise with random labels.

    Args:
        bias: whether the bias gradient is used.
    """
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor(last.loss.labels, dtype=torch.float64)
    right = 0
    for _ in range(SIMULATED):
        x = simulated[torch.randint(len(simulated), (b,), generator=generator).to(simulated.device)]
        which = torch.randint(len(values), (b,), generator=generator)
        g = last.output_gradient(x, values[which])
        found = last.shares(known, g.mT @ x / b, g.mean(0) if bias else None, b)
        truth = which.bincount(minlength=len(values)).tolist()
        right += sum(min(n, t) for n, t in zip(whole_numbers(found, b), truth, strict=True))
    return right / (b * SIMULATED)


@dataclass(frozen=True)
class _Last:
    """The last layer: the loss takes its outputs as they are."""

    loss: Loss
    weight: Float[Tensor, "outputs features"]
    bias: Float[Tensor, " outputs"]
    """Zero if there is none."""
    weight_name: str
    bias_name: str
    """Empty if there is none."""
    bias_trained: bool
    nonnegative: str | None
    """The activation that keeps its input from being negative, if one is known to."""

    @property
    def plain(self) -> bool:
        """Whether g is softmax(o) - one_hot(y), in a batch as well as alone."""
        loss = self.loss
        return isinstance(loss, CrossEntropy) and not loss.label_smoothing and loss.weight is None

    def output_gradient(self, x: Float[Tensor, "s features"], y: Float[Tensor, " s"]) -> Float[Tensor, "s outputs"]:
        """g of each sample, from its features and label."""
        return self.loss.output_gradient(x @ self.weight.mT + self.bias, y.to(x.device))

    def shares(
        self,
        known: Float[Tensor, "s features"],
        grad_weight: Float[Tensor, "outputs features"],
        grad_bias: Float[Tensor, " outputs"] | None,
        b: int,
    ) -> Float[Tensor, " labels"]:
        """The share of each label in a batch of b, not yet between 0 and 1, from features of noise and the gradient."""
        if isinstance(self.loss, MarginLoss):
            assert grad_bias is not None
            low, high = (
                float(self.output_gradient(known, torch.full((len(known),), y, dtype=torch.float64)).mean())
                for y in self.loss.labels
            )
            up = (float(grad_bias) - low) / (high - low)
            return torch.tensor([1 - up, up], dtype=torch.float64).clamp(0, 1)
        mean = known.mean(0)
        if grad_bias is None:
            # Sums of a row, features that are negative on noise counted so: they do not cancel.
            grad_bias = grad_weight @ mean.sign() / mean.abs().sum()
        g = grad_bias.to(grad_weight.device)
        # grad W = g x' if all samples had the same features. Where labels occur in nearly equal numbers g is next to
        # nothing and tells as little of them: features of noise take part, with the |g|^2 of labels at random.
        ridge = 1 / b
        x = (g @ grad_weight + ridge * mean) / (g @ g + ridge)
        return (self.weight @ x + self.bias).softmax(0) - g


def _last(target: Target) -> _Last | str:
    """The last layer, or why it is not one that labels can be read off."""
    uses, loss = target.graph.uses, target.loss
    if not uses:
        return "no layer of the model is known"
    use = uses[-1]
    weight = target.parameters.get(use.weight_name or "")
    if use.weight_name is None or weight is None or weight.dim() != 2 or len(weight) != use.outputs:
        return f"{use.name}, the last layer, is no Linear layer whose gradient is shared"
    if use.outputs != loss.outputs:
        return f"{use.name}, the last layer, has {use.outputs} outputs, the loss takes {loss.outputs}"
    bias = torch.zeros(len(weight)) if use.bias_name is None else target._tensors[use.bias_name]
    # Behind an obstacle, such as batch norm, the activation before may say nothing of the sign.
    chain = not target.graph.obstacles
    before = uses[use.before].activation if chain and use.before is not None else None
    last = _Last(
        loss,
        weight.double(),
        bias.double().to(weight.device),
        use.weight_name,
        use.bias_name or "",
        use.bias_name in target.parameters,
        str(before) if before is not None and before.nonnegative else None,
    )
    if not chain and _features(target, last, 1) is None:
        return f"it is not certain that the loss takes the outputs of {use.name} as they are"
    return last


def _features(target: Target, last: _Last, count: int) -> Float[Tensor, "s features"] | None:
    """What the last layer reads where the model reads noise; None if its gradient is not g x' there.

    The gradients that two labels give differ by (g - g') x'. With cross-entropy g - g' is -1 in one row and 1 in the
    other; with a margin loss it is read off the bias.
    """
    if isinstance(target.loss, MarginLoss) and not last.bias_trained:
        return None
    low, high = target.value_range or (0.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    noise = low + (high - low) * torch.rand((count, *target.input_shape), generator=generator, dtype=torch.float64)
    labels = [torch.tensor([y], dtype=torch.float64) for y in target.loss.examples[:2]]
    found = []
    with torch.random.fork_rng():  # a model with dropout in training mode draws from the global state
        for x in noise:
            first, second = (target.gradient(x[None], y) for y in labels)
            kind = first[last.weight_name].dtype
            apart = (first[last.weight_name] - second[last.weight_name]).double()
            if isinstance(target.loss, MarginLoss):
                reads = apart / (first[last.bias_name] - second[last.bias_name]).double()
            else:
                reads = apart[1:2]
            for label, gradient in zip(labels, (first, second), strict=True):
                g, grad = last.output_gradient(reads, label), gradient[last.weight_name].double()
                if not float((g.mT @ reads - grad).norm()) <= residual_tolerance(kind) * float(grad.norm()):
                    return None
            found.append(reads)
    return torch.cat(found)
