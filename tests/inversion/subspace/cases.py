"""Small perceptrons whose batches can be told apart, and what their gradients are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from rgap import Target, Update, capture, losses
from rgap.inversion.subspace.head import Spaces, spaces

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
}


def perceptron(
    widths: tuple[int, ...], activation: str, bias: bool = True, seed: int = 0, gain: float = 2.0
) -> nn.Module:
    """Weights somewhat larger than torch draws them, so that activations bend."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for at, (inputs, outputs) in enumerate(pairwise(widths)):
            layer = nn.Linear(inputs, outputs, bias=bias)
            with torch.no_grad():
                layer.weight.mul_(gain)
            layers += [layer, ACTIVATIONS[activation]()] if at < len(widths) - 2 else [layer]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Case:
    target: Target
    update: Update
    x: Tensor
    labels: Tensor

    @property
    def gradients(self) -> dict[str, Tensor]:
        return {name: g.double() for name, g in self.update.gradients.items()}

    def places(self) -> list[Spaces]:
        return list(spaces(self.target.network, self.target.loss, self.gradients, self.update.precision))


def case(
    activation: str,
    samples: int,
    bias: bool = True,
    widths: tuple[int, ...] = (30, 24, 20, 6),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    labels: Tensor | None = None,
) -> Case:
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.rand(samples, widths[0], generator=generator, dtype=torch.float64).to(dtype)
    if labels is None:
        labels = torch.randint(0, widths[-1], (samples,), generator=generator).to(dtype)
    model = perceptron(widths, activation, bias, seed).to(dtype)
    target = Target(model, losses.CrossEntropy(widths[-1]), (widths[0],), (0.0, 1.0), batch_size=samples)
    return Case(target, capture(target, x, labels), x.double(), labels.double())
