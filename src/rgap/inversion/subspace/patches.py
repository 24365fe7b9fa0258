"""What a convolution reads of one sample, up to its size, from the gradient of its weights alone.

    grad W = sum over positions p of k_p (U_p x)'

with U_p x the patch that position p reads. So every patch lies in the row space of grad W, which has as many dimensions
as there are positions, if those are no more than the outputs and fewer than the values of a patch. Patches overlap, and
hardly any other input has all of its patches in that space: x is the vector of the largest share in it,

    max over x of  sum |V' U_p x|^2 / sum |U_p x|^2,   which is 1,

an eigenvector. Nothing of what lies behind the layer is needed, neither its k nor which of its outputs a pool kept. A
Linear layer has one position and one patch: the row space of its gradient (Eq. 8).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from rgap.inversion.rounding import rounding
from rgap.inversion.subspace.span import Span
from rgap.nn.layers import Layer

GAP = 1e-4
"""So much less than the input's is the share of any other that is told apart from it."""
WITHIN = 1e-3
"""Of the input's own patches no more than this share is outside, as rounding allows: of float16 too."""
STEPS = 300
"""Restarts of the search for the eigenvector."""


@dataclass(frozen=True, eq=False)
class Direction:
    """A layer's input without its size and sign."""

    x: Float[Tensor, "1 c n"]
    """Of norm 1."""
    error: Float[Tensor, "1 c n"]
    """One draw of what the rounding of the gradient did to it."""
    gap: float
    """How much less of any other input is in it."""


def readable(layer: Layer, samples: int = 1) -> bool:
    """Whether the row space of the layer's gradient can hold all patches and be smaller than what it is a space of."""
    reads, patches = layer.weight.shape[2], samples * layer.positions
    return layer.groups == 1 and patches <= layer.outputs and patches < reads and layer.seen == layer.unknowns


def input_direction(layer: Layer, grad: Float[Tensor, "o i"], eps: float) -> Direction | None:
    """The direction of the input; None where the row space does not tell it.

    Args:
        grad: of the weight.
        eps: relative rounding of the gradient.
    """
    found = _leading(layer, grad, eps)
    if found is None:
        return None
    x, gap = found
    generator = torch.Generator(device=grad.device).manual_seed(0)
    drawn = torch.randn(grad.shape, generator=generator, dtype=grad.dtype, device=grad.device)
    moved = _leading(layer, grad + drawn * rounding(grad, eps), 2 * eps, x)
    if moved is None:
        return None
    error = moved[0] * float((moved[0] * x).sum().sign()) - x
    return Direction(x, error, gap)


def input_space(layer: Layer, grad: Float[Tensor, "o i"], eps: float, samples: int) -> Float[Tensor, "b c n"] | None:
    """An orthonormal basis of what the inputs of several samples span, whose patches the row space holds as well; None
    where it does not tell them."""
    found = _leading(layer, grad, eps, None, samples)
    if found is None:
        return None
    basis: Tensor = torch.linalg.qr(found[0].flatten(1).mT)[0].mT
    return basis.reshape(found[0].shape)


def _leading(
    layer: Layer, grad: Tensor, eps: float, start: Tensor | None = None, samples: int = 1
) -> tuple[Float[Tensor, "b c n"], float] | None:
    """The inputs with the largest shares, as many as there are samples, and how much less of any other is in it."""
    span = Span.of(layer, grad, None, eps)
    if not 0 < span.rank <= samples * layer.positions:
        return None
    if samples * layer.positions == 1:
        return span.v.mT[:1, :, None].reshape(1, layer.channels, layer.pixels), 1.0
    like = grad.new_zeros(1, layer.channels, layer.pixels)
    read = layer.patches(torch.ones_like(like))
    size = layer.scatter(torch.ones_like(read)).clamp(min=1.0).rsqrt()

    def within(flat: np.ndarray) -> np.ndarray:
        x = torch.as_tensor(flat, dtype=like.dtype, device=like.device).reshape(like.shape) * size
        patches = layer.patches(x)
        found: np.ndarray = (layer.scatter(span.v @ (span.v.mT @ patches)) * size).flatten().cpu().numpy()
        return found

    count = like.numel()
    begin = np.random.default_rng(0).random(count) if start is None else (start / size).flatten().cpu().numpy()
    operator = LinearOperator((count, count), matvec=within, dtype=np.float64)
    try:
        shares, vectors = eigsh(operator, k=samples + 1, which="LA", v0=begin, maxiter=STEPS, tol=1e-12)
    except ArpackNoConvergence:
        return None
    second, first = float(shares[0]), float(shares[1])
    if 1 - first > WITHIN or first - second < GAP:
        return None
    x = torch.as_tensor(vectors[:, :0:-1].T.copy(), dtype=like.dtype, device=like.device)
    x = x.reshape(samples, *like.shape[1:]) * size
    return x / x.flatten(1).norm(dim=1)[:, None, None], first - second
