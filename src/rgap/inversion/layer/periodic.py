"""A convolution continued periodically: its normal equations fall apart into one small matrix for each frequency.

With stride s the pixels fall into s phases per dimension, between which the convolution mixes like between channels
(polyphase form). So W'W is a matrix over channels and phases at each frequency of the grid of positions, and all of it
is inverted with a few Fourier transforms. At the border the true layer is another one, and the gradient rows are left
out; what conjugate gradients have left to do is to make up for both (T. Chan 1988: circulant preconditioners).
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.nn.layers import Grid, Layer

BLOCK = 128
"""The largest matrix at a frequency; larger ones take more memory than they are worth."""
SHIFT, FEW = 0.05, 0.2
"""Added to the diagonal, relative to its mean: what the weight rows do not tell the gradient rows do. It is more where
weight rows are no more than unknowns: 0.05 takes a quarter more steps there, and 0.2 a sixth more elsewhere."""


class Periodic:
    """x -> (W'W + t)^-1 x of the periodic layer, cut off where the layer ends: symmetric and positive definite."""

    def __init__(self, layer: Layer, grid: Grid):
        self._grid, self._groups = grid, layer.groups
        self._counts = [
            -(-(n + before + after) // stride)
            for n, (before, after), stride in zip(grid.size, grid.padding, grid.stride, strict=True)
        ]
        symbol = _symbol(layer, grid, self._counts)
        gram = symbol.mH @ symbol
        shift = relative_shift(layer) * float(layer.weight.square().sum()) / (layer.groups * gram.shape[-1])
        gram.diagonal(dim1=-2, dim2=-1).add_(shift or 1.0)
        # By Cholesky's factor: torch's LU of many matrices at once fails on some machines when threads are many.
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        self._inverse = inverse.to(torch.complex64).mT.contiguous()
        value = torch.linalg.eigvalsh(gram)
        self.condition = float(value.max() / value.min())
        """The ratio of the largest to the smallest eigenvalue."""

    def __call__(self, x: Float[Tensor, "s c n"]) -> Float[Tensor, "s c n"]:
        grid, s, c = self._grid, *x.shape[:2]
        dims = len(grid.size)
        # (s, c, n1, n2) -> (s, c, count1, phase1, count2, phase2) -> (s, g, c/g phases, counts)
        pads = [(0, count * stride - n) for count, stride, n in zip(self._counts, grid.stride, grid.size, strict=True)]
        y = torch.nn.functional.pad(x.reshape(s, c, *grid.size), [each for pad in reversed(pads) for each in pad])
        split = [each for pair in zip(self._counts, grid.stride, strict=True) for each in pair]
        y = y.reshape(s, c, *split).permute(0, 1, *range(3, 2 * dims + 2, 2), *range(2, 2 * dims + 2, 2))
        phases = y.shape[2 : 2 + dims]
        y = y.reshape(s, self._groups, -1, *self._counts)
        f = torch.fft.rfftn(y, dim=tuple(range(3, 3 + dims)))
        there = f.shape[3:]
        # Rows times the transposed matrix: matrices times few columns take three times as long.
        f = f.flatten(3).permute(1, 3, 0, 2).contiguous() @ self._inverse  # (g, frequencies, s, c/g phases)
        f = f.permute(2, 0, 3, 1).reshape(s, self._groups, -1, *there)
        y = torch.fft.irfftn(f, s=self._counts, dim=tuple(range(3, 3 + dims)))
        y = y.reshape(s, c, *phases, *self._counts)
        y = y.permute(0, 1, *(each for axis in range(dims) for each in (2 + dims + axis, 2 + axis)))
        y = y.reshape(s, c, *(count * stride for count, stride in zip(self._counts, grid.stride, strict=True)))
        for axis, n in enumerate(grid.size):
            y = y.narrow(2 + axis, 0, n)
        cut: Tensor = y.reshape(s, c, -1)
        return cut


def relative_shift(layer: Layer) -> float:
    """What is added to the diagonal, relative to its mean."""
    return SHIFT if layer.weight_rows > layer.unknowns else FEW


def _symbol(layer: Layer, grid: Grid, counts: list[int]) -> Tensor:
    """(g, frequencies, outputs, channels and phases): what each group does to a wave."""
    g, j, _ = layer.weight.shape
    w = layer.weight.reshape(g, j, layer.channels // g, *grid.kernel).to(torch.complex128)
    dims = len(counts)
    for axis, (count, kernel, stride, (before, _), dilation) in enumerate(
        zip(counts, grid.kernel, grid.stride, grid.padding, grid.dilation, strict=True)
    ):
        reach = torch.arange(kernel, device=w.device) * dilation - before
        # The last dimension is that of a real transform: half of its frequencies are conjugates of the rest.
        waves = torch.arange(count // 2 + 1 if axis == dims - 1 else count, device=w.device)
        rotation = torch.exp(2j * math.pi * waves[:, None] * reach.div(stride, rounding_mode="floor") / count)
        phase = torch.nn.functional.one_hot(reach % stride, stride)
        at = rotation.to(w)[:, :, None] * phase.to(w)
        w = torch.tensordot(w, at, dims=([3], [1]))  # appends frequencies and phases of this dimension
    # (g, j, c, f1, r1, f2, r2, ...)
    waves_at, phases_at = range(3, 3 + 2 * dims, 2), range(4, 3 + 2 * dims, 2)
    w = w.permute(0, *waves_at, 1, 2, *phases_at)
    return w.reshape(g, math.prod(w.shape[1 : 1 + dims]), j, -1)


_MADE: WeakKeyDictionary[Layer, Periodic | None] = WeakKeyDictionary()


def periodic(layer: Layer) -> Periodic | None:
    """Made once for a layer and kept as long as it; None if it is no convolution, or too wide."""
    if layer not in _MADE:
        grid = layer.grid
        wide = grid is None or layer.channels // layer.groups * math.prod(grid.stride) > BLOCK
        _MADE[layer] = None if grid is None or wide or not bool(layer.weight.any()) else Periodic(layer, grid)
    return _MADE[layer]
