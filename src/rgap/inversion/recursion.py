"""Algorithm 1 of R-GAP (arXiv:2010.07733): from a network's output back to its input, one segment at a time.

With z_i = W_i x_i + b_i, x_(i+1) = f(z_i) and k_i the cotangent of z_i, the gradient of the loss with respect to it:

    grad W_i = k_i x_i'                 k_(i-1) = (W_i' k_i) f'(z_(i-1))        (Eqs. 6-8)
    K_i x_i = grad W_i                  W_i x_i = z_i - b_i                     (Eqs. 15 and 16)

It begins with z and k of the last layer (Eqs. 9-14, `rgap.inversion.output`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.block import solve_block
from rgap.inversion.by_values import told_by_values
from rgap.inversion.estimate import inverted
from rgap.inversion.history import Candidate, Open, Paths
from rgap.inversion.layer import LayerSolution, LayerSystem
from rgap.inversion.noise import propagate
from rgap.inversion.non_monotone import both_branches, choose_branch
from rgap.inversion.norm import before_norm
from rgap.inversion.normed import layer_before
from rgap.inversion.null_space import complete
from rgap.inversion.read_ahead import read_ahead
from rgap.inversion.report import layer_report
from rgap.inversion.rivals import without_contradicting
from rgap.inversion.rounding import NEAREST
from rgap.inversion.sides import (
    branches,
    choose_side,
    choose_zeros,
    gradient_agrees,
    lit,
    other_side,
    sides_agree,
    sides_by_bias,
)
from rgap.inversion.state import Cause, Observation, State, Stop
from rgap.inversion.unpool import before_pool
from rgap.linalg import deadline
from rgap.nn.activation import Activation, Inverse
from rgap.nn.batch_norm import BatchNorm
from rgap.nn.layers import Layer
from rgap.nn.network import Network
from rgap.nn.non_monotone import NonMonotone
from rgap.nn.ops import Elementwise, Linear, Norm, Op
from rgap.nn.pools import Pool

PRECISE = 1e-5
"""Weight rows that miss more may hide a value on its wrong side."""
SOLVED = 1e-10
"""What solves in double precision leave of values, relatively, at the most."""
LEAST = 1e-6
"""However coarse the gradient, a cotangent above this part of its terms is not taken for their rounding."""


def recurse(
    network: Network,
    observed: Observation,
    paths: Paths,
    report: Callable[[int, float], None] = lambda done, loss: None,
    virtual: bool = False,
) -> list[Candidate]:
    """Algorithm 1, for all candidates of all updates together; those that contradict their constraints fall out.

    Args:
        network: up to the value that is known.
        paths: what is known of that value, for each candidate.
        report: is called with the number of segments that were passed.
        virtual: whether a layer before may tell what one leaves open: virtual constraints (Section 4).
    """
    return _from(network, observed, paths, paths, len(network.nodes), report, virtual)


def _from(
    network: Network,
    observed: Observation,
    output: Paths,
    paths: Paths,
    here: int,
    report: Callable[[int, float], None],
    virtual: bool,
) -> list[Candidate]:
    """The same from a value on.

    Args:
        output: the candidates at the network's output.
        paths: what is known of the value, for those that are left of them.
        here: its value_id.
    """
    for count, segment in enumerate(reversed(network.segments)):
        if segment.exit > here:
            continue
        deadline.check()
        report(count, float("nan"))
        op = network.nodes[segment.nodes[-1]].op
        if (segment.block or isinstance(op, Pool)) and len(paths.updates) > 1:
            go_on = partial(_from, network, observed, here=segment.exit, report=report, virtual=virtual)
            return _one_by_one(output, paths, segment.exit, op, go_on)
        paths = paths.at(segment.exit)
        ahead: tuple[int, Paths] | None = None
        layer = layer_before(network, segment, paths.state, observed)
        if segment.block or isinstance(op, Pool):
            told = told_by_values(network, segment.exit, observed, paths, partial(_missed, report, count))
            if told is not None:
                return told.at(0).candidates(0)
        match op:
            case _ if segment.block:
                inputs = math.prod(network.input_shape)
                found = solve_block(network.part([segment]), segment.exit, observed, paths, inputs)
            case _ if layer is not None:
                found = solve_block(network.part([layer, segment]), segment.exit, observed, paths, 0)
            case Linear():
                found = solve_layer(op, segment.exit, observed, paths)  # Eqs. 15 and 16; the cotangent W'k of Eq. 6
                found = complete(network, segment.exit - 1, found) if virtual else found
            case Elementwise():
                found = invert_activation(op.activation, paths)  # z = f^-1(x), k = cotangent * f'(z) of Eq. 6
            case Pool():  # what a gradient tells at once is not looked for
                ahead = read_ahead(network, segment.entry, observed, output, paths)
                step = partial(_missed, report, count)
                found = ahead[1] if ahead else unpool(network, segment.exit - 1, observed, paths, step)
            case _:
                behind = network.nodes[segment.entry - 1].op if segment.entry else None
                found = invert(op, behind, observed, paths)
        if isinstance(found, Stop):
            if segment.block or not isinstance(op, Pool):  # there it was tried
                ahead = read_ahead(network, segment.entry, observed, output, paths)
            if ahead is None:
                return paths.candidates(segment.exit, found)
            found = ahead[1]
        here, paths = ahead[0] if ahead else (layer or segment).entry, found
    return paths.at(0).candidates(0)


def _one_by_one(
    output: Paths, paths: Paths, value_id: int, op: Op, go_on: Callable[[Paths, Paths], list[Candidate]]
) -> list[Candidate]:
    """Each update by itself. Blocks and pools take every candidate alone: one that gets no further, or is told at once,
    or runs out of time, leads the others nowhere else."""
    ends: list[Candidate] = []
    for update in paths.updates:
        own = paths.of(update)
        try:
            ends += go_on(output.of(update), own)
        except deadline.OutOfTime:
            late = own.candidates(value_id, Stop(op, Cause.NOT_FOUND, "the time was up"))
            ends += [replace(each, cut_off=True) for each in late]
    return ends


def _missed(report: Callable[[int, float], None], count: int, step: int, missed: float) -> None:
    """Progress within one segment."""
    report(count, missed)


def solve_layer(op: Linear, value_id: int, observed: Observation, paths: Paths) -> Paths:
    """The layer's input from its gradient and weight constraints (Eqs. 15 and 16), minimum norm where not unique."""
    paths = without_contradicting(op, _read_off(op, observed, paths), observed.rank_tolerance)
    layer, count = op.layer, len(paths.history)
    has_gradient = op.has_gradient and layer.weight_name in observed.gradients
    grad = torch.zeros_like(layer.weight).expand(count, *layer.weight.shape)
    if has_gradient:
        grad = layer.pack_weight(observed.gradient(layer.weight_name, paths.update))
    bias = observed.gradient(layer.bias_name, paths.update) if layer.bias_name in observed.gradients else None
    state, system, solution = solve_sides(op, paths.state, grad, bias, has_gradient, observed)
    k = layer.pack_output(state.cotangent)
    row_weight = None if state.row_weight is None else layer.pack_output(state.row_weight)
    # What is left of the weight rows is an error of z too, one that the layers after this one did not see.
    z_std = layer.pack_output(state.std.expand(state.value.shape)).maximum(solution.weight_misfit[:, None, None])
    state = replace(state, std=layer.unpack_output(z_std).reshape(state.value.shape))
    probe = observed.probe(value_id, k.device)
    errors = propagate(
        system, z_std, solution.x, grad, observed.eps, paths.cotangent_error, paths.cotangent_scatter, probe
    )
    error = errors.square().mean(0).sqrt()
    history = []
    for s, before in enumerate(paths.history):
        k_open = None if op.cotangent_parameter in observed.gradients else before.cotangent_open
        z_open = None if system.determined_by_gradient[s] else before.value_open
        own = layer.name if solution.rank[s] < layer.unknowns else None
        one, size = slice(s, s + 1), float(error[s].square().mean().sqrt())
        weight = None if row_weight is None else row_weight[one]
        report = layer_report(layer, k[one], weight, solution, s, size, k_open or z_open or own, has_gradient)
        passed = replace(before, cotangent_open=k_open)
        history.append(passed.solved(report, value_id, state.one(s), Open(system, s, errors[0, one])))
    # Directions that the constraints hardly determine are the same in all channels: so is the error of each pixel.
    pixel = error.square().mean(1, keepdim=True).sqrt().expand(error.shape)
    cotangent = layer.unpack_input(_behind(layer, k, observed.eps))
    solved = State(layer.unpack_input(solution.x), cotangent, None, layer.unpack_input(pixel))
    residual = torch.maximum(solution.weight_residual, solution.gradient_residual)
    return replace(paths, state=solved, history=tuple(history)).scattered(observed.eps).plausible(residual)


