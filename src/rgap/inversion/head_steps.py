"""The Linear layers at the end of a network as a client of their own, which takes its steps on features.

In one epoch each sample is in one step. What the layers at the end read of it there, its features at the weights that
the layers in front have then, is all that their own gradients know of it: whatever stands in front may move meanwhile.
So the steps of these layers alone tell the features of all samples, and who was in which step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.all_steps import whole_cotangents
from rgap.inversion.walk import Client, Order, Plan, Walk, Weights
from rgap.nn.network import Network
from rgap.nn.ops import Elementwise, Linear, Op


@dataclass(frozen=True, eq=False)
class HeadClient:
    """The layers from the features on."""

    client: Client
    """Whose inputs are features."""
    value_id: int
    """Of the features in the whole network."""

    @classmethod
    def of(cls, client: Client, sent: Mapping[str, Tensor]) -> HeadClient | None:
        """The longest chain of Linear layers on vectors and elementwise operations at the end of a network; None where
        it is the whole network, or has fewer than two layers whose differences were sent.

        Args:
            sent: the difference, by parameter name.
        """
        network, known = client.network(client.weights), client.weights
        first = len(network.nodes)
        while first and network.nodes[first - 1].reads == (first - 1,) and dense(network.nodes[first - 1].op, known):
            first -= 1
        layers = [at for at in range(first, len(network.nodes)) if isinstance(network.nodes[at].op, Linear)]
        entries = {segment.entry for segment in network.segments}
        if len(layers) < 2 or layers[0] not in entries or not layers[0]:
            return None
        ops = tuple(node.op for node in network.nodes[layers[0] :])
        names = [n for op in ops if isinstance(op, Linear) for n in (op.layer.weight_name, op.layer.bias_name) if n]
        if any(name not in sent for name in names):
            return None
        weights = {name: known[name] for name in names}

        def of_head(at: Weights) -> Network:
            whole = client.network({**known, **at})
            return whole.part([segment for segment in whole.segments if segment.entry >= layers[0]])

        def gradient(at: Weights, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            z, back = torch.func.vjp(lambda own: _output(ops, own, x), dict(at))[:2]
            found: dict[str, Tensor] = back(client.loss.output_gradient(z, labels.to(z)) / len(x))[0]
            return found

        shape = tuple(network.shapes[layers[0]])
        return cls(Client(client.loss, shape, weights, of_head, gradient, gradient), layers[0])

    def cotangents(
        self, plan: Plan, features: Float[Tensor, "n u"], labels: Float[Tensor, " n"], order: Order
    ) -> Float[Tensor, "n u"]:
        """Of each sample's features in its step, times what the sample counts in the whole difference."""
        walk = Walk(self.client, plan).all(features, labels, order)
        return whole_cotangents(walk, features, labels, order, 0)


def dense(op: Op, weights: Weights) -> bool:
    """Whether it is a layer on vectors, or acts on each value alone."""
    if isinstance(op, Linear):
        layer, weight = op.layer, weights.get(op.layer.weight_name)
        return weight is not None and weight.shape == (layer.outputs, layer.unknowns) and layer.positions == 1
    return isinstance(op, Elementwise)


def _output(ops: Sequence[Op], weights: Mapping[str, Tensor], x: Tensor) -> Float[Tensor, "b o"]:
    """As torch's functions make it: those that put something in place of kinks see them."""
    value = x.flatten(1)
    for op in ops:
        if isinstance(op, Linear):
            value = value @ weights[op.layer.weight_name].mT
            if op.layer.bias_name is not None:
                value = value + weights[op.layer.bias_name]
        else:
            value = op.forward(value)
    return value
