"""Units on the wrong side of their kinks, on the way through local steps.

A sample's error decides the side of a unit that stands near its kink. On its wrong side the unit gets a gradient that
it did not have, which moves its weights, so that the samples of later steps miss the row space in which they are looked
for. By how they miss it the units in doubt of the steps before are told.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.subspace.step import Place, layer_of
from rgap.inversion.walk import Client, Order, Sides, Unit, Walk, Weights, kinks
from rgap.nn.network import Network

DOUBTED = 4.0
"""Standard deviations from its kink within which a unit's side is in doubt."""
DRAWS = 4
BACK = 8
"""Steps before of which units are tried."""
MOST = 256
"""Units that are tried, those nearest to their kinks."""
GAIN = 50.0
"""Times a value's noise, squared, by which a unit's other side has to lower what is missed, of all samples together."""
AS_FORETOLD = 0.6
"""Part of its own size by which that may differ from it."""
MEDIAN = 0.455
"""Of the square of a normally distributed value, in units of its variance."""


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


def with_other_sides(
    walk: Walk,
    order: Order,
    x: Float[Tensor, "n u"],
    labels: Float[Tensor, " n"],
    error: Float[Tensor, " n"],
    place: Place,
    own: Float[Tensor, "s u"],
) -> Sides:
    """The walk's sides, and that of the unit of its last steps by whose other side the next step's samples miss its row
    space less, if there is one.

    Of each unit in doubt the other side's effect is known, in pattern and size: it moves the first layer's weights by a
    known cotangent times its sample, and the later samples' hidden vectors by that.

    Args:
        x, labels, error: of the samples so far.
        place: before the next step.
        own: about that one's samples.
    """
    trail, doubts = walk.trail, list[tuple[float, Unit, bool]]()
    for step in range(max(0, walk.step - BACK), walk.step):
        doubts += in_doubt(walk.client, trail[step], x, order[step], error, step, walk.sides)
    nearest = sorted(doubts, key=lambda each: each[0])[:MOST]
    found, units = dict(walk.sides), sorted((each[1:] for each in nearest), key=lambda each: each[0].step)
    if not units:
        return found
    by = _moved(walk, x, labels, units, own)
    condition = place.condition
    t = condition.unknowns_of(condition.first.row(own))
    left = condition.left_by(t, torch.zeros_like(by[:1]))[0]
    changes = condition.left_by(t, by) - left
    # Of the median: what a wrong side spoils is not taken for noise. What is no sample misses more, and counts less.
    noise = (left.square().median(1, keepdim=True).values / MEDIAN).sqrt()
    left, changes = left / noise, changes / noise
    sizes = changes.square().sum((1, 2))
    gains = -2 * (left * changes).sum((1, 2)) - sizes
    best = int(torch.where((gains - sizes).abs() < AS_FORETOLD * sizes, gains, 0.0).argmax())
    if float(gains[best]) > GAIN:
        unit, above = units[best]
        found[unit] = above
    return found


def _moved(
    walk: Walk,
    x: Float[Tensor, "n u"],
    labels: Float[Tensor, " n"],
    units: Sequence[tuple[Unit, bool]],
    own: Float[Tensor, "s u"],
) -> Float[Tensor, "c s o"]:
    """By how much each unit's other side moves what the first layer gives samples, by its own step's gradient.

    Args:
        units: in the order of their steps.
    """
    client, plan, trail = walk.client, walk.plan, walk.trail
    c, parts = plan.expansion[walk.step][1], list[Tensor]()
    for step, group in groupby(units, key=lambda each: each[0].step):
        these = list(group)
        rows = [unit.sample for unit, _ in these]
        network = client.network(trail[step])
        segments = Place.layers(network, trail[step])
        assert segments is not None
        values = network.forward(x[rows].reshape(-1, *client.input_shape))
        k = client.loss.output_gradient(values[-1].flatten(1), labels[rows]).reshape(values[-1].shape)
        ways = []
        for other in (False, True):
            slopes = _with_sides(network, values, [(unit, above == other) for unit, above in these])
            found = network.vjp(values, slopes, {len(values) - 1: k})[segments[0].exit]
            assert found is not None
            ways.append(found.flatten(1))
        share = c[step] * walk.factors[step] / plan.sizes[step]
        biased = layer_of(network, segments[0]).bias_name is not None
        parts.append(share * (x[rows] @ own.mT + biased)[:, :, None] * (ways[1] - ways[0])[:, None])
    return torch.cat(parts)


def _with_sides(network: Network, values: list[Tensor], sides: Sequence[tuple[Unit, bool]]) -> dict[int, Tensor]:
    """The slopes, with one unit of each row on a given side."""
    slopes, nodes, functions = network.slopes(values), kinks(network), dict(network.activations)
    for row, (unit, above) in enumerate(sides):
        node = nodes[unit.activation]
        side = slopes[node].new_tensor(1.0 if above else -1.0)
        slopes[node].flatten(1)[row, unit.unit] = functions[node].slope(side)
    return slopes
