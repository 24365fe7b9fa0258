"""Networks without branches: layers with activations between them, one behind the other.

CNN6, CNN6-d and FCN3 are those that R-GAP was published with (J. Zhu and M. Blaschko, *R-GAP: Recursive Gradient Attack
on Privacy*, ICLR 2021, arXiv:2010.07733): each ends in one output, which the binary losses take.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import nn

from rgap.models.common import Activation, check_sizes, leaky_relu, seeded

CHANNELS = (12, 36, 36, 36, 64, 128)
"""After each convolution of CNN6."""
GEOMETRY = ((4, 2, 2), (3, 2, 1), (3, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 1))
"""Kernel, stride and padding of each convolution of CNN6."""
TIMES = (1, 2, 4, 4, 8, 8, 8, 8)
"""Channels of each convolution of VGG-11, in multiples of the width."""
HALVED = (1, 2, 4, 6, 8)
"""The convolutions of VGG-11 that a maximum over 2 x 2 follows in the original; here they have stride 2."""


def chain(
    convolutions: Iterable[tuple[int, int, int, int]],
    in_channels: int,
    size: int | tuple[int, int],
    outputs: int,
    activation: Activation = leaky_relu,
    bias: bool = False,
    norm: bool = False,
    pooled: Sequence[int] = (),
) -> nn.Sequential:
    """Convolutions and a Linear layer, with weights as torch draws them: conv1, act1, ..., flatten, fc.

    Args:
        convolutions: channels, kernel, stride and padding of each.
        size: (height, width) of the input, or one number for both.
        norm: batch norm after every convolution, norm1, ....
        pooled: numbers of the convolutions that a maximum over 3 x 3 follows, pool1, ...
    """
    height, breadth = (size, size) if isinstance(size, int) else size
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    before = in_channels
    for number, (after, kernel, stride, padding) in enumerate(convolutions, 1):
        layers[f"conv{number}"] = nn.Conv2d(before, after, kernel, stride, padding, bias=bias)
        if norm:
            layers[f"norm{number}"] = nn.BatchNorm2d(after)
        layers[f"act{number}"] = activation()
        height, breadth = ((n + 2 * padding - kernel) // stride + 1 for n in (height, breadth))
        if number in pooled:
            layers[f"pool{number}"] = nn.MaxPool2d(3)
            height, breadth = height // 3, breadth // 3
        before = after
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(before * height * breadth, outputs, bias=bias)
    return nn.Sequential(layers)


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
    if min(in_channels, *((size,) if isinstance(size, int) else size)) < 1:
        raise ValueError(f"got in_channels={in_channels}, size={size}: expected 1 or more")
    if len(channels) != len(GEOMETRY) or min(channels) < 1:
        raise ValueError(f"got channels={tuple(channels)}: expected {len(GEOMETRY)} numbers of 1 or more")
    rows = [(after, *geometry) for after, geometry in zip(channels, GEOMETRY, strict=True)]
    with seeded(seed):
        return chain(rows, in_channels, size, 1, activation, bias)


def mlp(
    in_features: int,
    hidden: Sequence[int] = (128, 64),
    classes: int = 2,
    activation: Activation = nn.ReLU,
    bias: bool = True,
    seed: int = 0,
) -> nn.Sequential:
    """Linear layers with activations between: any input of in_features values, (batch, ...), to (batch, classes).

    Layers flatten, fc1, act1, fc2, act2, ..., with no activation after the last fc.

    Args:
        in_features: the number of values in one input, such as the columns of a table.
        hidden: the widths between the layers.
        classes: outputs, one for each.
        activation: makes a new activation each time.
        bias: give every layer a bias.
        seed: of the weights.

    Raises:
        ValueError: a width is less than 1.
    """
    widths = (in_features, *hidden, classes)
    if min(widths) < 1:
        widths_given = f"in_features={in_features}, classes={classes}, hidden={tuple(hidden)}"
        raise ValueError(f"got {widths_given}: expected widths of 1 or more")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    with seeded(seed):
        for number, (fan_in, fan_out) in enumerate(pairwise(widths), 1):
            if number > 1:
                layers[f"act{number - 1}"] = activation()
            layers[f"fc{number}"] = nn.Linear(fan_in, fan_out, bias=bias)
    return nn.Sequential(layers)


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
        in_channels, size, activation, bias, seed: as of `cnn6`.
        widths: channels after each convolution.

    Raises:
        ValueError: in_channels, size or a width is less than 1.
    """
    height, breadth = (size, size) if isinstance(size, int) else size
    check_sizes(in_channels=in_channels, height=height, breadth=breadth)
    check_sizes(**{f"widths[{at}]": width for at, width in enumerate(widths)})
    with seeded(seed):
        return chain([(width, 3, 2, 1) for width in widths], in_channels, size, 1, activation, bias)


def vgg11(
    in_channels: int = 3,
    size: int = 32,
    classes: int = 10,
    width: int = 64,
    activation: Activation = nn.ReLU,
    bias: bool = True,
    seed: int = 0,
) -> nn.Sequential:
    """VGG-11 (K. Simonyan and A. Zisserman, ICLR 2015, configuration A) with strides in place of its maxima, and one
    Linear layer, as it is used on CIFAR-10.

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
    rows = [(times * width, 3, 2 if number in HALVED else 1, 1) for number, times in enumerate(TIMES, 1)]
    with seeded(seed):
        return chain(rows, in_channels, size, classes, activation, bias)


def lenet(in_channels: int = 3, size: int = 32, classes: int = 10, seed: int = 0) -> nn.Sequential:
    """The network of *Deep Leakage from Gradients* (Zhu, Liu and Han, NeurIPS 2019): LeNet with sigmoids, no pooling.

    Three convolutions of kernel 5 to 12 channels, strides 2, 2 and 1, and a Linear layer, with biases; every parameter
    uniform in [-0.5, 0.5]. Layers conv1, act1, ..., act3, flatten, fc: (batch, in_channels, size, size) to
    (batch, classes).

    Args:
        in_channels, size, classes, seed: as of `vgg11`.

    Raises:
        ValueError: an argument is less than 1.
    """
    check_sizes(in_channels=in_channels, size=size, classes=classes)
    with seeded(seed):
        model = chain([(12, 5, stride, 2) for stride in (2, 2, 1)], in_channels, size, classes, nn.Sigmoid, bias=True)
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def convnet(in_channels: int = 3, size: int = 32, classes: int = 10, width: int = 64, seed: int = 0) -> nn.Sequential:
    """The ConvNet of *Inverting Gradients* (Geiping et al., NeurIPS 2020), in evaluation mode; ConvNet64 by default.

    Eight 3 x 3 convolutions of 1, 2, 2, 4, 4, 4, 4 and 4 times `width` channels, each with batch norm and ReLU, a
    maximum over 3 x 3 after the sixth and the eighth, and a Linear layer: (batch, in_channels, size, size) to
    (batch, classes).

    Args:
        in_channels, classes, width, seed: as of `vgg11`.
        size: height and width of the input, 9 or more.

    Raises:
        ValueError: an argument is less than 1, or the size less than 9.
    """
    check_sizes(in_channels=in_channels, classes=classes, width=width)
    if size < 9:
        raise ValueError(f"got size={size}: expected 9 or more, which two maxima over 3 x 3 leave something of")
    rows = [(times * width, 3, 1, 1) for times in (1, 2, 2, 4, 4, 4, 4, 4)]
    with seeded(seed):
        return chain(rows, in_channels, size, classes, nn.ReLU, bias=True, norm=True, pooled=(6, 8)).eval()
