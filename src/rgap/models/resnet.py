"""Residual networks (K. He, X. Zhang, S. Ren and J. Sun, *Deep Residual Learning for Image Recognition*, CVPR 2016)."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from rgap.models.common import Activation, check_sizes, leaky_relu, seeded


class Block(nn.Module):
    """out = act(shortcut(x) + F(x)), with two convolutions of 3 x 3 in F.

    The shortcut is x itself, unless stride or channels change: then as "pad" or "conv" says, see `resnet20`.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        stride: int = 1,
        norm: bool = True,
        shortcut: str = "conv",
        activation: Activation = nn.ReLU,
        bias: bool = False,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, outputs, 3, stride, padding=1, bias=bias)
        self.norm1 = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        self.act1 = activation()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        self.norm2 = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != outputs:
            if shortcut == "pad":
                self.shortcut = Pad(stride, outputs - channels)
            else:
                parts = [nn.Conv2d(channels, outputs, 1, stride, bias=bias)]
                self.shortcut = nn.Sequential(*parts, nn.BatchNorm2d(outputs)) if norm else parts[0]
        self.act2 = activation()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        out: Tensor = self.act2(self.shortcut(x) + inner)
        return out


class Pad(nn.Module):
    """Every so manyth pixel, and channels of zeros: the shortcut without parameters, option A of the paper."""

    def __init__(self, stride: int, channels: int):
        super().__init__()
        self.stride, self.channels = stride, channels

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.channels))


