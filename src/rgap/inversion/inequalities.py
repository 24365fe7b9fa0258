"""What inequalities tell of the directions that no equation does.

Behind a maximum the largest value of each window is known, and that the others do not exceed it; and inputs lie in
their value range. Over an empty background, as MNIST's, these bind: all values of a window are the same there, one of
them tells its equation, and the input stands at the end of its range. The moves that remain are a polytope, and linear
programs tell how far it reaches.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import linprog
from torch import Tensor

from rgap.inversion.state import State
from rgap.inversion.system import ConstraintSystem, Linearisation
from rgap.linalg import deadline
from rgap.nn.activations import NonMonotone, ReLU
from rgap.nn.network import Network
from rgap.nn.ops import Elementwise
from rgap.nn.pools import MaxPool

MOST = 128
"""Directions for which this is tried: each takes two linear programs."""
ERRORS = 3.0
"""So many errors of the input an inequality may be missed by."""
FAR = 0.01
"""Relative to the value range: a direction that goes farther counts as open."""
DOUBTED = 8
"""With more units that the remaining moves bring to the other side of their kinks the moves say nothing of the rest."""


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


def narrowed(
    system: ConstraintSystem,
    at: Linearisation,
    null: Float[Tensor, "u free"],
    error: float,
    limits: tuple[int, Tensor],
    value_range: tuple[float, float],
) -> tuple[Tensor, float] | None:
    """The middle of the inputs of one sample that inequalities leave of those that agree with all equations, and how
    far from it the others may be, root mean square; None where nothing bounds them.

    Args:
        null: directions that the equations leave open, orthonormal.
        error: of the input in all others, root mean square.
        limits: of a value, by its id.
    """
    count, (low, high) = null.shape[1], value_range
    if not 0 < count <= MOST or system.samples > 1:
        return None
    draw = torch.randn(at.x.shape, generator=torch.Generator().manual_seed(0), dtype=at.x.dtype).to(at.x)
    network, (value_id, most) = system.network, limits
    bound = most.flatten().isfinite()
    columns = [network.jvp(at.values, at.slopes, each.reshape(at.x.shape)) for each in null.mT]
    moved = torch.stack([column[value_id].flatten() for column in columns], 1)[bound]
    off = network.jvp(at.values, at.slopes, error * draw)[value_id].square().mean().sqrt()
    rows = torch.cat([moved, null, -null])
    room = torch.cat([(most - at.values[value_id]).flatten()[bound], high - at.x.flatten(), at.x.flatten() - low])
    slack = torch.cat([off.expand(len(moved)), off.new_full((2 * len(null),), error)])
    box = _box(rows.cpu().numpy(), (room.clamp(min=0) + ERRORS * slack).cpu().numpy(), FAR * (high - low))
    if box is None:
        return None
    ends = torch.as_tensor(box).to(at.x)
    reach = ends.diff(dim=1)[:, 0] / 2
    crossed = 0
    for node, activation in network.activations:
        if not activation.kinked:
            continue
        value = network.nodes[node].reads[0]
        way = sum(column[value].abs() * size for column, size in zip(columns, ends.abs().amax(1), strict=True))
        crossed += int((way > at.values[value].abs() + ERRORS * error).sum())
    if crossed > DOUBTED:
        return None
    middle = at.x + (null @ ends.mean(1)).reshape(at.x.shape)
    return middle, float((reach.square().sum() / at.x.numel()).sqrt())


def _box(
    rows: NDArray[np.float64], room: NDArray[np.float64], far: float
) -> Float[NDArray[np.float64], "free 2"] | None:
    """How far each coordinate of c goes both ways while rows c <= room; None if one goes too far."""
    count = rows.shape[1]
    ends = np.zeros((count, 2))
    for at in range(count):
        for side, sign in ((0, 1.0), (1, -1.0)):
            deadline.check()
            goal = np.zeros(count)
            goal[at] = sign
            found = linprog(goal, A_ub=rows, b_ub=room, bounds=(-10 * far, 10 * far))
            if found.status != 0 or found.x is None or abs(found.x[at]) > far:
                return None
            ends[at, side] = found.x[at]
    return ends
