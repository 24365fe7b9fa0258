"""The networks of *Deep Leakage from Gradients* and *Inverting Gradients*."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from rgap.models.common import check_sizes, seeded


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
    check_sizes(in_channels=in_channels, size=size, classes=classes)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    with seeded(seed):
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
    check_sizes(in_channels=in_channels, classes=classes, width=width)
    if size < 9:
        raise ValueError(f"got size={size}: expected 9 or more, which two maxima over 3 x 3 leave something of")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    with seeded(seed):
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
