"""A traced model without its weights: the sizes of its layers, and what keeps it from being a plain chain of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from rgap.nn.activation import Activation
from rgap.nn.activations import IDENTITY
from rgap.nn.layers import Layer
from rgap.nn.obstacles import Obstacle

if TYPE_CHECKING:
    from rgap.nn.build import Program


@dataclass(frozen=True)
class Use:
    """One use of a Linear or convolutional layer, for one sample: numbers alone, nothing that grows with them."""

    name: str
    """Where it stands in the module, such as ``layer1.0.conv2``."""
    weight_name: str | None
    """The parameter in the module's state dict; None if the weight is computed from parameters."""
    bias_name: str | None
    unknowns: int
    """|x|: the values of its input."""
    seen: int
    """Of these, the values that at least one kernel position reads."""
    outputs: int
    """|z|: the values of its output."""
    weight_gradients: int
    """|W|: the gradient's entries for its weight; 0 if it is frozen, or no gradient gets to it."""
    bias_gradients: int
    before: int | None
    """The place in the graph of the layer whose output alone is its input, but for reshaping, an activation and batch
    norm with fixed statistics. None for the model's input, and past everything else."""
    mixed: bool
    """Whether its input is neither the model's nor one layer's output: a sum, a pooled value, ..."""
    make: partial[Layer] | None
    """Makes the layer from ``weight`` and ``bias``; None where it cannot be made."""
    activation: Activation = IDENTITY

    def layer(self, tensors: Mapping[str, Tensor]) -> Layer:
        """The layer with the weights that ``tensors`` holds under its names."""
        if self.make is None or self.weight_name is None:
            raise ValueError(f"{self.name} has no weight of its own")
        bias = None if self.bias_name is None else tensors[self.bias_name]
        return self.make(weight=tensors[self.weight_name], bias=bias)


@dataclass(frozen=True)
class Graph:
    """All uses of layers in the order in which they are computed, and every obstacle found."""

    uses: tuple[Use, ...]
    obstacles: tuple[Obstacle, ...]
    """What keeps the model from being a plain chain of layers."""
    program: Program | None = field(default=None, repr=False, compare=False)
    """The operations themselves; None if the model cannot be traced."""
    returned: int = 1
    """Values that the model returns; the loss takes one of them, see `rgap.nn.outputs`."""
    ending: str = ""
    """What the model does last, if it makes probabilities: ``sigmoid``, ``softmax`` or ``log_softmax``; else empty."""
    ending_is_the_loss: bool = False
    """Whether it was counted to the loss and taken away: the graph then ends in what it takes."""
