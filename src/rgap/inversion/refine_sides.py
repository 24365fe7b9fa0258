"""Units on the wrong side of their kinks in an answer that is right otherwise: told from the gradient, and mended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.doubted import Columns, read_columns, unit_gradients
from rgap.inversion.estimate import other_slope
from rgap.inversion.pattern import DARK, norms_read
from rgap.inversion.system import ConstraintSystem, Linearisation
from rgap.nn.activation import Activation
from rgap.nn.activations import LeakyReLU, PReLU, ReLU

Unit = tuple[int, int]
"""An elementwise operation, by its node, and which of its values."""
TRIED, FLIPPED = 32, 8
"""How many units, those nearest to their kink, are tried on their other side, and how many are changed at the most."""
PAIRS = 2**26
"""Numbers of what all of them put into the gradients, above which units are tried alone and not by twos."""
LESS = 0.9
"""What a change of side must leave of the distance: of several units on their wrong sides each one tells a part."""
NEAR = 0.2
"""A relative distance to the gradient above this has other causes than a few units."""
VISIBLE = 1e-3
"""A move above this fraction of the inputs is no correction of their error."""


def refine_sides(system: ConstraintSystem, x: Float[Tensor, "b ..."], tolerance: float) -> Float[Tensor, "b ..."]:
    """x, moved by next to nothing to the sides of its kinks on which the gradient agrees; x itself if none do.

    The gradient jumps when a unit changes its side. An answer that is right to seven digits can therefore miss the
    update by a few per cent, because of one unit out of ten thousand. Which unit it is shows in the gradient itself:
    on the right sides it agrees.

    Args:
        tolerance: relative distance to the gradient, by layer, below which it agrees.
    """
    at = system.linearise(x)
    start = best = system.distance_by_layer(at)
    if not tolerance < start < NEAR:
        return x
    near, columns = _nearest_units(system, at), read_columns(system, at)
    there = at
    changed: list[Unit] = []
    while near and best > tolerance and len(changed) < FLIPPED:
        chosen = _best_flips(system, there, columns, near)
        slopes = there.slopes
        for unit in chosen:
            slopes = flipped(system, slopes, unit)
        after = system.with_slopes(at, slopes)
        distance = system.distance_by_layer(after)
        if distance > LESS * best:
            break
        best, there = distance, after
        changed += chosen
        near = [unit for unit in near if unit not in chosen]
    if not changed:
        return x
    moved = step_over(system, at, changed)
    if float((moved - x).norm()) > VISIBLE * float(x.norm()):
        return x  # an answer that must move so far has other causes than its own error
    return moved if system.distance_by_layer(system.linearise(moved)) < start else x


def step_over(system: ConstraintSystem, at: Linearisation, units: list[Unit]) -> Float[Tensor, "b ..."]:
    """x with the smallest move that brings the given units to the other side of their kinks.

    Args:
        units: each one's elementwise operation, by its node, and which of its values.
    """
    rows, heights = [], []
    for node, index in units:
        value = system.network.nodes[node].reads[0]
        k = torch.zeros_like(at.values[value])
        k.view(-1)[index] = 1.0
        row = system.network.vjp(at.values, at.slopes, {value: k})[0]
        rows.append(torch.zeros_like(at.x).flatten() if row is None else row.flatten())
        heights.append(at.values[value].reshape(-1)[index])
    jacobian, value_of = torch.stack(rows), torch.stack(heights)
    # The move of minimum norm. The rows are few, and scaled to be compared with each other.
    scale = jacobian.norm(dim=1, keepdim=True).clamp(min=torch.finfo(at.x.dtype).tiny)
    move = torch.linalg.pinv(jacobian / scale) @ (-2 * value_of[:, None] / scale)
    moved: Tensor = at.x + move.reshape(at.x.shape)
    return moved


def _nearest_units(system: ConstraintSystem, at: Linearisation) -> list[Unit]:
    """Units of kinked activations that read something, those nearest to their kink by their layer's spread."""
    near: list[tuple[float, int, int]] = []
    for node, activation in system.network.activations:
        if isinstance(activation, (LeakyReLU, PReLU, ReLU)):
            z = at.values[system.network.nodes[node].reads[0]]
            size = norms_read(system, at, node)
            seen = size > DARK * size.max()
            distance = (z / z.square().mean().sqrt()).abs()[seen]
            found, index = distance.topk(min(TRIED, len(distance)), largest=False)
            index = seen.flatten().nonzero().flatten()[index]
            near += [(v, node, i) for v, i in zip(found.tolist(), index.tolist(), strict=True)]
    return [(node, index) for _, node, index in sorted(near)[:TRIED]]


