"""What the last layer's gradient of one update gives the recursion to begin with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from rgap.attacks.base import AS_ONE
from rgap.attacks.result import Outcome, Status
from rgap.inversion.output import OutputCandidates, activation_before_last, last_layer, output_candidates
from rgap.nn.losses import MarginLoss
from rgap.nn.ops import Affine
from rgap.target import Target
from rgap.update import Update


@dataclass(frozen=True, eq=False)
class Begun:
    """One update and the candidates for its last layer's output."""

    update: Update
    gradients: dict[str, Tensor]
    output: OutputCandidates
    assumptions: tuple[str, ...]


def obstacle(target: Target) -> str | None:
    """Why the recursion has nowhere to begin; None if it has."""
    try:
        network = target.network
    except NotImplementedError as error:
        return str(error)
    if last_layer(network) is None:
        scaled = isinstance(network.nodes[-1].op, Affine) and network.nodes[-1].reads == (len(network.nodes) - 1,)
        remedy = "; what scales or shifts a layer's outputs belongs into its weights and bias" if scaled else ""
        return f"{network.nodes[-1].op} is not a layer whose gradient is shared: the loss takes its raw output{remedy}"
    if math.prod(network.shapes[-1]) != target.loss.outputs:
        return f"{math.prod(network.shapes[-1])} outputs a sample, the loss takes {target.loss.outputs}"
    return None


def begin(target: Target, update: Update) -> Begun | Outcome:
    """The candidates for the last layer's output; or the outcome where its gradient allows none."""
    network = target.network
    gradients = {name: g.double().to(target.device) for name, g in update.gradients.items()}
    assumptions: tuple[str, ...] = ()
    if target.batch_size != 1 or update.header.batch_size != 1:
        assumptions = (AS_ONE,)
    if update.norm == 0:
        reason = "all gradients are zero: the loss is saturated, or a layer's units are all dead"
        return Outcome(Status.GRADIENT_ZERO, reason, assumptions=assumptions)
    if network.scalable:
        assumptions += ("the gradient was not scaled: here a scaled one is that of a brighter or darker input",)
    output = output_candidates(
        network.layers[-1], activation_before_last(network), target.loss, gradients, update.precision
    )
    assumptions += output.assumptions
    if len(output.labels) == 0:
        reason = output.reason or f"under {target.loss.name} loss no sample gives this last gradient"
        return Outcome(Status.NOT_CONVERGED, reason, assumptions=assumptions)
    return Begun(update, gradients, output, assumptions)


def saturated(target: Target, output: OutputCandidates, eps: float, tolerance: float) -> str:
    """What a nearly saturated loss did to the client's own gradient; empty if it did nothing that shows."""
    k = float(output.k.abs().max())
    if isinstance(target.loss, MarginLoss) or k == 0 or eps / k <= tolerance:
        return ""
    return f"; the loss is nearly saturated: k is {k:.1e}, and the rounding of 1 - p may be {min(eps / k, 1):.0%} of it"
