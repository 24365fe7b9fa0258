"""A small perceptron for tables."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from rgap.models.common import Activation, seeded


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
