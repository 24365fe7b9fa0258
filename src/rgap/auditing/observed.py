"""The updates that an audit attacks, and what the auditor knows of the samples behind each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rgap.protocol import Protocol
from rgap.tables import labels as labels_of
from rgap.tables import samples_of
from rgap.target import Target
from rgap.update import Update, capture

Truth = tuple[Tensor, Sequence[float]]
"""The samples behind one update, (b, *input_shape), and their labels: for the comparison alone."""


@dataclass(frozen=True, eq=False)
class Observed:
    """One update, and what is known of the samples behind it."""

    update: Update
    names: tuple[str, ...]
    """One for each sample."""
    truth: Tensor | None = None
    """(b, *input_shape); None if the auditor does not know the samples."""
    labels: tuple[float, ...] | None = None
    made_here: bool = False
    """Whether the auditor made the update of these samples."""

    @property
    def samples(self) -> int:
        return len(self.names)


def captured(
    target: Target, samples: Any, labels: Sequence[float | int] | None, protocol: Protocol
) -> tuple[list[Observed], str | None]:
    """What clients with these samples would send, and what had to be left out; see `rgap.audit`.

    Raises:
        ValueError: samples or labels do not fit.
    """
    known = samples_of(samples)
    inputs, names = known.inputs, known.names
    group = target.batch_size * protocol.clients
    count = len(inputs) // group * group
    if not count:
        raise ValueError(
            f"got {len(inputs)} samples, expected {group} or more: batch size {target.batch_size} "
            f"times {protocol.clients} clients"
        )
    given = labels_of(known, target.loss) if labels is None else [float(label) for label in labels]
    if len(given) != len(inputs):
        raise ValueError(f"got {len(given)} labels for {len(inputs)} samples, expected one for each")
    found = []
    for start in range(0, count, group):
        own = slice(start, start + group)
        own_labels = tuple(float(label) for label in given[own])
        update = capture(target, inputs[own], torch.tensor(own_labels), protocol)
        found.append(Observed(update, names[own], inputs[own], own_labels, made_here=True))
    left_out = len(inputs) - count
    return found, f"{left_out} samples that do not fill another update" if left_out else None


def received(target: Target, updates: Mapping[str, Update], truth: Mapping[str, Truth]) -> list[Observed]:
    """Updates that a server got, by the names of those who sent them; see `rgap.audit_updates`.

    Raises:
        ValueError: there is none, the truth belongs to no update, or it does not fit.
        UpdateError: an update is not one of the target's.
    """
    if not updates:
        raise ValueError("got no updates, expected one or more by name, such as {'client-1': update}")
    unknown = [name for name in truth if name not in updates]
    if unknown:
        raise ValueError(f"got the truth of {', '.join(unknown)}, expected some of {', '.join(updates)}")
    found = []
    for name, update in updates.items():
        update.check(target)
        one = of_nobody_knows(name, update, target)
        if name not in truth:
            found.append(one)
            continue
        (inputs, labels), count = truth[name], one.samples
        if tuple(inputs.shape) != (count, *target.input_shape) or len(labels) != count:
            raise ValueError(
                f"{name}: got samples of shape {tuple(inputs.shape)} and {len(labels)} labels, expected "
                f"({count}, {', '.join(map(str, target.input_shape))}) and {count} labels: the update says that it "
                f"comes from {count} samples"
            )
        found.append(replace(one, truth=inputs, labels=tuple(float(label) for label in labels)))
    return found


def of_nobody_knows(name: str, update: Update, target: Target) -> Observed:
    """An update whose samples are not known, with a name for each."""
    count = update.samples(target)
    return Observed(update, (name,) if count == 1 else tuple(f"{name}, sample {at + 1}" for at in range(count)))


def digest(sent: Sequence[Observed]) -> str:
    """SHA-256 over the samples that are known, and over updates that were not made of them here."""
    found = hashlib.sha256()
    for each in sent:
        known = [] if each.truth is None else [each.truth]
        for tensor in (*known, *(() if each.made_here else each.update.gradients.values())):
            found.update(tensor.detach().cpu().double().contiguous().numpy().tobytes())
    return found.hexdigest()
