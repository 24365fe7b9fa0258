"""What one layer says of its input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.nn.layers import Layer

Rhs = tuple[Tensor, Tensor]
"""Of one layer, z without the bias (s, o, p) and the weight's gradient (s, g, j, i)."""


@dataclass(frozen=True)
class LayerRows:
    """What one layer says of its input, in s systems."""

    layer: Layer
    k: Float[Tensor, "s o p"]
    """Gradient of the loss with respect to the layer's output; zero where it, or that of the weight, is not known."""
    row_weight: Float[Tensor, "s o p"] | None = None
    """How far each value of z is known, 0 where its row is dropped; None means 1 everywhere."""

    @cached_property
    def square(self) -> Float[Tensor, "s o p"] | None:
        """The weight that each row of z has in the normal equations."""
        return None if self.row_weight is None else self.row_weight**2

    def weighted(self, z: Tensor) -> Tensor:
        return z if self.row_weight is None else z * self.row_weight

    def select(self, systems: Tensor) -> LayerRows:
        """Of some of the systems."""
        return LayerRows(self.layer, self.k[systems], None if self.row_weight is None else self.row_weight[systems])

    @property
    def used(self) -> Float[Tensor, "s g"]:
        """The number of weight rows in use."""
        groups = self.layer.groups
        if self.row_weight is None:
            return self.k.new_full((len(self.k), groups), self.layer.weight_rows / groups)
        return (self.row_weight.reshape(len(self.k), groups, -1) > 0).sum(-1).to(self.k)

    @property
    def size(self) -> Float[Tensor, "s g"]:
        """The squares of all weight rows, weighted: the trace of W' D W."""
        layer = self.layer
        each = layer.output(layer.weight.new_ones(1, layer.channels, layer.pixels), layer.weight.square())
        each = each if self.square is None else each * self.square
        return each.reshape(len(each), layer.groups, -1).sum(-1).expand(len(self.k), -1)

    @property
    def kernel_size(self) -> Float[Tensor, "s g"]:
        """The squares of all gradient rows of one channel: the trace of K0' K0."""
        layer = self.layer
        read = (layer.table < layer.pixels).sum(0)
        return (self.k.square() * read).reshape(len(self.k), layer.groups, -1).sum(-1)


def flat(parts: list[Tensor]) -> Float[Tensor, "s n"]:
    return torch.cat([part.flatten(1) for part in parts], 1)
