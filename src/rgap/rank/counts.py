"""Counting unknowns against constraints, layer by layer (Section 4 of R-GAP, arXiv:2010.07733)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from math import prod
from types import MappingProxyType

from rgap.inversion.by_values import MANY
from rgap.inversion.shared_null_space import virtual_rows
from rgap.inversion.subspace.head import largest_batches
from rgap.nn.activations import ReLU
from rgap.nn.graph import Graph, Use
from rgap.nn.losses import Loss
from rgap.nn.network import Network, Node
from rgap.nn.non_monotone import NonMonotone
from rgap.nn.ops import Elementwise, Linear
from rgap.rank.drawn import Drawn
from rgap.rank.measured import residue_classes

INPUT = "input"
"""What the first layer reads."""


class Measured(Enum):
    """How far the number of free dimensions can be relied on."""

    NO = "not measured"
    EXACT = "exact"
    ESTIMATED = "estimated"


@dataclass(frozen=True)
class LayerRank:
    """Unknowns and constraints of one layer, for the whole batch, and what the constraints leave free."""

    name: str
    unknowns: int
    """|x|: the values of the layer's input."""
    gradient_rows: int
    """|W|: one constraint for each weight (Eq. 15), however large the batch; 0 if the weight's gradient is not sent."""
    weight_rows: int
    """|z|: one constraint for each output value (Eq. 16)."""
    virtual_rows: int
    """|V|: constraints that earlier layers hand down (Eqs. 17 to 20)."""
    unseen: int
    """Unknowns that no kernel position reads: nothing tells them."""
    expected_weight_rows: int
    """How many weight constraints survive the activation: half after ReLU, where a zero tells no value; else all."""
    bias_rows: int = 0
    """One constraint on k for each bias whose gradient is sent. The paper's layers have none: no index counts them."""
    uses: int = 1
    """How often the model uses the layer; beyond 1, inputs and outputs are those of all uses together."""
    reads: str | None = INPUT
    """The layer whose output alone is this layer's input, but for reshaping, an activation and batch norm with fixed
    statistics. None past anything else (a sum, a pooled value, ...): then no layer hands |V| down to this one."""
    known_weight_rows: int | None = None
    """The same, as it was at the sample; None if not measured."""
    live_gradient_rows: int | None = None
    """Gradient constraints of the units that are not dead at the sample; those of dead units read 0 = 0."""
    measured: Measured = Measured.NO
    free: int | None = None
    """Dimensions of x that [W; K] leaves free, z being known; None if not measured."""
    error: int = 0
    """How far `free` may be off, in dimensions; 0 where it is exact."""
    method: str = ""
    """What `free` was read from."""
    joint_free: int | None = None
    """Dimensions of x that the gradients of this layer and all later ones leave free together, z not being known but
    constrained by them, with the signs of all units known; None if not measured."""

    @property
    def own_index(self) -> int:
        """|x| - |W| - |z|: the index without virtual constraints."""
        return self.unknowns - self.gradient_rows - self.weight_rows

    @property
    def index(self) -> int:
        """The paper's rank analysis index RA-i = |x| - |W| - |z| - |V|; above 0 it counts too few constraints.

        Section 4 of the paper first calls an attack infeasible where |x| - |W| - |z| < 0; its tables use the sign the
        other way round, as here.
        """
        return self.own_index - self.virtual_rows

    @property
    def rank(self) -> int | None:
        """Of [W; K]; None if not measured."""
        return None if self.free is None else self.unknowns - self.free


def count(graph: Graph, batch_size: int = 1) -> tuple[LayerRank, ...]:
    """The counts of every layer, without any number from weights or samples.

    Layer i gets |V_i| = sum over n < i of max(|z_n| - |x_n|, 0) virtual constraints: a layer with more outputs than
    inputs constrains its own output. The paper prints max(|x_n| - |z_n|, 0) - max(|x_n| - |x_n| - |W_n|, 0), which
    gives such a layer none, against its Eqs. 17 to 20; the reading here yields the indices of its Table 2.

    The paper's layers are a chain. In any other network n runs over the layers on the one way back from layer i, each
    the only source of the next one's input, since z_n says nothing exact of a sum, a maximum or a mean that it is part
    of. The way may well fork forwards: who else reads z_n does not change it.

    Unknowns, outputs and virtual constraints belong to each sample of a batch; the gradient is shared by all. The same
    goes for the uses of a layer that is used several times: they are one entry, at the place of the first.
    """
    handed_down: list[int] = []
    for use in graph.uses:
        source = None if use.before is None else graph.uses[use.before]
        surplus = 0 if source is None else max(source.outputs - source.unknowns, 0)
        handed_down.append(surplus if use.before is None else handed_down[use.before] + surplus)
    layers: dict[object, list[int]] = {}
    for at, use in enumerate(graph.uses):
        layers.setdefault(at if use.weight_name is None else use.weight_name, []).append(at)
    return tuple(_all_uses(graph.uses, use_ids, handed_down, batch_size) for use_ids in layers.values())


