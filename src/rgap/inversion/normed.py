"""Through a layer and a norm behind it at once, where what the norm puts out is known in part: a batch norm in training
mode, whose statistics are told, or a layer, group or instance norm, whose mean and size are not.

What the norm does to a cotangent takes the values that it reads: k = k_0 - s z for every channel or group. Behind ReLU
those of its zeros are not known, and neither is the layer's cotangent there. Of both together the rows are

    norm(W x + b) = y, where y is known        sum over the samples of K(W x + b) x = grad W

the second ones of second order in x, and no kink is among them: Gauss and Newton begin at what the first ones tell.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rgap.inversion.block_solve import SOLVER, BlockInput, solve_jointly
from rgap.inversion.jacobian import Jacobian
from rgap.inversion.normed_sides import other_sides
from rgap.inversion.report import LayerReport
from rgap.inversion.state import Cause, Observation, State, Stop
from rgap.inversion.system import ConstraintSystem
from rgap.nn.batch_norm import BatchNorm
from rgap.nn.network import Network, Segment
from rgap.nn.ops import Linear, Norm

SIDES = 3
"""Times that a few values behind are found on their other sides, at the most."""


def layer_before(network: Network, segment: Segment, state: State, observed: Observation) -> Segment | None:
    """The layer in front of a norm, if some of the norm's output is not known; None if there is no need of it, or no
    layer with a gradient of its own stands there."""
    norm = network.nodes[segment.nodes[-1]].op
    if not isinstance(norm, (BatchNorm, Norm)) or segment.block:
        return None
    ahead = next((each for each in network.segments if each.exit == segment.entry), None)
    op = None if ahead is None or ahead.block else network.nodes[ahead.nodes[-1]].op
    if not isinstance(op, Linear) or not op.has_gradient:
        return None
    if isinstance(norm, Norm) and op.layer.positions == 1 and op.layer.bias_name in observed.gradients:
        return None  # the bias's gradient is the layer's cotangent, whatever the norm does
    unknown = state.row_weight is not None and bool((state.row_weight == 0).any())
    return ahead if unknown and op.layer.weight_name in observed.gradients else None


def through_both(
    both: Network, observed: Observation, state: State, but_mean: bool = False
) -> tuple[State, tuple[LayerReport, ...], State] | Stop:
    """What is known of the layer's input, the layer's report, and what is known of the norm's output by then.

    Args:
        both: the layer and the norm.
        observed: of one update.
        state: of the norm's output, (b, *shape).
        but_mean: as in `solve_jointly`.
    """
    op, norm = (node.op for node in both.nodes)
    assert isinstance(op, Linear)
    if isinstance(norm, BatchNorm):
        free = op.layer.unknowns - op.layer.weight_rows
        if op.layer.positions == 1 and free > 0 and not but_mean:
            return Stop(op, Cause.OPEN, f"{free} dimensions of the samples' mean are hidden by the norm behind it")
        # What it puts out is known as well as its statistics are.
        state = replace(state, std=torch.hypot(state.std, norm.precision * torch.as_tensor(norm.gamma).abs()))
    values = ConstraintSystem(both, state, {}, observed.eps)
    rows = values.weight_rows + op.layer.gradient_rows
    if not but_mean and rows < values.unknowns:
        return Stop(op, Cause.OPEN, f"{rows} numbers tell {values.unknowns}")
    at = values.linearise(state.value.new_zeros(values.in_shape))
    jacobian = Jacobian(values, at, {})
    start = SOLVER.step(jacobian, jacobian.weighted(values.residual(at)), at.x, None)
    found, state = _on_all_sides(both, observed, state, start, but_mean)
    if isinstance(found, Stop):
        return found
    std = found.x.new_full(found.x.shape, found.std)
    return State(found.x, found.cotangent, None, std), tuple(found.reports.values()), state


def _on_all_sides(
    both: Network, observed: Observation, state: State, start: Tensor, but_mean: bool
) -> tuple[BlockInput | Stop, State]:
    """What `solve_jointly` finds, and the state with the sides of its values on which the gradient agrees."""
    gradients = {name: grad[0] for name, grad in observed.gradients.items()}
    for _ in range(SIDES):
        other, start = other_sides(ConstraintSystem(both, state, gradients, observed.eps), start, SOLVER)
        if other is state:
            break
        state = other
    return solve_jointly(both, observed, state, start, but_mean), state