def solve_sides(
    op: Linear, state: State, grad: Float[Tensor, "s g j i"], bias: Tensor | None, has_gradient: bool, obs: Observation
) -> tuple[State, LayerSystem, LayerSolution]:
    """The layer's constraints and their solution, with the sides of kinks behind it on which the gradients agree.

    Args:
        bias: gradient of the layer's bias, (s, o); None if there is none.
    """
    other = state.alternative
    if other is not None and bool((other.value != state.value).any()):
        state, other = choose_branch(op, state, other, grad, has_gradient, obs), None
    if other is not None and bias is not None:
        state = sides_by_bias(op.layer, state, other, bias, obs.eps)
    system, solution = _solve(op, state, grad, has_gradient, obs)
    if other is not None:  # of slopes
        chosen = _sides(op, state, other, solution, grad, obs)
        if chosen is not state:
            return chosen, *_solve(op, chosen, grad, has_gradient, obs)
    return state, system, solution


def _behind(layer: Layer, k: Float[Tensor, "s o p"], eps: float) -> Float[Tensor, "s c n"]:
    """W'k, the first factor of Eq. 6; zero where its terms cancel but for their rounding, as of equal rows of W."""
    found = layer.grad_input(k)
    noise = min(eps, LEAST) * layer.weight.norm() * k.flatten(1).norm(dim=1)
    kept: Tensor = found * (found.flatten(1).norm(dim=1) > noise)[:, None, None]
    return kept


