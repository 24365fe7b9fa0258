"""What updates give away at once, before any attack: labels, and what the first layer that can be read reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.attacks import candidates, class_shares
from rgap.attacks.features import Features, features
from rgap.attacks.label_counts import counts
from rgap.auditing.observed import Observed
from rgap.inversion.root import leading_pair
from rgap.linalg import deadline
from rgap.losses import LabelMaps
from rgap.printable import listed
from rgap.target import Target
from rgap.update import Update

AGREES = 1e-3
"""Values that differ by less, relative to the largest of them, were read off exactly."""
SPREAD = 4.0
"""The largest of many errors is about so many standard deviations."""
CHANGED = 0.5
"""Of a single sample's last gradient so much may be left over beside one outer product, if it is to tell the label."""


@dataclass(frozen=True)
class ReadOut:
    """Of all samples together."""

    samples: int
    """That were looked at."""
    labels: int = 0
    """Whose label the update leaves no doubt of, and that is right as far as anyone knows."""
    known: bool = True
    """Whether everything could be compared."""
    layer: str = ""
    """That reads the features; empty if none were read off."""
    values: int = 0
    """That it reads."""
    features: int = 0
    """Samples of which they were read off, exactly as far as anyone knows."""
    counts: tuple[tuple[str, dict[float, int]], ...] = ()
    """Of updates of several samples whose labels are not certain, by the first sample's name: how often each label
    occurs, estimated."""
    counted: int = 0
    """Samples of these updates."""
    counted_right: int | None = None
    """How many of their labels the estimates have right; None if that is not known."""
    hidden: str = ""
    """The layer whose gradient should tell what it reads and does not, as after noise or compression; else empty."""
    shares: float | None = None
    """Of label maps, how far off the classes' shares of the pixels are at the most; None if they are not known."""

    @property
    def labels_told(self) -> str:
        """Whose labels, for a sentence; empty if nobody's."""
        if self.shares is not None:
            return f"the classes' shares of the label maps (to {self.shares:.1%} of the pixels)"
        return _of("the label", "the labels", self.labels, self.samples)

    @property
    def features_told(self) -> str:
        """Which features, for a sentence; empty if none."""
        if not self.features:
            return ""
        of = "" if self.features == self.samples else f" of {self.features} of {self.samples} samples"
        return f"all {self.values} values that {self.layer} reads{of}"

    @property
    def counts_told(self) -> str:
        """How often each label occurs, in a sentence; empty if that was not estimated."""
        if not self.counts:
            return ""
        right = "" if self.counted_right is None else f", right for {self.counted_right} of {self.counted} samples"
        each = "; ".join(f"{f'{name}: ' if len(self.counts) > 1 else ''}{_often(own)}" for name, own in self.counts[:2])
        more = f"; and {len(self.counts) - 2} more updates" if len(self.counts) > 2 else ""
        return f"How often each label occurs is estimated{right}: {each}{more}."

    @property
    def hidden_told(self) -> str:
        """What a change of the gradient hid, in a sentence; empty if nothing."""
        if not self.hidden:
            return ""
        everywhere = " everywhere" if self.features else ""
        return (
            f"What {self.hidden} reads could not be read off{everywhere}: the gradient that was sent contradicts "
            "itself or the sample, as after noise, quantisation or compression."
        )

    @property
    def told(self) -> str:
        """Everything, in the order of what it is worth; empty if it is nothing."""
        return " and ".join(filter(None, (self.features_told, self.labels_told)))

    @property
    def sentences(self) -> tuple[str, ...]:
        """Everything, with what is only estimated and what could not be read, for people."""
        off = f"Read off at once, without any search: {self.told}." if self.told else ""
        return tuple(filter(None, (off, self.counts_told, self.hidden_told)))


def _of(one: str, several: str, some: int, count: int) -> str:
    if not some:
        return ""
    if some == count:
        return f"{one} of the sample" if count == 1 else f"{several} of all {count} samples"
    return f"{several if some > 1 else one} of {some} of {count} samples"


def _often(own: dict[float, int]) -> str:
    """The labels that occur most often."""
    most = sorted(own.items(), key=lambda each: -each[1])
    return listed([f"{count} of label {label:g}" for label, count in most if count], 10)


