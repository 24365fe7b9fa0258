"""Layers whose input is read off their gradient, because the gradient of a bias is the cotangent of their output.

For one sample, with k the cotangent of a Linear layer's output z = W x + b,

    grad W = k x',    grad b = k,    so    x = (row i of grad W) / k_i    for every i      (Eq. 3)

(L. T. Phong, Y. Aono, T. Hayashi, L. Wang and S. Moriai, *Privacy-Preserving Deep Learning via Additively Homomorphic
Encryption*, IEEE TIFS 2018). So is the gradient of whatever else is added to every value on its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.layer import LayerSystem
from rgap.inversion.report import LayerReport, layer_report
from rgap.inversion.rounding import rounding
from rgap.nn.layers import Layer
from rgap.nn.network import Network
from rgap.nn.ops import Affine, Gather, Linear, Other
from rgap.nn.pools import Pool


@dataclass(frozen=True)
class Source:
    """A layer whose input is read off its gradient."""

    layer: Layer
    value_id: int
    """Of the layer's output, whose cotangent is known."""
    parameter: str
    """Whose gradient it is."""

    @property
    def simple(self) -> bool:
        """Whether every row of the weight's gradient is a multiple of the input."""
        layer = self.layer
        whole = layer.seen == layer.unknowns  # a stride may pass over pixels, and padding may be all that is read
        return whole and layer.positions == 1 and layer.offsets == 1 and layer.groups == 1


@dataclass(frozen=True)
class LayerInput:
    """What a layer's gradient alone determines of its input."""

    x: Float[Tensor, "1 c n"]
    std: float
    """Of its error."""
    report: LayerReport


def sources(network: Network, available: Collection[str]) -> Iterator[Source]:
    """From the input to the output.

    Args:
        available: names of the gradients that can be used.
    """
    for node_id, node in enumerate(network.nodes):
        op = node.op
        if isinstance(op, Linear) and op.has_gradient and op.layer.weight_name in available:
            parameter = _parameter_behind(network, node_id + 1, available)
            if parameter is not None:
                yield Source(op.layer, node_id + 1, parameter)


def read_off(
    source: Source,
    grad: Float[Tensor, "1 g j i"],
    k: Float[Tensor, "1 o p"],
    eps: float,
    rank_tolerance: float,
    probe: torch.Generator,
) -> LayerInput | None:
    """The layer's input by Eq. 3, or by its gradient constraints alone (Eq. 15); None if they leave it open.

    Args:
        eps: relative rounding of the gradient.
        rank_tolerance: singular values below this fraction of the largest count as zero.
        probe: draws the noise that the error is estimated with.
    """
    layer = source.layer
    if source.simple:
        row, std = divide(grad[0, 0], k.flatten(), eps)
        x = row.reshape(1, -1, 1)
        return LayerInput(x, std, _divided_report(layer, grad, k, x, std))
    no_rows = torch.zeros_like(k)
    system = LayerSystem(layer, k, no_rows, rank_tolerance)
    solution = system.solve(no_rows, grad)
    if solution.rank[0] < layer.unknowns:
        return None
    noise = torch.randn(grad.shape, generator=probe, dtype=grad.dtype, device=grad.device)
    moved = system.apply_inverse(no_rows, noise * rounding(grad, eps))
    std = float(moved.square().mean().sqrt())
    return LayerInput(solution.x, std, layer_report(layer, k, no_rows, solution, 0, std, None))


def divide(
    grad_weight: Float[Tensor, "o n"], grad_bias: Float[Tensor, " o"], eps: float
) -> tuple[Float[Tensor, " n"], float]:
    """The mean of all rows of grad W / grad b, each with its inverse variance.

    A row's noise is the rounding of the gradient, and what the rows disagree by if that is more.

    Args:
        grad_bias: not all zero; rows where it is zero tell nothing and are left out.
        eps: relative rounding of the gradient.

    Returns:
        x, and its estimated error (root mean square).
    """
    # Squares of a saturated loss's gradient would be lost; of quotients to the largest k they are not.
    scale = grad_bias.abs().max()
    k = grad_bias / scale
    rows = k != 0
    grad, k = grad_weight[rows] / scale, k[rows]
    of_weight = (rounding(grad_weight[rows], eps) / scale).square().mean(1)
    of_bias = (rounding(grad_bias[rows], eps) / scale).square() * (grad / k[:, None]).square().mean(1)
    disagree = (grad - torch.outer(k, k @ grad / (k @ k))).square().mean()
    # Of a row of zeros there is none.
    noise = ((of_weight + of_bias + disagree).sqrt() / k.abs()).clamp(min=torch.finfo(k.dtype).tiny)
    # k divides the weight and not the row: a tiny k then overflows nowhere.
    least = noise.min()
    weight = (least / noise).square()
    x = (weight / k) @ grad / weight.sum()  # Eq. 3, row by row
    return x, float(least / weight.sum().sqrt())


def _divided_report(layer: Layer, grad: Tensor, k: Tensor, x: Tensor, std: float) -> LayerReport:
    rows = int((k != 0).sum())
    return LayerReport(
        name=layer.name,
        unknowns=layer.unknowns,
        weight_rows=0,
        gradient_rows=rows * layer.unknowns,
        rank=layer.unknowns,
        condition=1.0,
        weight_residual=0.0,
        gradient_residual=float((layer.grad_weight(x, k) - grad).norm() / grad.norm()) if grad.any() else 0.0,
        error=std,
        dead_units=layer.outputs - rows,
        method="bias",
    )


def _own_parameter(network: Network, value_id: int, available: Collection[str]) -> str | None:
    """The parameter whose gradient is the cotangent of this value, if there is one that is available."""
    name = network.nodes[value_id - 1].op.cotangent_parameter if value_id else None
    return name if name in available else None


def _parameter_behind(network: Network, value_id: int, available: Collection[str]) -> str | None:
    """The same of this value, or of one that it goes into alone and unchanged but for a known factor."""
    while value_id:
        own = _own_parameter(network, value_id, available)
        if own is not None:
            return own
        readers = network.readers[value_id]
        if len(readers) != 1 or not isinstance(network.nodes[readers[0]].op, (Affine, Gather)):
            return None
        value_id = readers[0] + 1
    return None


def cotangent(network: Network, value_id: int, gradients: Mapping[str, Tensor]) -> Tensor | None:
    """That of a value, as far as gradients of biases and the like give it without any slope; (1, *shape)."""
    own = _own_parameter(network, value_id, gradients)
    if own is not None:
        return gradients[own].reshape(1, *network.shapes[value_id])
    return network.cotangent_of(value_id, lambda behind: cotangent(network, behind, gradients), {})


def obstacle_before(network: Network, value_id: int) -> str | None:
    """What stands between the input and a value, for a message; None if nothing that is known beforehand."""
    segments = [segment for segment in network.segments if segment.exit <= value_id]
    if (segments[-1].exit if segments else 0) != value_id:
        return f"{network.nodes[value_id - 1].op.name}: one of several ways"
    for segment in reversed(segments):
        for node_id in segment.nodes:
            op = network.nodes[node_id].op
            zeros = torch.zeros(1, *network.nodes[node_id].shape, dtype=torch.float64, device=network.device)
            lossy = isinstance(op, (Affine, Gather)) and op.invert(zeros) is None
            if isinstance(op, (Other, Pool)) or (lossy and not segment.block):
                return f"{op.name}: {op.what if isinstance(op, (Other, Pool)) else op.loses}"
    return None
