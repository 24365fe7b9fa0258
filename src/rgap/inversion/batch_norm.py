"""What a layer reads in front of a batch norm in training mode, from its gradient alone.

Behind the batch norm the cotangent is known, in front of it it depends on the value there: k = k_0 - s z for every
channel, with s from the gradient of the norm's weight. So the gradient rows K(z) h = grad W, z = W h + b, are nearly
linear: s is a sum over positions and signs, small beside k. They are solved again and again, each time with the k of
the answer before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.layer import LayerSolution, LayerSystem
from rgap.nn.batch_norm import BatchNorm
from rgap.nn.layers import Layer

ROUNDS = 50
SHRINKS = 0.9
"""Where a round moves the answer by more than this part of the last one's move, it does not get any nearer."""


@dataclass(frozen=True, eq=False)
class BeforeNorm:
    """What a layer reads, (1, c, n), with the system it solves at the end."""

    solution: LayerSolution
    system: LayerSystem


def before_batch_norm(
    layer: Layer, norm: BatchNorm, cotangent: Tensor, grad: Float[Tensor, "1 g j i"], rank_tolerance: float
) -> BeforeNorm | None:
    """The layer's input; None where its gradient does not determine it, or the rounds lead nowhere.

    Args:
        cotangent: of what the norm puts out, in the shape of the layer's output.
        grad: the gradient of the layer's weight.
    """
    shape = cotangent.shape
    behind = norm.vjp(cotangent, (cotangent,))[0]
    nothing = torch.zeros_like(layer.pack_output(cotangent))

    def solve(z: Tensor) -> BeforeNorm:
        k = layer.pack_output(behind + norm.source(layer.unpack_output(z).reshape(shape)))
        system = LayerSystem(layer, k, nothing, rank_tolerance)
        return BeforeNorm(system.solve(nothing, grad), system)

    center = ((norm.beta - norm.shift) / norm.scale).expand(shape)
    found, moved = solve(layer.pack_output(center)), torch.inf
    if found.solution.rank[0] < layer.unknowns:
        return None
    for _ in range(ROUNDS):
        x = found.solution.x
        found = solve(layer.output(x) + layer.offset)
        last, moved = moved, float((found.solution.x - x).norm())
        if not moved < torch.inf:
            return None
        if moved > SHRINKS * last:
            break
    near = moved <= 1e-3 * float(found.solution.x.norm())
    return found if near else None
