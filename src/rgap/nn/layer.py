"""A linear or convolutional layer as one trilinear form.

``<k, L(W, x)>`` is linear in the weight W, the input x and the output gradient k, so each layer has three
contractions (Eqs. 15 and 16 of R-GAP, arXiv:2010.07733):

- ``output(x, W)``       z = W x, the weight constraints (Eq. 16),
- ``grad_weight(x, k)``  grad W = K x, the gradient constraints (Eq. 15),
- ``grad_input(k, W)``   W' k, the adjoint of both: of the first in x for fixed W, of the second for fixed k.

All geometry (stride, padding, dilation, any number of dimensions) is one integer table: ``table[t, p]`` is the
pixel that kernel offset t reads at output position p, or ``pixels`` where it reads the zero padding. A Linear layer
is the case of one offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

# s systems, c channels, n pixels, o outputs, p positions, t kernel offsets, g groups, j outputs of one group,
# i = channels of one group times kernel offsets.


@dataclass(frozen=True)
class Grid:
    """How a convolution walks over its input, one number per dimension."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    """Zeros before and after."""
    dilation: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """z = W x + b.

    Every operation takes and gives batches of s independent systems. An input is (s, channels, pixels), an output or
    its gradient (s, outputs, positions), a weight (g, j, i), or (s, g, j, i) with one weight per system.
    """

    name: str
    """Where the layer stands in the module, such as ``conv1``."""
    weight: Float[Tensor, "g j i"]
    bias: Float[Tensor, " o"] | None
    table: Int[Tensor, "t p"]
    channels: int
    pixels: int
    input_shape: tuple[int, ...]
    """Shape of one sample's input in the module, such as (3, 32, 32)."""
    output_shape: tuple[int, ...]
    weight_name: str
    """The parameter's name in the module's state dict."""
    bias_name: str | None
    channels_last: bool = False
    """Whether the module keeps channels in the last dimension (Linear on more than one position)."""
    transposed: bool = False
    """Whether the module's weight has its inputs before its outputs, as a transposed convolution's has."""
    grid: Grid | None = None
    """Of a convolution, behind its table."""
    samples: int = 1
    """That each system has side by side, with a sum over all of them in its gradient."""

    @cached_property
    def groups(self) -> int:
        return self.weight.shape[0]

    @cached_property
    def outputs(self) -> int:
        return self.weight.shape[0] * self.weight.shape[1]

    @cached_property
    def offsets(self) -> int:
        return self.table.shape[0]

    @cached_property
    def positions(self) -> int:
        return self.table.shape[1]

    @cached_property
    def unknowns(self) -> int:
        """|x|: the number of values in one input."""
        return self.channels * self.pixels

    @cached_property
    def weight_rows(self) -> int:
        """|z|: the number of weight constraints."""
        return self.outputs * self.positions

    @cached_property
    def gradient_rows(self) -> int:
        """|W|: the number of gradient constraints."""
        return self.weight.numel()

    @cached_property
    def spare_rows(self) -> int:
        """Those that weight constraints do not repeat: k_c' U w_d' is in the span of both for outputs c and d."""
        outputs, weights = self.weight.shape[1:]
        return self.groups * outputs * max(0, weights - outputs)

    @cached_property
    def seen(self) -> int:
        """The number of input values that at least one kernel position reads."""
        return self.channels * int((torch.unique(self.table) < self.pixels).sum())

    # Between the module's shapes and (channels, pixels).

    def pack_input(self, x: Tensor) -> Float[Tensor, "s c n"]:
        """(s, *input_shape), or anything that flattens to it, as (s, channels, pixels).

        Of a layer on several samples side by side the samples of a system come one after another.
        """
        x = x.reshape(len(x), *self.input_shape)
        x = x.movedim(-1, 1) if self.channels_last else x
        return self.beside(x.reshape(len(x), self.channels, self.pixels // self.samples))

    def unpack_input(self, x: Shaped[Tensor, "s c n"]) -> Tensor:
        """(s, channels, pixels) as (s, *input_shape)."""
        x = self._apart(x)
        if self.channels_last:
            x = x.movedim(1, -1)
        return x.reshape(len(x), *self.input_shape)

    def pack_output(self, z: Tensor) -> Shaped[Tensor, "s o p"]:
        """(s, *output_shape), or anything that flattens to it, as (s, outputs, positions)."""
        z = z.reshape(len(z), *self.output_shape)
        z = z.movedim(-1, 1) if self.channels_last else z
        return self.beside(z.reshape(len(z), self.outputs, self.positions // self.samples))

    def unpack_output(self, z: Float[Tensor, "s o p"]) -> Tensor:
        """(s, outputs, positions) as (s, *output_shape)."""
        z = self._apart(z)
        if self.channels_last:
            z = z.movedim(1, -1)
        return z.reshape(len(z), *self.output_shape)

    def beside(self, values: Shaped[Tensor, "sb c n"]) -> Shaped[Tensor, "s c bn"]:
        """What is at the pixels or positions of every sample, side by side."""
        if self.samples == 1:
            return values
        return values.reshape(-1, self.samples, *values.shape[1:]).movedim(1, 2).flatten(2)

    def _apart(self, values: Shaped[Tensor, "s c bn"]) -> Shaped[Tensor, "sb c n"]:
        if self.samples == 1:
            return values
        return values.reshape(*values.shape[:2], self.samples, -1).movedim(2, 1).flatten(0, 1)

    def pack_weight(self, weight: Tensor) -> Float[Tensor, "s g j i"]:
        """Weights or their gradients, (s, *weight shape of the module), as (s, g, j, i)."""
        if self.transposed:
            (g, j, i), n = self.weight.shape, len(weight)
            weight = weight.reshape(n, g, self.channels // g, j, -1).transpose(2, 3)
            return weight.reshape(n, g, j, i)
        return weight.reshape(len(weight), *self.weight.shape)

    def unpack_weight(self, weight: Float[Tensor, "s g j i"], shape: Sequence[int]) -> Tensor:
        """The inverse of `pack_weight`.

        Args:
            shape: of the module's weight.
        """
        if self.transposed:
            (g, j, _), n = self.weight.shape, len(weight)
            weight = weight.reshape(n, g, j, self.channels // g, -1).transpose(2, 3)
        return weight.reshape(len(weight), *shape)

    # The trilinear form.

    def patches(self, x: Float[Tensor, "*s c n"]) -> Float[Tensor, "*s g i p"]:
        """What each output position reads: the linear map U of the layer's geometry."""
        shape = (*x.shape[:-2], self.groups, self.weight.shape[-1], self.positions)
        if self._each_reads_its_own:
            return x.reshape(shape)
        if self.grid is not None and max(self.grid.dilation) == 1:
            return _windows(x, self.grid).reshape(shape)
        return torch.nn.functional.pad(x, (0, 1))[..., self.table.reshape(-1)].reshape(shape)

    def scatter(self, patches: Float[Tensor, "*s g i p"]) -> Float[Tensor, "*s c n"]:
        """U', the adjoint of `patches`: adds every patch value to the pixel it was read from."""
        flat = patches.reshape(*patches.shape[:-3], self.channels, self.table.numel())
        if self._each_reads_its_own:
            return flat
        index = self.table.reshape(-1).expand_as(flat)
        out = flat.new_zeros(*flat.shape[:-1], self.pixels + 1)
        return out.scatter_add_(-1, index, flat)[..., :-1]

    @cached_property
    def _each_reads_its_own(self) -> bool:
        """Whether each position reads the pixel of its own number and no other, as in a Linear layer."""
        own = torch.arange(self.pixels, device=self.table.device)
        return torch.equal(self.table, own[None])

    def output(self, x: Float[Tensor, "*s c n"], weight: Tensor | None = None) -> Float[Tensor, "*s o p"]:
        """W x, without the bias (Eq. 16)."""
        weight = self.weight if weight is None else weight
        return self._by_output(_times(weight, self.patches(x)))

    def rows(
        self, x: Float[Tensor, "*s c n"], k: Float[Tensor, "*k o p"]
    ) -> tuple[Float[Tensor, "*s o p"], Float[Tensor, "*r g j i"]]:
        """W x and K x, the weight and the gradient constraints (Eqs. 15 and 16), from one unfolding of x.

        Args:
            k: its leading axes broadcast with those of x.
        """
        patches = self.patches(x)
        return self._by_output(_times(self.weight, patches)), self._by_group(k) @ patches.mT

    def rows_adjoint(
        self, z: Float[Tensor, "*z o p"], grad: Float[Tensor, "*r g j i"] | None, k: Float[Tensor, "*k o p"]
    ) -> Float[Tensor, "*s c n"]:
        """W' z + K' grad, the adjoint of `rows`, with one scatter; without ``grad`` it is W' z.

        The leading axes of all three broadcast. Where that repeats one, the adjoint of the repetition, a sum, is left
        to the caller.
        """
        patches = _times(self.weight.mT, self._by_group(z))
        return self.scatter(patches if grad is None else patches + grad.mT @ self._by_group(k))

    @cached_property
    def offset(self) -> Float[Tensor, "o 1"]:
        """The bias as a column; zeros if there is none."""
        bias = self.weight.new_zeros(self.outputs) if self.bias is None else self.bias
        return bias[:, None]

    def read(self, x: Float[Tensor, "s c n"]) -> Float[Tensor, "s o p"]:
        """The norm of what each output reads."""
        size = self.patches(x).norm(dim=2, keepdim=True).expand(-1, -1, self.weight.shape[1], -1)
        read: Tensor = size.reshape(len(x), self.outputs, self.positions)
        return read

    def grad_weight(self, x: Float[Tensor, "*s c n"], k: Float[Tensor, "*s o p"]) -> Float[Tensor, "*s g j i"]:
        """K x, the gradient of the weight (Eq. 15)."""
        return self._by_group(k) @ self.patches(x).mT

    def batch_gradient(self, x: Float[Tensor, "b c n"], k: Float[Tensor, "b o p"]) -> Float[Tensor, "1 g j i"]:
        """The gradient of the weight, summed over samples."""
        if self.positions > 1:
            return self.grad_weight(x, k).sum(0, keepdim=True)
        # Of Linear layers as one product: the samples' own gradients would take so many times as much memory.
        return (self._by_group(k)[..., 0].movedim(0, -1) @ self.patches(x)[..., 0].movedim(0, 1))[None]

    def grad_input(self, k: Float[Tensor, "*s o p"], weight: Tensor | None = None) -> Float[Tensor, "*s c n"]:
        """W' k, the gradient of the input; with a gradient of the weight in place of W it is K' grad W."""
        weight = self.weight if weight is None else weight
        return self.scatter(_times(weight.mT, self._by_group(k)))

    def normal(
        self,
        x: Float[Tensor, "s c n"],
        k: Float[Tensor, "s o p"],
        rows: Float[Tensor, "s o p"] | None,
        scale: Float[Tensor, "s g"],
    ) -> Float[Tensor, "s c n"]:
        """(W' D W + b K' K) x, without a matrix; D holds one weight per row, b is the scale of the gradient rows."""
        patches, k = self.patches(x), self._by_group(k)
        z = _times(self.weight, patches)
        z = z if rows is None else z * self._by_group(rows)
        grad = scale[..., None, None] * (k @ patches.mT)
        return self.scatter(_times(self.weight.mT, z) + grad.mT @ k)

    def _by_group(self, k: Float[Tensor, "*s o p"]) -> Float[Tensor, "*s g j p"]:
        return k.reshape(*k.shape[:-2], self.groups, self.weight.shape[-2], self.positions)

    def _by_output(self, z: Float[Tensor, "*s g j p"]) -> Float[Tensor, "*s o p"]:
        return z.reshape(*z.shape[:-3], self.outputs, self.positions)

    # The matrices behind the form, as far as they are worth having.

    def kernel_matrix(self, k: Float[Tensor, "s o p"]) -> Float[Tensor, "s g r n"]:
        """K0, the gradient constraints of one input channel: r = j*t rows, the same for all channels of a group.

        The layer's K is block diagonal with K0 once per channel, so rank(K) is the sum over groups of channels per
        group times rank(K0).
        """
        j, t = self.outputs // self.groups, self.offsets
        index = self.table.expand(len(k), self.groups, j, t, self.positions)
        values = self._by_group(k)[:, :, :, None, :].expand_as(index)
        rows = k.new_zeros(len(k), self.groups, j, t, self.pixels + 1).scatter_add_(-1, index, values)
        return rows[..., :-1].reshape(len(k), self.groups, j * t, self.pixels)

    def weight_gram(self, rows: Float[Tensor, "s o p"] | None = None) -> Float[Tensor, "s g u u"]:
        """W' D W, for the u = channels per group * pixels unknowns of each group; D holds one weight per row.

        Assembled position by position, as finite elements are: each adds its small dense matrix to the pixels it
        reads. Without row weights it does not depend on the sample: it has s = 1, is made once and kept.
        """
        return self._plain_gram if rows is None else self._assemble(rows)

    @cached_property
    def _plain_gram(self) -> Float[Tensor, "1 g u u"]:
        return self._assemble(self.weight.new_ones(1, self.outputs, 1))

    def _assemble(self, rows: Tensor) -> Float[Tensor, "s g u u"]:
        s, (g, j, i) = len(rows), self.weight.shape
        channels, n = self.channels // g, self.pixels + 1
        size = channels * n
        gram = rows.new_zeros(s, g, size * size)
        # The unknowns (channel, pixel) that each position reads, the padding's dummy pixel included.
        reads = torch.arange(channels, device=rows.device)[:, None, None] * n + self.table
        reads = reads.reshape(i, self.positions).mT
        step = max(1, 2**25 // (i * i * s * g))
        rows = rows.reshape(s, g, j, -1)
        for start in range(0, self.positions, step):
            index = reads[start : start + step]
            d = rows if rows.shape[-1] == 1 else rows[..., start : start + step]
            # One (i, i) matrix per position, or the same for all where the rows have no weights.
            local = (self.weight.mT[:, None] * d.movedim(-1, 2)[..., None, :]) @ self.weight[:, None]
            local = local.expand(s, g, len(index), i, i).reshape(s, g, -1)
            flat = (index[:, :, None] * size + index[:, None, :]).reshape(-1)
            gram.scatter_add_(-1, flat.expand_as(local), local)
        gram = gram.reshape(s, g, channels, n, channels, n)[:, :, :, :-1, :, :-1]
        return gram.reshape(s, g, channels * self.pixels, channels * self.pixels)

    def side_by_side(self, samples: int) -> Layer:
        """The layer on several samples at once, as one on so many times as many pixels: the gradient sums over
        samples as it does over positions."""
        if samples == 1:
            return self
        shift = torch.arange(samples, device=self.table.device)[:, None, None] * self.pixels
        table = torch.where(self.table < self.pixels, self.table + shift, samples * self.pixels)
        table = table.movedim(0, 1).flatten(1)
        return replace(self, table=table, pixels=samples * self.pixels, grid=None, samples=samples)

    @cached_property
    def single(self) -> Layer:
        """The same layer in float32, for products that need no more."""
        return replace(self, weight=self.weight.float(), bias=None)

    def to(self, device: torch.device) -> Layer:
        """The same layer with its tensors on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias, table=self.table.to(device))

    def __str__(self) -> str:
        return f"{self.name}: {list(self.input_shape)} -> {list(self.output_shape)}"


def _times(weight: Tensor, values: Float[Tensor, "*s g i p"]) -> Float[Tensor, "*s g j p"]:
    """The weight, or its transpose, times what is at each position.

    Of one position of many systems that is one product of two matrices, not one with a vector for each of them.
    """
    if weight.dim() == 3 and len(weight) == 1 and values.shape[-1] == 1:
        return (values[..., 0, :, 0] @ weight[0].mT)[..., None, :, None]
    return weight @ values


def _windows(x: Float[Tensor, "*s c n"], grid: Grid) -> Tensor:
    """(..., c, *kernel, *positions): a view that copies no value twice, which a gather by an index is slower than."""
    dims = len(grid.size)
    pads = [each for pair in reversed(grid.padding) for each in pair]
    view = torch.nn.functional.pad(x.reshape(*x.shape[:-1], *grid.size), pads)
    first = view.dim() - dims
    for axis, (kernel, stride) in enumerate(zip(grid.kernel, grid.stride, strict=True)):
        view = view.unfold(first + axis, kernel, stride)
    return view.movedim(tuple(range(-dims, 0)), tuple(range(first, first + dims)))