def _best_flips(
    system: ConstraintSystem, at: Linearisation, columns: Sequence[Columns], near: list[Unit]
) -> list[Unit]:
    """The one unit, or the two, without which the gradients are missed least.

    Of two units that put nearly the same into a gradient, with opposite signs, each one alone only makes it worse.
    """
    missed = system.residual(at).gradient
    size = max(sum(each.numel() for each in of) for of in (at.values, system.gradients))
    most = max(1, PAIRS // size)
    own: list[Tensor] = []  # |here + e_u|^2 less |here|^2
    for first in range(0, len(near), most):
        here, changes = _changes(system, at, columns, missed, near[first : first + most])
        own.append(changes.square().sum(1) + 2 * changes @ here)
    alone = torch.cat(own)
    if len(near) > most:
        return [near[int(alone.argmin())]]
    both = alone + alone[:, None] + 2 * changes @ changes.mT
    both.diagonal().copy_(alone)
    one, other = divmod(int(both.argmin()), len(near))
    return [near[one]] if one == other else [near[one], near[other]]


def _changes(
    system: ConstraintSystem,
    at: Linearisation,
    columns: Sequence[Columns],
    missed: Sequence[Tensor],
    near: list[Unit],
) -> tuple[Float[Tensor, " w"], Float[Tensor, "u w"]]:
    """What is missed of the gradients that the units move, each in units of its own size, and what the other side of
    each unit adds to it."""
    kinds = dict(system.network.activations)
    here, changes = [at.x.new_zeros(0)], [at.x.new_zeros(len(near), 0)]
    rows = {node: [row for row, (of, _) in enumerate(near) if of == node] for node in dict(near)}
    units = {node: torch.tensor([near[row][1] for row in of], device=at.x.device) for node, of in rows.items()}
    moved = unit_gradients(system, at, columns, units)
    jumps = {node: _jump(kinds[node], at, node).flatten()[index] for node, index in units.items()}
    for layer, (rest, grad) in enumerate(zip(missed, system.gradients, strict=True)):
        added = {node: of[layer] for node, of in moved.items()}
        if all(each is None for each in added.values()) or not bool(grad.any()):
            continue
        here.append(columns[layer].along(rest).flatten() / grad.norm())
        change = at.x.new_zeros(len(near), len(here[-1]))
        for node, each in added.items():
            if each is not None:
                change[rows[node]] = each * (-jumps[node] / grad.norm())[:, None]
        changes.append(change)
    return torch.cat(here), torch.cat(changes, 1)


def _jump(activation: Activation, at: Linearisation, node: int) -> Tensor:
    """By how much each unit's cotangent changes with its side."""
    k, slope = at.cotangents[node + 1], at.slopes[node]
    return torch.zeros_like(slope) if k is None else k * (other_slope(activation, slope) - slope)


def flipped(system: ConstraintSystem, slopes: Mapping[int, Tensor], unit: Unit) -> dict[int, Tensor]:
    """The slopes with one unit's other one."""
    node, index = unit
    changed = slopes[node].clone(memory_format=torch.contiguous_format)
    activation = dict(system.network.activations)[node]
    changed.view(-1)[index] = other_slope(activation, slopes[node]).reshape(-1)[index]
    return {at: changed if at == node else slope for at, slope in slopes.items()}