def _all_uses(uses: tuple[Use, ...], use_ids: list[int], handed_down: list[int], batch_size: int) -> LayerRank:
    """All uses of one layer as one entry."""
    own = [uses[at] for at in use_ids]
    first = own[0]
    biases = {use.bias_name or use.name: use.bias_gradients for use in own}
    read = {None if use.mixed else INPUT if use.before is None else uses[use.before].name for use in own}
    return LayerRank(
        name=first.name,
        unknowns=batch_size * sum(use.unknowns for use in own),
        gradient_rows=max(use.weight_gradients for use in own),
        weight_rows=batch_size * sum(use.outputs for use in own),
        virtual_rows=batch_size * sum(handed_down[at] for at in use_ids),
        unseen=batch_size * sum(use.unknowns - use.seen for use in own),
        expected_weight_rows=sum(
            batch_size * use.outputs // (2 if isinstance(use.activation, ReLU) else 1) for use in own
        ),
        bias_rows=sum(biases.values()),
        uses=len(own),
        reads=read.pop() if len(read) == 1 else None,
    )


@dataclass(frozen=True)
class LargestBatch:
    """The largest batch whose samples are told apart and followed back to the input, by count."""

    size: int
    """Samples, where each layer in front determines its inputs by itself or with the one directly before it; below 2
    no batch is told apart."""
    layer: str
    """The layer that ends it: the one that tells no more samples apart, or one in front of it whose constraints no
    longer determine its inputs."""
    at_most: int
    """Samples, where all layers in front are solved together, `size` or more: beyond it too few are told apart, or
    their inputs stay open."""
    measured: int | None = None
    """Samples, where those that rounding leaves apart and the values that activations tell are measured at drawn
    batches, `size` or fewer; None where that was not done."""


def largest_batch(network: Network, loss: Loss, drawn: Drawn | None = None) -> LargestBatch:
    """The best of all places where samples are told apart, each with the layers in front of it.

    A layer in front has |z| weight constraints for each sample, and for all samples together as many gradient
    constraints as weight constraints do not repeat. A layer directly before it with more outputs than inputs adds
    virtual constraints, as many for each sample as it has more.

    Args:
        drawn: batches to measure at; None for counts alone.
    """
    counted, at_most = largest_batches(network, loss), 0
    best, layer = max(
        _limits(network, counted).values(), key=lambda each: each[0], default=(0, network.layers[-1].name)
    )
    for value_id, size in counted.items():
        open_ = partial(_open, network, value_id)
        at_most = max(at_most, bisect_left(range(1, size + 1), True, key=lambda samples: open_(samples) > 0))
    measured = None
    if drawn is not None and drawn.measurable(max(counted.values(), default=0)):
        limits = _limits(network, counted, drawn.told)
        measured = drawn.told_apart(counted, {value_id: min(best, size) for value_id, (size, _) in limits.items()})
    return LargestBatch(best, layer, max(best, at_most), measured)


def _limits(
    network: Network, apart: Mapping[int, int], told: Mapping[int, float] = MappingProxyType({})
) -> dict[int, tuple[int, str]]:
    """The largest batch of each place, and the layer that ends it, given up to how many samples it tells apart."""
    return {
        value_id: min(
            [*_in_front(network, value_id, size, told), (size, _name(network.nodes[value_id]))],
            key=lambda each: each[0],
        )
        for value_id, size in apart.items()
    }


