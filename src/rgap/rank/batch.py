"""Up to how many samples behind one gradient a network gives everything away, by count."""

from __future__ import annotations

from dataclasses import dataclass

from rgap.inversion.subspace.head import largest_batches
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
    found = []
    for value_id, size in largest_batches(network, loss).items():
        own = LargestBatch(size, _name(network.nodes[value_id]))
        found.append(min([*_in_front(network, value_id), own], key=lambda each: each.size))
    return max(found, key=lambda each: each.size, default=LargestBatch(0, network.layers[-1].name))


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
