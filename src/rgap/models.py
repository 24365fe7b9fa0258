"""The networks of the paper, with the sizes of its experiments as defaults."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

ActivationFactory = Callable[[], nn.Module]


def leaky_relu() -> nn.Module:
    """The activation of the paper's networks: LeakyReLU with slope 0.2."""
    return nn.LeakyReLU(0.2)


def cnn6(
    in_channels: int = 3,
    size: int = 32,
    *,
    activation: ActivationFactory = leaky_relu,
    bias: bool = False,
    seed: int = 0,
) -> nn.Sequential:
    """The paper's CNN6: six convolutions and a Linear layer with one output, all of full rank at 32 x 32.

    Args:
        in_channels, size: of the square input pictures; (1, 28) for MNIST.
        seed: of torch's default initialisation.
    """
    return _cnn6(36, in_channels, size, activation, bias, seed)


def cnn6_d(
    in_channels: int = 3,
    size: int = 32,
    *,
    activation: ActivationFactory = leaky_relu,
    bias: bool = False,
    seed: int = 0,
) -> nn.Sequential:
    """CNN6 with 20 channels after the second convolution instead of 36, which makes that layer rank-deficient."""
    return _cnn6(20, in_channels, size, activation, bias, seed)


def _cnn6(width: int, in_channels: int, size: int, activation: ActivationFactory, bias: bool, seed: int) -> nn.Sequential:
    plan = (  # channels in, channels out, kernel, stride, padding
        (in_channels, 12, 4, 2, 2),
        (12, width, 3, 2, 1),
        (width, 36, 3, 1, 1),
        (36, 36, 3, 1, 1),
        (36, 64, 3, 2, 1),
        (64, 128, 3, 1, 1),
    )
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for number, (c_in, c_out, kernel, stride, padding) in enumerate(plan, 1):
            modules[f"conv{number}"] = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=bias)
            modules[f"act{number}"] = activation()
            size = (size + 2 * padding - kernel) // stride + 1
        modules["flatten"] = nn.Flatten()
        modules["fc"] = nn.Linear(128 * size * size, 1, bias=bias)
    return nn.Sequential(modules)


def fcn3(
    in_features: int = 784,
    hidden: tuple[int, ...] = (1000, 100),
    *,
    activation: ActivationFactory = leaky_relu,
    bias: bool = False,
    seed: int = 0,
) -> nn.Sequential:
    """The paper's FCN3: 784-1000-100-1, fully connected.

    Args:
        in_features: of one flattened input; any shape with as many values is taken.
        hidden: widths of the layers between.
        seed: of torch's default initialisation.
    """
    widths = (in_features, *hidden, 1)
    modules: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for number, (n_in, n_out) in enumerate(zip(widths, widths[1:], strict=False), 1):
            modules[f"fc{number}"] = nn.Linear(n_in, n_out, bias=bias)
            if number < len(widths) - 1:
                modules[f"act{number}"] = activation()
    return nn.Sequential(modules)
