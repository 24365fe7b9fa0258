"""Random networks for property tests."""

from __future__ import annotations

from dataclasses import dataclass

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
    """A network, its loss, and the one sample a client has."""

    target: Target
    x: torch.Tensor
    y: torch.Tensor


@st.composite
def clients(draw: st.DrawFn) -> Client:
    """A chain of up to three convolutions and two Linear layers in float64, and a random sample in [0, 1]."""
    channels = draw(st.integers(1, 3))
    shape = (channels, draw(st.integers(4, 7)), draw(st.integers(4, 7)))
    activation, bias = ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))], draw(st.booleans())
    loss, label, seed = draw(st.sampled_from(LOSSES)), draw(st.sampled_from([-1.0, 1.0])), draw(st.integers(0, 2**31))
    size, layers = torch.Size(shape), []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(draw(st.integers(0, 3))):
            groups = draw(st.sampled_from([1, 1, size[0]]))
            layer = nn.Conv2d(
                size[0], groups * draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 2)),
                draw(st.integers(0, 2)), draw(st.integers(1, 2)), groups, bias,
            )  # fmt: skip
            reach = layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
            if min(size[1:]) + 2 * layer.padding[0] >= reach:
                layers += [layer, activation()]
                size = layer(torch.zeros(1, *size)).shape[1:]
        layers.append(nn.Flatten())
        width = size.numel()
        for _ in range(draw(st.integers(0, 2))):
            out = draw(st.integers(2, width + 5))
            layers += [nn.Linear(width, out, bias), activation()]
            width = out
        layers.append(nn.Linear(width, 1, bias))
        x = torch.rand(1, *shape, dtype=torch.float64)
    target = Target(nn.Sequential(*layers).double().eval(), loss, shape, (0.0, 1.0))
    return Client(target, x, torch.tensor([label]))
