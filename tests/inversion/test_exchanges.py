"""The last routes through a pool that are wrong are told by the gradient rows that they spoil."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rgap import Target, losses
from rgap.inversion import route_rows, routes
from rgap.inversion.exchanges import exchanged
from rgap.inversion.state import State
from rgap.inversion.unpool import route_of
from tests.auditing.small_audits import seeded

SHAPES = ((8, 10, 10), (48, 5, 5), (8, 10, 10))
"""Of what a layer reads, of what the pool behind it puts out, of a move of the former."""


def few_wrong(seed: int) -> tuple[route_rows.Decided, route_rows.Point]:
    """A layer and its pool near the right input, where some routes are wrong, and at it."""
    model = seeded(nn.Conv2d(8, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48 * 25, 10))
    network = Target(model, losses.CrossEntropy(10), (8, 10, 10)).network
    generator = torch.Generator().manual_seed(seed)
    x, k, moved = (torch.randn(1, *each, generator=generator, dtype=torch.float64) for each in SHAPES)
    values = network.forward(x)
    ks = network.vjp(values, network.slopes(values), {3: k * (values[3] > 0)})
    [(_, grad), *_] = network.gradients(values, ks)
    route = route_of(network, 2)
    assert route is not None
    std = torch.full_like(k, 1e-12)
    observed = route.observed(State(values[3], k, None, std), grad[0].reshape(48, 8, 3, 3), False)
    near, right = (route_rows.Point(route.part, observed, each) for each in (x + 5e-3 * moved, x))
    return route_rows.Decided(near, routes.SETTLED), right


@pytest.mark.parametrize("seed", [0, 2, 5])
def test_exchanges_of_places_that_are_nearly_alike_explain_what_gradient_rows_miss(seed: int) -> None:
    at, right = few_wrong(seed)
    wrong = int((at.slope != right.hard.slope).any(-1)[right.observed.known].sum())
    found = exchanged(at)
    assert found is not None
    left = int((found.routes != right.hard.slope).any(-1)[right.observed.known].sum())
    assert 2 <= wrong <= 12
    assert left == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_value_above_zero_that_was_taken_for_a_zero_is_told_by_the_gradient(seed: int) -> None:
    at, right = few_wrong(seed)
    observed = right.observed
    smallest = torch.where(observed.known, observed.value, torch.inf).flatten().argmin()
    zero = (torch.arange(observed.value.numel()) == smallest).reshape(observed.value.shape)
    assert float(observed.value[zero]) < 0.01
    taken = replace(
        observed,
        value=torch.where(zero, 0.0, observed.value),
        known=observed.known & ~zero,
        cotangent=torch.where(zero, 0.0, observed.cotangent),
        idle=torch.where(zero, observed.cotangent, observed.idle),
    )
    found = exchanged(route_rows.Decided(route_rows.Point(at.point.part, taken, right.x), routes.SETTLED))
    assert found is not None
    assert torch.equal(found.observed.known, observed.known)
    assert torch.equal(found.observed.cotangent, observed.cotangent)
    assert torch.equal(found.observed.idle, observed.idle)
    assert torch.equal(found.routes[observed.known], right.hard.slope[observed.known])


def test_nothing_is_exchanged_where_routes_are_right() -> None:
    _, right = few_wrong(0)
    assert exchanged(route_rows.Decided(right, routes.SETTLED)) is None
