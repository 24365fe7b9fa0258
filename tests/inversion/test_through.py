"""Sides behind a mean, and the network's own input with them, where kinks stand in front of its layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, losses
from rgap.inversion import route_rows, routes, unpool
from rgap.inversion.prior import Prior
from rgap.inversion.routes import Unpooled
from rgap.inversion.state import Cause, State, Stop
from rgap.inversion.through import DOUBTED, Smooth, find_through
from rgap.inversion.unpool import CLOSE, before_pool, route_of
from rgap.nn.network import Network
from tests.inversion.test_unpool import pictures

POOL = 5
"""The second mean, by its node."""


def known(
    seed: int, silent: int, pool: type[nn.Module] = nn.AvgPool2d
) -> tuple[Network, Tensor, State, dict[str, Tensor]]:
    """What is known behind a second pool whose layer has few outputs alive."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            *(nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), pool(2)),
            *(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), pool(2), nn.Flatten(), nn.Linear(216, 10)),
        )
    model[3].bias.data[:silent] -= 5.0
    target = Target(model, losses.CrossEntropy(10), (1, 12, 12), (0.0, 1.0))
    network, x = target.network, pictures(1, 1, 12, seed).double()
    values = network.forward(x)
    k = torch.randn(values[POOL + 1].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = network.gradients(values, network.vjp(values, network.slopes(values), {POOL + 1: k}))
    gradients = {layer.weight_name: g.reshape(target.parameters[layer.weight_name].shape) for layer, g in found}
    return network, x, State(values[POOL + 1], k, None, torch.full_like(k, 1e-9)), gradients


def task(
    seed: int, silent: int, pool: type[nn.Module] = nn.AvgPool2d
) -> tuple[unpool.Route, route_rows.Observed, Tensor]:
    network, x, state, gradients = known(seed, silent, pool)
    route = route_of(network, POOL, 0)
    assert route is not None
    return route, route.observed(state, gradients[route.weight_name], False), x


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize(("seed", "silent"), [(1, 0), (3, 0), (1, 12)])
def test_few_wrong_sides_are_found_with_the_input(
    seed: int, silent: int, weighed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of layers whose rows can be weighed by what they read, and of others."""
    if not weighed:
        monkeypatch.setattr("rgap.inversion.read_weight.MOST_ROWS", 0)
    route, observed, x = task(seed, silent)
    start = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    right, begun = (route_rows.Point(route.part, observed, each) for each in (x, start))
    wrong = (right.hard.slope != begun.hard.slope) & (observed.cotangent != 0)[..., None]
    assert int(wrong.sum()) >= 2
    reported: list[float] = []
    found = find_through(
        route.part, observed, Prior((1, 12, 12), 0.5), 2e-5, start, lambda step, missed: reported.append(missed)
    )
    assert found.missed == min(reported) < 2e-6
    assert bool((found.routes == right.hard.slope)[wrong].all())
    assert float((found.x - x).abs().max()) < 1e-4


@pytest.mark.parametrize("seed", [1, 3])
def test_routes_of_a_maximum_behind_another_are_found_with_the_input(seed: int) -> None:
    """From a constant, at which a hundred of them are wrong."""
    route, observed, x = task(seed, 0, nn.MaxPool2d)
    start = torch.full_like(x, 0.5)
    right, begun = (route_rows.Point(route.part, observed, each) for each in (x, start))
    alive = (observed.cotangent != 0)[..., None]
    assert int(((right.hard.slope != begun.hard.slope) & alive).sum()) > 80
    found = find_through(route.part, observed, Prior((1, 12, 12), 0.5), 2e-5, start)
    assert found.missed < 2e-6
    assert not bool(((found.routes != right.hard.slope) & alive).any())
    assert float((found.x - x).abs().max()) < 1e-4


def test_behind_another_maximum_the_input_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that does not find it nothing else is tried."""
    route, observed, _ = task(0, 12, nn.MaxPool2d)
    near = Unpooled(torch.zeros(1, 1, 12, 12, dtype=torch.float64), observed.value[..., None], 0.5, 3)
    monkeypatch.setattr(unpool, "find_through", lambda *of: near)
    monkeypatch.setattr(unpool, "find_routes", lambda *of: pytest.fail("other searches lead no nearer"))
    assert unpool.solve_route(route, observed, 1e-7, with_prior=True) is near


def test_slopes_in_front_are_means_over_how_far_values_moved() -> None:
    route, observed, x = task(0, 12)
    before = route_rows.Point(route.part, observed, x + 0.05)
    point = Smooth(route.part, observed, x, before)
    z, slope = point.values[1], point.slopes[1]
    far = DOUBTED * (z - before.values[1]).square().mean((2, 3), keepdim=True).sqrt().expand_as(z)
    assert bool((slope[z > 3 * far] == 1).all())
    assert bool((slope[z < -3 * far] == 0).all())
    near = z.abs() < far / 2
    assert bool(near.any())
    assert bool(((slope > 0.2) & (slope < 0.8))[near].all())
    assert bool((point.hard.slope == route_rows.Point(route.part, observed, x).hard.slope).all())


@pytest.mark.parametrize(("missed", "close"), [(0.5 * CLOSE, True), (2 * CLOSE, False)])
@pytest.mark.parametrize("silent", [0, 20])
def test_an_input_that_nearly_meets_the_constraints_is_handed_on(
    silent: int, missed: float, close: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers together tell the rest of it. Further off it is none, and routes are looked for as ever."""
    network, x, state, gradients = known(0, silent)
    searched: list[Any] = []

    def through(part: route_rows.Pooled, observed: route_rows.Observed, *_: Any) -> routes.Unpooled:
        return routes.Unpooled(x, route_rows.Point(part, observed, x).hard.slope, missed, 1)

    def nothing(part: route_rows.Pooled, observed: Any, prior: Any, agrees: Any, start: Tensor, *more: Any) -> Any:
        searched.append(more[0])
        return routes.Unpooled(start, route_rows.Point(part, observed, start).hard.slope, 0.5, 1)

    monkeypatch.setattr(unpool, "find_through", through)
    monkeypatch.setattr(unpool, "find_routes", nothing)
    if silent:  # its layer's own rows tell too little: from the input alone, by all layers
        route = route_of(network, POOL, 0)
        assert route is not None
        observed = route.observed(state, gradients[route.weight_name], False)
        found = unpool.solve_route(route, observed, 1e-9, with_prior=True)
        assert found is not None
        assert bool(searched) != close
        return
    stop = before_pool(network, POOL, state, gradients, 1e-9)
    assert isinstance(stop, Stop)
    assert stop.cause is Cause.LOSSY
    assert (stop.input is x) == close
    assert (routes.ANNEALING in searched) != close
