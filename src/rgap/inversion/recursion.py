"""Algorithm 1 of R-GAP (arXiv:2010.07733): from a network's output back to its input, one segment at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rgap.inversion import block
from rgap.inversion.layer import LayerSystem
from rgap.inversion.rounding import rounding
from rgap.inversion.state import Candidate, History, LayerSolve, Observation, State
from rgap.nn.activations import Activation, Inverse, NonMonotone
from rgap.nn.network import Network, Segment
from rgap.nn.ops import Affine, Elementwise, Linear, Norm, Op

UNSURE, BRANCHES, BRANCHED = 5.0, 3, 20_000
"""A value within so many errors of its activation's kink may lie on either side of it; how many are tried at once, and
among how many values. Of more the sides are told from the gradient."""
FOLDS = 20
"""How often the places of folded activations are decided anew."""
CANCELS = 1e-4
"""Sums over positions below this fraction of their terms' sizes say nothing of a norm's size."""
ROUGH = 1e-4
"""Singular values below this fraction of the largest are of no use where an input is wanted for its signs alone."""
DOUBT = 1e-2
"""The weight of a row whose value may be another one, while the others decide."""


def recurse(
    network: Network,
    segments: Sequence[Segment],
    given: Observation,
    state: State,
    k_error: Float[Tensor, " s"],
    update: Int[Tensor, " s"],
    report: Callable[[int, float], None] = lambda done, loss: None,
) -> list[tuple[int, Candidate]]:
    """All candidates of all updates together; those that contradict their constraints fall out on the way.

    Args:
        segments: from the network's input to the value that is known.
        state: that value, for each candidate.
        k_error: how far rounding may have moved k, relative to k.
        update: which one each candidate is of.
        report: is told how many segments were passed.

    Returns:
        Which candidate, and where it ended.
    """
    family = torch.arange(len(state.value), device=state.value.device)
    trails = [History() for _ in state.value]
    stopped, at = "", segments[-1].exit
    for count, segment in enumerate(reversed(segments)):
        report(count, float("nan"))
        at, of = segment.exit, update[family]
        op = network.nodes[segment.nodes[-1]].op
        if segment.block:
            part = network.part([segment])
            passed = [
                block.back(part, given.one(int(of[s])), state.one(s), trail, given.probe(at, state.value.device))
                for s, trail in enumerate(trails)
            ]
            through = {s: each for s, each in enumerate(passed) if isinstance(each, State)}
            if not through:
                stopped = str(passed[0])
                break
            keep = torch.tensor(list(through), device=state.value.device)
            family, k_error, trails = family[keep], k_error[keep], [trails[s] for s in through]
            state = State.concatenate(list(through.values()))
        elif isinstance(op, Linear):
            state, residual = _layer(op, given, of, state, k_error, trails, at)
            alive = _plausible(residual, family, of)
            state, k_error, family = state.select(alive), k_error[alive], family[alive]
            trails = [trail for trail, keep in zip(trails, alive.tolist(), strict=True) if keep]
        elif isinstance(op, Elementwise):
            state, of = _activation(op.activation, state)
            k_error, family = k_error[of], family[of]
            trails = [trails[parent].passed(op.activation) for parent in of.tolist()]
        else:
            behind = network.nodes[segment.entry - 1].op if segment.entry else None
            moved = _unscaled(op, behind, state, given, of) if isinstance(op, Norm) else None
            moved = _inverted(op, state, given, of) if moved is None else moved
            if moved is None:
                stopped = f"stops at {op.name}: {op.loses}"
                break
            state = moved
    ends = []
    for s, trail in enumerate(trails):
        here = state.one(s)
        none = torch.zeros(0)
        ends.append(
            (
                int(family[s]),
                Candidate(
                    here.value,
                    none,
                    none,
                    float("nan"),
                    float(here.rms_std[0]),
                    tuple(trail.layers),
                    tuple(trail.steps),
                    at if trail.known is None else trail.at,
                    here if trail.known is None else trail.known,
                    stopped,
                ),
            )
        )
    return ends


def _layer(
    op: Linear,
    given: Observation,
    of: Int[Tensor, " s"],
    state: State,
    k_error: Float[Tensor, " s"],
    trails: list[History],
    at: int,
) -> tuple[State, Float[Tensor, " s"]]:
    """The layer's input from its constraints (Eqs. 15 and 16), and how badly they are met."""
    layer, gradients = op.layer, given.gradients
    state = _told(op, state, given, of)
    heard = op.has_gradient and layer.weight_name in gradients
    if heard:
        grad = layer.pack_weight(given.gradient(layer.weight_name, of))
    else:
        grad = torch.zeros_like(layer.weight).expand(len(state.value), *layer.weight.shape)
    if state.alternative is not None:
        folded = bool((state.alternative.value != state.value).any())
        state = (
            _unfolded(op, state, state.alternative, given)
            if folded
            else _sided(op, state, state.alternative, grad, given)
        )
    k, z, row_weight = layer.pack_output(state.cotangent), layer.pack_output(state.value), _rows(op, state)
    z_error = layer.pack_output(state.std.expand(state.value.shape))
    # Without gradient rows there are weight rows alone.
    known = k if heard else torch.zeros_like(k)
    system = LayerSystem(layer, known, row_weight, given.rank_tolerance, solver=given.solver)
    solved = system.solve(z - layer.offset, grad)
    # What is left of the weight rows is an error of z too, one that the layers after this one did not see.
    z_error = z_error.maximum(solved.weight_misfit[:, None, None])
    noise = _error(system, z_error, grad, given.eps, k_error, given.probe(at, state.value.device))
    error = noise.square().mean((1, 2)).sqrt()
    for s, trail in enumerate(trails):
        own = slice(s, s + 1)
        step = LayerSolve(k[own], z[own], z_error[own], solved.x[own], None if row_weight is None else row_weight[own])
        trail.add(step, layer, system, solved, s, float(error[s]), op.cotangent_parameter in gradients, heard)
        trail.open_at(at, state.one(s))
    x = layer.unpack_input(solved.x)
    # The directions that the constraints tell badly are the same in all channels: so is the error of each pixel.
    each = noise.square().mean(1, keepdim=True).sqrt().expand(noise.shape)
    before = State(x, layer.unpack_input(layer.grad_input(k)), None, layer.unpack_input(each))
    return before, torch.maximum(solved.weight_residual, solved.gradient_residual)


