"""Units on the wrong side of their kinks, on the way through local steps.

A sample's error decides the side of a unit that stands near its kink. On its wrong side the unit gets a gradient that
it did not have, which moves its weights, so that the samples of later steps miss the row space in which they are looked
for. There the units in doubt of the steps before are tried on their other sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.subspace.step import Place
from rgap.inversion.walk import Client, Sides, Unit, Walk, Weights, kinks
from rgap.linalg import deadline

DOUBTED = 4.0
"""Standard deviations from its kink within which a unit's side is in doubt."""
DRAWS = 4
BACK = 4
"""Steps before in which units are tried."""
MOST = 12
"""Units that are tried, those nearest to their kinks."""
SUSPECT = 5.0
"""Times what rounding explains, squared, by which a sample misses the row space where a unit is on its wrong side."""
LOWER = 0.5
"""By which a trial has to lower the logarithm of what is missed, of all samples together."""
SOLVES = 10


def in_doubt(
    client: Client,
    weights: Weights,
    x: Float[Tensor, "n u"],
    members: Sequence[int],
    error: Float[Tensor, " n"],
    step: int,
    sides: Sides,
) -> list[tuple[float, Unit, bool]]:
    """Units of a step that samples' errors may move over their kinks: how many standard deviations from it, which, and
    the side that each is not on.

    Args:
        weights: before the step.
        error: of each sample's values, root mean square.
    """
    rows, network = list(members), client.network(weights)
    draw = torch.Generator(device=x.device).manual_seed(0)
    noise = torch.randn(DRAWS, len(rows), x.shape[1], generator=draw, dtype=x.dtype, device=x.device)
    moved = x[rows] + noise * error[rows][:, None]
    values = network.forward(torch.cat([x[rows], moved.flatten(0, 1)]).reshape(-1, *client.input_shape))
    found = []
    for activation, node in enumerate(kinks(network)):
        z = values[network.nodes[node].reads[0]].flatten(1)
        own, drawn = z[: len(rows)], z[len(rows) :].reshape(DRAWS, len(rows), -1)
        std = (drawn - own).square().mean((0, 2)).sqrt()[:, None]
        for row, at in (own.abs() < DOUBTED * std).nonzero().tolist():
            which = Unit(step, rows[row], activation, at)
            away = float(own[row, at].abs() / std[row, 0])
            found.append((away, which, not sides.get(which, bool(own[row, at] > 0))))
    return found


def missed(place: Place, x: Float[Tensor, "s u"], solve: bool, noise: float) -> float:
    """By how much samples miss a step's row space: the logarithm, all together, of what is more than rounding explains.

    Args:
        solve: whether the samples themselves are only about there.
        noise: the standard deviation of each value of what is left of the second layer's difference.
    """
    second = place.spaces.second
    assert second is not None
    # Units on wrong sides leave something in the space that is taken for noise.
    more = second.noise / (noise * (len(second.u) ** 0.5 + len(second.v) ** 0.5))
    off = place.misfit(place.solve(x, SOLVES) if solve else x)[0] * max(1.0, more) ** 2
    return float((off / SUSPECT).clamp(min=1).log().sum())


def with_other_sides(
    client: Client,
    walk: Walk,
    order: Sequence[tuple[int, ...]],
    x: Float[Tensor, "n u"],
    labels: Float[Tensor, " n"],
    error: Float[Tensor, " n"],
    miss: Callable[[Walk], float],
) -> Walk:
    """The walk with a unit of its last steps on its other side, where samples of the next one miss less then; else the
    walk itself.

    Args:
        x, labels, error: of the samples so far.
        miss: by how much the next step's samples miss.
    """
    inputs, trail = x.reshape(-1, *client.input_shape), walk.trail
    doubts = list[tuple[float, Unit, bool]]()
    for step in range(max(0, walk.step - BACK), walk.step):
        doubts += in_doubt(client, trail[step], x, order[step], error, step, walk.sides)
    if not doubts:
        return walk
    best, least = walk, miss(walk) - LOWER
    for _, which, above in sorted(doubts, key=lambda each: each[0])[:MOST]:
        if deadline.used() >= 1:
            break
        there = walk.instead({**walk.sides, which: above}, which.step).all(inputs, labels, order[which.step :])
        found = miss(there)
        if found < least:
            best, least = there, found
    return best
