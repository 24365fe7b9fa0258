"""The normal equations of weight rows on some directions of each channel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.layer.cost import CHUNK, from_rows
from rgap.linalg import psd
from rgap.nn.layers import Layer


def restricted_grams(
    layer: Layer, bases: Mapping[int, Float[Tensor, "n _"]], rows: Float[Tensor, "1 o p"] | None = None
) -> dict[int, Float[Tensor, "cd cd"]]:
    """B' W' D W B of some groups of a layer; only what is on and below the diagonal is set.

    Args:
        bases: of each group, the same directions of all its channels, in columns.
        rows: D, the weight of each row; None: 1 everywhere.
    """
    shape = (layer.channels // layer.groups, layer.pixels, layer.channels // layer.groups * layer.pixels)
    whole: Tensor | None = None
    found = {}
    for group, basis in bases.items():
        if from_rows(layer, basis.shape[1]):
            found[group] = _of_rows(layer, group, basis, rows)
            continue
        whole = layer.weight_gram(rows)[0] if whole is None else whole
        found[group] = psd.congruent(whole[group].reshape(shape), basis)
    return found


def _of_rows(
    layer: Layer, group: int, basis: Float[Tensor, "n d"], rows: Float[Tensor, "1 o p"] | None
) -> Float[Tensor, "cd cd"]:
    """Of one group, from its rows, some positions at once."""
    (outputs, _), d, channels = layer.weight[group].shape, basis.shape[1], layer.channels // layer.groups
    out = basis.new_zeros(channels * d, channels * d)
    step = max(1, CHUNK // max(1, outputs * channels * d))
    for start in range(0, layer.positions, step):
        seen = _rows(layer, group, basis, rows, slice(start, start + step))
        for c in range(channels):
            end = (c + 1) * d
            out[c * d : end, :end] += seen[:, c * d : end].mT @ seen[:, :end]
    return out


def _rows(
    layer: Layer, group: int, basis: Float[Tensor, "n d"], rows: Float[Tensor, "1 o p"] | None, positions: slice
) -> Float[Tensor, "jp cd"]:
    """D^1/2 W B of one group: each direction stands in one channel, and is read by that channel's weights alone."""
    weight, table, d = layer.weight[group], layer.table[:, positions], basis.shape[1]
    outputs, channels = len(weight), layer.channels // layer.groups
    read = torch.nn.functional.pad(basis.mT, (0, 1))[:, table].movedim(0, -1)  # t p d
    by_channel = weight.reshape(outputs * channels, layer.offsets)
    seen = (by_channel @ read.flatten(1)).reshape(outputs, channels, table.shape[1], d).movedim(1, 2)
    if rows is not None:
        each = rows.reshape(layer.groups, outputs, layer.positions)[group, :, positions]
        seen = seen * each[..., None, None].sqrt()
    return seen.reshape(outputs * table.shape[1], channels * d)
