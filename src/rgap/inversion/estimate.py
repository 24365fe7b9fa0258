"""What is known of one value inside a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.inversion.state import State
from rgap.nn.activation import Activation
from rgap.nn.activations import ReLU
from rgap.nn.batch_norm import BatchNorm
from rgap.nn.ops import Affine, Op


@dataclass(frozen=True)
class Estimate:
    """A value inside the block, (1, *shape), as `State` has it."""

    value: Tensor
    row_weight: Tensor | None
    std: Tensor

    @property
    def full(self) -> bool:
        return self.row_weight is None or bool((self.row_weight > 0).all())

    @property
    def rms_std(self) -> Tensor:
        """The root mean square of the standard deviation of what is known, (1,)."""
        std = self.std.expand(self.value.shape)
        known = std if self.row_weight is None else std[self.row_weight > 0]
        return known.square().sum().div(max(known.numel(), 1)).sqrt().reshape(1)


@dataclass(frozen=True)
class Kinks:
    """The kinks behind a value, through operations that mix none of its numbers."""

    node: int
    """Of the activation, or the number of nodes if it reads the block's output."""
    there: Tensor
    """The value's cotangent if all that is in doubt were on the other side, (b, *shape)."""


def other_slope(activation: Activation, slope: Tensor) -> Tensor:
    """That of a kinked activation on the other side."""
    # Of ReLU's slopes, 0 and 1, an output of zero tells neither: `other_side` leaves them alone.
    return 1 - slope if isinstance(activation, ReLU) else activation.other_side(slope)


def undone(op: Op, out: Estimate) -> Estimate | None:
    """Through an operation that has one input for each output."""
    x = op.invert(out.value)
    if x is None:
        return None
    weight = out.row_weight
    if weight is not None and not isinstance(op, Affine):
        weight = op.invert(weight)
    std: Tensor | None = out.std.expand(out.value.shape)
    assert std is not None
    std = std / op.scale.abs() if isinstance(op, Affine) else op.invert(std)
    if isinstance(op, BatchNorm) and std is not None:
        std = torch.hypot(std, op.error)
    return Estimate(x, weight, out.std if std is None else std)


def inverted(op: Op, state: State) -> State | None:
    """What is known of what an operation reads, from its output; None if it has more than one input for that."""
    known = undone(op, Estimate(state.value, state.row_weight, state.std))
    if known is None:
        return None
    other = None if state.alternative is None else inverted(op, state.alternative)
    return State(known.value, op.cotangent(state.cotangent, known.value), known.row_weight, known.std, other)


def product(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Of two row weights, None where all of both are 1."""
    if first is None or second is None:
        return second if first is None else first
    return first * second
