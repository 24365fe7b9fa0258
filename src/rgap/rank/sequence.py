"""A network whose layers stand one behind the other, with nothing lost between them: where ranks are measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.nn.layers import Layer
from rgap.nn.network import Network
from rgap.nn.obstacles import Kind
from rgap.nn.ops import Affine, Elementwise, Gather, Linear, Op
from rgap.target import Target


@dataclass(frozen=True, eq=False)
class LayerSequence:
    """Layers, with activations, known factors and reorderings of values between them."""

    network: Network

    @cached_property
    def node_ids(self) -> tuple[int, ...]:
        """Of the layers."""
        return tuple(at for at, node in enumerate(self.network.nodes) if isinstance(node.op, Linear))

    def __len__(self) -> int:
        return len(self.node_ids)

    def __getitem__(self, depth: int) -> Layer:
        return self.network.layers[depth]

    def signals(
        self, sample: Float[Tensor, "b ..."], generator: torch.Generator
    ) -> tuple[list[Float[Tensor, "b o p"]], list[Float[Tensor, "b o p"]]]:
        """k of every layer's output, from a random one at the last, and the slope of what stands behind the layer."""
        network, last = self.network, self.node_ids[-1]
        values = network.forward(sample.to(network.device, torch.float64))
        slopes = network.slopes(values)
        end = self[-1].pack_output(values[last + 1])
        drawn = torch.randn(end.shape, generator=generator, dtype=torch.float64).to(end.device)
        cotangents = network.vjp(values, slopes, {last + 1: self[-1].unpack_output(drawn)})
        k = [self[depth].pack_output(_there(cotangents[at + 1])) for depth, at in enumerate(self.node_ids)]
        return k, [self._slope(depth, slopes, len(sample)) for depth in range(len(self))]

    def _slope(self, depth: int, slopes: dict[int, Tensor], batch: int) -> Float[Tensor, "b o p"]:
        """Of the next layer's input in this layer's output, value by value."""
        layer = self[depth]
        if depth + 1 == len(self):
            return layer.weight.new_ones(batch, layer.outputs, layer.positions)
        slope = layer.weight.new_ones(batch, *self[depth + 1].input_shape)
        for node_id, op in self._behind(depth):
            like = slope.new_zeros(1, *self.network.shapes[node_id])
            slope = slope * slopes[node_id] if node_id in slopes else op.vjp(slope, (like,))[0]
        return layer.pack_output(slope)

    def as_output(self, depth: int, batch: int, basis: Float[Tensor, "f c bn"]) -> Float[Tensor, "f o bp"]:
        """Directions of the next layer's input, samples side by side, at the places of this layer's output."""
        layer, after, count = self[depth], self[depth + 1], len(basis)
        samples = basis.reshape(count, after.channels, batch, after.pixels).transpose(1, 2).flatten(0, 1)
        out = after.unpack_input(samples)
        for _, op in self._behind(depth):
            if isinstance(op, Gather):
                out = op.vjp(out, (out,))[0]
        packed = layer.pack_output(out)
        return packed.reshape(count, batch, layer.outputs, layer.positions).transpose(1, 2).flatten(2)

    def _behind(self, depth: int) -> Iterator[tuple[int, Op]]:
        """The operations between a layer and the next, the last one first."""
        for node_id in reversed(range(self.node_ids[depth] + 1, self.node_ids[depth + 1])):
            yield node_id, self.network.nodes[node_id].op


def passed(target: Target) -> Network | None:
    """A target's network; None where an obstacle stops the closed form, or an operation is not known."""
    if any(obstacle.kind is not Kind.PASSED for obstacle in target.obstacles):
        return None
    try:
        return target.network
    except NotImplementedError:
        return None


def layer_sequence(target: Target) -> LayerSequence | None:
    """The layers of a target; None where something else stands between them, or a gradient is not of one layer."""
    network = passed(target)
    if network is None or any(node.reads != (at,) for at, node in enumerate(network.nodes)):
        return None
    ops = [node.op for node in network.nodes]
    at = [node_id for node_id, op in enumerate(ops) if isinstance(op, Linear)]
    inside = all(_keeps_all(op) or isinstance(op, Elementwise) for op in ops[at[0] : at[-1]])
    around = all(_keeps_all(op) for op in (*ops[: at[0]], *ops[at[-1] :]))
    # The counts take a layer with its padding, where the network may have made both one.
    sizes = [use.unknowns for use in target.graph.uses]
    if not inside or not around or [layer.unknowns for layer in network.layers] != sizes:
        return None
    return LayerSequence(network)


def _keeps_all(op: Op) -> bool:
    """Whether every value of the input is one of the output's, known up to a known factor; or a layer of its own."""
    if isinstance(op, Linear):
        return op.has_gradient
    if isinstance(op, Affine):
        return bool((op.scale != 0).all())
    if not isinstance(op, Gather) or op.index.numel() != op.size:
        return False
    return bool((op.index.sort().values == torch.arange(op.size, device=op.index.device)).all())


def _there(cotangent: Tensor | None) -> Tensor:
    assert cotangent is not None, "every layer stands on the way from the input to the output"
    return cotangent
