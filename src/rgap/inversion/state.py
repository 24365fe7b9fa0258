"""What the recursion is given, what it knows at each value, and where it stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.inversion.layer import Solver
from rgap.nn.ops import Op


@dataclass(frozen=True, eq=False)
class Observation:
    """The gradients of u updates of one model, and how far they can be trusted."""

    gradients: dict[str, Tensor]
    """By parameter name, (u, *shape) in float64; what is missing was not sent."""
    eps: float
    """Relative rounding of the gradients."""
    rank_tolerance: float
    """Singular values below this fraction of the largest count as zero."""
    seed: int = 0
    """Of the noise that errors are estimated with."""
    solver: Solver = "auto"
    """For what a layer's gradient alone does not determine."""

    def gradient(self, name: str, of: Int[Tensor, " s"]) -> Float[Tensor, "s ..."]:
        """A parameter's gradient for each of several candidates, given which update each one is of."""
        gradient = self.gradients[name]
        return gradient.expand(len(of), *gradient.shape[1:]) if len(gradient) == 1 else gradient[of]

    def one(self, update: int) -> Observation:
        """A single update's."""
        return replace(self, gradients={name: g[update : update + 1] for name, g in self.gradients.items()})

    def probe(self, value_id: int, device: torch.device) -> torch.Generator:
        """Draws noise, the same at the same value whatever else is attacked."""
        return torch.Generator(device=device).manual_seed(self.seed + 1_000_003 * value_id)


@dataclass(frozen=True, eq=False)
class State:
    """How far the recursion has come: what is known of one value of the network, for s candidates."""

    value: Tensor
    """(s, *shape)"""
    cotangent: Tensor
    """The gradient of the loss with respect to the value, (s, *shape): the paper's k behind a layer."""
    row_weight: Tensor | None
    """How far each number can be relied on, 0 where it is not known; None means 1 everywhere."""
    std: Tensor
    """The standard deviation of the value's error, about: (s, *shape) or broadcast to it."""
    alternative: State | None = None
    """What else it may be: behind an activation that is not monotone the other value that its output allows, and at
    kinks the cotangent of their other side."""

    def select(self, index: Tensor) -> State:
        """The candidates at an index or mask."""
        return State(
            self.value[index],
            self.cotangent[index],
            None if self.row_weight is None else self.row_weight[index],
            self.std[index],
            None if self.alternative is None else self.alternative.select(index),
        )

    @property
    def single(self) -> State:
        """In float32."""
        weight = None if self.row_weight is None else self.row_weight.float()
        return State(self.value.float(), self.cotangent.float(), weight, self.std.float())

    def one(self, s: int) -> State:
        """A single candidate's."""
        return self.select(torch.tensor([s], device=self.value.device))

    def weighed(self, weight: Tensor | None) -> Tensor | None:
        """Its row weights times others of the same values; None means 1 everywhere."""
        if self.row_weight is None or weight is None:
            return self.row_weight if weight is None else weight
        return weight * self.row_weight

    @property
    def rms_std(self) -> Float[Tensor, " s"]:
        """The root mean square of the standard deviation."""
        return self.std.expand(self.value.shape).flatten(1).square().mean(1).sqrt()

    @staticmethod
    def concatenate(states: Sequence[State]) -> State:
        """The candidates of several states."""
        weights = [torch.ones_like(each.value) if each.row_weight is None else each.row_weight for each in states]
        return State(
            torch.cat([each.value for each in states]),
            torch.cat([each.cotangent for each in states]),
            None if all(each.row_weight is None for each in states) else torch.cat(weights),
            torch.cat([each.std.expand(each.value.shape) for each in states]),
        )


class Cause(Enum):
    """Why the recursion stops."""

    LOSSY = "an operation does not keep what it reads"
    OPEN = "a layer behind leaves its input open"
    NOT_FOUND = "no input satisfies the constraints"


@dataclass(frozen=True, eq=False)
class Stop:
    """Where the recursion got no further, and why."""

    op: Op
    cause: Cause
    what: str
    """In a few words."""
    nearest: Tensor | None = None
    """Of a single candidate what the layer in front of a pool reads, (b, *shape), as near as it was found with nothing
    else but that layer; None if it was not looked for."""
    input: Tensor | None = None
    """The network's input, where it was found with that layer and what stands in front of it, (b, *shape)."""

    @property
    def node(self) -> str:
        """The operation's name in the model."""
        return self.op.name

    def __str__(self) -> str:
        return f"stops at {self.node}: {self.what}"