def _with_cotangent(op: Op, state: State, observed: Observation, of: Tensor) -> State:
    """With the gradient of what was added to every value for the cotangent, where there is one: it is the same."""
    if op.cotangent_parameter is None or op.cotangent_parameter not in observed.gradients:
        return state
    gradient = observed.gradient(op.cotangent_parameter, of)
    return replace(state, cotangent=gradient.reshape(state.cotangent.shape))


def _read_off(op: Op, observed: Observation, paths: Paths) -> Paths:
    """The same of all candidates. Such a cotangent is what the client's own weight gradients are made of: nothing but
    the rounding of its values is wrong with it."""
    state = _with_cotangent(op, paths.state, observed, paths.update)
    if state is paths.state:
        return paths
    own = torch.full_like(paths.cotangent_error, NEAREST * observed.eps)
    return replace(paths, state=state, cotangent_error=torch.zeros_like(own), cotangent_scatter=own)


def _solve(
    op: Linear, state: State, grad: Float[Tensor, "s g j i"], has_gradient: bool, observed: Observation
) -> tuple[LayerSystem, LayerSolution]:
    """K x = grad W and W x = z - b (Eqs. 15 and 16)."""
    layer = op.layer
    k, z = layer.pack_output(state.cotangent), layer.pack_output(state.value)
    row_weight = None if state.row_weight is None else layer.pack_output(state.row_weight)
    # Without gradient rows there are weight rows alone.
    rows_k = k if has_gradient else torch.zeros_like(k)
    system = LayerSystem(layer, rows_k, row_weight, observed.rank_tolerance, solver=observed.solver)
    return system, system.solve(z - layer.offset, grad)


def _sides(
    op: Linear, state: State, other: State, solution: LayerSolution, grad: Tensor, observed: Observation
) -> State:
    """The state with the slopes that the gradient shows, the same one if it agrees with those taken.

    Args:
        solution: with the slopes taken.
    """
    layer, x = op.layer, solution.x
    k, there = layer.pack_output(state.cotangent), layer.pack_output(other.cotangent)
    if other.row_weight is not None:  # of a ReLU
        if bool(gradient_agrees(layer, k, x, grad, observed.eps).all()):
            return state
        return choose_zeros(op, state, other, x, grad, observed)
    there = torch.where(lit(layer, x), there, k)
    if torch.equal(there, k):
        return state
    # Where gradient rows alone determine the input they are met on any side, and the weight rows show a wrong one.
    error = state.rms_std.maximum(SOLVED * state.value.flatten(1).square().mean(1).sqrt())
    precise = (solution.weight_residual <= PRECISE) & (solution.weight_misfit <= error)
    if bool((precise & sides_agree(layer, k, there, x, grad, observed.eps)).all()):
        return state
    other = replace(other, cotangent=layer.unpack_output(there).reshape(state.cotangent.shape))
    return choose_side(op, state, other, grad, observed)


