"""The mean of what a layer reads over a batch, which a batch norm in training mode behind the layer hides.

In front of such a norm the cotangents of a Linear layer's output sum to zero over the batch. So gradient rows tell how
the samples' inputs differ, and of their mean the weight rows alone tell anything: as many numbers as there are outputs.
What is left open is one move s of all samples. Where the layer reads an activation f of another batch norm's output,
that has the mean beta in every unit:

    sum over i of f^-1(x_i + s) = b beta

whose left side rises with s, unit by unit. Behind ReLU it is the larger one of two: where all are active the sum tells
s, and where one is not, the least output of a unit is zero.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.jacobian import Jacobian
from rgap.inversion.system import Rows
from rgap.linalg.operator import LinearOperator
from rgap.nn.activation import Activation
from rgap.nn.activations import IDENTITY, Hardtanh, ReLU, Smooth
from rgap.nn.batch_norm import BatchNorm
from rgap.nn.network import Network
from rgap.nn.non_monotone import NonMonotone
from rgap.nn.ops import Elementwise, Linear

HALVINGS = 80
"""Of the interval in which s lies."""


def norm_before(network: Network, node: int, samples: int) -> tuple[BatchNorm, Activation] | None:
    """The batch norm in training mode whose output a Linear layer reads, and the activation between them; None if
    anything else stands there, if no such norm follows the layer, or if these are not all samples of the batch."""
    op, ahead = network.nodes[node].op, network.nodes[node - 1].op if node else None
    behind = network.nodes[node + 1].op if node + 1 < len(network.nodes) else None
    if not isinstance(op, Linear) or op.layer.positions > 1 or not isinstance(behind, BatchNorm):
        return None
    activation: Activation = IDENTITY
    if isinstance(ahead, Elementwise) and node > 1:
        activation, ahead = ahead.activation, network.nodes[node - 2].op
    in_line = sum(segment.exit <= node for segment in network.segments) == node
    rising = not isinstance(activation, (NonMonotone, Hardtanh))
    whole = isinstance(ahead, BatchNorm) and ahead.samples == samples and behind.samples == samples
    return (ahead, activation) if isinstance(ahead, BatchNorm) and whole and in_line and rising else None


def common_mean(
    x: Float[Tensor, "b *shape"], error: Tensor, norm: BatchNorm, activation: Activation
) -> Float[Tensor, "b *shape"]:
    """All samples' inputs, which are known up to one move s of them all, with the mean that the norm in front gives.

    Args:
        error: of the inputs, as far as they are known; broadcast to them.
        norm: whose output, through the activation, the inputs are.
    """
    total = len(x) * (norm.beta + torch.zeros_like(x[:1]))
    if isinstance(activation, ReLU):
        return x + (total / len(x) - x.mean(0)).maximum(-x.amin(0))
    low, high = _ends(x, total, activation, error)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = activation.invert(x + middle, error.expand(x.shape)).z.sum(0, keepdim=True) > total
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return x + (low + high) / 2


def _ends(x: Tensor, total: Tensor, activation: Activation, error: Tensor) -> tuple[Tensor, Tensor]:
    """An interval in which s lies: within the activation's range, or beyond all values by what they may miss."""
    least, most = (activation.low, activation.high) if isinstance(activation, Smooth) else (-math.inf, math.inf)
    lowest, highest = x.amin(0, keepdim=True), x.amax(0, keepdim=True)
    # Beyond these moves every z has the sign that the sum lacks.
    reach = total.abs() / len(x) + 1
    ends = activation(torch.stack([-reach, reach]))
    low = least - lowest if math.isfinite(least) else ends[0] - highest
    high = most - highest if math.isfinite(most) else ends[1] - lowest
    return low, high


class WithMean(LinearOperator):
    """The rows of a Jacobian, and the mean of all samples' inputs as one row for each of its numbers, without noise."""

    def __init__(self, jacobian: Jacobian):
        self.jacobian = jacobian
        self.in_shape, self.like, self.values = jacobian.in_shape, jacobian.like, jacobian.values
        self.mean_diagonal = jacobian.mean_diagonal
        self._weight = (len(jacobian.like) * jacobian.mean_diagonal) ** 0.5

    def mv(self, x: Float[Tensor, "d *in_shape"]) -> Float[Tensor, "d rows"]:
        return torch.cat([self.jacobian.mv(x), self._weight * x.mean(1).flatten(1)], 1)

    def rmv(self, rows: Float[Tensor, "d rows"]) -> Float[Tensor, "d *in_shape"]:
        count = self.like[0].numel()
        mean = self._weight / len(self.like) * rows[:, -count:].reshape(len(rows), 1, *self.in_shape[1:])
        found: Tensor = self.jacobian.rmv(rows[:, :-count]) + mean
        return found

    def weighted(self, rows: Rows) -> Float[Tensor, "d rows"]:
        """As `Jacobian.weighted`, the mean being told exactly."""
        found = self.jacobian.weighted(rows)
        return torch.cat([found, found.new_zeros(len(found), self.like[0].numel())], 1)
