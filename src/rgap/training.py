"""Training a network for a while, so that it can be attacked as it is during or after training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rgap.losses import Loss


def train(
    model: nn.Module, loss: Loss, inputs: Tensor, labels: Tensor, epochs: int, rate: float, batch: int, seed: int
) -> nn.Module:
    """So many epochs of Adam, in place; the model stays in its mode. The order of the samples is the seed's.

    Args:
        inputs: (n, *input_shape); labels: (n,).
        rate: Adam's learning rate.
        batch: samples in one step; the last of an epoch may have fewer.
    """
    optimiser = torch.optim.Adam(model.parameters(), rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for which in torch.split(torch.randperm(len(inputs), generator=generator), batch):
            found = torch.autograd.grad(loss(model(inputs[which]), labels[which]), list(model.parameters()))
            for parameter, gradient in zip(model.parameters(), found, strict=True):
                parameter.grad = gradient
            optimiser.step()
    optimiser.zero_grad()
    return model


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """The share of samples that a model labels right: by its largest output, or by the sign of its only one."""
    with torch.no_grad():
        outputs = model(inputs)
    predicted = outputs.argmax(1).to(labels) if outputs.shape[1] > 1 else outputs[:, 0].sign()
    return float((predicted == labels).float().mean())
