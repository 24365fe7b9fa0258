"""Counting unknowns against constraints, layer by layer (Section 4 of R-GAP, arXiv:2010.07733)."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from enum import Enum
from functools import partial
from math import prod

from rgap.inversion.shared_null_space import virtual_rows
from rgap.inversion.subspace.head import largest_batches
from rgap.nn.activations import ReLU
from rgap.nn.graph import Graph, Use
from rgap.nn.losses import Loss
from rgap.nn.network import Network, Node
from rgap.nn.ops import Linear

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


def largest_batch(network: Network, loss: Loss) -> LargestBatch:
    """The best of all places where samples are told apart, each with the layers in front of it.

    A layer in front has |z| weight constraints for each sample, and for all samples together as many gradient
    constraints as weight constraints do not repeat. A layer directly before it with more outputs than inputs adds
    virtual constraints, as many for each sample as it has more.
    """
    found, at_most = [], 0
    for value_id, size in largest_batches(network, loss).items():
        own = (size, _name(network.nodes[value_id]))
        found.append(min([*_in_front(network, value_id), own], key=lambda each: each[0]))
        open_ = partial(_open, network, value_id)
        at_most = max(at_most, bisect_left(range(1, size + 1), True, key=lambda samples: open_(samples) > 0))
    best = max(found, key=lambda each: each[0], default=(0, network.layers[-1].name))
    return LargestBatch(*best, max(best[0], at_most))


def _in_front(network: Network, value_id: int) -> list[tuple[int, str]]:
    """For how many samples each layer in front of a place has constraints enough, where that is limited."""
    found = []
    for at, node in enumerate(network.nodes[:value_id]):
        if isinstance(node.op, Linear):
            layer = node.op.layer
            short = layer.unknowns - layer.weight_rows - virtual_rows(network, at)
            rows = layer.spare_rows if node.op.has_gradient else 0
            found += [(rows // short, layer.name)] if short > 0 else []
    return found


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
