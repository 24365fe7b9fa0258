"""VGG-11 without pooling (K. Simonyan and A. Zisserman, ICLR 2015, configuration A)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from rgap.models.common import Activation, check_sizes, seeded

TIMES = (1, 2, 4, 4, 8, 8, 8, 8)
"""Channels of each convolution, in multiples of the width."""
HALVED = (1, 2, 4, 6, 8)
"""The convolutions that a maximum over 2 x 2 follows in the original; here they have stride 2."""


def vgg11(
    in_channels: int = 3,
    size: int = 32,
    classes: int = 10,
    width: int = 64,
    activation: Activation = nn.ReLU,
    bias: bool = True,
    seed: int = 0,
) -> nn.Sequential:
    """VGG-11 with strides in place of its maxima, and one Linear layer, as it is used on CIFAR-10.

    Eight convolutions of 3 x 3 with 1, 2, 4, 4, 8, 8, 8 and 8 times `width` channels. The five that a maximum over
    2 x 2 follows in the original have stride 2 instead, so that every layer is linear in its input but for the
    activation; 32 x 32 becomes 1 x 1.

    Layers conv1, act1, ..., conv8, act8, flatten, fc: (batch, in_channels, size, size) to (batch, classes).

    Args:
        in_channels: of the input.
        size: its height and width.
        classes: outputs, one for each.
        width: channels after the first convolution; 64 in the original.
        activation: makes a new activation each time.
        bias: give every layer a bias, as the original has.
        seed: of the weights.

    Raises:
        ValueError: an argument is less than 1.
    """
    check_sizes(in_channels=in_channels, size=size, classes=classes, width=width)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    with seeded(seed):
        for number, times in enumerate(TIMES, 1):
            stride = 2 if number in HALVED else 1
            layers[f"conv{number}"] = nn.Conv2d(channels, times * width, 3, stride, padding=1, bias=bias)
            layers[f"act{number}"] = activation()
            channels, size = times * width, (size - 1) // stride + 1
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(channels * size * size, classes, bias=bias)
    return nn.Sequential(layers)
