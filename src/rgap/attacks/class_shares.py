"""How often each class occurs in a label map, read off the last layer's bias.

Its gradient is the mean over all pixels of g = softmax(o) - one_hot(y), whatever the kernel, and behind an
interpolation too. The mean of the softmax is taken from what the model says of noise.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.nn.label_maps import LabelMaps
from rgap.target import Target
from rgap.update import Update

PROBES = 16
"""Inputs of noise."""


def class_shares(target: Target, update: Update) -> Float[Tensor, " classes"]:
    """The share of each class among the pixels of all samples; of a single class's logits that of yes.

    An estimate, which is good where the model is not sure of its classes, as a fresh one is.

    Raises:
        ValueError: the loss has no label maps, or the last layer's bias has no gradient; says which.
    """
    loss, use = target.loss, target.graph.uses[-1] if target.graph.uses else None
    if not isinstance(loss, LabelMaps):
        raise ValueError(f"the {loss.name} loss has no label maps, expected rgap.losses.LabelMaps")
    bias = update.gradients.get(use.bias_name or "") if use is not None else None
    if bias is None or bias.numel() != loss.classes:
        raise ValueError("the classes' shares are read off the gradient of a last layer's bias, which was not sent")
    low, high = target.value_range or (0.0, 1.0)
    noise = torch.rand(PROBES, *target.input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad(), torch.random.fork_rng():
        maps = target.outputs(low + (high - low) * noise).double().reshape(PROBES, loss.classes, -1)
    said = maps.sigmoid() if loss.classes == 1 else maps.softmax(1)
    return (said.mean((0, 2)) - bias.double().to(said.device)).clamp(0, 1).cpu()
