"""Up to how many samples behind one gradient a network gives everything away, by count."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rgap.inversion.subspace.head import largest_batch as told_apart
from rgap.nn.losses import Loss
from rgap.nn.network import Network, Node
from rgap.nn.ops import Linear


@dataclass(frozen=True)
class LargestBatch:
    """The largest batch whose samples are told apart and followed back to the input, by count."""

    size: int
    """Samples; below 2 no batch is told apart."""
    layer: str
    """The layer that ends it: the one that tells no more samples apart, or one in front of it whose constraints no
    longer determine its inputs."""


def largest_batch(network: Network, loss: Loss) -> LargestBatch:
    """The best of all places where samples are told apart, each with the layers in front of it.

    A layer in front has |W| gradient constraints for all samples together, and |z| weight constraints for each: with
    |x| > |z| they are enough for up to |W| / (|x| - |z|) samples.
    """
    places = [node_id for node_id, node in enumerate(network.nodes) if _reads_one(node)]
    found = []
    for place, node_id in enumerate(places):
        if any(segment.entry == node_id for segment in network.segments):
            own = LargestBatch(_of_place(network, loss, places[place : place + 2]), _name(network.nodes[node_id]))
            found.append(min([*_in_front(network, node_id), own], key=lambda each: each.size))
    return max(found, key=lambda each: each.size, default=LargestBatch(0, network.layers[-1].name))


def _reads_one(node: Node) -> bool:
    """Whether it is a Linear layer whose gradient is sent, and which reads every sample as one row."""
    op = node.op
    return isinstance(op, Linear) and op.has_gradient and op.layer.positions == 1 and op.layer.groups == 1


def _of_place(network: Network, loss: Loss, told: list[int]) -> int:
    """How many samples are told apart at the first of two layers, as if no other layer sent its gradient."""
    nodes = tuple(
        replace(node, op=replace(node.op, has_gradient=False))
        if isinstance(node.op, Linear) and node_id not in told
        else node
        for node_id, node in enumerate(network.nodes)
    )
    return told_apart(Network(nodes, network.input_shape), loss)


def _in_front(network: Network, node_id: int) -> list[LargestBatch]:
    """For how many samples each layer in front of a place has constraints enough, where that is limited."""
    found = []
    for node in network.nodes[:node_id]:
        if isinstance(node.op, Linear):
            layer = node.op.layer
            short = layer.unknowns - layer.weight_rows
            rows = layer.gradient_rows if node.op.has_gradient else 0
            found += [LargestBatch(rows // short, layer.name)] if short > 0 else []
    return found


def _name(node: Node) -> str:
    assert isinstance(node.op, Linear)
    return node.op.layer.name
