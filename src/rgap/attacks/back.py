"""Algorithm 1 of R-GAP (arXiv:2010.07733): from a network's output back to its input, one segment at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rgap.attacks import block
from rgap.attacks.base import rounding
from rgap.attacks.trail import End, Front, Given, Step, Trail, one
from rgap.constraints import System
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
    given: Given,
    front: Front,
    k_error: Float[Tensor, " s"],
    update: Int[Tensor, " s"],
    report: Callable[[int, float], None] = lambda done, loss: None,
) -> list[tuple[int, End]]:
    """All candidates of all updates together; those that contradict their constraints fall out on the way.

    Args:
        segments: from the network's input to the value that is known.
        front: that value, for each candidate.
        k_error: how far rounding may have moved k, relative to k.
        update: which one each candidate is of.
        report: is told how many segments were passed.

    Returns:
        Which candidate, and where it ended.
    """
    family = torch.arange(len(front.y), device=front.y.device)
    trails = [Trail() for _ in front.y]
    stopped, at = "", segments[-1].exit
    for count, segment in enumerate(reversed(segments)):
        report(count, float("nan"))
        at, of = segment.exit, update[family]
        op = network.nodes[segment.nodes[-1]].op
        if segment.block:
            part = network.part([segment])
            passed = [
                block.back(part, given.one(int(of[s])), one(front, s), trail, given.probe(at, front.y.device))
                for s, trail in enumerate(trails)
            ]
            through = {s: each for s, each in enumerate(passed) if isinstance(each, Front)}
            if not through:
                stopped = str(passed[0])
                break
            keep = torch.tensor(list(through), device=front.y.device)
            family, k_error, trails = family[keep], k_error[keep], [trails[s] for s in through]
            front = _together(list(through.values()))
        elif isinstance(op, Linear):
            front, residual = _layer(op, given, of, front, k_error, trails, at)
            alive = _plausible(residual, family, of)
            front, k_error, family = front.select(alive), k_error[alive], family[alive]
            trails = [trail for trail, keep in zip(trails, alive.tolist(), strict=True) if keep]
        elif isinstance(op, Elementwise):
            front, of = _activation(op.activation, front)
            k_error, family = k_error[of], family[of]
            trails = [trails[parent].passed(op.activation) for parent in of.tolist()]
        else:
            behind = network.nodes[segment.entry - 1].op if segment.entry else None
            moved = _unscaled(op, behind, front, given, of) if isinstance(op, Norm) else None
            moved = _inverted(op, front, given, of) if moved is None else moved
            if moved is None:
                stopped = f"stops at {op.name}: {op.loses}"
                break
            front = moved
    ends = []
    for s, trail in enumerate(trails):
        here = one(front, s)
        none = torch.zeros(0)
        ends.append(
            (
                int(family[s]),
                End(
                    here.y,
                    none,
                    none,
                    float("nan"),
                    float(here.spread[0]),
                    tuple(trail.layers),
                    tuple(trail.steps),
                    at if trail.known is None else trail.at,
                    here if trail.known is None else trail.known,
                    stopped,
                ),
            )
        )
    return ends


def _together(fronts: list[Front]) -> Front:
    return Front(
        torch.cat([each.y for each in fronts]),
        torch.cat([each.k for each in fronts]),
        None,
        torch.cat([each.error.expand(each.y.shape) for each in fronts]),
    )


def _layer(
    op: Linear,
    given: Given,
    of: Int[Tensor, " s"],
    front: Front,
    k_error: Float[Tensor, " s"],
    trails: list[Trail],
    at: int,
) -> tuple[Front, Float[Tensor, " s"]]:
    """The layer's input from its constraints (Eqs. 15 and 16), and how badly they are met."""
    layer, gradients = op.layer, given.gradients
    front = _told(op, front, given, of)
    heard = op.has_gradient and layer.weight_name in gradients
    if heard:
        grad = layer.pack_weight(given.told(layer.weight_name, of))
    else:
        grad = torch.zeros_like(layer.weight).expand(len(front.y), *layer.weight.shape)
    if front.other is not None:
        folded = bool((front.other.y != front.y).any())
        front = _unfolded(op, front, front.other, given) if folded else _sided(op, front, front.other, grad, given)
    k, z, row_weight = layer.pack_output(front.k), layer.pack_output(front.y), _rows(op, front)
    z_error = layer.pack_output(front.error.expand(front.y.shape))
    # Without gradient rows there are weight rows alone.
    known = k if heard else torch.zeros_like(k)
    system = System(layer, known, row_weight, given.rank_tolerance, solver=given.solver)
    solved = system.solve(z - layer.offset, grad)
    # What is left of the weight rows is an error of z too, one that the layers after this one did not see.
    z_error = z_error.maximum(solved.weight_misfit[:, None, None])
    noise = _error(system, z_error, grad, given.eps, k_error, given.probe(at, front.y.device))
    error = noise.square().mean((1, 2)).sqrt()
    for s, trail in enumerate(trails):
        own = slice(s, s + 1)
        step = Step(k[own], z[own], z_error[own], solved.x[own], None if row_weight is None else row_weight[own])
        trail.add(step, layer, system, solved, s, float(error[s]), op.cotangent_parameter in gradients, heard)
        trail.open_at(at, one(front, s))
    x = layer.unpack_input(solved.x)
    # The directions that the constraints tell badly are the same in all channels: so is the error of each pixel.
    each = noise.square().mean(1, keepdim=True).sqrt().expand(noise.shape)
    before = Front(x, layer.unpack_input(layer.grad_input(k)), None, layer.unpack_input(each))
    return before, torch.maximum(solved.weight_residual, solved.gradient_residual)