def read_out(target: Target, observed: Sequence[Observed]) -> ReadOut:
    """Look at each update as long as there is time; what was not looked at does not count."""
    labels, samples, found, off, hidden = 0, 0, [], [], ""
    counted: list[tuple[Observed, dict[float, int]]] = []
    for each in observed:
        if deadline.used() >= 1:
            break
        samples += each.samples
        if isinstance(target.loss, LabelMaps):
            off += _shares(target, target.loss, each)
        else:
            certain = _labels(target, each)
            labels += certain
            own = None if certain or each.samples == 1 else _counts(target, each)
            if own is not None:
                counted.append((each, own))
        one = features(target, each.update.to_gradient(target)[0]) if each.samples == 1 else None
        if one is not None and one.value_id > 0:
            if _right(target, each, one):
                found.append((one.layer, one.x.numel()))
            else:
                hidden = one.layer
    layer, values = Counter(found).most_common(1)[0][0] if found else ("", 0)
    known = all(each.truth is not None for each in observed)
    right = [(Counter(own) & Counter(each.labels)).total() for each, own in counted if each.labels is not None]
    return ReadOut(
        samples=samples,
        labels=labels,
        known=known,
        layer=layer,
        values=values,
        features=found.count((layer, values)),
        counts=tuple((each.names[0].partition(",")[0], own) for each, own in counted),
        counted=sum(each.samples for each, _ in counted),
        counted_right=sum(right) if len(right) == len(counted) else None,
        hidden=hidden,
        shares=max(off, default=None),
    )


def _shares(target: Target, loss: LabelMaps, observed: Observed) -> list[float]:
    """How far the classes' shares of the pixels are from the true ones; empty if there are none."""
    update, _ = observed.update.to_gradient(target)
    if observed.labels is None:
        return []
    try:
        told = class_shares(target, update)
    except ValueError:
        return []
    truth = torch.stack([loss.shares(label) for label in observed.labels]).mean(0)
    return [float((told - truth).abs().max())]


def _labels(target: Target, observed: Observed) -> int:
    """How many labels of one update are certain, and right where they are known."""
    steps = observed.update.header.protocol.minibatches(observed.update.samples_of_one(target))
    if len(steps) > 1:
        return 0  # the labels that several steps taken for one give are an estimate
    update, _ = observed.update.to_gradient(target)
    try:
        possible = candidates(target, update).labels if update.norm > 0 else ()
    except ValueError:
        return 0
    if len(possible) != 1:
        return 0
    told = possible[0].tolist()
    if observed.labels is None:  # of several samples labels are an estimate
        return 0 if observed.samples > 1 or _changed(target, update) else len(told)
    if target.loss.labels:
        return (Counter(told) & Counter(observed.labels)).total()
    return sum(abs(a - b) <= AGREES * max(1.0, abs(b)) for a, b in zip(told, observed.labels, strict=True))


def _counts(target: Target, observed: Observed) -> dict[float, int] | None:
    """How often each label occurs, estimated; None if the last layer does not tell."""
    update, _ = observed.update.to_gradient(target)
    try:
        return counts(target, update).counts
    except ValueError:
        return None


def _changed(target: Target, update: Update) -> bool:
    """Whether the last layer's gradient is so far from that of one sample that its signs may be anything."""
    use = target.graph.uses[-1] if target.graph.uses else None
    gradient = None if use is None else update.gradients.get(use.weight_name or "")
    if gradient is None or gradient.dim() != 2 or not gradient.any():
        return False
    return leading_pair(gradient.double())[-1] > CHANGED


def _right(target: Target, observed: Observed, found: Features) -> bool:
    """Whether what a layer reads was read off, exactly as far as anyone knows."""
    if observed.truth is not None:
        return _agrees(_value(target, observed.truth, found.value_id), found.x)
    sizes = found.x[found.x != 0].abs()
    signs = len(sizes) > 1 and bool((sizes.max() - sizes.min()) <= AGREES * sizes.max())  # all that a sign leaves
    return not signs and SPREAD * found.std <= AGREES * float(found.x.abs().max())


def _value(target: Target, truth: Tensor, value_id: int) -> Tensor:
    with torch.no_grad():
        return target.network.forward(truth.double().to(target.device))[value_id]


def _agrees(truth: Tensor, found: Tensor) -> bool:
    return bool((truth - found).abs().max() <= AGREES * truth.abs().max())
