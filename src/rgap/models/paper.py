"""The networks that R-GAP was published with, ready to attack.

Source: J. Zhu and M. Blaschko, *R-GAP: Recursive Gradient Attack on Privacy*, ICLR 2021, arXiv:2010.07733.
Each ends in one output, which the binary losses take. Weights are drawn as torch draws them by default, from
the seed alone: the same seed gives the same weights, and the global random state stays as it was.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from rgap.models.common import Activation, check_sizes, leaky_relu, seeded
from rgap.models.table import mlp

CHANNELS = (12, 36, 36, 36, 64, 128)
"""After each convolution of CNN6."""
GEOMETRY = ((4, 2, 2), (3, 2, 1), (3, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 1))
"""Kernel, stride and padding of each convolution of CNN6."""


def cnn6(
    in_channels: int = 3,
    size: int | tuple[int, int] = 32,
    activation: Activation = leaky_relu,
    bias: bool = False,
    seed: int = 0,
    width: int = 36,
) -> nn.Sequential:
    """CNN6: six convolutions and a linear layer, each of full rank, so that the recursion recovers the input.

    Layers conv1, act1, ..., conv6, act6, flatten, fc: (batch, in_channels, height, width) to (batch, 1).

    Args:
        in_channels: of the input.
        size: (height, width) of the input, or one number for both.
        activation: makes a new activation each time; by default LeakyReLU with slope 0.2.
        bias: give every layer a bias; the paper's have none.
        seed: of the weights.
        width: channels after conv2; with less than 36 on pictures of three channels that layer is rank-deficient.

    Raises:
        ValueError: in_channels, size or width is less than 1.
    """
    check_sizes(width=width)
    return six_convolutions((CHANNELS[0], width, *CHANNELS[2:]), in_channels, size, activation, bias, seed)


def cnn6_d(
    in_channels: int = 3,
    size: int | tuple[int, int] = 32,
    activation: Activation = leaky_relu,
    bias: bool = False,
    seed: int = 0,
) -> nn.Sequential:
    """CNN6-d: CNN6 with 20 channels instead of 36 after conv2, which makes that layer rank-deficient.

    Layers, arguments and errors are those of `cnn6` with width 20.
    """
    return cnn6(in_channels, size, activation, bias, seed, width=20)


def fcn3(
    in_features: int = 784,
    hidden: Sequence[int] = (1000, 100),
    activation: Activation = leaky_relu,
    bias: bool = False,
    seed: int = 0,
) -> nn.Sequential:
    """FCN3: three linear layers. Any input of in_features values, (batch, ...), to (batch, 1).

    Layers flatten, fc1, act1, fc2, act2, fc3; more or fewer with another `hidden`.

    Args:
        in_features: the number of values in one input.
        hidden: the widths between the linear layers.
        activation: makes a new activation each time; by default LeakyReLU with slope 0.2.
        bias: give every layer a bias; the paper's have none.
        seed: of the weights.

    Raises:
        ValueError: a width is less than 1.
    """
    return mlp(in_features, hidden, 1, activation, bias, seed)


def six_convolutions(
    channels: Sequence[int],
    in_channels: int = 3,
    size: int | tuple[int, int] = 32,
    activation: Activation = leaky_relu,
    bias: bool = False,
    seed: int = 0,
) -> nn.Sequential:
    """CNN6 with other numbers of channels; layers, the other arguments and errors are those of `cnn6`.

    Args:
        channels: after each of the six convolutions.
    """
    height, breadth = (size, size) if isinstance(size, int) else size
    if min(in_channels, height, breadth) < 1:
        raise ValueError(f"got in_channels={in_channels}, size={size}: expected 1 or more")
    if len(channels) != len(GEOMETRY) or min(channels) < 1:
        raise ValueError(f"got channels={tuple(channels)}: expected {len(GEOMETRY)} numbers of 1 or more")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    before = in_channels
    with seeded(seed):
        for number, (after, (kernel, stride, padding)) in enumerate(zip(channels, GEOMETRY, strict=True), 1):
            layers[f"conv{number}"] = nn.Conv2d(before, after, kernel, stride, padding, bias=bias)
            layers[f"act{number}"] = activation()
            height, breadth = ((n + 2 * padding - kernel) // stride + 1 for n in (height, breadth))
            before = after
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(before * height * breadth, 1, bias=bias)
    return nn.Sequential(layers)