def _in_front(network: Network, value_id: int, most: int, told: Mapping[int, float]) -> list[tuple[int, str]]:
    """For how many samples each layer in front of a place has constraints enough, where that limits them.

    What stands in front of a value with many times the input's numbers need not be inverted.
    """
    many = MANY * prod(network.input_shape)
    first = max(
        (at for at in range(1, value_id + 1) if prod(network.shapes[at]) >= many and _alone(network, at)), default=0
    )
    found = []
    for at, node in enumerate(network.nodes[first:value_id], first):
        if isinstance(node.op, Linear):
            open_ = _open_of(network, at, node.op, told)
            size = bisect_left(range(1, most + 1), True, key=lambda samples: open_(samples) > 0)
            found += [(size, node.op.layer.name)] if size < most else []
    return found


def _alone(network: Network, value_id: int) -> bool:
    """Whether everything passes through a value."""
    return any(segment.exit == value_id for segment in network.segments)


def _open_of(network: Network, at: int, op: Linear, told: Mapping[int, float]) -> Callable[[int], int]:
    """Dimensions of what a layer reads that its constraints and those of the layer directly before it leave open, by
    the number of samples.

    Gradient rows tell each channel by itself, and each residue class of pixels where kernels move by more than one:
    those that are more than its pixels tell nothing. What they leave open weight rows tell, but for one for each pair
    of outputs, which the gradient rows repeat. Behind a ReLU about half of the values are known, and their rows repeat
    what their own output's gradient tells and no other's. Where some outputs have two inputs there are two cotangents
    as well, so that no gradient row is counted.

    Args:
        told: of activations the part of their outputs that tells its input, by their nodes, where that was measured.
    """
    layer, behind = op.layer, _activation_behind(network, at + 1)
    kind = None if behind is None else dict(network.activations)[behind]
    part = 1.0 if behind is None else told.get(behind, 0.5 if isinstance(kind, ReLU) else 1.0)
    two = isinstance(kind, NonMonotone) and part < 1
    (outputs, weights), virtual = layer.weight.shape[1:], virtual_rows(network, at)
    classes = [(len(offsets), len(pixels)) for offsets, pixels in residue_classes(layer)]
    unseen = layer.pixels - sum(pixels for _, pixels in classes)

    def left(samples: int) -> int:
        rank = min(outputs, samples * layer.positions) if op.has_gradient and not two else 0
        channel = samples * unseen + sum(max(0, samples * pixels - rank * offsets) for offsets, pixels in classes)
        repeated = layer.groups * rank * (1 if part < 1 else min(outputs, weights))
        rows = int(part * samples * layer.weight_rows) - repeated
        return layer.channels * channel - max(0, rows) - samples * virtual

    return left


def _activation_behind(network: Network, value_id: int) -> int | None:
    """The node of the one that alone reads a value, or a sum of it; None where there is another way."""
    while value_id < len(network.nodes) and len(network.readers[value_id]) == 1:
        node = network.readers[value_id][0]
        op = network.nodes[node].op
        if isinstance(op, Elementwise):
            return node
        if isinstance(op, Linear):
            return None
        value_id = node + 1
    return None


def _open(network: Network, value_id: int, samples: int) -> int:
    """Dimensions of the input that stay open at least where a value of so many samples is known, by count.

    From the value back to the input: a layer tells no more of what it reads than what is known of its |z| and its |W|
    together, and no more than if all of its |z| were known. What it leaves open the layers in front of it may tell.
    """
    left = 0
    for segment in reversed([each for each in network.segments if each.exit <= value_id]):
        op = network.nodes[segment.nodes[-1]].op
        if isinstance(op, Linear) and not segment.block:
            layer, sent = op.layer, int(op.has_gradient)
            short = samples * (layer.unknowns - layer.weight_rows)
            left = max(0, short - sent * layer.spare_rows, short + left - sent * layer.gradient_rows)
        elif segment.block:  # its layers' gradients may all tell of what it reads
            ops = [network.nodes[at].op for at in segment.nodes]
            rows = sum(each.layer.gradient_rows for each in ops if isinstance(each, Linear) and each.has_gradient)
            short = samples * (prod(network.shapes[segment.entry]) - prod(network.shapes[segment.exit]))
            left = max(0, short + left - rows)
    return left


def _name(node: Node) -> str:
    assert isinstance(node.op, Linear)
    return node.op.layer.name
