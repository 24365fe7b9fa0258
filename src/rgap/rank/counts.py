"""Counting unknowns against constraints, layer by layer (Section 4 of R-GAP, arXiv:2010.07733)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import accumulate

from rgap.nn.activations import ReLU
from rgap.nn.chain import Chain


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
    """|W|: one constraint for each weight (Eq. 15), however large the batch."""
    weight_rows: int
    """|z|: one constraint for each output value (Eq. 16)."""
    virtual_rows: int
    """|V|: constraints that earlier layers hand down (Eqs. 17 to 20)."""
    unseen: int
    """Unknowns that no kernel position reads: nothing tells them."""
    expected_weight_rows: int
    """How many weight constraints survive the activation: half after ReLU, where a zero tells no value; else all."""
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


def count(chain: Chain, batch_size: int = 1) -> tuple[LayerRank, ...]:
    """The counts of every layer, without any number from weights or samples.

    Layer i gets |V_i| = sum over n < i of max(|z_n| - |x_n|, 0) virtual constraints: a layer with more outputs than
    inputs constrains its own output. The paper prints max(|x_n| - |z_n|, 0) - max(|x_n| - |x_n| - |W_n|, 0), which
    gives such a layer none, against its Eqs. 17 to 20; the reading here yields the indices of its Table 2.

    Unknowns, outputs and virtual constraints belong to each sample of a batch; the gradient is shared by all.
    """
    surplus = [max(layer.weight_rows - layer.unknowns, 0) for layer in chain]
    virtual = accumulate(surplus, initial=0)
    return tuple(
        LayerRank(
            name=layer.name,
            unknowns=batch_size * layer.unknowns,
            gradient_rows=layer.gradient_rows,
            weight_rows=batch_size * layer.weight_rows,
            virtual_rows=batch_size * handed_down,
            unseen=batch_size * (layer.unknowns - layer.seen),
            expected_weight_rows=batch_size * layer.weight_rows // (2 if isinstance(layer.activation, ReLU) else 1),
        )
        for layer, handed_down in zip(chain, virtual, strict=False)
    )
