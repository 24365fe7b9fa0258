"""A convolution behind a gather of pixels, such as a padding or a cut, is one with another table."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from rgap.nn.layer import Layer
from rgap.nn.ops import Gather


def behind_gather(layer: Layer, before: Gather) -> Layer | None:
    """A convolution that reads its input through a gather of pixels, the same in all channels; else None."""
    if layer.channels_last or len(before.input_shape) != len(layer.input_shape) or len(layer.input_shape) < 2:
        return None
    if before.output_shape != layer.input_shape or before.input_shape[0] != layer.channels:
        return None
    pixels = math.prod(before.input_shape[1:])
    if before.index.numel() == before.size and bool((before.index < before.size).all()):
        return None  # a reordering is inverted as it is
    index = before.index.reshape(layer.channels, layer.pixels)
    inside = index < before.size
    offset = torch.arange(layer.channels, device=index.device)[:, None] * pixels
    local = torch.where(inside, index - offset, pixels)
    if not bool((local == local[:1]).all() and ((local >= 0) & (local <= pixels)).all()):
        return None
    reads = torch.cat([local[0], local.new_tensor([pixels])]).to(layer.table.device)
    return replace(layer, table=reads[layer.table], pixels=pixels, input_shape=before.input_shape, grid=None)
