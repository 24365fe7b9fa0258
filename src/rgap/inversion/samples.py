"""Back through a chain for several samples whose gradients were added up, layer by layer.

Each sample has its own weight rows W x_i = z_i, and all share the gradient rows: sum over i of K_i x_i = grad W. One
layer of a batch is one layer on b times as many pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.inversion.block import solve_one
from rgap.inversion.common_mean import common_mean, norm_before
from rgap.inversion.estimate import inverted
from rgap.inversion.noise import propagate
from rgap.inversion.normed import layer_before, through_both
from rgap.inversion.recursion import before_activation, slope_error, solve_sides
from rgap.inversion.refine import refined
from rgap.inversion.report import LayerReport, layer_report
from rgap.inversion.shared_null_space import may_be_told, told_together
from rgap.inversion.state import Cause, Observation, State, Stop
from rgap.inversion.system import ConstraintSystem
from rgap.inversion.unpool import before_pool
from rgap.nn.activations import ReLU
from rgap.nn.batch_norm import BatchNorm
from rgap.nn.network import Network, Segment
from rgap.nn.ops import Elementwise, Linear, Norm, Op
from rgap.nn.pools import Pool

NEARLY = 1e-4
"""How near, relatively, gradients come on the right sides of all kinks before values are known any better."""


@dataclass(frozen=True, eq=False)
class Passed:
    """How far the inputs of several samples are known, and what happened on the way."""

    state: State
    """Of the value in front of the last operation that was passed."""
    output: State
    """What it began with."""
    certain: tuple[int, State]
    """The last value that every layer behind it determines, with its value_id."""
    layers: tuple[LayerReport, ...]
    scatter: float = 0.0
    """How far each value of the cotangent may be off on its own, root mean square, relative to theirs."""
    stop: Stop | None = None
    """The operation that was not passed."""
    certain_scatter: float = 0.0
    """As `scatter`, of the last value that is certain."""

    def scattered(self, moved: Tensor, k: Tensor) -> Passed:
        """The values of a cotangent k moved by that much more."""
        more = float(moved.norm() / k.norm().clamp(min=torch.finfo(k.dtype).tiny))
        return replace(self, scatter=(self.scatter**2 + more**2) ** 0.5)

    def moved(self, x: Tensor) -> Passed:
        """With other values at the end."""
        return replace(self, state=replace(self.state, value=x))


def layer_by_layer(
    network: Network,
    output: State,
    observed: Observation,
    report: Callable[[int, float], None] = lambda step, missed: None,
    scatter: float = 0.0,
) -> Passed:
    """Back from what is known of each sample's output, to the inputs or to an operation that is not inverted.

    Args:
        output: value, cotangent and error of the output, (b, *shape).
        observed: of one update, the sum over the samples.
        report: is called with the number of steps through a pool and what they miss.
        scatter: of the output's cotangent, as `Passed` has it.
    """
    passed = Passed(output, output, (len(network.nodes), output), (), scatter)
    gradients = {name: grad[0] for name, grad in observed.gradients.items()}
    here = len(network.nodes)
    for segment in reversed(network.segments):
        if segment.exit > here:
            continue
        op = network.nodes[segment.nodes[-1]].op
        ahead = layer_before(network, segment, passed.state, observed)
        if segment.block:
            passed = _block(network, segment, passed, observed)
        elif ahead is not None and not isinstance(op, Norm):  # how well such a norm tells several is not known
            segment, passed = ahead, _with_norm(network, ahead, segment, passed, observed)
        elif isinstance(op, Linear):
            passed = _linear(network, segment, op, passed, observed)
        elif isinstance(op, Elementwise):
            passed = _activation(network, segment, op, passed, observed)
        elif isinstance(op, Pool):
            before = before_pool(network, segment.nodes[-1], passed.state, gradients, observed.eps, report)
            passed = replace(passed, stop=before) if isinstance(before, Stop) else replace(passed, state=before)
        else:
            passed = _other(op, passed)
        here = segment.entry
        if passed.stop is not None:
            return passed
        if all(layer.open_since is None for layer in passed.layers):
            passed = replace(passed, certain=(segment.entry, passed.state), certain_scatter=passed.scatter)
    return passed


def _block(network: Network, segment: Segment, passed: Passed, observed: Observation) -> Passed:
    block, state, op = network.part([segment]), passed.state, network.nodes[segment.nodes[-1]].op
    if any(layer.weight_name not in observed.gradients for layer in block.layers):
        return replace(passed, stop=Stop(op, Cause.LOSSY, "a gradient of its layers was not sent"))
    open_since = next((each.name for each in passed.layers if each.open_since), None)
    found = solve_one(block, segment.exit, observed, state, open_since)
    if isinstance(found, Stop):
        return replace(passed, stop=found)
    before, reports = found
    passed = replace(passed, layers=(*reports, *passed.layers))
    if not any(activation.kinked for _, activation in block.activations):
        moved = _cotangent(block, before.value + before.std * _draw(before.value), state.cotangent)
        passed = passed.scattered(moved - before.cotangent, before.cotangent)
    return replace(passed, state=before)


def _linear(network: Network, segment: Segment, op: Linear, passed: Passed, observed: Observation) -> Passed:
    if op.layer.weight_name not in observed.gradients or not op.has_gradient:
        return replace(passed, stop=Stop(op, Cause.LOSSY, "its gradient is not its own, or was not sent"))
    told, samples = None, len(passed.state.value)
    if may_be_told(network, segment.nodes[-1], samples):
        told = told_together(network, segment.nodes[-1], passed.state, observed)
    if told is None:
        told = _layer(replace(op, layer=op.layer.side_by_side(samples)), passed, observed)
    state, own = told
    if own.open_since == own.name and own.unknowns - own.rank <= op.layer.unknowns - op.layer.weight_rows:
        found = norm_before(network, segment.nodes[-1], samples)
        if found is not None:  # then nothing but the mean is open
            state = replace(state, value=common_mean(state.value, state.std, *found))
            own = replace(own, rank=own.unknowns, open_since=None)
    return replace(passed, state=state, layers=(own, *passed.layers))


def _with_norm(network: Network, ahead: Segment, norm: Segment, passed: Passed, observed: Observation) -> Passed:
    """Through a layer and the batch norm behind it at once, and what that hides of the mean from the norm in front."""
    both = network.part([ahead, norm])
    before = norm_before(network, ahead.nodes[-1], len(passed.state.value))
    found = through_both(both, observed, passed.state, before is not None)
    if isinstance(found, Stop):
        return replace(passed, stop=found)
    state, reports, behind = found
    moved = _cotangent(both, state.value + state.std * _draw(state.value), behind.cotangent)
    passed = passed.scattered(moved - state.cotangent, state.cotangent)
    if before is not None:
        state = replace(state, value=common_mean(state.value, state.std, *before))
    return replace(passed, state=state, layers=(*reports, *passed.layers))


def _activation(network: Network, segment: Segment, op: Elementwise, passed: Passed, observed: Observation) -> Passed:
    state = passed.state
    if not isinstance(op.activation, ReLU) and may_be_told(network, segment.entry - 1, len(state.value)):
        # Its rows sharpen what is wrong behind them: from all constraints there that is known better.
        state = _once_more(network, segment.exit, passed, observed)
    std = state.std.expand(state.value.shape)
    state, inverse = before_activation(op.activation, state)
    k = state.cotangent * inverse.slope  # Eq. 6
    if not op.activation.kinked:
        passed = passed.scattered(state.cotangent * slope_error(op.activation, inverse, std), k)
    return replace(passed, state=replace(state, cotangent=k))


def _other(op: Op, passed: Passed) -> Passed:
    state = inverted(op, passed.state)
    if state is None:
        return replace(passed, stop=Stop(op, Cause.LOSSY, op.loses))
    if not isinstance(op, BatchNorm):
        return replace(passed, state=state)
    # What is left of a cotangent is as precise as what the norm took away from it.
    moved, k = op.precision * passed.state.cotangent * op.scale, state.cotangent
    if len(k) == op.samples:  # then all of it that is told: the norm leaves no mean
        k = k - k.mean((0, *range(2, k.dim())), keepdim=True)
    return replace(passed, state=replace(state, cotangent=k)).scattered(moved, k)


def _once_more(network: Network, value_id: int, passed: Passed, observed: Observation) -> State:
    """What is known of a value, from all constraints behind it together."""
    segments = [segment for segment in network.segments if segment.entry >= value_id]
    state, gradients = passed.state, {name: grad[0] for name, grad in observed.gradients.items()}
    if not segments or state.row_weight is not None:
        return state
    system = ConstraintSystem(network.part(segments).own, passed.output, gradients, observed.eps)
    if not system.nodes:
        return state
    x, std = refined(system, state.value, max(NEARLY, 10 * observed.eps))
    return replace(state, value=x, std=torch.full_like(x, std)) if std < float(state.std.mean()) else state


def _cotangent(network: Network, x: Tensor, output: Tensor) -> Tensor:
    """That of a network's input, given that of its output."""
    values = network.forward(x)
    found = network.cotangents(values, network.slopes(values), output)[0]
    return torch.zeros_like(x) if found is None else found


