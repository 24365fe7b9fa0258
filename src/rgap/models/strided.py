"""A chain of strided convolutions that keeps all of a picture, however large it is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from rgap.models.common import Activation, check_sizes, leaky_relu, seeded


def strided(
    in_channels: int = 3,
    size: int | tuple[int, int] = 224,
    widths: Sequence[int] = (16, 96, 512),
    activation: Activation = leaky_relu,
    bias: bool = False,
    seed: int = 0,
) -> nn.Sequential:
    """Convolutions 3 x 3 of stride 2, each with more outputs than inputs, and a linear layer.

    A convolution of stride 2 has a quarter of the positions, so one with more than four times the channels has more
    weight constraints than unknowns: each layer is of full rank at every size, by its weights alone.

    Layers conv1, act1, ..., flatten, fc: (batch, in_channels, height, width) to (batch, 1).

    Args:
        in_channels: of the input.
        size: (height, width) of the input, or one number for both.
        widths: channels after each convolution.
        activation: makes a new activation each time; by default LeakyReLU with slope 0.2.
        bias: give every layer a bias.
        seed: of the weights.

    Raises:
        ValueError: in_channels, size or a width is less than 1.
    """
    height, breadth = (size, size) if isinstance(size, int) else size
    check_sizes(in_channels=in_channels, height=height, breadth=breadth)
    check_sizes(**{f"widths[{at}]": width for at, width in enumerate(widths)})
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    before = in_channels
    with seeded(seed):
        for number, after in enumerate(widths, 1):
            layers[f"conv{number}"] = nn.Conv2d(before, after, 3, 2, 1, bias=bias)
            layers[f"act{number}"] = activation()
            height, breadth = (height + 1) // 2, (breadth + 1) // 2
            before = after
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(before * height * breadth, 1, bias=bias)
    return nn.Sequential(layers)
