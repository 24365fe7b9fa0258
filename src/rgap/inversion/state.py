"""What the recursion is given, what it knows at each value, and what it keeps of each candidate on its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.inversion.layer import LayerSolution, LayerSystem, Solver
from rgap.inversion.report import JointReport, LayerReport, layer_report
from rgap.nn.activations import Activation, Identity
from rgap.nn.layers import Layer


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

    def one(self, s: int) -> State:
        """A single candidate's."""
        return self.select(torch.tensor([s], device=self.value.device))

    @property
    def rms_std(self) -> Float[Tensor, " s"]:
        """The root mean square of the standard deviation."""
        return self.std.expand(self.value.shape).flatten(1).square().mean(1).sqrt()

    @staticmethod
    def concatenate(states: Sequence[State]) -> State:
        """The candidates of several states that are known everywhere."""
        return State(
            torch.cat([each.value for each in states]),
            torch.cat([each.cotangent for each in states]),
            None,
            torch.cat([each.std.expand(each.value.shape) for each in states]),
        )


@dataclass(frozen=True)
class LayerSolve:
    """What one candidate had at a layer."""

    k: Float[Tensor, "1 o p"]
    z: Float[Tensor, "1 o p"]
    z_error: Float[Tensor, "1 o p"]
    x: Float[Tensor, "1 c n"]
    """The layer's input, as solved."""
    row_weight: Float[Tensor, "1 o p"] | None


@dataclass(frozen=True)
class Candidate:
    """One candidate at the end of the recursion."""

    x: Tensor
    """(1, *shape): the network's input, or the value where the recursion stopped."""
    k: Tensor
    """(1, *shape): the gradient of the loss with respect to the network's output."""
    label: Tensor
    margin: float
    error: float
    layers: tuple[LayerReport, ...]
    steps: tuple[LayerSolve, ...]
    at: int
    """The place in the network of the last value, from the output, up to which nothing was left open."""
    known: State
    """That value."""
    stopped: str = ""
    """Why it did not get to the input; empty if it did."""
    joint: JointReport | None = None
    note: str = ""

    def scaled(self, factor: float, label: Tensor, margin: float) -> Candidate:
        """The same direction for another candidate, in a network that scales."""
        return replace(self, x=factor * self.x, label=label, margin=margin, error=abs(factor) * self.error)


@dataclass
class History:
    """What is said of one candidate along its way, from the output to the input."""

    layers: list[LayerReport] = field(default_factory=list)
    steps: list[LayerSolve] = field(default_factory=list)
    """Both from the input to the output."""
    x_open: str | None = None
    """The rank-deficient layer, if any, whose free dimensions reach the present input, and so the z before it."""
    k_open: str | None = None
    """Likewise for k."""
    at: int = 0
    known: State | None = None
    """The last value up to which nothing was left open, and its place; set when something is."""

    def add(
        self,
        step: LayerSolve,
        layer: Layer,
        system: LayerSystem,
        solved: LayerSolution,
        s: int,
        error: float,
        k_known: bool,
        heard: bool = True,
    ) -> None:
        """Note what happened at a layer, and whether its input is determined."""
        self.k_open = None if k_known else self.k_open
        z_open = None if system.determined_by_gradient[s] else self.x_open
        own = layer.name if solved.rank[s] < layer.unknowns else None
        self.x_open = self.k_open or z_open or own
        self.layers.insert(0, layer_report(layer, step.k, step.row_weight, solved, s, error, self.x_open, heard))
        self.steps.insert(0, step)

    def beside(self, reports: Sequence[LayerReport]) -> None:
        """Note what happened in a block."""
        self.layers[:0] = reports

    def open_at(self, at: int, known: State) -> None:
        """Remember the value before the first that was left open."""
        if self.known is None and (self.x_open or self.k_open) is not None:
            self.at, self.known = at, known

    def passed(self, activation: Activation) -> History:
        """A copy behind an activation: the slopes that enter the next k are known as far as the input is."""
        k_open = self.k_open if isinstance(activation, Identity) else self.k_open or self.x_open
        return History(list(self.layers), list(self.steps), self.x_open, k_open, self.at, self.known)
