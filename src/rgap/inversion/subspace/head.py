"""Where in a network the samples of a batch can be told apart: a Linear layer and all that is behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.subspace.condition import Condition, CotangentCondition, RowCondition
from rgap.inversion.subspace.span import Span
from rgap.nn.layers import Layer
from rgap.nn.losses import CrossEntropy, Loss
from rgap.nn.network import Network, Segment
from rgap.nn.ops import Linear


@dataclass(frozen=True, eq=False)
class Head:
    """The part of a network from a Linear layer's input, its features, to the output.

    What goes through it is a batch of features and a label for each; the gradients of its layers follow.
    """

    network: Network
    """Its first operation is the Linear layer."""
    loss: Loss
    value_id: int
    """Of the features in the whole network."""
    scalable: bool
    """Whether scaled features give scaled outputs, so that their scale is told by the loss alone."""

    @property
    def layer(self) -> Layer:
        op = self.network.nodes[0].op
        assert isinstance(op, Linear)
        return op.layer

    def values(self, x: Float[Tensor, "s n"]) -> list[Tensor]:
        return self.network.forward(x.reshape(-1, *self.network.input_shape))

    def cotangents(self, values: list[Tensor], labels: Float[Tensor, " s"]) -> list[Tensor | None]:
        """The gradient of each sample's own loss with respect to all values (Eq. 6)."""
        outputs = values[-1].flatten(1)
        k = self.loss.output_gradient(outputs, labels.to(outputs)).reshape(values[-1].shape)
        return self.network.vjp(values, self.network.slopes(values), {len(values) - 1: k})

    def k(self, values: list[Tensor], labels: Float[Tensor, " s"]) -> Float[Tensor, "s o"]:
        """The cotangent behind the first layer."""
        found = self.cotangents(values, labels)[1]
        return torch.zeros_like(values[1]).flatten(1) if found is None else found.flatten(1)

    def direction(self, values: list[Tensor]) -> Float[Tensor, "s o"]:
        """Of a network with one output, the cotangent behind the first layer whatever the label, up to its size."""
        end = {len(values) - 1: torch.ones_like(values[-1])}
        found = self.network.vjp(values, self.network.slopes(values), end)[1]
        return torch.zeros_like(values[1]).flatten(1) if found is None else found.flatten(1)


@dataclass(frozen=True, eq=False)
class Spaces:
    """The spaces in which a head's condition is stated, less the samples that were found."""

    head: Head
    first: Span
    second: Span | None
    """Of the next Linear layer; None where it is too narrow for the samples, or there is none."""
    second_at: int = 0
    """The value in the head that the second layer reads."""

    @property
    def left(self) -> int:
        return self.first.rank

    def reduced(self) -> Spaces:
        second = None if self.second is None else self.second.reduced()
        return Spaces(self.head, self.first.reduced(), second, self.second_at)

    @property
    def smooth(self) -> bool:
        """Whether the cotangent behind the first layer can be differentiated."""
        return not any(activation.kinked for _, activation in self.head.network.activations)

    def condition(self, labels: Float[Tensor, " s"]) -> Condition:
        """Of inputs that are left in the spaces.

        Args:
            labels: of the starts, where the condition asks for them.
        """
        if self.second is None:
            return self.cotangent_condition(labels)
        between = [each for each in self.head.network.segments[1:] if each.exit <= self.second_at]
        return RowCondition(self.first, self.head.network.part(between), self.second)

    def cotangent_condition(self, labels: Float[Tensor, " s"]) -> CotangentCondition:
        segments = self.head.network.segments[1:]
        return CotangentCondition(
            self.first, self.head.network.part(segments) if segments else None, self.head.loss, labels
        )

    def without(self, x: Float[Tensor, "s n"], labels: Float[Tensor, " s"], share: Float[Tensor, " s"]) -> Spaces:
        """Less these samples, each times its share in the gradient."""
        values = self.head.values(x)
        ks = self.head.cotangents(values, labels)
        first, second, k = self.first, self.second, ks[1]
        assert k is not None
        first = first.without(values[0].flatten(1), k.flatten(1), share)
        if second is not None:
            k = ks[self.second_at + 1]
            assert k is not None
            second = second.without(values[self.second_at].flatten(1), k.flatten(1), share)
        return Spaces(self.head, first, second, self.second_at)


