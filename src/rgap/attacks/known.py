"""What an update tells exactly beside its gradient: values that layers read, labels, statistics of batch norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rgap.attacks.features import features, nonzero
from rgap.inversion.batch import find_features
from rgap.inversion.subspace.peel import Search
from rgap.nn.reads import read_by
from rgap.target import Target
from rgap.update import Update

SEARCH = Search()


@dataclass(frozen=True, eq=False)
class Known:
    """Of one update, by the name that `Target.gradient_function` gives to what a module reads."""

    modules: tuple[str, ...] = ()
    """That are listened to."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """(b, n): what a layer reads of every sample."""
    labels: Tensor | None = None
    """(b,): of the samples in the same order; None if they have no order or are not known with it."""
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """(2, channels): mean and variance of what a batch norm reads."""
    assumptions: tuple[str, ...] = ()


def known(target: Target, update: Update, values: bool, statistics: bool) -> Known:
    """What is known exactly of one update.

    Args:
        values, statistics: whether they are asked for.
    """
    found = _values(target, update) if values else Known()
    if statistics and update.buffers:
        told = target.batch_statistics(update.buffers, update.samples(target))
        names = {mean.removesuffix(".running_mean"): each for mean, each in told.items()}
        if names:
            taken = {read_by(n): torch.stack([each.mean, each.variance]) for n, each in names.items()}
            note = f"mean and variance of what {', '.join(names)} read, from the running statistics that were sent"
            modules = tuple(dict.fromkeys((*found.modules, *names)))
            found = Known(modules, found.values, found.labels, taken, (*found.assumptions, note))
    return found


def _values(target: Target, update: Update) -> Known:
    """What the first layer reads of which the gradient tells it exactly."""
    samples = update.samples(target)
    if samples == 1:
        single = features(target, update)
        if single is None:
            return Known()
        return _listened(target, single.layer, single.x.reshape(1, -1), None)
    try:
        network = target.network
    except NotImplementedError:
        return Known()
    gradients = nonzero(target, update)
    if any(name not in gradients for name in update.gradients):
        return Known()
    batch = find_features(network, target.loss, gradients, update.precision, samples, SEARCH, lambda done, loss: None)
    if batch is None or batch.found != samples or not batch.residual(gradients) <= update.tolerance:
        return Known()
    times = torch.tensor(batch.times, device=batch.samples.x.device)
    x, labels = (t.repeat_interleave(times, 0) for t in (batch.samples.x, batch.samples.labels))
    return _listened(target, batch.layer, x.reshape(samples, -1), labels)


def _listened(target: Target, layer: str, values: Tensor, labels: Tensor | None) -> Known:
    """The same, if the layer is a module that can be listened to; nothing if it is not."""
    if layer not in dict(target.model.named_modules()):
        return Known()
    gradient = target.gradient_function(torch.float64, plain=True, reads=[layer])
    x = torch.zeros(len(values), *target.input_shape, dtype=torch.float64, device=target.device)
    weights = x.new_full((len(x), len(target.loss.labels) or 1), 0.5)
    seen = gradient(x, weights).get(read_by(layer))
    if seen is None or seen.shape[0] != len(values) or seen[0].numel() != values.shape[1]:
        return Known()
    of = "the values" if labels is None else f"labels and values of all {len(values)} samples"
    note = f"{of} that {layer} reads, exactly, from the gradients behind them"
    return Known((layer,), {read_by(layer): values}, labels, {}, (note,))
