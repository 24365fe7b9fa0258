"""Any traced model as operations on values: a chain of segments, some of which are blocks with branches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rgap.nn.activations import Activation
from rgap.nn.layers import Layer
from rgap.nn.ops import Elementwise, Op, Trained

Slopes = Mapping[int, Tensor]
"""Of every elementwise operation, by its place, the slope at each of its values."""


@dataclass(frozen=True)
class Node:
    """An operation and the values it reads: 0 is the network's input, i + 1 what node i puts out."""

    op: Op
    reads: tuple[int, ...]
    shape: tuple[int, ...]
    """Of its value, for one sample."""


@dataclass(frozen=True)
class Segment:
    """The nodes between two values that everything passes through: one operation, or a block of several."""

    entry: int
    """The value it begins with."""
    nodes: range
    """Their places; the last one puts out the value it ends with."""

    @property
    def exit(self) -> int:
        return self.nodes.stop

    @property
    def block(self) -> bool:
        """Whether it branches."""
        return len(self.nodes) > 1


@dataclass(frozen=True, eq=False)
class Network:
    """Nodes in the order in which they are computed; the last one's value is the network's output."""

    nodes: tuple[Node, ...]
    input_shape: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        return self.layers[0].weight.device if self.layers else torch.device("cpu")

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer, trained or not."""
        return tuple(node.op.layer for node in self.nodes if isinstance(node.op, Trained))

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """From the input to the output. No operation of a segment reads a value from before its entry."""
        found, entry = [], 0
        last = {value: place for place, node in enumerate(self.nodes) for value in node.reads}
        for place in range(len(self.nodes)):
            # Everything up to this node is read for the last time by it, or comes out of it.
            if all(last.get(value, -1) <= place for value in range(entry, place + 1)):
                found.append(Segment(entry, range(entry, place + 1)))
                entry = place + 1
        return tuple(found)

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of all values of one sample."""
        return (self.input_shape, *(node.shape for node in self.nodes))

    @property
    def scalable(self) -> bool:
        """Whether a scaled input gives a scaled output."""
        return all(node.op.scalable for node in self.nodes)

    def part(self, segments: Sequence[Segment]) -> Network:
        """Consecutive segments as a network of their own."""
        first, last = segments[0].entry, segments[-1].exit
        moved = (replace(node, reads=tuple(value - first for value in node.reads)) for node in self.nodes[first:last])
        return Network(tuple(moved), self.shapes[first])

    def forward(self, x: Tensor) -> list[Tensor]:
        """All values, from the input (s, *input_shape)."""
        values = [x]
        for node in self.nodes:
            values.append(node.op.forward(*(values[at] for at in node.reads)))
        return values

    def slopes(self, values: list[Tensor]) -> dict[int, Tensor]:
        """Of the elementwise operations, at these values."""
        return {place: activation.slope(values[self.nodes[place].reads[0]]) for place, activation in self.activations}

    @cached_property
    def activations(self) -> tuple[tuple[int, Activation], ...]:
        """Places of the elementwise operations."""
        return tuple(
            (place, node.op.activation) for place, node in enumerate(self.nodes) if isinstance(node.op, Elementwise)
        )

    def pull(self, values: list[Tensor], slopes: Slopes, starts: Mapping[int, Tensor]) -> list[Tensor | None]:
        """k of all values (Eq. 6), from the sources of gradient at some of them.

        Args:
            values: of one system; or of as many as k has.
            slopes: in place of those at the values.
            starts: what comes in at a value, by its place; (s, *shape), s the same in all.

        Returns:
            None for values that no gradient gets to.
        """
        ks: list[Tensor | None] = [starts.get(place) for place in range(len(values))]
        for place in reversed(range(len(self.nodes))):
            node, k = self.nodes[place], ks[place + 1]
            if k is None:
                continue
            if place in slopes:
                pulled: tuple[Tensor, ...] = (k * slopes[place],)
            else:
                pulled = node.op.pull(k, tuple(values[at] for at in node.reads))
            for at, more in zip(node.reads, pulled, strict=True):
                there = ks[at]
                ks[at] = more if there is None else there + more
        return ks

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """Of every value, the places of the nodes that read it."""
        found: list[list[int]] = [[] for _ in self.shapes]
        for place, node in enumerate(self.nodes):
            for value in dict.fromkeys(node.reads):
                found[value].append(place)
        return tuple(map(tuple, found))

    def k_of(self, value: int, k_behind: Callable[[int], Tensor | None], slopes: Slopes) -> Tensor | None:
        """k of one value (Eq. 6); None if it is not known behind one of the operations that read it.

        Args:
            k_behind: of another value, by its place.
            slopes: of elementwise operations, as far as they are known.
        """
        total: Tensor | None = None
        for place in self.readers[value]:
            op, reads = self.nodes[place].op, self.nodes[place].reads
            k = k_behind(place + 1) if op.linear or place in slopes else None
            if k is None:
                return None
            if place in slopes:
                pulled: tuple[Tensor, ...] = (k * slopes[place],)
            else:
                pulled = op.pull(k, tuple(k.new_zeros(1, *self.shapes[at]) for at in reads))
            for at, more in zip(reads, pulled, strict=True):
                if at == value:
                    total = more if total is None else total + more
        return total

    def push(self, values: list[Tensor], slopes: Slopes, move: Tensor) -> list[Tensor]:
        """How all values move with the input, to first order; moves (s, *input_shape) at the values of one system."""
        moves = [move]
        for place, node in enumerate(self.nodes):
            if place in slopes:
                moves.append(moves[node.reads[0]] * slopes[place])
            else:
                xs = tuple(values[at] for at in node.reads)
                moves.append(node.op.push(tuple(moves[at] for at in node.reads), xs))
        return moves

    def gradients(self, values: list[Tensor], ks: list[Tensor | None]) -> Iterator[tuple[Layer, Tensor]]:
        """Every layer that is heard, with K x: (s, g, j, i)."""
        for place, node in enumerate(self.nodes):
            k = ks[place + 1]
            if isinstance(node.op, Trained) and node.op.heard and k is not None:
                layer, x = node.op.layer, node.op.layer.pack_input(values[node.reads[0]])
                yield layer, layer.grad_weight(x.expand(len(k), *x.shape[1:]), layer.pack_output(k))

    def __str__(self) -> str:
        return "\n".join(str(node.op) for node in self.nodes)
