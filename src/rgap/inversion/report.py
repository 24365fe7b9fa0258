"""What is reported of the layers that an input was solved for."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from rgap.inversion.layer import LayerSolution
from rgap.nn.layers import Layer

BLOCK, VALUES = "block", "values"
"""Methods: all layers of a block jointly, and the network's input from weight rows alone (`by_values`)."""


@dataclass(frozen=True)
class LayerReport:
    """What happened at one layer, for one answer."""

    name: str
    unknowns: int
    """|x|, the values of the layer's input."""
    weight_rows: int
    """Weight constraints in use, after those that an activation hides are dropped."""
    gradient_rows: int
    rank: int
    """Independent constraints among them, measured."""
    condition: float
    weight_residual: float
    """|W x + b - z| / |z|."""
    gradient_residual: float
    """|K x - grad W| / |grad W|."""
    error: float
    """How far the rounding of the gradient may have moved this layer's input (root mean square, an estimate)."""
    dead_units: int
    """Outputs whose gradient is zero at every position: their weights' gradients say nothing."""
    method: str
    open_since: str | None = None
    """The layer whose free dimensions reach this layer's input, so that it is not determined; None if it is."""

    @property
    def free(self) -> int:
        """The number of dimensions that the constraints leave open."""
        return self.unknowns - self.rank

    @property
    def with_others(self) -> bool:
        """Whether it was solved together with other layers: all layers know the last digits better then."""
        return self.method in (BLOCK, VALUES)


@dataclass(frozen=True)
class JointReport:
    """How several layers' constraints were solved jointly for the input."""

    layers: tuple[str, ...]
    """From the input to the last layer that was solved jointly."""
    unknowns: int
    rows: int
    """Weight rows of the last of these layers and gradient rows of all of them."""
    rank: int
    """Independent constraints at the answer, measured without the prior."""
    condition: float
    steps: int
    """Linearisations."""
    converged: bool
    """Whether the recomputed gradient agrees."""
    prior: str | None
    """What was taken for granted where constraints were still missing; None if nothing was."""
    bounded: int = 0
    """Dimensions that no equation tells but inequalities do: other values of a maximum's window are no larger, and the
    input lies in its range."""

    @property
    def free(self) -> int:
        """The number of dimensions that all constraints together leave open."""
        return self.unknowns - self.rank - self.bounded


def layer_report(
    layer: Layer,
    k: Float[Tensor, "1 o p"],
    row_weight: Float[Tensor, "1 o p"] | None,
    solution: LayerSolution,
    s: int,
    error: float,
    open_since: str | None,
    has_gradient: bool = True,
) -> LayerReport:
    """What happened at a layer, for candidate s of those of one batch."""
    return LayerReport(
        name=layer.name,
        unknowns=layer.unknowns,
        weight_rows=layer.weight_rows if row_weight is None else int((row_weight > 0).sum()),
        gradient_rows=layer.gradient_rows if has_gradient else 0,
        rank=solution.rank[s],
        condition=solution.condition[s],
        weight_residual=float(solution.weight_residual[s]),
        gradient_residual=float(solution.gradient_residual[s]),
        error=error,
        dead_units=int((k[0] == 0).all(-1).sum()) if has_gradient else 0,
        method=solution.method[s],
        open_since=open_since,
    )
