"""Any traced model as operations on values: a chain of segments, some of which are blocks with branches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rgap.nn.activation import Activation
from rgap.nn.batch_norm import BatchNorm, OwnBatchNorm
from rgap.nn.layers import Layer
from rgap.nn.ops import Elementwise, Linear, Op

Slopes = Mapping[int, Tensor]
"""Of every elementwise operation, by its node_id, the slope at each of its values."""


@dataclass(frozen=True)
class Node:
    """An operation and the ids of the values it reads: 0 is the network's input, i + 1 what node i puts out."""

    op: Op
    reads: tuple[int, ...]
    shape: tuple[int, ...]
    """Of its value_id, for one sample."""


@dataclass(frozen=True)
class Segment:
    """The nodes between two values that everything passes through: one operation, or a block of several."""

    entry: int
    """The id of the value it begins with."""
    nodes: range
    """Their ids; the last one puts out the value it ends with."""

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
        """Every layer in the order in which they are computed, trained or not."""
        return tuple(node.op.layer for node in self.nodes if isinstance(node.op, Linear))

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """From the input to the output. No operation of a segment reads a value from before its entry."""
        found, entry = [], 0
        last = {value_id: node_id for node_id, node in enumerate(self.nodes) for value_id in node.reads}
        for node_id in range(len(self.nodes)):
            # Everything up to this node is read for the last time by it, or comes out of it.
            if all(last.get(value_id, -1) <= node_id for value_id in range(entry, node_id + 1)):
                found.append(Segment(entry, range(entry, node_id + 1)))
                entry = node_id + 1
        return tuple(found)

    @cached_property
    def last_read(self) -> tuple[tuple[int, ...], ...]:
        """Of every node the ids of the values that none behind it reads."""
        last = {value_id: node_id for node_id, node in enumerate(self.nodes) for value_id in node.reads}
        found: list[list[int]] = [[] for _ in self.nodes]
        for value_id, node_id in last.items():
            found[node_id].append(value_id)
        return tuple(map(tuple, found))

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of all values of one sample."""
        return (self.input_shape, *(node.shape for node in self.nodes))

    @property
    def scalable(self) -> bool:
        """Whether a scaled input gives a scaled output."""
        return all(node.op.scalable for node in self.nodes)

    @property
    def homogeneous(self) -> bool:
        """Whether everything but biases is: then Eq. 10 holds from layer to layer."""
        return all(node.op.scalable or isinstance(node.op, Linear) for node in self.nodes)

    def part(self, segments: Sequence[Segment]) -> Network:
        """Consecutive segments as a network of their own."""
        first, last = segments[0].entry, segments[-1].exit
        nodes = (
            replace(node, reads=tuple(value_id - first for value_id in node.reads)) for node in self.nodes[first:last]
        )
        return Network(tuple(nodes), self.shapes[first])

    def up_to(self, value_id: int) -> Network:
        """The segments from the input to a value."""
        return self.part([segment for segment in self.segments if segment.exit <= value_id])

    @cached_property
    def own(self) -> Network:
        """The same, with batch norms in training mode that take the statistics of their values, and not those that
        were told; itself where there are none."""
        if not any(isinstance(node.op, BatchNorm) for node in self.nodes):
            return self
        nodes = (replace(node, op=node.op.own) if isinstance(node.op, BatchNorm) else node for node in self.nodes)
        return Network(tuple(nodes), self.input_shape)

    @cached_property
    def single(self) -> Network | None:
        """The same in float32, for derivatives that need no more; None if an operation cannot be had so."""
        ops = [node.op.single for node in self.nodes]
        if self.coupled or any(op is None for op in ops):
            return None
        nodes = (replace(node, op=op) for node, op in zip(self.nodes, ops, strict=True) if op is not None)
        return Network(tuple(nodes), self.input_shape)

    @cached_property
    def told_precision(self) -> float:
        """How precise cotangents are that running statistics tell of batch norms in training mode; 0 without those."""
        return max((node.op.precision for node in self.nodes if isinstance(node.op, BatchNorm)), default=0.0)

    @cached_property
    def coupled(self) -> bool:
        """Whether a cotangent depends on values by more than slopes: on sums over a batch, told or not."""
        return any(isinstance(node.op, (BatchNorm, OwnBatchNorm)) for node in self.nodes)

    def forward(self, x: Tensor) -> list[Tensor]:
        """All values, from the input (s, *input_shape)."""
        values = [x]
        for node in self.nodes:
            values.append(node.op.forward(*(values[value_id] for value_id in node.reads)))
        return values

    def slopes(self, values: list[Tensor]) -> dict[int, Tensor]:
        """Of the elementwise operations, at these values."""
        return {node_id: f.slope(values[self.nodes[node_id].reads[0]]) for node_id, f in self.activations}

    @cached_property
    def activations(self) -> tuple[tuple[int, Activation], ...]:
        """The elementwise operations by their node ids."""
        return tuple((i, node.op.activation) for i, node in enumerate(self.nodes) if isinstance(node.op, Elementwise))

    def vjp(self, values: list[Tensor], slopes: Slopes, starts: Mapping[int, Tensor]) -> list[Tensor | None]:
        """The cotangents of all values (Eq. 6), from the sources of gradient at some of them.

        Args:
            values: of one system; or of as many as there are cotangents.
            slopes: in place of those at the values.
            starts: what comes in at a value, by its id; (s, *shape), s the same in all.

        Returns:
            None for values that no gradient gets to.
        """
        ks: list[Tensor | None] = [starts.get(value_id) for value_id in range(len(values))]
        for node_id in reversed(range(len(self.nodes))):
            node, k = self.nodes[node_id], ks[node_id + 1]
            if k is None:
                continue
            if node_id in slopes:
                cotangents: tuple[Tensor, ...] = (k * slopes[node_id],)
            else:
                cotangents = node.op.vjp(k, tuple(values[value_id] for value_id in node.reads))
            for value_id, more in zip(node.reads, cotangents, strict=True):
                there = ks[value_id]
                ks[value_id] = more if there is None else there + more
        return ks

    def cotangents(self, values: list[Tensor], slopes: Slopes, k: Tensor) -> list[Tensor | None]:
        """The cotangents of all values at the true inputs, from that of the output; see `vjp`."""
        starts = {len(values) - 1: k}
        for node in self.nodes:
            more = node.op.source(values[node.reads[0]])
            if more is not None:
                starts[node.reads[0]] = starts.get(node.reads[0], 0) + more
        return self.vjp(values, slopes, starts)

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """Of every value, the ids of the nodes that read it."""
        found: list[list[int]] = [[] for _ in self.shapes]
        for node_id, node in enumerate(self.nodes):
            for value_id in dict.fromkeys(node.reads):
                found[value_id].append(node_id)
        return tuple(map(tuple, found))

    def cotangent_of(
        self,
        value_id: int,
        behind: Callable[[int], Tensor | None],
        slopes: Slopes,
        known: Callable[[int], Tensor | None] = lambda _: None,
    ) -> Tensor | None:
        """The cotangent of one value (Eq. 6); None if it is not known behind one of the operations that read it.

        Args:
            behind: the cotangent of another value, by its id.
            slopes: of elementwise operations, as far as they are known.
            known: a value, by its id.
        """
        total: Tensor | None = None
        for node_id in self.readers[value_id]:
            op, reads = self.nodes[node_id].op, self.nodes[node_id].reads
            k, x = (behind(node_id + 1) if op.linear or node_id in slopes else None), known(reads[0])
            if isinstance(op, BatchNorm) and x is not None:
                k = behind(node_id + 1)
                total = op.source(x) if total is None else total + op.source(x)
            if k is None:
                return None
            if node_id in slopes:
                cotangents: tuple[Tensor, ...] = (k * slopes[node_id],)
            else:
                cotangents = op.vjp(k, tuple(k.new_zeros(1, *self.shapes[each]) for each in reads))
            for each, more in zip(reads, cotangents, strict=True):
                if each == value_id:
                    total = more if total is None else total + more
        return total

    def jvp(self, values: list[Tensor], slopes: Slopes, tangent: Tensor) -> list[Tensor]:
        """The tangents of all values from the input's, (s, *input_shape), at the values of one system."""
        tangents = [tangent]
        for node_id, node in enumerate(self.nodes):
            if node_id in slopes:
                tangents.append(tangents[node.reads[0]] * slopes[node_id])
            else:
                xs = tuple(values[value_id] for value_id in node.reads)
                tangents.append(node.op.jvp(tuple(tangents[value_id] for value_id in node.reads), xs))
        return tangents

    def gradients(self, values: list[Tensor], ks: list[Tensor | None]) -> Iterator[tuple[Layer, Tensor]]:
        """Every layer that has a gradient of its own, with K x: (s, g, j, i)."""
        for node_id, node in enumerate(self.nodes):
            k = ks[node_id + 1]
            if isinstance(node.op, Linear) and node.op.has_gradient and k is not None:
                layer, x = node.op.layer, node.op.layer.pack_input(values[node.reads[0]])
                yield layer, layer.grad_weight(x.expand(len(k), *x.shape[1:]), layer.pack_output(k))

    def __str__(self) -> str:
        return "\n".join(str(node.op) for node in self.nodes)