def invert_activation(activation: Activation, paths: Paths) -> Paths:
    """z = f^-1(x) and its cotangent (Eq. 6), a candidate for each choice of sides of values at their kinks."""
    x = paths.state
    std = x.std.expand(x.value.shape)
    z, inverse = before_activation(activation, x)
    of, slope = branches(activation, x.value, inverse.slope, std)
    if len(of) > len(x.value):
        z = replace(z, alternative=None)
    found = replace(paths, state=z).select(of)
    k = found.state.cotangent * slope  # Eq. 6
    history = tuple(each.passed_activation(activation) for each in found.history)
    if not activation.kinked:
        found = found.scattered(_relative(found.state.cotangent * slope_error(activation, inverse, std)[of], k))
    return replace(found, state=replace(found.state, cotangent=k), history=history)


def slope_error(activation: Activation, inverse: Inverse, std: Tensor) -> Tensor:
    """How far an error of the output moves the slopes of an activation without kinks."""
    # Where the slope vanishes z moves by the root of what moves x.
    moved = inverse.z + std / inverse.slope.abs().maximum(std.sqrt())
    return activation.slope(moved) - activation.slope(inverse.z)


def before_activation(activation: Activation, x: State) -> tuple[State, Inverse]:
    """What is known of z = f^-1(x), the cotangent still that of x, with what z may be as well or its slope."""
    inverse = activation.invert(x.value, x.std.expand(x.value.shape))
    std = x.std / inverse.slope.abs().clamp(min=1e-12)
    z = State(inverse.z, x.cotangent, x.weighed(inverse.weight), std)
    if isinstance(activation, NonMonotone):
        return both_branches(activation, x, z), inverse
    return replace(z, alternative=other_side(activation, x, inverse)), inverse


def _relative(moved: Tensor, k: Tensor) -> Float[Tensor, " s"]:
    """Root mean square of the one over that of the other."""
    size = k.flatten(1).norm(dim=1).clamp(min=torch.finfo(k.dtype).tiny)
    relative: Tensor = moved.flatten(1).norm(dim=1) / size
    return relative


def unpool(
    network: Network,
    node: int,
    observed: Observation,
    paths: Paths,
    report: Callable[[int, float], None] = lambda step, missed: None,
) -> Paths | Stop:
    """Through a pool, each candidate on its own."""
    states, stop = [], Stop(network.nodes[node].op, Cause.LOSSY, "")
    for s in range(len(paths.history)):
        gradients = {name: observed.gradient(name, paths.update[s : s + 1])[0] for name in observed.gradients}
        try:
            found = before_pool(network, node, paths.state.one(s), gradients, observed.eps, report)
        except deadline.OutOfTime:
            found = replace(stop, what="what it reads was not found: the time was up", nearest=None)
        if isinstance(found, Stop):
            stop = found
        else:
            states.append((s, found))
    if not states:
        return stop if len(paths.history) == 1 else replace(stop, nearest=None)
    kept = paths.select(torch.tensor([s for s, _ in states], device=paths.update.device))
    return replace(kept, state=State.concatenate([state for _, state in states]))


def invert(op: Op, behind: Op | None, observed: Observation, paths: Paths) -> Paths | Stop:
    """Through an operation that has one input for each output, or of whose input the cotangent is known.

    Args:
        behind: the operation that this one reads.
    """
    state = before_norm(op, behind, paths.state, observed, paths.update) if isinstance(op, Norm) else None
    if state is None:
        state = _inverted(op, paths.state, observed, paths.update)
    if state is None:
        return Stop(op, Cause.LOSSY, op.loses)
    found = replace(paths, state=state)
    return found.scattered(op.precision) if isinstance(op, BatchNorm) else found


def _inverted(op: Op, state: State, observed: Observation, of: Tensor) -> State | None:
    other = None if state.alternative is None else _with_cotangent(op, state.alternative, observed, of)
    return inverted(op, replace(_with_cotangent(op, state, observed, of), alternative=other))
