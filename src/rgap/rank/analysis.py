"""The rank analysis of a whole network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from rgap.linalg.deadline import share, within
from rgap.linalg.threads import one_thread
from rgap.nn.obstacles import Kind, NotAChain, Obstacle
from rgap.rank import measured
from rgap.rank.counts import LargestBatch, LayerRank, Measured, count, largest_batch
from rgap.rank.estimated import estimate
from rgap.rank.local import Local, free_dimensions, worth
from rgap.rank.measured import Free, Rows
from rgap.rank.sequence import LayerSequence, layer_sequence, passed
from rgap.rank.summary import Group, names, percent, summarise
from rgap.target import Target

FORMAT = 1
"""Version of `RankAnalysis.to_dict`."""
LARGEST_BASIS = 2**26
"""Entries of the free directions that are followed from one layer to the one before it."""

SECONDS = 10.0
"""For what stays free of the input of a model that is no chain, unless told otherwise."""
NAMED = 3
"""Layers, or kinds of obstacles, that the verdict names."""

Progress = Callable[[LayerRank], None]
Looked = Callable[[int, int], None]


@dataclass(frozen=True)
class RankAnalysis:
    """Unknowns against constraints for every layer, from the input to the output."""

    layers: tuple[LayerRank, ...]
    batch_size: int
    at_sample: bool
    """Whether the ranks were measured at a given sample, not at a random one."""
    obstacles: tuple[Obstacle, ...] = ()
    """Why ranks cannot be measured; if there is a reason, the counts are all there is."""
    batch: LargestBatch | None = None
    """Up to how many samples behind one gradient the network gives everything away, by count; None if the closed form
    cannot pass it."""
    local: Local | None = None
    """What stays free to first order, whatever the attack; measured where the ranks of single layers are not."""
    uncounted: tuple[str, ...] = ()
    """Parameters of a model that is no chain that belong to no layer that is counted, but for batch norm's."""

    @property
    def largest_batch(self) -> int | None:
        """Samples of the largest batch that the network gives away, by count; None if that cannot be said."""
        return None if self.batch is None else self.batch.size

    @property
    def largest_batch_layer(self) -> str | None:
        """The layer that ends it."""
        return None if self.batch is None else self.batch.layer

    @property
    def index(self) -> int:
        """The paper's index of the network: the largest over its layers."""
        return max(layer.index for layer in self.layers)

    @property
    def critical(self) -> LayerRank:
        """The layer with the largest index."""
        return max(self.layers, key=lambda layer: layer.index)

    @property
    def unknowns(self) -> int:
        """Dimensions of the input that `joint_free` counts."""
        return self.layers[0].unknowns if self.local is None else self.local.unknowns

    @property
    def joint_free(self) -> int | None:
        """Dimensions of the input that the gradients of all layers together leave free; None if not measured."""
        if self.local is not None:
            return self.local.free if self.local.complete and not self.local.alone else None
        return self.layers[0].joint_free

    @property
    def leaky(self) -> tuple[LayerRank, ...]:
        """The layers whose own constraints leave part of their input free."""
        return tuple(layer for layer in self.layers if layer.free)

    @property
    def protecting(self) -> LayerRank | None:
        """The layer nearest the output whose free dimensions reach the input; None if none do, or it is not known."""
        if not self.joint_free:
            return None
        reaching = None
        for layer in self.layers:
            if not layer.joint_free:
                break
            reaching = layer if layer.free else reaching
        return reaching

    @property
    def verdict(self) -> str:
        """Which layer protects the input, in a sentence or two."""
        size, joint = self.unknowns, self.joint_free
        by_count = f"the paper's index is {self.index}"
        if self.obstacles or self.local is not None:
            return self._counted
        if self.layers[0].measured is Measured.NO:
            if self.index > 0:
                return f"By counting, {self.critical.name} protects the input: {by_count}. Ranks were not measured."
            return f"By counting, no layer protects the input: {by_count}. Ranks were not measured."
        stated = self._leaks
        if joint is None:
            return f"Whether a layer protects the input is not decided: {stated}, but not all layers could be followed."
        against = f" Counting says otherwise: {by_count}." if (self.index > 0) != (joint > 0) else ""
        if joint == 0 and not stated:
            return f"No layer protects the input: the constraints of every layer determine its input.{against}"
        if joint == 0:
            return (
                f"No layer protects the input: {stated}, which stops the recursion layer by layer, but with the "
                f"gradients of the layers before it everything is determined.{against}"
            )
        layer = self.protecting
        name = "Unread pixels protect part of the input" if layer is None else f"{layer.name} protects the input"
        unread = f" ({self.layers[0].unseen} are read by no kernel)" if self.layers[0].unseen else ""
        return (
            f"{name}: {joint} of its {size} dimensions ({percent(joint / size)}) stay free{unread}, whatever all "
            f"layers tell together; {stated}.{against}"
        )

    @property
    def _counted(self) -> str:
        """The verdict on a model whose ranks cannot be measured."""
        short = [layer for layer in self.layers if layer.index > 0]
        if short:
            stated = (
                f"By counting, {len(short)} of {len(self.layers)} layers have fewer constraints than inputs, "
                f"{self.critical.name} by the most: its index is {self.index}."
            )
        else:
            stated = f"By counting, every layer has as many constraints as inputs: the paper's index is {self.index}."
        stops = [obstacle for obstacle in self.obstacles if obstacle.kind is not Kind.PASSED]
        groups = sorted(summarise(stops or self.obstacles), key=lambda group: -group.count)
        more = f" and {len(groups) - NAMED} more kinds" if len(groups) > NAMED else ""
        named = ", ".join(str(group) for group in groups[:NAMED]) + more
        why = f"the recursion cannot pass this model ({named})" if stops else "it is no plain chain"
        why += f", with {named}" if named and not stops else ""
        alone = "the counts take each layer alone, as if skip connections, normalisation and pooling were not there"
        if self.local is None:
            nothing = f"This says nothing certain of the model's input: {why}, so ranks were not measured"
            return f"{stated} {nothing}, and {alone}."
        return f"{self._free} {stated} But {alone}: {why}."

    @property
    def _free(self) -> str:
        """What stays free of the input, whatever the attack."""
        assert self.local is not None
        size, free = self.unknowns, self.local.free
        at = "at the sample" if self.at_sample else "at a drawn input"
        if self.local.alone:
            one = replace(self, batch_size=1, local=replace(self.local, alone=False))
            no_fewer = " In a batch no fewer of each stay free." if free and self.local.complete else ""
            return (
                f"What stays free of a batch of {self.batch_size} was not measured, which takes longer. Of one sample "
                f"by itself: {one._free}{no_fewer}"
            )
        if not self.local.complete and free == size:
            return (
                "What stays free of the input was not measured: it takes more time than was given (--budget, in Python "
                "seconds=)."
            )
        if not self.local.complete:
            return (
                f"At most {free} of {size} dimensions of the input stay free, {at}: the time was up before it was "
                "known how many (--budget, in Python seconds=)."
            )
        if not free:
            return (
                f"No dimension of the input stays free, measured {at}: near it the gradients tell every input apart. "
                "Whether an attack finds it is another question (rgap audit)."
            )
        return (
            f"{free} of {size} dimensions of the input ({percent(free / size)}) stay free, whatever the attack: along "
            f"them nothing that is sent changes, measured {at}. An attack can only guess them from what is usual."
        )

    @property
    def groups(self) -> tuple[Group, ...]:
        """The obstacles, those of one kind together."""
        return summarise(self.obstacles)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know beside the numbers."""
        found = [
            f"{'no plain chain' if group.kind is Kind.PASSED else 'in the way'}: {group} ({group.kind.value}). "
            f"{group.remedy}"
            for group in self.groups
        ]
        unsent = [layer.name for layer in self.layers if not layer.gradient_rows]
        if unsent:
            found.append(f"no gradient is sent for the weights of {names(unsent)}: |W| is 0")
        if self.uncounted:
            found.append(
                f"the gradients of {names(self.uncounted)} are in no count: only those of Linear and convolutional "
                "layers are"
            )
        unread = [layer.name for layer in self.layers if layer.reads is None]
        if unread:
            found.append(f"the input of {names(unread)} is no single layer's output: no |V| is handed down, it is 0")
        shared = [f"{layer.name} ({layer.uses} times)" for layer in self.layers if layer.uses > 1]
        if shared:
            found.append(f"used several times, |x|, |z| and |V| added up and |W| once: {names(shared)}")
        if self.batch is not None and self.batch.size > 1:
            found.append(
                "by count, samples of one gradient are told apart and followed back "
                f"up to a batch of {self.batch.size}, which {self.batch.layer} ends"
            )
        elif self.batch is not None:
            found.append(f"by count, no batch comes back sample by sample: {self.batch.layer} ends it")
        biases = sum(layer.bias_rows for layer in self.layers)
        if biases:
            found.append(f"{biases} gradients of biases are further constraints that the paper's index does not count")
        return tuple(found)

    @property
    def _leaks(self) -> str:
        """The leaky layers: those whose gaps no earlier layer closes, or all where every gap is closed."""
        closed = next((at for at, layer in enumerate(self.layers) if layer.joint_free == 0), len(self.layers))
        found = [layer for layer in self.layers[:closed] if layer.free] or self.leaky
        parts = [f"{layer.name} leaves {about(layer)} of its {layer.unknowns} inputs free" for layer in found[:NAMED]]
        return ", ".join(parts) + (f" and {len(found) - NAMED} more layers leave some" if len(found) > NAMED else "")

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "format": FORMAT,
            "kind": "rgap.rank",
            "verdict": self.verdict,
            "index": self.index,
            "critical": self.critical.name,
            "joint_free": self.joint_free,
            "free_at_most": None if self.local is None or self.local.alone else self.local.free,
            "free_alone": self.local.free if self.local and self.local.alone and self.local.complete else None,
            "largest_batch": self.largest_batch,
            "largest_batch_layer": self.largest_batch_layer,
            "batch_size": self.batch_size,
            "at_sample": self.at_sample,
            "notes": list(self.notes),
            "obstacles": [group.to_dict() for group in self.groups],
            "layers": [
                asdict(layer)
                | {"measured": layer.measured.value, "index": layer.index, "own_index": layer.own_index}
                | {"rank": layer.rank}
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        header = ("layer", "|x|", "|W|", "|z|", "|V|", "index", "rank", "free", "joint", "measured")
        lines: list[tuple[str, ...]] = [header]
        for layer in self.layers:
            how = layer.measured.value + (f": {layer.method}" if layer.method else "")
            numbers = (layer.unknowns, layer.gradient_rows, layer.weight_rows, layer.virtual_rows, layer.index)
            joint = "-" if layer.joint_free is None else str(layer.joint_free)
            rank = "-" if layer.rank is None else str(layer.rank)
            lines.append((layer.name, *map(str, numbers), rank, about(layer), joint, how))
        widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
        table = [
            "  ".join(
                cell.ljust(width) if at in (0, len(header) - 1) else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([*table, f"index of the network: {self.index} ({self.critical.name})", *notes, self.verdict])


def about(layer: LayerRank) -> str:
    """The free dimensions, with how far they may be off."""
    if layer.free is None:
        return "-"
    return f"{layer.free}+-{layer.error}" if layer.error else str(layer.free)


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
    return RankAnalysis(counts, batch, at_sample, obstacles, _largest_batch(target), local, uncounted)


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


def _largest_batch(target: Target) -> LargestBatch | None:
    """By count; None where the closed form cannot pass the model."""
    network = passed(target)
    return None if network is None else largest_batch(network, target.loss)


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
