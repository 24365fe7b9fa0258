"""What is kept of each candidate on its way from the output to the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.attacks.base import JointReport, LayerReport
from rgap.constraints import Solved, Solver, System
from rgap.nn.activations import Activation, Identity
from rgap.nn.layers import Layer


@dataclass(frozen=True, eq=False)
class Given:
    """What the recursion works with from beginning to end, for u updates of one model."""

    gradients: dict[str, Tensor]
    """By parameter name, (u, *shape) in float64; what is missing was not told."""
    eps: float
    """Relative rounding of the gradients."""
    rank_tolerance: float
    """Singular values below this fraction of the largest count as zero."""
    seed: int = 0
    """Of the noise that errors are estimated with."""
    solver: Solver = "auto"
    """For what the gradient alone does not tell."""

    def told(self, name: str, of: Int[Tensor, " s"]) -> Float[Tensor, "s ..."]:
        """A parameter's gradient for each of several candidates, given which update each one is of."""
        gradient = self.gradients[name]
        return gradient.expand(len(of), *gradient.shape[1:]) if len(gradient) == 1 else gradient[of]

    def one(self, update: int) -> Given:
        """A single update's."""
        return replace(self, gradients={name: g[update : update + 1] for name, g in self.gradients.items()})

    def probe(self, place: int, device: torch.device) -> torch.Generator:
        """Draws noise, the same at the same place whatever else is attacked."""
        return torch.Generator(device=device).manual_seed(self.seed + 1_000_003 * place)


@dataclass(frozen=True, eq=False)
class Front:
    """How far the recursion has come: what is known of one value of the network, for s candidates."""

    y: Tensor
    """(s, *shape)"""
    k: Tensor
    """The gradient of the loss with respect to it."""
    weight: Tensor | None
    """How far each value can be relied on, 0 where it is not known; None means 1 everywhere."""
    error: Tensor
    """About how far y is off, (s, *shape) or broadcast to it."""
    other: Front | None = None
    """What else it may be: behind a folded activation the other values that its output allows, and at kinks the k of
    their other side."""

    def select(self, index: Tensor) -> Front:
        """The candidates at an index or mask."""
        return Front(
            self.y[index],
            self.k[index],
            None if self.weight is None else self.weight[index],
            self.error[index],
            None if self.other is None else self.other.select(index),
        )

    @property
    def spread(self) -> Float[Tensor, " s"]:
        """The root mean square of the error."""
        return self.error.expand(self.y.shape).flatten(1).square().mean(1).sqrt()


@dataclass(frozen=True)
class Step:
    """What one candidate had at a layer."""

    k: Float[Tensor, "1 o p"]
    z: Float[Tensor, "1 o p"]
    z_error: Float[Tensor, "1 o p"]
    x: Float[Tensor, "1 c n"]
    """The layer's input, as solved."""
    row_weight: Float[Tensor, "1 o p"] | None


@dataclass(frozen=True)
class End:
    """One candidate at the end of the recursion."""

    x: Tensor
    """(1, *shape): the network's input, or the value where the recursion stopped."""
    k: Tensor
    """(1, *shape): the gradient of the loss with respect to the network's output."""
    label: Tensor
    margin: float
    error: float
    layers: tuple[LayerReport, ...]
    steps: tuple[Step, ...]
    at: int
    """The place in the network of the last value, from the output, up to which nothing was left open."""
    known: Front
    """That value."""
    stopped: str = ""
    """Why it did not get to the input; empty if it did."""
    joint: JointReport | None = None
    note: str = ""

    def scaled(self, factor: float, label: Tensor, margin: float) -> End:
        """The same direction for another candidate, in a network that scales."""
        return replace(self, x=factor * self.x, label=label, margin=margin, error=abs(factor) * self.error)


@dataclass
class Trail:
    """What is said of one candidate along its way, from the output to the input."""

    layers: list[LayerReport] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    """Both from the input to the output."""
    x_open: str | None = None
    """The rank-deficient layer, if any, whose free dimensions reach the present input, and so the z before it."""
    k_open: str | None = None
    """Likewise for k."""
    at: int = 0
    known: Front | None = None
    """The last value up to which nothing was left open, and its place; set when something is."""

    def add(
        self,
        step: Step,
        layer: Layer,
        system: System,
        solved: Solved,
        s: int,
        error: float,
        k_known: bool,
        heard: bool = True,
    ) -> None:
        """Note what happened at a layer, and whether its input is determined."""
        self.k_open = None if k_known else self.k_open
        z_open = None if system.by_gradient_alone[s] else self.x_open
        own = layer.name if solved.rank[s] < layer.unknowns else None
        self.x_open = self.k_open or z_open or own
        self.layers.insert(0, report(layer, step.k, step.row_weight, solved, s, error, self.x_open, heard))
        self.steps.insert(0, step)

    def beside(self, reports: Sequence[LayerReport]) -> None:
        """Note what happened in a block."""
        self.layers[:0] = reports

    def open_at(self, at: int, known: Front) -> None:
        """Remember the value before the first that was left open."""
        if self.known is None and (self.x_open or self.k_open) is not None:
            self.at, self.known = at, known

    def passed(self, activation: Activation) -> Trail:
        """A copy behind an activation: the slopes that enter the next k are known as far as the input is."""
        k_open = self.k_open if isinstance(activation, Identity) else self.k_open or self.x_open
        return Trail(list(self.layers), list(self.steps), self.x_open, k_open, self.at, self.known)


def report(
    layer: Layer,
    k: Float[Tensor, "1 o p"],
    row_weight: Float[Tensor, "1 o p"] | None,
    solved: Solved,
    s: int,
    error: float,
    opened: str | None,
    heard: bool = True,
) -> LayerReport:
    """What happened at a layer, for candidate s of those that were solved together."""
    return LayerReport(
        name=layer.name,
        unknowns=layer.unknowns,
        weight_rows=layer.weight_rows if row_weight is None else int((row_weight > 0).sum()),
        gradient_rows=layer.gradient_rows if heard else 0,
        rank=solved.rank[s],
        condition=solved.condition[s],
        weight_residual=float(solved.weight_residual[s]),
        gradient_residual=float(solved.gradient_residual[s]),
        error=error,
        dead_units=int((k[0] == 0).all(-1).sum()) if heard else 0,
        method=solved.method[s],
        open_since=opened,
    )


def one(front: Front, s: int) -> Front:
    """A single candidate's."""
    return front.select(torch.tensor([s], device=front.y.device))
