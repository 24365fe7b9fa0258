"""What is kept of each candidate on its way from the output to the input."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from rgap.attacks.base import JointReport, LayerReport
from rgap.constraints import Solved, System
from rgap.nn.activations import Identity
from rgap.nn.layers import Layer


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
    """One candidate's input, at the end of the recursion."""

    x: Float[Tensor, "1 c n"]
    label: float
    margin: float
    error: float
    layers: tuple[LayerReport, ...]
    steps: tuple[Step, ...]
    joint: JointReport | None = None
    note: str = ""

    def scaled(self, margin: float) -> End:
        """The same direction with another margin, for a chain that scales."""
        factor = margin / self.margin if self.margin else 1.0
        return replace(self, x=factor * self.x, margin=margin, error=abs(factor) * self.error)


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

    def add(
        self, step: Step, layer: Layer, system: System, solved: Solved, s: int, error: float, k_known: bool
    ) -> None:
        """Note what happened at a layer, and whether its input is determined."""
        self.k_open = None if k_known else self.k_open
        z_open = None if system.by_gradient_alone[s] else self.x_open
        own = layer.name if solved.rank[s] < layer.unknowns else None
        self.x_open = self.k_open or z_open or own
        weight = system.row_weight
        report = LayerReport(
            name=layer.name,
            unknowns=layer.unknowns,
            weight_rows=layer.weight_rows if weight is None else int((weight[s] > 0).sum()),
            gradient_rows=layer.gradient_rows,
            rank=solved.rank[s],
            condition=solved.condition[s],
            weight_residual=float(solved.weight_residual[s]),
            gradient_residual=float(solved.gradient_residual[s]),
            error=error,
            dead_units=int((system.k[s] == 0).all(-1).sum()),
            method=solved.method,
            open_since=self.x_open,
        )
        self.layers.insert(0, report)
        self.steps.insert(0, step)

    def passed(self, before: Layer) -> Trail:
        """A copy behind an activation: the slopes that enter the next k are known as far as the input is."""
        k_open = self.k_open if isinstance(before.activation, Identity) else self.k_open or self.x_open
        return Trail(list(self.layers), list(self.steps), self.x_open, k_open)
