"""What inequalities tell of the directions that no equation does.

Behind a maximum the largest value of each window is known, and that the others do not exceed it; and inputs lie in
their value range. Over an empty background, as MNIST's, these bind: all values of a window are the same there, one of
them tells its equation, and the input stands at the end of its range. The moves that remain are a polytope, and linear
programs tell how far it reaches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import linprog
from torch import Tensor

from rgap.inversion.refine_sides import flipped
from rgap.inversion.state import State
from rgap.inversion.system import ConstraintSystem, Linearisation
from rgap.linalg import deadline
from rgap.nn.activations import ReLU
from rgap.nn.network import Network
from rgap.nn.non_monotone import NonMonotone
from rgap.nn.ops import Elementwise
from rgap.nn.pools import MaxPool

MOST = 128
"""Directions for which this is tried: each takes two linear programs."""
ERRORS = 3.0
"""So many errors of the input an inequality may be missed by."""
FAR = 0.01
"""Relative to the value range: a direction that goes farther counts as open."""
TRIED, PATTERNS = 64, 64
"""Of so many units a linear program tells whether the remaining moves bring them to the other side of their kinks; with
more patterns of their sides, those of six units, nothing is told."""
Pattern = frozenset[tuple[int, int]]
"""The units on their other sides, each by its elementwise operation's node."""


def upper_limits(network: Network, value_id: int, state: State) -> tuple[int, Tensor] | None:
    """A value, by its id, and what its numbers do not exceed, as a maximum at the end of what is known tells; infinite
    where it tells nothing. None if there is no such maximum.

    Args:
        value_id: what is known for certain: what a pool puts out, or what it reads.
        state: of that value.
    """
    known = torch.ones_like(state.value) if state.row_weight is None else state.row_weight
    behind = network.nodes[value_id - 1].op
    if isinstance(behind, MaxPool):
        front = network.nodes[value_id - 1].reads[0]
        before = network.nodes[front - 1] if front else None
        if before is None or not isinstance(before.op, Elementwise):
            return front, _limits(behind, state.value.masked_fill(known == 0, math.inf))
        if isinstance(before.op.activation, NonMonotone):
            return None
        largest = before.op.activation.invert(state.value, state.std.expand(state.value.shape)).z
        return before.reads[0], _limits(behind, largest.masked_fill(known == 0, math.inf))
    zeros, at = False, value_id
    while True:
        readers = network.readers[at]
        if len(readers) != 1:
            return None
        op = network.nodes[readers[0]].op
        if isinstance(op, MaxPool):
            break
        if at != value_id or not isinstance(op, Elementwise) or isinstance(op.activation, NonMonotone):
            return None
        zeros, at = isinstance(op.activation, ReLU), readers[0] + 1
    largest = op.read(state.value.masked_fill(known == 0, -math.inf), -math.inf).amax(-1)
    largest = largest.masked_fill(largest == -math.inf, 0.0 if zeros else math.inf)
    return value_id, _limits(op, largest)


def _limits(pool: MaxPool, largest: Tensor) -> Tensor:
    """Of each value a pool reads, the least that its windows allow, of the shape of the pool's input."""
    largest = largest.reshape(len(largest), pool.channels, -1, 1)
    limits = largest.new_full((len(largest), pool.channels, pool.positions + 1), math.inf)
    places = largest.expand(*largest.shape[:3], pool.windows.shape[1]).flatten(2)
    limits = limits.scatter_reduce(2, pool.windows.flatten().expand_as(places), places, "amin")
    return limits[..., :-1].reshape(len(largest), *pool.input_shape)


@dataclass(frozen=True, eq=False)
class _Left:
    """What inequalities leave of the moves that the equations leave open, from one input on given sides."""

    at: Linearisation
    columns: list[list[Tensor]]
    """Of each direction, how all values move with it."""
    rows: NDArray[np.float64]
    room: NDArray[np.float64]
    ends: Float[Tensor, "free 2"]
    """How far each direction goes both ways."""
    middle: Tensor
    reach: float
    """How far others may be from the middle, root mean square."""


def narrowed(
    system: ConstraintSystem,
    at: Linearisation,
    null_of: Callable[[Linearisation], Float[Tensor, "u free"]],
    error: float,
    limits: tuple[int, Tensor],
    value_range: tuple[float, float],
) -> tuple[Tensor, float, int] | None:
    """The middle of the inputs of one sample that inequalities leave of those that agree with all equations, how far
    from it the others may be, root mean square, and the number of directions; None where nothing bounds them.

    Beyond a kink the equations are others. So what inequalities leave there counts too, of all patterns of sides that
    moves lead to from one to the next.

    Args:
        null_of: directions that the equations leave open, orthonormal, on the sides of a linearisation.
        error: of the input in all others, root mean square.
        limits: of a value, by its id.
    """
    if system.samples > 1:
        return None
    first: _Left | None = None
    apart, waiting, seen = 0.0, [Pattern()], {Pattern()}
    while waiting:
        pattern = waiting.pop()
        slopes = reduce(lambda slopes, unit: flipped(system, slopes, unit), pattern, at.slopes)
        there = system.with_slopes(at, slopes) if pattern else at
        left = _left(system, there, null_of(there), error, limits, value_range)
        if left is None or _routes_change(system, left, limits[0]):
            return None
        first = first or left
        apart = max(apart, float((left.middle - first.middle).square().mean().sqrt()) + left.reach)
        beyond = {pattern ^ {unit} for unit in _crossed(system, left, error)} - seen
        seen |= beyond
        waiting += beyond
        if len(seen) > PATTERNS:
            return None
    assert first is not None
    return first.middle, apart, len(first.columns)


