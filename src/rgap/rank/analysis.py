"""The rank analysis of a whole network: how it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from rgap.linalg.deadline import share, within
from rgap.linalg.threads import one_thread
from rgap.nn.obstacles import NotAChain
from rgap.rank import measured
from rgap.rank.counts import LargestBatch, LayerRank, Measured, count, largest_batch
from rgap.rank.drawn import Drawn
from rgap.rank.estimated import estimate
from rgap.rank.found import RankAnalysis
from rgap.rank.local import Local, free_dimensions, worth
from rgap.rank.measured import Free, Rows
from rgap.rank.sequence import LayerSequence, layer_sequence, passed
from rgap.target import Target

LARGEST_BASIS = 2**26
"""Entries of the free directions that are followed from one layer to the one before it."""

SECONDS = 10.0
"""For what stays free of the input of a model that is no chain, unless told otherwise."""

Progress = Callable[[LayerRank], None]
Looked = Callable[[int, int], None]


@one_thread()
def rank_analysis(
    target: Target,
    sample: Tensor | None = None,
    batch_size: int | None = None,
    measure: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
    seconds: float = SECONDS,
    looked: Looked = lambda done, of: None,
) -> RankAnalysis:
    """Count and measure the constraints on every layer's input, before any gradient exists.

    Source: R-GAP, Section 4, arXiv:2010.07733, for the counts; the ranks are those of the matrices themselves, with
    the output gradients k and the slopes of one batch. The loss and the label only scale k, which no rank depends on.

    Layers are measured that stand one behind the other, with activations, reordering and batch norm with fixed
    statistics between them. Any other model is counted all the same, layer by layer: `RankAnalysis.notes` says what the
    counts leave out. What stays free of its input to first order is measured (`RankAnalysis.local`).

    Args:
        sample: (b, *input_shape), where to measure; by default drawn uniformly from the target's value range.
        batch_size: of one gradient; by default that of the sample, or the target's.
        measure: whether to measure ranks; the counts alone need no matrix and take no time.
        seed: of the sample drawn, of k at the last layer and of the probes for layers too large to measure.
        progress: called after each layer that was measured, from the last to the first.
        seconds: that measuring what stays free of the input may take: minutes for a large model, whose bound falls as
            long as that goes on. Of a model that is so large that nothing would be seen in the time, it is not begun.
        looked: called with how many directions of the input were looked at, of how many.

    Raises:
        NotAChain: the model cannot be traced, or has no Linear or convolutional layer: there is nothing to count.
        ValueError: batch_size or the sample's shape does not fit.
    """
    if not target.graph.uses:
        raise NotAChain(target.obstacles)
    batch = _batch_size(target, sample, batch_size)
    counts = count(target.graph, batch)
    sequence = layer_sequence(target)
    generator, local = torch.Generator().manual_seed(seed), None
    if measure and sequence is not None:
        counts = _measured(sequence, counts, _sample(target, batch, sample, generator), generator, progress)
    elif measure:
        local = _local(target, _sample(target, batch, sample, generator), generator, seconds, looked)
    # Batch norm with fixed statistics keeps no model from being a chain.
    obstacles = tuple(each for each in target.obstacles if each.what != "batch_norm") if sequence is None else ()
    uncounted = _uncounted(target) if sequence is None else ()
    at_sample = measure and sample is not None
    return RankAnalysis(counts, batch, at_sample, obstacles, _largest_batch(target, measure, seed), local, uncounted)


def _uncounted(target: Target) -> tuple[str, ...]:
    """Parameters whose gradients are sent and that no count knows."""
    counted = {name for use in target.graph.uses for name in (use.weight_name, use.bias_name)}
    norms = {f"{name}." for name, module in target.model.named_modules() if isinstance(module, _BatchNorm)}
    return tuple(
        name for name in target.parameters if name not in counted and f"{name.rpartition('.')[0]}." not in norms
    )


def _local(target: Target, sample: Tensor, generator: torch.Generator, seconds: float, looked: Looked) -> Local | None:
    """What stays free of the samples; None where the model draws at random or cannot be differentiated twice."""
    uses = [(use, target.parameters.get(use.weight_name or "")) for use in target.graph.uses]
    products = sum(use.outputs * use.weight_gradients // len(weight) for use, weight in uses if weight is not None)
    try:
        with within(seconds):
            time = share(1.0) or 0.0
            if worth(len(sample) * products, sample.numel(), time):
                return free_dimensions(target, sample, generator, looked)
            # Of a batch each sample adds what it gives by itself to the gradient, unless norms mix them in training.
            if len(sample) == 1 or target.mode == "training" or not worth(products, sample[0].numel(), time):
                return Local(sample.numel(), sample.numel(), False)
            found = free_dimensions(target, sample[:1], generator, looked)
            return None if found is None else replace(found, alone=True)
    except (RuntimeError, ValueError, NotImplementedError):  # as of batch norm in training mode for a single sample
        return None


def _largest_batch(target: Target, measure: bool, seed: int) -> LargestBatch | None:
    """By count, and measured at drawn batches; None where the closed form cannot pass the model."""
    network = passed(target)
    if network is None:
        return None
    drawn = Drawn(network, target.loss, target.value_range or (0.0, 1.0), seed) if measure else None
    try:
        return largest_batch(network, target.loss, drawn)
    except (RuntimeError, ValueError, NotImplementedError):  # what torch cannot differentiate
        return largest_batch(network, target.loss)


def _batch_size(target: Target, sample: Tensor | None, batch_size: int | None) -> int:
    if sample is not None and (tuple(sample.shape[1:]) != target.input_shape or not len(sample)):
        expected = ", ".join(map(str, target.input_shape))
        raise ValueError(
            f"got a sample of shape {tuple(sample.shape)}, expected (b, {expected}): the batch comes first; "
            "add it with sample[None]"
        )
    if batch_size is None:
        return target.batch_size if sample is None else len(sample)
    if batch_size < 1:
        raise ValueError(f"got batch_size {batch_size}: expected 1 or more")
    if sample is not None and len(sample) != batch_size:
        raise ValueError(f"got batch_size {batch_size} and {len(sample)} sample(s): leave one out or make them agree")
    return batch_size


def _measured(
    layers: LayerSequence,
    counts: tuple[LayerRank, ...],
    sample: Tensor,
    generator: torch.Generator,
    progress: Progress | None,
) -> tuple[LayerRank, ...]:
    """From the last layer to the first, with the directions that the layers so far leave free together."""
    k, slopes = layers.signals(sample, generator)
    found: list[LayerRank] = []
    followed: Tensor | None = None  # free directions of the next layer's input, as moves of this layer's output
    lost = False  # whether some layer's directions could not be computed
    for depth in reversed(range(len(layers))):
        layer_rows = measured.rows(layers[depth], k[depth], slopes[depth])
        own, joint = _layer(layer_rows, followed, depth > 0, lost, generator)
        lost = joint is None or (joint.count > 0 and joint.basis is None and depth > 0)
        found.insert(0, _filled(counts[depth], layer_rows, own, joint))
        if progress is not None:
            progress(found[0])
        if depth and not lost and joint is not None and joint.basis is not None:
            followed = layers.as_output(depth - 1, len(sample), joint.basis)
            lost = followed.numel() > LARGEST_BASIS
    return tuple(found)


def _layer(
    found: Rows, followed: Tensor | None, directions: bool, lost: bool, generator: torch.Generator
) -> tuple[Free, Free | None]:
    """What the layer's own constraints leave free, z being known, and what it and all later layers do together."""
    result = measured.measure(found, directions, None if lost else followed)
    if result is not None:
        own, joint = result
        return own, joint if not lost or own.method == measured.GRADIENT_ALONE else None
    own = estimate(found, generator)
    settled = own.error == 0 and not lost and (followed is None or not len(followed))
    return own, own if settled else None


def _filled(counts: LayerRank, found: Rows, own: Free, joint: Free | None) -> LayerRank:
    return replace(
        counts,
        known_weight_rows=int(found.known.sum()),
        live_gradient_rows=counts.gradient_rows - found.dead * counts.gradient_rows // found.layer.outputs,
        measured=Measured.EXACT if own.exact else Measured.ESTIMATED,
        free=own.count,
        error=own.error,
        method=own.method,
        joint_free=None if joint is None else joint.count,
    )


def _sample(target: Target, batch: int, sample: Tensor | None, generator: torch.Generator) -> Tensor:
    """Where to measure: the sample, or one of noise."""
    if sample is not None:
        return sample
    low, high = target.value_range or (0.0, 1.0)
    return low + (high - low) * torch.rand(batch, *target.input_shape, generator=generator, dtype=torch.float64)
