"""What a layer reads in front of a batch norm in training mode, inside a block with branches.

Behind the batch norm the cotangent is known, in front of it it depends on the value there: k = k_0 - s z for every
channel, with s from the gradient of the norm's weight. So the gradient rows K(z) h = grad W, z = W h + b, are of second
order in h, and no kink is among them. Where the norm's output is added to the block's input, h tells that too, and what
the layers in front make of it is h again: as many rows once more. Levenberg and Marquardt's steps on both begin at
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.inversion.estimate import Estimate
from rgap.linalg import cg, deadline
from rgap.linalg.derivative import linearised
from rgap.nn.batch_norm import BatchNorm
from rgap.nn.network import Network
from rgap.nn.ops import Linear, Sum

STEPS = 30
TOLERANCE, PRODUCTS = 1e-3, 300
"""Of the conjugate gradients of one step."""
DAMPED = 1e-4
"""At first, in units of the mean diagonal of the gradient rows' normal equations, about."""
AGREES = 1e-2
"""Of the gradient rows. What misses more is not the value; the block's own rows decide on what misses less."""
AGAIN = 0.1
"""Weight of the rows by which h comes again out of what it tells, against those of its gradient."""
STANDS = 0.99
"""A step that leaves more of what is missed leads no further."""


@dataclass(frozen=True, eq=False)
class NormRows:
    """What is known of the value that a layer in front of a batch norm in training mode reads."""

    op: Linear
    norm: BatchNorm
    behind: Tensor
    """The cotangent of what the norm reads, but for its `source`."""
    grad: Tensor
    """The layer's, (1, g, j, i)."""
    again: Callable[[Tensor], Tensor] | None
    """What the layers in front make of what the value tells, which is the value."""

    def missed(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """By gradient rows, and by the value that comes out again; both relative to their size."""
        layer, z = self.op.layer, self.op.forward(h)
        k = self.behind + self.norm.source(z)
        found = layer.batch_gradient(layer.pack_input(h), layer.pack_output(k))
        rows = (self.grad - found) / self.grad.norm()
        if self.again is None:
            return rows, None
        out = self.again(self.norm.forward(z))
        return rows, AGAIN * (out - h) / out.detach().norm()

    def flat(self, h: Tensor) -> Tensor:
        rows, again = self.missed(h)
        return rows.flatten() if again is None else torch.cat([rows.flatten(), again.flatten()])


def rows_before(
    network: Network,
    value: int,
    ks: Mapping[int, Tensor],
    values: Mapping[int, Estimate],
    gradients: Mapping[str, Tensor],
) -> NormRows | None:
    """Those of a value that a layer reads, if that has a gradient and a batch norm in training mode alone behind it."""
    for node_id in network.readers[value]:
        op, behind = network.nodes[node_id].op, network.readers[node_id + 1]
        norm = network.nodes[behind[0]].op if len(behind) == 1 else None
        if not isinstance(op, Linear) or not op.has_gradient or not isinstance(norm, BatchNorm):
            continue
        k = ks.get(behind[0] + 1)
        if k is None or op.layer.weight_name not in gradients:
            continue
        grad = op.layer.pack_weight(gradients[op.layer.weight_name])
        again = _again(network, value, behind[0] + 1, values)
        return NormRows(op, norm, norm.vjp(k, (k,))[0], grad, again)
    return None


def _again(network: Network, value: int, out: int, values: Mapping[int, Estimate]) -> Callable[[Tensor], Tensor] | None:
    """A value from a norm's output that is added to the block's input, where the sum is known."""
    [*readers] = network.readers[out]
    if len(readers) != 1 or not isinstance(network.nodes[readers[0]].op, Sum):
        return None
    total, reads = values.get(readers[0] + 1), network.nodes[readers[0]].reads
    if total is None or not total.full or sorted(reads) != [0, out] or not value:
        return None
    front = Network(network.nodes[:value], network.input_shape)
    return lambda y: front.forward(total.value - y)[-1]


def before_batch_norm(rows: NormRows, shape: tuple[int, ...]) -> Tensor | None:
    """The value, (b, *shape); None if none agrees with the layer's gradient.

    Args:
        shape: with the samples in front.
    """
    h, damping = rows.grad.new_zeros(shape), DAMPED
    for _ in range(STEPS):
        deadline.check()
        move, size = _step(rows, h, damping)
        left = float(rows.flat(h + move).norm())
        if not left < size:
            damping *= 4
            continue
        h, damping = h + move, damping / 5
        if left > STANDS * size:
            break
    return h if float(rows.missed(h)[0].norm()) <= AGREES else None


def _step(rows: NormRows, h: Tensor, damping: float) -> tuple[Tensor, float]:
    """The damped step from h, and the size of what is missed there."""
    along, missed, back = linearised(rows.flat, h)

    def normal(v: Tensor) -> Tensor:
        return back(along(v[0]))[None] + damping * v

    return cg.solve(normal, -back(missed)[None], TOLERANCE, PRODUCTS).x[0], float(missed.norm())