def _told(op: Op, front: Front, given: Given, of: Int[Tensor, " s"]) -> Front:
    """With k itself, where the gradient of what is added to every value tells it."""
    if op.cotangent_parameter is None or op.cotangent_parameter not in given.gradients:
        return front
    return replace(front, k=given.told(op.cotangent_parameter, of).reshape(front.k.shape))


def _rows(op: Linear, front: Front) -> Tensor | None:
    return None if front.weight is None else op.layer.pack_output(front.weight)


def _unfolded(op: Linear, front: Front, other: Front, given: Given) -> Front:
    """Of two values that a folded activation allows, the one that the weight rows of all the others come near to.

    k of a unit depends on which it is, so the gradient rows say nothing before it is decided.
    """
    layer = op.layer
    unsure = front.y != other.y
    weight = torch.ones_like(front.y) if front.weight is None else front.weight
    weight = layer.pack_output(torch.where(unsure, DOUBT * weight, weight))
    nothing = torch.zeros_like(layer.pack_output(front.k))
    system = System(layer, nothing, weight, given.rank_tolerance, solver=given.solver)
    grad = torch.zeros_like(layer.weight).expand(len(nothing), *layer.weight.shape)
    lower = torch.zeros_like(unsure)
    for _ in range(FOLDS):
        y = torch.where(lower, other.y, front.y)
        x = system.solve(layer.pack_output(y) - layer.offset, grad).x
        z = layer.unpack_output(layer.output(x) + layer.offset)
        nearer = unsure & ((z - other.y).abs() < (z - front.y).abs())
        if bool((nearer == lower).all()):
            break
        lower = nearer
    chosen = None
    if front.weight is not None and other.weight is not None:
        chosen = torch.where(lower, other.weight, front.weight)
    return Front(
        torch.where(lower, other.y, front.y),
        torch.where(lower, other.k, front.k),
        chosen,
        torch.where(lower, other.error, front.error.expand(front.y.shape)),
    )


def _sided(op: Linear, front: Front, other: Front, grad: Float[Tensor, "s g j i"], given: Given) -> Front:
    """Of two sides of their kinks on which values may lie, the one with which the gradient agrees.

    The wrong one adds a multiple of one vector to the gradient of the unit's own weights, what the unit reads. So the
    gradient rows of such units are left out at first; if the others determine the input it tells the sides.
    """
    layer = op.layer
    k, there = layer.pack_output(front.k), layer.pack_output(other.k)
    unsure = k != there
    sure = ~unsure.any(-1, keepdim=True)
    left = grad * sure.reshape(len(k), layer.groups, -1, 1)
    system = System(layer, k * sure, _rows(op, front), max(ROUGH, given.rank_tolerance), solver=given.solver)
    x = system.solve(layer.pack_output(front.y) - layer.offset, left).x
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
    return replace(front, k=layer.unpack_output(k).reshape(front.k.shape), other=None)