def _told(op: Op, state: State, given: Observation, of: Int[Tensor, " s"]) -> State:
    """With k itself, where the gradient of what is added to every value tells it."""
    if op.cotangent_parameter is None or op.cotangent_parameter not in given.gradients:
        return state
    return replace(state, cotangent=given.gradient(op.cotangent_parameter, of).reshape(state.cotangent.shape))


def _rows(op: Linear, state: State) -> Tensor | None:
    return None if state.row_weight is None else op.layer.pack_output(state.row_weight)


def _unfolded(op: Linear, state: State, other: State, given: Observation) -> State:
    """Of two values that a folded activation allows, the one that the weight rows of all the others come near to.

    k of a unit depends on which it is, so the gradient rows say nothing before it is decided.
    """
    layer = op.layer
    unsure = state.value != other.value
    weight = torch.ones_like(state.value) if state.row_weight is None else state.row_weight
    weight = layer.pack_output(torch.where(unsure, DOUBT * weight, weight))
    nothing = torch.zeros_like(layer.pack_output(state.cotangent))
    system = LayerSystem(layer, nothing, weight, given.rank_tolerance, solver=given.solver)
    grad = torch.zeros_like(layer.weight).expand(len(nothing), *layer.weight.shape)
    lower = torch.zeros_like(unsure)
    for _ in range(FOLDS):
        y = torch.where(lower, other.value, state.value)
        x = system.solve(layer.pack_output(y) - layer.offset, grad).x
        z = layer.unpack_output(layer.output(x) + layer.offset)
        nearer = unsure & ((z - other.value).abs() < (z - state.value).abs())
        if bool((nearer == lower).all()):
            break
        lower = nearer
    chosen = None
    if state.row_weight is not None and other.row_weight is not None:
        chosen = torch.where(lower, other.row_weight, state.row_weight)
    return State(
        torch.where(lower, other.value, state.value),
        torch.where(lower, other.cotangent, state.cotangent),
        chosen,
        torch.where(lower, other.std, state.std.expand(state.value.shape)),
    )