class Mean(nn.Module):
    """The mean of every channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def _stages(stages: int, blocks: int, width: int, *how: Any) -> dict[str, nn.Module]:
    """Blocks of `width` channels, twice as many in each stage; all stages but the first begin with stride 2."""
    found: dict[str, nn.Module] = {}
    channels = width
    for stage, number in itertools.product(range(stages), range(blocks)):
        outputs, stride = width * 2**stage, 2 if stage and not number else 1
        found[f"block{stage + 1}_{number + 1}"] = Block(channels, outputs, stride, *how)
        channels = outputs
    return found


def resnet20(
    in_channels: int = 3,
    size: int = 32,
    classes: int = 10,
    width: int = 16,
    norm: bool = True,
    pool: bool = True,
    activation: Activation = nn.ReLU,
    shortcut: str = "pad",
    blocks: int = 3,
    bias: bool = False,
    seed: int = 0,
) -> nn.Sequential:
    """ResNet-20 as the paper has it for CIFAR-10 (Section 4.2), in evaluation mode.

    A convolution, three stages of `blocks` blocks with 1, 2 and 4 times `width` channels, the last two beginning with
    stride 2, the mean of every channel, and a Linear layer.

    Layers conv, norm, act, block1_1, ..., block3_3, pool, fc: (batch, in_channels, size, size) to (batch, classes).
    Without norm there is no norm, without pool there is flatten in its place.

    Args:
        in_channels: of the input.
        size: its height and width.
        classes: outputs, one for each.
        width: channels after the first convolution.
        norm: batch norm after every convolution.
        pool: take the mean of every channel; else the Linear layer reads all values.
        activation: makes a new activation each time.
        shortcut: "pad", without parameters, as the paper has it for CIFAR-10, or "conv", a convolution of 1 x 1.
        blocks: in each stage; 3 give 20 layers.
        bias: give every convolution a bias; the paper's leave it to batch norm.
        seed: of the weights.

    Raises:
        ValueError: a size is less than 1, or another shortcut.
    """
    check_sizes(in_channels=in_channels, size=size, classes=classes, width=width, blocks=blocks)
    if shortcut not in ("pad", "conv"):
        raise ValueError(f"got shortcut={shortcut!r}: expected 'pad' or 'conv'")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with seeded(seed):
        layers["conv"] = nn.Conv2d(in_channels, width, 3, padding=1, bias=bias)
        if norm:
            layers["norm"] = nn.BatchNorm2d(width)
        layers["act"] = activation()
        layers |= _stages(3, blocks, width, norm, shortcut, activation, bias)
        size = (size + 3) // 4  # after two strides of 2
        layers["pool" if pool else "flatten"] = Mean() if pool else nn.Flatten()
        layers["fc"] = nn.Linear(4 * width * (1 if pool else size * size), classes)
    return nn.Sequential(layers).eval()


def resnet18(
    in_channels: int = 3, size: int = 224, classes: int = 1000, width: int = 64, seed: int = 0
) -> nn.Sequential:
    """ResNet-18 as the paper has it for ImageNet (Table 1), in evaluation mode.

    A convolution of 7 x 7 with stride 2, a maximum over 3 x 3 with stride 2, four stages of two blocks with 1, 2, 4 and
    8 times `width` channels, the last three beginning with stride 2 and a convolution of 1 x 1 for a shortcut, the mean
    of every channel, and a Linear layer.

    Layers conv, norm, act, maximum, block1_1, ..., block4_2, pool, fc: (batch, in_channels, size, size) to
    (batch, classes).

    Args:
        in_channels, classes, width, seed: as of `resnet20`.
        size: height and width of the input. No weight depends on it, since `pool` leaves one value of every channel:
            the network takes pictures of any size.

    Raises:
        ValueError: an argument is less than 1.
    """
    check_sizes(in_channels=in_channels, size=size, classes=classes, width=width)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    with seeded(seed):
        layers["conv"] = nn.Conv2d(in_channels, width, 7, 2, padding=3, bias=False)
        layers["norm"] = nn.BatchNorm2d(width)
        layers["act"] = nn.ReLU()
        layers["maximum"] = nn.MaxPool2d(3, 2, padding=1)
        layers |= _stages(4, 2, width)
        layers["pool"] = Mean()
        layers["fc"] = nn.Linear(8 * width, classes)
    return nn.Sequential(layers).eval()


def residual(
    in_channels: int = 3,
    size: int = 32,
    classes: int = 1,
    width: int = 36,
    blocks: int = 2,
    activation: Activation = leaky_relu,
    bias: bool = False,
    norm: bool = False,
    seed: int = 0,
) -> nn.Sequential:
    """A residual network whose layers all have full rank, so that the recursion recovers the input.

    A design of this package, not a published network: CNN6 (J. Zhu and M. Blaschko, ICLR 2021) with residual blocks in
    place of its third and fourth convolution, x -> act(x + conv2(act(conv1(x)))). On 32 x 32 the maps in the blocks are
    of 9 x 9 = 81 values, and the gradient of a convolution of 3 x 3 has 9 * width rows for every channel of its input:
    with `width` 36 four times as many as it has unknowns, so that this gradient alone determines the input.

    The weights need no scaling: as torch draws them, a convolution makes its input's variance about a third, so that
    two in a row add to x about a tenth of its variance, and many blocks leave the activations at their size.

    Layers conv1, act1, conv2, act2, block1, ..., conv3, act3, conv4, act4, flatten, fc:
    (batch, in_channels, size, size) to (batch, classes).

    Args:
        in_channels, size, seed: as of `resnet20`.
        classes: outputs, one for each; 1 for the binary losses.
        width: channels in the blocks.
        blocks: how many.
        activation: makes a new activation each time; by default LeakyReLU with slope 0.2.
        bias: give every layer a bias.
        norm: batch norm after every convolution of a block; the network is in evaluation mode.

    Raises:
        ValueError: an argument is less than 1.
    """
    check_sizes(in_channels=in_channels, size=size, classes=classes, width=width, blocks=blocks)
    layers: OrderedDict[str, nn.Module] = OrderedDict()

    def convolution(number: int, channels: int, outputs: int, kernel: int, stride: int, padding: int) -> None:
        nonlocal size
        layers[f"conv{number}"] = nn.Conv2d(channels, outputs, kernel, stride, padding, bias=bias)
        layers[f"act{number}"] = activation()
        size = (size + 2 * padding - kernel) // stride + 1

    with seeded(seed):
        convolution(1, in_channels, 12, 4, 2, 2)
        convolution(2, 12, width, 3, 2, 1)
        for number in range(1, blocks + 1):
            layers[f"block{number}"] = Block(width, width, norm=norm, activation=activation, bias=bias)
        convolution(3, width, 64, 3, 2, 1)
        convolution(4, 64, 128, 3, 1, 1)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(128 * size * size, classes, bias=bias)
    return nn.Sequential(layers).eval()


def settled(model: nn.Module, inputs: Tensor, rounds: int = 20) -> nn.Module:
    """The model with batch norm's statistics moved towards those of these inputs, in evaluation mode.

    Args:
        inputs: (b, *input_shape), two or more.
        rounds: passes; each moves the statistics a tenth of the way.
    """
    model.train()
    with torch.no_grad():
        for _ in range(rounds):
            model(inputs)
    return model.eval()