def _activation(activation: Activation, front: Front) -> tuple[Front, Int[Tensor, " b"]]:
    """Through an activation, with the candidate that each of the branches at its kinks comes from."""
    error = front.error.expand(front.y.shape)
    inverse = activation.invert(front.y, error)
    z_error = error / inverse.slope.abs().clamp(min=1e-12)
    weight = inverse.weight
    if front.weight is not None:
        weight = front.weight if weight is None else weight * front.weight
    of, slope = _branches(activation, front.y, inverse.slope, error)
    other = _other_side(activation, front, inverse, error) if len(of) == len(front.y) else None
    if isinstance(activation, NonMonotone):
        z = activation.lower(front.y)
        fold = activation.slope(z)
        z = torch.where(front.y < 0, z, inverse.z)
        fold = torch.where(front.y < 0, fold, inverse.slope)
        other = Front(z, front.k * fold, fold.abs().clamp(max=1.0), error / fold.abs().clamp(min=1e-12))
    found = Front(inverse.z, front.k, weight, z_error.expand(front.y.shape), other).select(of)
    return replace(found, k=found.k * slope), of  # Eq. 6


def _other_side(activation: Activation, front: Front, inverse: Inverse, error: Tensor) -> Front | None:
    """With k of values that may lie on the other side of their kink as it is there; None if there are no such."""
    there = activation.other_side(inverse.slope)
    unsure = (front.y.abs() <= UNSURE * error) & (there != inverse.slope)
    if inverse.weight is not None:
        unsure &= inverse.weight > 0  # of the others nothing is known
    if not bool(unsure.any()):
        return None
    return Front(inverse.z, front.k * torch.where(unsure, there, inverse.slope), None, front.error)


def _unscaled(op: Norm, behind: Op | None, front: Front, given: Given, of: Int[Tensor, " s"]) -> Front | None:
    """k of what a norm reads, its size from the gradient of the bias that was added there; the value stays unknown.

    The bias's gradient is k summed over positions, and each group's k is known but for its size: as many linear
    equations as there are biases.
    """
    name = behind.layer.bias_name if isinstance(behind, Linear) else None
    if not isinstance(behind, Linear) or name is None or name not in given.gradients:
        return None
    layer = behind.layer
    times = layer.pack_output(op.vjp_times_size(front.k, front.y))
    count = front.k[0].numel()
    group = torch.arange(count, device=times.device).div(count // op.groups, rounding_mode="floor")
    group = layer.pack_output(group.reshape(1, *front.k.shape[1:])).expand(times.shape)
    matrix = times.new_zeros(len(times), layer.outputs, op.groups).scatter_add_(2, group, times)
    sizes = times.new_zeros(matrix.shape).scatter_add_(2, group, times.abs()).amax((1, 2))
    if bool((torch.linalg.svdvals(matrix)[:, -1] <= CANCELS * sizes).any()) or layer.outputs < op.groups:
        return None  # the sums over positions cancel, as those of a whole group do
    told = given.told(name, of).reshape(len(times), -1, 1)
    inverse = torch.linalg.lstsq(matrix, told).solution[..., 0]
    k = times * inverse.gather(1, group.flatten(1)).reshape(times.shape)
    nothing = torch.zeros_like(front.y)
    return Front(nothing, layer.unpack_output(k).reshape(front.k.shape), nothing, front.error)


def _inverted(op: Op, front: Front, given: Given, of: Int[Tensor, " s"]) -> Front | None:
    """Through an operation that has one input for each output."""
    front = _told(op, front, given, of)
    y = op.invert(front.y)
    if y is None:
        return None
    k = op.vjp(front.k, (y,))[0]
    error = front.error.expand(front.y.shape)
    if isinstance(op, Affine):
        weight, error = front.weight, error / op.scale.abs()
    else:
        weight = None if front.weight is None else op.invert(front.weight)
        moved = op.invert(error)
        error = error if moved is None else moved
    other = None if front.other is None else _inverted(op, front.other, given, of)
    return Front(y, k, weight, error, other)


def _error(
    system: System, z_error: Tensor, grad: Tensor, eps: float, k_error: Tensor, probe: torch.Generator
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