def _sided(op: Linear, state: State, other: State, grad: Float[Tensor, "s g j i"], given: Observation) -> State:
    """Of two sides of their kinks on which values may lie, the one with which the gradient agrees.

    The wrong one adds a multiple of one vector to the gradient of the unit's own weights, what the unit reads. So the
    gradient rows of such units are left out at first; if the others determine the input it tells the sides.
    """
    layer = op.layer
    k, there = layer.pack_output(state.cotangent), layer.pack_output(other.cotangent)
    unsure = k != there
    sure = ~unsure.any(-1, keepdim=True)
    left = grad * sure.reshape(len(k), layer.groups, -1, 1)
    system = LayerSystem(layer, k * sure, _rows(op, state), max(ROUGH, given.rank_tolerance), solver=given.solver)
    x = system.solve(layer.pack_output(state.value) - layer.offset, left).x
    miss = (grad - layer.grad_weight(x, k)).flatten(1, 2)
    patches = layer.patches(x)
    k = k.clone()
    for s, unit in (~sure[..., 0]).nonzero().tolist():
        at = unsure[s, unit].nonzero().flatten()
        if system.rank[s] < layer.unknowns or len(at) > miss.shape[-1]:
            continue
        move = (there - k)[s, unit, at]
        effect = patches[s, unit * layer.groups // layer.outputs][:, at] * move
        share = torch.linalg.lstsq(effect, miss[s, unit, :, None]).solution[:, 0]
        turned = share > 0.5
        left = miss[s, unit] - effect[:, turned].sum(1)
        # What turning does not explain has another cause, such as a candidate that is none.
        if float(left.norm()) < 0.5 * float(miss[s, unit].norm()):
            k[s, unit, at[turned]] = there[s, unit, at[turned]]
    return replace(state, cotangent=layer.unpack_output(k).reshape(state.cotangent.shape), alternative=None)


def _activation(activation: Activation, state: State) -> tuple[State, Int[Tensor, " b"]]:
    """Through an activation, with the candidate that each of the branches at its kinks comes from."""
    error = state.std.expand(state.value.shape)
    inverse = activation.invert(state.value, error)
    z_error = error / inverse.slope.abs().clamp(min=1e-12)
    weight = inverse.weight
    if state.row_weight is not None:
        weight = state.row_weight if weight is None else weight * state.row_weight
    of, slope = _branches(activation, state.value, inverse.slope, error)
    other = _other_side(activation, state, inverse, error) if len(of) == len(state.value) else None
    if isinstance(activation, NonMonotone):
        z = activation.lower(state.value)
        fold = activation.slope(z)
        z = torch.where(state.value < 0, z, inverse.z)
        fold = torch.where(state.value < 0, fold, inverse.slope)
        other = State(z, state.cotangent * fold, fold.abs().clamp(max=1.0), error / fold.abs().clamp(min=1e-12))
    found = State(inverse.z, state.cotangent, weight, z_error.expand(state.value.shape), other).select(of)
    return replace(found, cotangent=found.cotangent * slope), of  # Eq. 6


def _other_side(activation: Activation, state: State, inverse: Inverse, error: Tensor) -> State | None:
    """With k of values that may lie on the other side of their kink as it is there; None if there are no such."""
    there = activation.other_side(inverse.slope)
    unsure = (state.value.abs() <= UNSURE * error) & (there != inverse.slope)
    if inverse.weight is not None:
        unsure &= inverse.weight > 0  # of the others nothing is known
    if not bool(unsure.any()):
        return None
    return State(inverse.z, state.cotangent * torch.where(unsure, there, inverse.slope), None, state.std)


def _unscaled(op: Norm, behind: Op | None, state: State, given: Observation, of: Int[Tensor, " s"]) -> State | None:
    """k of what a norm reads, its size from the gradient of the bias that was added there; the value stays unknown.

    The bias's gradient is k summed over positions, and each group's k is known but for its size: as many linear
    equations as there are biases.
    """
    name = behind.layer.bias_name if isinstance(behind, Linear) else None
    if not isinstance(behind, Linear) or name is None or name not in given.gradients:
        return None
    layer = behind.layer
    times = layer.pack_output(op.vjp_times_size(state.cotangent, state.value))
    count = state.cotangent[0].numel()
    group = torch.arange(count, device=times.device).div(count // op.groups, rounding_mode="floor")
    group = layer.pack_output(group.reshape(1, *state.cotangent.shape[1:])).expand(times.shape)
    matrix = times.new_zeros(len(times), layer.outputs, op.groups).scatter_add_(2, group, times)
    sizes = times.new_zeros(matrix.shape).scatter_add_(2, group, times.abs()).amax((1, 2))
    if bool((torch.linalg.svdvals(matrix)[:, -1] <= CANCELS * sizes).any()) or layer.outputs < op.groups:
        return None  # the sums over positions cancel, as those of a whole group do
    told = given.gradient(name, of).reshape(len(times), -1, 1)
    inverse = torch.linalg.lstsq(matrix, told).solution[..., 0]
    k = times * inverse.gather(1, group.flatten(1)).reshape(times.shape)
    nothing = torch.zeros_like(state.value)
    return State(nothing, layer.unpack_output(k).reshape(state.cotangent.shape), nothing, state.std)


def _inverted(op: Op, state: State, given: Observation, of: Int[Tensor, " s"]) -> State | None:
    """Through an operation that has one input for each output."""
    state = _told(op, state, given, of)
    y = op.invert(state.value)
    if y is None:
        return None
    k = op.vjp(state.cotangent, (y,))[0]
    error = state.std.expand(state.value.shape)
    if isinstance(op, Affine):
        weight, error = state.row_weight, error / op.scale.abs()
    else:
        weight = None if state.row_weight is None else op.invert(state.row_weight)
        moved = op.invert(error)
        error = error if moved is None else moved
    other = None if state.alternative is None else _inverted(op, state.alternative, given, of)
    return State(y, k, weight, error, other)


def _error(
    system: LayerSystem, z_error: Tensor, grad: Tensor, eps: float, k_error: Tensor, probe: torch.Generator
) -> Float[Tensor, "s c n"]:
    """Push one draw of the right-hand side's noise through the solver, the same one for all candidates.

    z carries the error of the layers after this one, grad W its rounding, and an error of k acts like one of grad W.
    """
    layer, k = system.layer, system.k

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=probe, dtype=k.dtype, device=k.device)

    grad_noise = draw(*grad.shape[1:]) * rounding(grad, eps)
    grad_noise = grad_noise + grad * (k_error * draw())[:, None, None, None]
    z_noise = draw(layer.outputs, layer.positions) * z_error
    return system.apply_inverse(z_noise, grad_noise)


def _branches(activation: Activation, x: Tensor, slope: Tensor, error: Tensor) -> tuple[Int[Tensor, " b"], Tensor]:
    """Values so near their kink that their error leaves the side open: every choice of sides becomes a candidate.

    Returns:
        The candidate that each of b branches comes from, and its slopes.
    """
    other = activation.other_side(slope)
    of, slopes = [], []
    for s in range(len(x)):
        unsure = ((x[s].abs() <= UNSURE * error[s]) & (other[s] != slope[s])).flatten().nonzero().flatten()
        unsure = unsure[:0] if len(unsure) > BRANCHES or x[s].numel() > BRANCHED else unsure
        for sides in product((False, True), repeat=len(unsure)):
            branch = slope[s].clone()
            for at, change in zip(unsure.tolist(), sides, strict=True):
                branch.view(-1)[at] = (other[s] if change else slope[s]).reshape(-1)[at]
            of.append(s)
            slopes.append(branch)
    return torch.tensor(of, device=x.device), torch.stack(slopes)


def _plausible(residual: Float[Tensor, " s"], family: Int[Tensor, " s"], of: Int[Tensor, " s"]) -> Bool[Tensor, " s"]:
    """Which candidates go on.

    Of the branches of one candidate, the one that satisfies its constraints best; of different ones of an update, all
    but those that contradict theirs while another satisfies them: those cannot be the sample.
    """
    rivals = torch.where(family[:, None] == family, residual, torch.inf)
    best_of_family = rivals.argmin(1) == torch.arange(len(residual), device=residual.device)
    least = torch.where(of[:, None] == of, residual, torch.inf).amin(1)
    return best_of_family & (residual <= (1e3 * least).clamp(min=1e-2))
