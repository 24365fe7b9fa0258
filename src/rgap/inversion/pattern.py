"""On which side of its kink each unit is: known, in doubt, or to be changed.

The cotangents in front of a unit jump when it changes its side, and with them the gradient rows. But what one wrong
side does to them is a multiple of one known vector. So the rows are used as soon as most sides are right, with what
the units in doubt may have done projected out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rgap.inversion.estimate import other_slope
from rgap.nn.activations import LeakyReLU, PReLU, ReLU
from rgap.nn.ops import Linear

if TYPE_CHECKING:
    from rgap.inversion.system import ConstraintSystem, Linearisation

Pattern = Mapping[int, Bool[Tensor, "b ..."]]
"""Of each elementwise operation, by its node, which units are in doubt; all are known where it is not named."""

READS = 1e-2
"""A unit that reads less than this fraction of what any unit of its layer reads has no side worth knowing."""
DARK = 1e-4
"""One that reads less than this reads an empty background, which no value is nearer to its kink than."""


def least_certain(system: ConstraintSystem, at: Linearisation, count: int) -> Pattern:
    """The units, over all activations and samples, that are nearest to their kink, measured by the spread of their
    layer. Those that read next to nothing, as on an empty background, stay out: they are all near their kinks, and
    have hardly any effect on whichever side they are."""
    distances, shapes = [], {}
    for node, activation in system.network.activations:
        z = at.values[system.network.nodes[node].reads[0]]
        if activation.kinked:
            size = _reads(system, at, node)
            apart = z.abs() / z.square().mean().sqrt()
            distances.append(torch.where(size > READS * size.max(), apart, torch.inf).flatten())
            shapes[node] = z.shape
    if not distances:
        return {}
    every = torch.cat(distances)
    count = min(count, int(every.isfinite().sum()))
    chosen = torch.zeros_like(every, dtype=torch.bool)
    chosen[every.topk(count, largest=False).indices] = True
    parts = torch.split(chosen, [len(each) for each in distances])
    return {node: part.reshape(shape) for (node, shape), part in zip(shapes.items(), parts, strict=True)}


def changed_sides(system: ConstraintSystem, before: Linearisation, after: Linearisation) -> int:
    """How many slopes are other than they were by more than half of the steepest, of units that read something."""
    total = 0
    for node, new in after.slopes.items():
        size = _reads(system, after, node)
        old = before.slopes[node]
        total += int((((old - new).abs() > 0.5 * new.abs().max()) & (size > READS * size.max())).sum())
    return total


def _reads(system: ConstraintSystem, at: Linearisation, node: int) -> Tensor:
    """The norm of what each unit reads; 1 where it is not a layer's."""
    value = system.network.nodes[node].reads[0]
    before = system.network.nodes[value - 1] if value else None
    if before is None or not isinstance(before.op, Linear):
        return torch.ones_like(at.values[value])
    layer = before.op.layer
    size = layer.read(layer.pack_input(at.values[before.reads[0]]))
    return layer.unpack_output(size).reshape(at.values[value].shape)


TRIED, FLIPPED = 32, 8
"""How many units, those nearest to their kink, are tried on their other side, and how many are changed at the most."""
PAIRS = 2**26
"""Numbers of the gradients at all of them, above which units are tried alone and not by twos."""
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
    near = _nearest_units(system, at)
    slopes = at.slopes
    changed: list[tuple[int, int]] = []
    while near and best > tolerance and len(changed) < FLIPPED:
        chosen = _best_flips(system, at, slopes, near)
        flipped = slopes
        for unit in chosen:
            flipped = _flipped(system, flipped, unit)
        distance = system.distance_by_layer(system.with_slopes(at, flipped))
        if distance > LESS * best:
            break
        best, slopes = distance, flipped
        changed += chosen
        near = [unit for unit in near if unit not in chosen]
    if not changed:
        return x
    moved = step_over(system, at, changed)
    if float((moved - x).norm()) > VISIBLE * float(x.norm()):
        return x  # an answer that must move so far has other causes than its own error
    return moved if system.distance_by_layer(system.linearise(moved)) < start else x


def step_over(system: ConstraintSystem, at: Linearisation, units: list[tuple[int, int]]) -> Float[Tensor, "b ..."]:
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


def _nearest_units(system: ConstraintSystem, at: Linearisation) -> list[tuple[int, int]]:
    """Units of kinked activations that read something, the nearest to their kink first, by their layer's spread."""
    near: list[tuple[float, int, int]] = []
    for node, activation in system.network.activations:
        if isinstance(activation, (LeakyReLU, PReLU, ReLU)):
            z = at.values[system.network.nodes[node].reads[0]]
            size = _reads(system, at, node)
            seen = size > DARK * size.max()
            distance = (z / z.square().mean().sqrt()).abs()[seen]
            found, index = distance.topk(min(TRIED, len(distance)), largest=False)
            index = seen.flatten().nonzero().flatten()[index]
            near += [(v, node, i) for v, i in zip(found.tolist(), index.tolist(), strict=True)]
    return [(node, index) for _, node, index in sorted(near)[:TRIED]]


def _best_flips(
    system: ConstraintSystem, at: Linearisation, slopes: Mapping[int, Tensor], near: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The one unit, or the two, without which the gradients are missed least.

    Of two units that put nearly the same into a gradient, with opposite signs, each one alone only makes it worse.
    """

    def missed(slopes: Mapping[int, Tensor]) -> Float[Tensor, " w"]:
        rows = system.residual(system.with_slopes(at, dict(slopes))).gradient
        pairs = zip(rows, system.gradients, strict=True)
        return torch.cat([(row / grad.norm()).flatten() for row, grad in pairs if bool(grad.any())])

    here = missed(slopes)
    tried = (missed(_flipped(system, slopes, unit)) for unit in near)
    if here.numel() * len(near) > PAIRS:
        sizes = [float(each.norm()) for each in tried]
        return [near[min(range(len(near)), key=sizes.__getitem__)]]
    moved = torch.stack([each - here for each in tried])
    # |here + e_u + e_v|^2 less |here|^2; on the diagonal |here + e_u|^2.
    gram, along = moved @ moved.mT, moved @ here
    own = gram.diagonal() + 2 * along
    both = own + own[:, None] + 2 * gram
    both.diagonal().copy_(own)
    first, second = divmod(int(both.argmin()), len(near))
    return [near[first]] if first == second else [near[first], near[second]]


def _flipped(system: ConstraintSystem, slopes: Mapping[int, Tensor], unit: tuple[int, int]) -> dict[int, Tensor]:
    node, index = unit
    changed = slopes[node].clone(memory_format=torch.contiguous_format)
    activation = dict(system.network.activations)[node]
    changed.view(-1)[index] = other_slope(activation, slopes[node]).reshape(-1)[index]
    return {at: changed if at == node else slope for at, slope in slopes.items()}
