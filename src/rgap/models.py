"""The networks that R-GAP was published with, ready to attack.

Source: J. Zhu and M. Blaschko, *R-GAP: Recursive Gradient Attack on Privacy*, ICLR 2021, arXiv:2010.07733.
Each ends in one output, which the binary losses take. Weights are drawn as torch draws them by default, from
the seed alone: the same seed gives the same weights, and the global random state stays as it was.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import nn

Activation = Callable[[], nn.Module]


def _leaky_relu() -> nn.Module:
    return nn.LeakyReLU(0.2)


def cnn6(
    in_channels: int = 3,
    size: int | tuple[int, int] = 32,
    activation: Activation = _leaky_relu,
    bias: bool = False,
    seed: int = 0,
) -> nn.Sequential:
    """CNN6: six convolutions and a linear layer, each of full rank, so that the recursion recovers the input.

    Layers conv1, act1, ..., conv6, act6, flatten, fc: (batch, in_channels, height, width) to (batch, 1).

    Args:
        in_channels: of the input.
        size: (height, width) of the input, or one number for both.
        activation: makes a new activation each time; by default LeakyReLU with slope 0.2.
        bias: give every layer a bias; the paper's have none.
        seed: of the weights.

    Raises:
        ValueError: in_channels or size is less than 1.
    """
    return _cnn(in_channels, size, 36, activation, bias, seed)


def cnn6_d(
    in_channels: int = 3,
    size: int | tuple[int, int] = 32,
    activation: Activation = _leaky_relu,
    bias: bool = False,
    seed: int = 0,
) -> nn.Sequential:
    """CNN6-d: CNN6 with 20 channels instead of 36 after conv2, which makes that layer rank-deficient.

    Layers, arguments and errors are those of `cnn6`.
    """
    return _cnn(in_channels, size, 20, activation, bias, seed)


def fcn3(
    in_features: int = 784,
    hidden: Sequence[int] = (1000, 100),
    activation: Activation = _leaky_relu,
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
    widths = (in_features, *hidden, 1)
    if min(widths) < 1:
        raise ValueError(f"got in_features={in_features}, hidden={tuple(hidden)}: expected widths of 1 or more")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    with _seeded(seed):
        for number, (fan_in, fan_out) in enumerate(pairwise(widths), 1):
            if number > 1:
                layers[f"act{number - 1}"] = activation()
            layers[f"fc{number}"] = nn.Linear(fan_in, fan_out, bias=bias)
    return nn.Sequential(layers)


def lenet(in_channels: int = 3, size: int = 32, classes: int = 10, seed: int = 0) -> nn.Sequential:
    """The network of *Deep Leakage from Gradients* (Zhu, Liu and Han, NeurIPS 2019): LeNet with sigmoids, no pooling.

    Three convolutions of kernel 5 to 12 channels, strides 2, 2 and 1, and a Linear layer, with biases; every parameter
    uniform in [-0.5, 0.5]. Layers conv1, act1, ..., act3, flatten, fc: (batch, in_channels, size, size) to
    (batch, classes).

    Args:
        in_channels: of the input.
        size: its height and width.
        classes: outputs, one for each.
        seed: of the weights.

    Raises:
        ValueError: an argument is less than 1.
    """
    _check_sizes(in_channels=in_channels, size=size, classes=classes)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    with _seeded(seed):
        for number, stride in enumerate((2, 2, 1), 1):
            layers[f"conv{number}"] = nn.Conv2d(channels, 12, 5, stride, padding=2)
            layers[f"act{number}"] = nn.Sigmoid()
            channels, size = 12, (size - 1) // stride + 1
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(12 * size * size, classes)
        model = nn.Sequential(layers)
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def convnet(in_channels: int = 3, size: int = 32, classes: int = 10, width: int = 64, seed: int = 0) -> nn.Sequential:
    """The ConvNet of *Inverting Gradients* (Geiping et al., NeurIPS 2020), in evaluation mode; ConvNet64 by default.

    Eight 3 x 3 convolutions of 1, 2, 2, 4, 4, 4, 4 and 4 times `width` channels, each with batch norm and ReLU, a
    maximum over 3 x 3 after the sixth and the eighth, and a Linear layer: (batch, in_channels, size, size) to
    (batch, classes).

    Args:
        in_channels: of the input.
        size: its height and width, 9 or more.
        classes: outputs, one for each.
        width: channels after the first convolution.
        seed: of the weights.

    Raises:
        ValueError: an argument is less than 1, or the size less than 9.
    """
    _check_sizes(in_channels=in_channels, classes=classes, width=width)
    if size < 9:
        raise ValueError(f"got size={size}: expected 9 or more, which two maxima over 3 x 3 leave something of")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    with _seeded(seed):
        for number, times in enumerate((1, 2, 2, 4, 4, 4, 4, 4), 1):
            layers[f"conv{number}"] = nn.Conv2d(channels, times * width, 3, padding=1)
            layers[f"norm{number}"] = nn.BatchNorm2d(times * width)
            layers[f"act{number}"] = nn.ReLU()
            channels = times * width
            if number in (6, 8):
                layers[f"pool{number}"] = nn.MaxPool2d(3)
                size //= 3
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(channels * size * size, classes)
    return nn.Sequential(layers).eval()


def _check_sizes(**sizes: int) -> None:
    if min(sizes.values()) < 1:
        raise ValueError(f"got {', '.join(f'{name}={size}' for name, size in sizes.items())}: expected 1 or more")


def _cnn(
    in_channels: int, size: int | tuple[int, int], width: int, activation: Activation, bias: bool, seed: int
) -> nn.Sequential:
    """CNN6 with `width` channels after the second convolution."""
    height, breadth = (size, size) if isinstance(size, int) else size
    if min(in_channels, height, breadth) < 1:
        raise ValueError(f"got in_channels={in_channels}, size={size}: expected 1 or more")
    # (channels in, channels out, kernel, stride, padding)
    rows = (
        (in_channels, 12, 4, 2, 2),
        (12, width, 3, 2, 1),
        (width, 36, 3, 1, 1),
        (36, 36, 3, 1, 1),
        (36, 64, 3, 2, 1),
        (64, 128, 3, 1, 1),
    )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with _seeded(seed):
        for number, (c_in, c_out, kernel, stride, padding) in enumerate(rows, 1):
            layers[f"conv{number}"] = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=bias)
            layers[f"act{number}"] = activation()
            height, breadth = ((n + 2 * padding - kernel) // stride + 1 for n in (height, breadth))
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(128 * height * breadth, 1, bias=bias)
    return nn.Sequential(layers)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # On the CPU whatever the default device, so that a seed means the same weights on every machine.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