def _draw(like: Tensor) -> Tensor:
    generator = torch.Generator(device=like.device).manual_seed(0)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _layer(op: Linear, passed: Passed, observed: Observation) -> tuple[State, LayerReport]:
    """The layer's inputs from their weight rows and the gradient rows that they share (Eqs. 15 and 16)."""
    layer = op.layer
    grad = layer.pack_weight(observed.gradients[layer.weight_name])
    bias = observed.gradients.get(layer.bias_name or "")
    state, system, solution = solve_sides(op, passed.state, grad, bias, True, observed)
    k = layer.pack_output(state.cotangent)
    weight = None if state.row_weight is None else layer.pack_output(state.row_weight)
    generator = torch.Generator(device=k.device).manual_seed(0)
    std = layer.pack_output(state.std.expand(state.value.shape)).maximum(solution.weight_misfit[:, None, None])
    moved = propagate(
        system, std, solution.x, grad, observed.eps, std.new_zeros(1), std.new_tensor([passed.scatter]), generator
    )
    moved = moved.square().mean().sqrt()
    x = layer.unpack_input(solution.x)
    open_since = layer.name if solution.rank[0] < layer.unknowns else None
    report = layer_report(layer, k, weight, solution, 0, float(moved), open_since)
    return State(x, layer.unpack_input(layer.grad_input(k)), None, moved.expand(x.shape)), report
