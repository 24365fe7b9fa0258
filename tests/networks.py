"""Random networks for property tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import nn

from rgap import Target, losses

ACTIVATIONS = {
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "identity": nn.Identity,
}
LOSSES = [losses.Logistic(), losses.Exponential(), losses.Hinge(), losses.SquaredHinge()]


@dataclass(frozen=True)
class Client:
    """A network, its loss, and the one sample a client has. Its repr makes it again, so that it can be an @example.

    Attributes:
        shape: of the sample.
        convolutions: for each (groups, outputs of a group, kernel, stride, padding, dilation), with an activation
            behind it.
        widths: of the Linear layers before the last, which has one output.
        seed: of the weights and of the sample.
    """

    shape: tuple[int, int, int]
    convolutions: tuple[tuple[int, int, int, int, int, int], ...]
    widths: tuple[int, ...]
    activation: str
    bias: bool
    loss: losses.Loss
    label: float
    seed: int

    @cached_property
    def _made(self) -> tuple[nn.Sequential, torch.Tensor]:
        size, layers, activation = torch.Size(self.shape), [], ACTIVATIONS[self.activation]
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for groups, outputs, kernel, stride, padding, dilation in self.convolutions:
                layer = nn.Conv2d(size[0], groups * outputs, kernel, stride, padding, dilation, groups, self.bias)
                layers += [layer, activation()]
                size = layer(torch.zeros(1, *size)).shape[1:]
            widths = [size.numel(), *self.widths]
            layers.append(nn.Flatten())
            for inputs, outputs in pairwise(widths):
                layers += [nn.Linear(inputs, outputs, self.bias), activation()]
            layers.append(nn.Linear(widths[-1], 1, self.bias))
            return nn.Sequential(*layers).double().eval(), torch.rand(1, *self.shape, dtype=torch.float64)

    @cached_property
    def target(self) -> Target:
        return Target(self._made[0], self.loss, self.shape, (0.0, 1.0))

    @property
    def x(self) -> torch.Tensor:
        return self._made[1]

    @cached_property
    def y(self) -> torch.Tensor:
        return torch.tensor([self.label])


@st.composite
def clients(draw: st.DrawFn) -> Client:
    """A chain of up to three convolutions and two Linear layers in float64, and a random sample in [0, 1]."""
    channels = draw(st.integers(1, 3))
    shape = (channels, draw(st.integers(4, 7)), draw(st.integers(4, 7)))
    activation, bias = draw(st.sampled_from(sorted(ACTIVATIONS))), draw(st.booleans())
    loss, label, seed = draw(st.sampled_from(LOSSES)), draw(st.sampled_from([-1.0, 1.0])), draw(st.integers(0, 2**31))
    size, convolutions, widths = shape, [], []
    for _ in range(draw(st.integers(0, 3))):
        groups = draw(st.sampled_from([1, 1, size[0]]))
        outputs, kernel = draw(st.integers(1, 6)), draw(st.integers(1, 4))
        stride, padding, dilation = draw(st.integers(1, 2)), draw(st.integers(0, 2)), draw(st.integers(1, 2))
        height, width = ((n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in size[1:])
        if min(height, width) > 0:
            convolutions.append((groups, outputs, kernel, stride, padding, dilation))
            size = (groups * outputs, height, width)
    width = math.prod(size)
    for _ in range(draw(st.integers(0, 2))):
        width = draw(st.integers(2, width + 5))
        widths.append(width)
    return Client(shape, tuple(convolutions), tuple(widths), activation, bias, loss, label, seed)
