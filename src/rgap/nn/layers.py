"""Linear layers and convolutions as `Layer`: a weight, and the table of what each kernel offset reads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from rgap.nn.layer import Grid, Layer

__all__ = ["Grid", "Layer", "convolution", "linear", "transposed_convolution"]


def linear(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    input_shape: Sequence[int],
    weight_name: str,
    bias_name: str | None,
    transposed: bool = False,
) -> Layer:
    """A Linear layer, weight (outputs, features), on an input of shape (..., features).

    Args:
        transposed: the weight is (features, outputs), as in x @ W.
    """
    weight = weight.mT if transposed else weight
    features, leading = input_shape[-1], tuple(input_shape[:-1])
    positions = math.prod(leading)
    return Layer(
        name=name,
        weight=weight.detach().to(torch.float64, copy=True)[None],
        bias=None if bias is None else bias.detach().to(torch.float64, copy=True),
        table=torch.arange(positions, device=weight.device)[None],
        channels=features,
        pixels=positions,
        input_shape=tuple(input_shape),
        output_shape=(*leading, weight.shape[0]),
        weight_name=weight_name,
        bias_name=bias_name,
        channels_last=bool(leading),
        transposed=transposed,
    )


def _table(size: Sequence[int], axes: Sequence[tuple[Tensor, Tensor]]) -> Int[Tensor, "t p"]:
    """The pixel that each offset reads at each position, from what it reads along each dimension, if that is inside."""
    table = torch.zeros(1, 1, dtype=torch.long)
    inside = torch.ones(1, 1, dtype=torch.bool)
    for length, (at, within) in zip(size, axes, strict=True):
        # Row-major over the dimensions so far, times this one: offsets and positions both grow by an outer product.
        table = table[:, None, :, None] * length + at[None, :, None, :]
        inside = inside[:, None, :, None] & within[None, :, None, :]
        table, inside = (each.reshape(each.shape[0] * each.shape[1], -1) for each in (table, inside))
    return torch.where(inside, table, math.prod(size))


def convolution(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    input_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    weight_name: str,
    bias_name: str | None,
) -> Layer:
    """A convolution in any number of dimensions, weight (outputs, channels/groups, *kernel).

    ``padding`` is (before, after) per dimension, filled with zeros.
    """
    channels, *size = input_shape
    kernel = weight.shape[2:]
    axes, out_size = [], []
    for length, width, step, (before, after), spread in zip(size, kernel, stride, padding, dilation, strict=True):
        count = (length + before + after - spread * (width - 1) - 1) // step + 1
        at = torch.arange(width)[:, None] * spread + torch.arange(count) * step - before
        axes.append((at, (at >= 0) & (at < length)))
        out_size.append(count)
    return Layer(
        name=name,
        weight=weight.detach().to(torch.float64, copy=True).reshape(groups, weight.shape[0] // groups, -1),
        bias=None if bias is None else bias.detach().to(torch.float64, copy=True),
        table=_table(size, axes).to(weight.device),
        channels=channels,
        pixels=math.prod(size),
        input_shape=tuple(input_shape),
        output_shape=(weight.shape[0], *out_size),
        weight_name=weight_name,
        bias_name=bias_name,
        grid=Grid(tuple(size), tuple(kernel), tuple(stride), tuple(padding), tuple(dilation)),
    )


def transposed_convolution(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    input_shape: Sequence[int],
    output_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    weight_name: str,
    bias_name: str | None,
) -> Layer:
    """A transposed convolution in any number of dimensions, weight (channels, outputs/groups, *kernel)."""
    channels, *size = input_shape
    kernel = weight.shape[2:]
    axes = []
    sizes = zip(size, output_size, kernel, stride, padding, dilation, strict=True)
    for length, count, width, step, before, spread in sizes:
        # Pixel i reaches position i * step + offset * spread - before.
        reach = torch.arange(count) + before - torch.arange(width)[:, None] * spread
        at, fits = reach.div(step, rounding_mode="floor"), reach % step == 0
        axes.append((at, fits & (at >= 0) & (at < length)))
    swapped = weight.detach().to(torch.float64, copy=True).reshape(groups, channels // groups, weight.shape[1], -1)
    return Layer(
        name=name,
        weight=swapped.transpose(1, 2).reshape(groups, weight.shape[1], -1),
        bias=None if bias is None else bias.detach().to(torch.float64, copy=True),
        table=_table(size, axes).to(weight.device),
        channels=channels,
        pixels=math.prod(size),
        input_shape=tuple(input_shape),
        output_shape=(groups * weight.shape[1], *output_size),
        weight_name=weight_name,
        bias_name=bias_name,
        transposed=True,
    )
