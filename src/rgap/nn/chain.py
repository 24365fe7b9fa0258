"""A network as the recursion sees it: layers one after another, or the list of what stands in its way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from jaxtyping import Float
from torch import Tensor

from rgap.nn.layers import Layer


class Kind(Enum):
    """Why a model is no plain chain of layers."""

    PASSED = "the recursion passes it"

    NEVER = "never invertible"
    NOT_YET = "not supported yet"
    SETTING = "wrong setting"


@dataclass(frozen=True)
class Obstacle:
    """One thing in a model that keeps it from being a plain chain of layers; most of them the recursion passes."""

    where: str
    """The module or operation, such as ``features.3``."""
    what: str
    kind: Kind
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what} ({self.kind.value}). {self.remedy}"


class NotAChain(ValueError):
    """The model is no plain chain of layers; ``obstacles`` lists all that keeps it from being one."""

    def __init__(self, obstacles: Sequence[Obstacle]):
        self.obstacles = tuple(obstacles)
        lines = "\n".join(f"  - {obstacle}" for obstacle in obstacles)
        super().__init__(f"the model is no plain chain of layers, {len(obstacles)} obstacle(s):\n{lines}")


@dataclass(frozen=True)
class Chain:
    """Layers from the input to the output; the last one has no activation."""

    layers: tuple[Layer, ...]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __getitem__(self, index: int) -> Layer:
        return self.layers[index]

    def forward(self, x: Float[Tensor, "s c n"]) -> tuple[list[Tensor], list[Tensor]]:
        """Every layer's input and every layer's z, from the first layer's input."""
        inputs, outputs = [x], []
        for depth, layer in enumerate(self.layers):
            outputs.append(layer.output(inputs[-1]) + layer.offset)
            if depth + 1 < len(self.layers):
                after = layer.unpack_output(layer.activation(outputs[-1]))
                inputs.append(self.layers[depth + 1].pack_input(after))
        return inputs, outputs

    def backward(self, k: Float[Tensor, "s o 1"], slopes: Sequence[Tensor]) -> list[Tensor]:
        """Every layer's k (Eq. 6), from the last one's and the slopes of all activations but the last."""
        found = [k]
        for depth in reversed(range(len(self.layers) - 1)):
            layer, after = self.layers[depth], self.layers[depth + 1]
            found.insert(0, layer.k_from(after, found[0]) * slopes[depth])
        return found

    @property
    def homogeneous(self) -> bool:
        """Whether <W, grad W> and the <b, grad b> of the layer and all later ones add up to the same in every layer
        (Eq. 10)."""
        return all(layer.activation.homogeneous for layer in self.layers)

    @property
    def scalable(self) -> bool:
        """Whether a scaled input gives a scaled output: piecewise linear through the origin, without biases."""
        return self.homogeneous and all(layer.bias is None for layer in self.layers)

    def __str__(self) -> str:
        return "\n".join(str(layer) for layer in self.layers)