def _left(
    system: ConstraintSystem,
    at: Linearisation,
    null: Float[Tensor, "u free"],
    error: float,
    limits: tuple[int, Tensor],
    value_range: tuple[float, float],
) -> _Left | None:
    """None where a direction goes far, or where there are too many of them."""
    (low, high), (value_id, most), network = value_range, limits, system.network
    if not 0 < null.shape[1] <= MOST:
        return None
    draw = torch.randn(at.x.shape, generator=torch.Generator().manual_seed(0), dtype=at.x.dtype).to(at.x)
    bound = most.flatten().isfinite()
    columns = [network.jvp(at.values, at.slopes, each.reshape(at.x.shape)) for each in null.mT]
    moved = torch.stack([column[value_id].flatten() for column in columns], 1)[bound]
    off = network.jvp(at.values, at.slopes, error * draw)[value_id].square().mean().sqrt()
    rows = torch.cat([moved, null, -null]).cpu().numpy()
    free = torch.cat([(most - at.values[value_id]).flatten()[bound], high - at.x.flatten(), at.x.flatten() - low])
    slack = torch.cat([off.expand(len(moved)), off.new_full((2 * len(null),), error)])
    room = (free.clamp(min=0) + ERRORS * slack).cpu().numpy()
    box = _box(rows, room, FAR * (high - low))
    if box is None:
        return None
    ends = torch.as_tensor(box).to(at.x)
    middle = at.x + (null @ ends.mean(1)).reshape(at.x.shape)
    reach = float((ends.diff(dim=1).square().sum() / 4 / at.x.numel()).sqrt())
    return _Left(at, columns, rows, room, ends, middle, reach)


def _way(left: _Left, moves: list[Tensor]) -> Tensor:
    """How far values go at the most, if all directions went to their ends at once."""
    return sum((move.abs() * size for move, size in zip(moves, left.ends.abs().amax(1), strict=True)), moves[0] * 0)


def _crossed(system: ConstraintSystem, left: _Left, error: float) -> list[tuple[int, int]]:
    """The units that moves bring to the other side of their kinks, each by its elementwise operation's node; of more
    than are tried all that may."""
    may: list[tuple[int, int]] = []
    for node, activation in system.network.activations:
        if activation.kinked:
            value = system.network.nodes[node].reads[0]
            size = left.at.values[value].abs() + ERRORS * error
            way = _way(left, [column[value] for column in left.columns])
            may += [(node, unit) for unit in (way > size).flatten().nonzero()[:, 0].tolist()]
    if len(may) > TRIED:
        return may
    found = []
    for node, unit in may:
        value = system.network.nodes[node].reads[0]
        row = torch.stack([column[value].flatten()[unit] for column in left.columns])
        z = float(left.at.values[value].flatten()[unit])
        towards = row if z > 0 else -row
        least = _least(towards.cpu().numpy(), left.rows, left.room, float(left.ends.abs().max()))
        if least is None or abs(z) + least <= 0:
            found.append((node, unit))
    return found


def _routes_change(system: ConstraintSystem, left: _Left, value_id: int) -> bool:
    """Whether moves bring another value of a window to the top, in a maximum in front of the one that is known."""
    network = system.network
    for at, node in enumerate(network.nodes):
        if not isinstance(node.op, MaxPool) or at + 1 > value_id:
            continue
        value = node.reads[0]
        routes = node.op.routes(left.at.values[value])

        def behind(moved: Tensor, op: MaxPool = node.op, routes: Tensor = routes, fill: float = 0.0) -> Tensor:
            places = op.read(moved, fill)
            return (routes * places.masked_fill(places == -math.inf, 0.0)).sum(-1, keepdim=True) - places

        gaps = behind(left.at.values[value], fill=-math.inf)
        way = _way(left, [behind(column[value]) for column in left.columns])
        if bool(((way > gaps) & (routes == 0)).any()):
            return True
    return False


def _box(
    rows: NDArray[np.float64], room: NDArray[np.float64], far: float
) -> Float[NDArray[np.float64], "free 2"] | None:
    """How far each coordinate of c goes both ways while rows c <= room; None if one goes too far."""
    count = rows.shape[1]
    ends = np.zeros((count, 2))
    for at in range(count):
        for side, sign in ((0, 1.0), (1, -1.0)):
            goal = np.zeros(count)
            goal[at] = sign
            least = _least(goal, rows, room, 10 * far)
            if least is None or abs(least) > far:
                return None
            ends[at, side] = sign * least
    return ends


def _least(goal: NDArray[np.float64], rows: NDArray[np.float64], room: NDArray[np.float64], far: float) -> float | None:
    """The least of goal c while rows c <= room, no coordinate going farther than so far; None if there is none."""
    deadline.check()
    found = linprog(goal, A_ub=rows, b_ub=room, bounds=(-far, far))
    return found.fun if found.status == 0 else None
