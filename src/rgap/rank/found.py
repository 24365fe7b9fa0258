"""What a rank analysis found, and what it says of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from rgap.nn.obstacles import Kind, Obstacle
from rgap.rank.counts import LargestBatch, LayerRank, Measured
from rgap.rank.local import Local
from rgap.rank.summary import Group, names, percent, summarise

FORMAT = 1
"""Version of `RankAnalysis.to_dict`."""
NAMED = 3
"""Layers, or kinds of obstacles, that the verdict names."""


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
    def largest_batch_at_most(self) -> int | None:
        """The same where all layers in front are solved together, which need not succeed: beyond it none is."""
        return None if self.batch is None else self.batch.at_most

    @property
    def largest_batch_measured(self) -> int | None:
        """`largest_batch`, with what drawn batches show: samples that rounding leaves apart, values that activations
        tell. None where that was not measured."""
        return None if self.batch is None else self.batch.measured

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
            seconds = self.local.seconds
            enough = "" if seconds is None else f"; some {100 * math.ceil(seconds / 100)} would do"
            return (
                f"At most {free} of {size} dimensions of the input stay free, {at}: the time was up before it was "
                f"known how many (--budget, in Python seconds={enough})."
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
        if self.batch is not None:
            size, more, fewer = self.batch.size, self.batch.at_most, self.batch.measured
            back = f"samples of one gradient are told apart and followed back up to a batch of {size}, which"
            told = back if size > 1 else "no batch comes back sample by sample:"
            together = f"; solved together, the layers in front may tell up to {more}" if more > max(1, size) else ""
            found.append(f"by count, {told} {self.batch.layer} ends{'' if size > 1 else ' it'}{together}")
            if fewer is not None and 1 < size > fewer:
                found[-1] += f"; measured at drawn batches, {f'up to {fewer}' if fewer > 1 else 'none'}"
            if self.batch_size > 1 and self.joint_free is not None:
                found[-1] += (
                    f"; measured, a batch of {self.batch_size} leaves {self.joint_free or 'no'} dimensions free"
                )
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
            "largest_batch_at_most": self.largest_batch_at_most,
            "largest_batch_measured": self.largest_batch_measured,
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