def spaces(network: Network, loss: Loss, gradients: Mapping[str, Tensor], eps: float) -> Iterator[Spaces]:
    """Every place where the samples of a batch may be told apart, from the input to the output.

    Args:
        gradients: of the mean over the batch, by parameter name.
        eps: their relative rounding.
    """
    spans: dict[int, Span] = {}

    def span(segment: Segment) -> Span:
        if segment.entry not in spans:
            spans[segment.entry] = _span(network.nodes[segment.nodes[0]].op, gradients, eps)
        return spans[segment.entry]

    for at, segment in enumerate(network.segments):
        if not told(network, segment, gradients):
            continue
        first, behind = span(segment), network.segments[at + 1 :]
        if first.full or first.rank == 0:
            continue
        part = network.part(network.segments[at:])
        head = Head(part, loss, segment.entry, part.scalable)
        following = next((each for each in behind if told(network, each, gradients)), None)
        if following is not None:
            second, plain = span(following), [each for each in behind if each.entry < following.entry]
            # As many equations as unknowns at least are left beside the second row space.
            room = prod(network.shapes[following.entry]) + second.biased - second.rank
            if second.rank == first.rank and room >= first.rank and plain:
                yield Spaces(head, first, second, following.entry - segment.entry)
        alone = Spaces(head, first, None)
        if not alone.smooth and len(part.nodes) == 3 and loss.outputs == 1:
            yield alone  # by which units fire: `rgap.inversion.subspace.pattern`
        unknowns = first.rank - first.biased
        if alone.smooth and _rank(network, segment, loss) - first.rank >= unknowns:
            yield alone


def ranks(network: Network, loss: Loss, gradients: Mapping[str, Tensor], eps: float) -> Iterator[tuple[str, int, int]]:
    """Of each layer whose gradient leaves rank to spare its name, the rank, and how many samples it tells at the most.

    Args:
        gradients, eps: as in `spaces`.
    """
    for segment in network.segments:
        if told(network, segment, gradients):
            found = _span(network.nodes[segment.nodes[0]].op, gradients, eps)
            if found.rank and not found.full:
                yield found.layer.name, found.rank, min(len(found.v) - 1, _rank(network, segment, loss))


def largest_batch(network: Network, loss: Loss) -> int:
    """Up to how many samples are told apart by count, at the best place of the network; 0 if there is none."""
    return max(largest_batches(network, loss).values(), default=0)


def largest_batches(network: Network, loss: Loss) -> dict[int, int]:
    """Of each place where samples are told apart, by the id of the value that its layer reads, up to how many are, by
    count.

    Fewer samples than a layer has inputs and outputs leave its gradient rank to spare; and what lies in a space must
    be more equations than there are unknowns. Measured, it may be less: where activations are nearly straight.
    """
    gradients = {
        name: torch.empty(0) for layer in network.layers for name in (layer.weight_name, layer.bias_name) if name
    }
    places = [at for at, each in enumerate(network.segments) if told(network, each, gradients)]
    found = {}
    for at, following in zip(places, [*places, None][1:], strict=True):
        segment = network.segments[at]
        first, part = _layer(network, segment), network.part(network.segments[at:])
        most = [0]
        if not any(activation.kinked for _, activation in part.activations):
            # outputs - b equations for b unknowns, one less with a bias.
            room = _rank(network, segment, loss) + (first.bias_name is not None)
            most.append(min(room // 2, first.unknowns - 1))
        elif len(part.nodes) == 3 and loss.outputs == 1:
            most.append(min(first.unknowns, first.outputs) - 1)
        if following is not None:
            second = _layer(network, network.segments[following])
            room = (second.unknowns + (second.bias_name is not None)) // 2
            widths = min(first.unknowns, first.outputs, second.unknowns) - 1
            most.append(min(widths, room, _rank(network, network.segments[following], loss)))
        found[segment.entry] = max(most)
    return found


def _layer(network: Network, segment: Segment) -> Layer:
    op = network.nodes[segment.nodes[0]].op
    assert isinstance(op, Linear)
    return op.layer


def _rank(network: Network, segment: Segment, loss: Loss) -> int:
    """The largest rank that a layer's gradient can have with rank to spare."""
    last = segment.exit == len(network.nodes)
    # A softmax's cotangents add up to zero.
    return _layer(network, segment).outputs - (1 if not last or isinstance(loss, CrossEntropy) else 0)


def told(network: Network, segment: Segment, gradients: Mapping[str, Tensor]) -> bool:
    """Whether it is one Linear layer whose gradient was sent and is its own."""
    op = network.nodes[segment.nodes[-1]].op
    return (
        not segment.block
        and isinstance(op, Linear)
        and op.has_gradient
        and op.layer.positions == 1
        and op.layer.groups == 1
        and op.layer.weight_name in gradients
        and op.layer.unknowns == op.layer.weight.shape[-1]
    )


def _span(op: object, gradients: Mapping[str, Tensor], eps: float) -> Span:
    assert isinstance(op, Linear)
    layer = op.layer
    weight = layer.pack_weight(gradients[layer.weight_name].double()[None])[0, 0]
    bias = None if layer.bias_name is None else gradients.get(layer.bias_name)
    return Span.of(layer, weight, None if bias is None else bias.double(), eps)
