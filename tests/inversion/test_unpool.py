"""Through maximum pools: exactly where the rows are enough, and otherwise never called so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, Update, capture, losses
from rgap.attacks import Closed, Recursive, Status
from rgap.inversion import recursion, route_rows, routes, unpool
from rgap.inversion.prior import Prior
from rgap.inversion.state import Cause, State, Stop
from rgap.inversion.unpool import MISSED, before_pool, route_of
from rgap.linalg.deadline import OutOfTime
from rgap.nn.network import Network
from rgap.nn.pools import Pool
from tests.auditing.small_audits import seeded


def pictures(count: int, channels: int, size: int, seed: int = 0) -> Tensor:
    """Smooth pictures with edges and a little noise, so that no two values are equal, in float32."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size, mode="bilinear")
    return 0.9 * (smooth + 0.3 * (smooth > 0.6)).clamp(0, 1) + 0.1 * torch.rand(smooth.shape, generator=generator)


def network(kind: str) -> tuple[nn.Module, int]:
    """A network, and the channels of its pictures."""
    behind = (nn.Flatten(), nn.LazyLinear(24), nn.ReLU(), nn.LazyLinear(10))
    fronts: dict[str, tuple[nn.Module, ...]] = {
        "relu, pool": (nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        "pool, relu": (nn.Conv2d(1, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
        "leaky": (nn.Conv2d(1, 32, 3, padding=1), nn.LeakyReLU(0.2), nn.MaxPool2d(2)),
        "tanh": (nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.Tanh(), nn.MaxPool2d(2)),
        "overlapping": (nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        "batch norm": (nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        "two pools": (
            *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        ),
        "two layers, one pool": (
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ),
        "relu, mean": (nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        "batch norm, leaky, mean": (
            *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)),
            *(nn.LeakyReLU(0.1), nn.AvgPool2d(2)),
        ),
        "two means": (
            *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2)),
        ),
    }
    return nn.Sequential(*fronts[kind], *behind), 1


KINDS = (
    "relu, pool", "pool, relu", "leaky", "tanh", "overlapping", "batch norm", "two pools", "two layers, one pool",
    "relu, mean", "batch norm, leaky, mean", "two means",
)  # fmt: skip


SIZE = 10
"""Of the pictures: small, since most of the time goes to steps, and rows enough."""
SHAPES = ((8, 10, 10), (48, 5, 5), (8, 10, 10))
"""Of what a layer reads, of what the pool behind it puts out, of a move of the former."""


def target_of(kind: str, size: int = SIZE) -> Target:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, channels = network(kind)
        model(torch.zeros(2, channels, size, size))
        for part in model:
            if isinstance(part, nn.BatchNorm2d):  # scales of either sign: a maximum becomes a minimum
                part.weight.data.uniform_(-1, 1)
                part.bias.data.uniform_(-0.3, 0.3)
                part.running_var.uniform_(0.5, 1.5)
    return Target(model.eval(), losses.CrossEntropy(10), (channels, size, size), (0.0, 1.0))


def behind_the_pool(target: Target, x: Tensor) -> tuple[State, dict[str, Tensor], int, list[Tensor | None]]:
    """What is known behind the first pool, its node, and the cotangents of all values."""
    network = target.network
    node = next(at for at, each in enumerate(network.nodes) if isinstance(each.op, Pool))
    values = network.forward(x)
    k = torch.randn(values[node + 1].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ks = network.vjp(values, {}, {node + 1: k})
    gradients = {
        layer.weight_name: grad.sum(0).reshape(target.parameters[layer.weight_name].shape)
        for layer, grad in network.gradients(values, ks)
    }
    return State(values[node + 1], k, None, torch.full_like(k, 1e-9)), gradients, node, ks


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_with_pools_is_inverted_exactly(kind: str) -> None:
    # Means, and windows that share values, tell less.
    size = 12 if "mean" in kind else 11 if kind == "overlapping" else SIZE
    target, x = target_of(kind, size), pictures(1, 1, size)
    found = Closed()(target, capture(target, x, torch.tensor([3.0])))
    assert found.status is Status.EXACT, found
    error = float((found.inputs - x).square().mean())
    assert error < 1e-8
    if "mean" in kind:  # all values in front of a mean have one error between them
        assert error**0.5 < 10 * found.answers[0].error


@pytest.mark.parametrize("kind", ["relu, pool", "batch norm", "relu, mean", "two layers, one pool"])
@pytest.mark.parametrize("decided", [False, True])
def test_few_unknowns_move_as_many_do(kind: str, decided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a matrix as by one product after another."""
    target, x = target_of(kind, 6), pictures(1, 1, 6).double()
    state, gradients, node, _ = behind_the_pool(target, x)
    route = route_of(target.network, node, 0)
    assert route is not None
    observed = route.observed(state, gradients[route.weight_name], False)
    point = route_rows.Point(route.part, observed, 0.7 * x + 0.1)
    step = route_rows.Step(point, 3.0, 0.3, routes.SETTLED)
    step = step.decided() if decided else step
    moves = []
    for few in (0, 1000):
        monkeypatch.setattr(route_rows, "FEW", few)
        moves.append(step.move(step.wanted, step.left, Prior((1, 6, 6), 0.0), 0.1))
    assert float(moves[0].norm()) > 0.1
    torch.testing.assert_close(moves[0], moves[1], rtol=0, atol=1e-6 * float(moves[0].norm()))


def test_rows_of_some_outputs_are_enough_where_all_would_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each output of the second convolution has 800 gradient rows; what it reads has 800 unknowns, the picture 100."""
    monkeypatch.setattr(route_rows, "LARGE", 0)
    weighed: set[tuple[int, int]] = set()
    apply = route_rows.Whitening.__call__

    def counted(self: route_rows.Whitening, grads: Tensor) -> Tensor:
        found = apply(self, grads)
        weighed.add((len(self.outputs), int((found.flatten(1, 2) != 0).any(2).any(0).sum())))
        return found

    monkeypatch.setattr(route_rows.Whitening, "__call__", counted)
    target, x = target_of("two pools"), pictures(1, 1, SIZE)
    found = Closed()(target, capture(target, x, torch.tensor([3.0])))
    assert found.status is Status.EXACT, found
    assert float((found.inputs - x).square().mean()) < 1e-8
    assert weighed == {(5, 5), (1, 1)}


def test_rows_of_silent_outputs_are_not_weighed() -> None:
    target, x = target_of("relu, pool", 6), pictures(1, 1, 6).double()
    state, gradients, node, _ = behind_the_pool(target, x)
    route = route_of(target.network, node, 0)
    assert route is not None
    observed = route.observed(state, gradients[route.weight_name], False)
    k, grad = observed.cotangent.clone(), observed.grad.clone()
    k[:, ::2], grad[:, ::2] = 0.0, 0.0
    alive = (k != 0).any(2)[0].nonzero()[:, 0]
    assert 4 < len(alive) <= 16
    point = route_rows.Point(route.part, replace(observed, cotangent=k, grad=grad), 0.7 * x + 0.1)
    weigher = route_rows.Whitening(route_rows.Step(point, 3.0, 0.3, routes.SETTLED))
    assert torch.equal(weigher.outputs, alive)
    assert len(weigher.inverse) == len(alive)


def test_many_unknowns_are_looked_for_in_large_steps_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpool, "MANY", 0)
    monkeypatch.setattr(unpool, "FEWER", 10**6)  # not from the picture
    tried = []
    find = unpool.find_routes

    def counted(*of: Any) -> routes.Unpooled:
        tried.append((of[5], (found := find(*of)).missed <= of[3]))
        return found

    monkeypatch.setattr(unpool, "find_routes", counted)
    target, x = target_of("two pools"), pictures(1, 1, SIZE)
    found = Closed()(target, capture(target, x, torch.tensor([3.0])))
    assert found.status is Status.EXACT, found
    assert float((found.inputs - x).square().mean()) < 1e-8
    assert (routes.QUICK, True) in tried
    assert not any(schedule in (routes.ANNEALING, routes.COLDER) for schedule, _ in tried)


@pytest.mark.parametrize("kind", ["relu, mean", "batch norm, leaky, mean"])
def test_all_values_in_front_of_a_mean_are_those_of_the_forward_pass(kind: str) -> None:
    """Also of several samples whose gradients were added up."""
    target, x = target_of(kind, 12), pictures(2, 1, 12).double()
    network, (state, gradients, node, ks) = target.network, behind_the_pool(target, x)
    found = before_pool(network, node, state, gradients, 1e-6 / MISSED)
    assert isinstance(found, State), found
    torch.testing.assert_close(found.value, network.forward(x)[node], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.cotangent, ks[node])


@pytest.mark.parametrize("kind", ["relu, pool", "leaky", "pool, relu"])
def test_routes_are_those_of_the_forward_pass(kind: str) -> None:
    """Also of several samples whose gradients were added up."""
    target, x = target_of(kind), pictures(2, 1, SIZE).double()
    network, (state, gradients, node, ks) = target.network, behind_the_pool(target, x)
    values = network.forward(x)
    found = before_pool(network, node, state, gradients, 1e-6 / MISSED)
    assert isinstance(found, State), found
    assert found.row_weight is not None
    passed = found.row_weight > 0
    torch.testing.assert_close(found.value[passed], values[node][passed], rtol=1e-6, atol=1e-6)
    wanted = ks[node]
    assert wanted is not None
    slope = network.slopes(values).get(node - 1, torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(found.cotangent * slope, wanted * slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_wrong_routes_are_found_by_the_outputs_that_miss_most(seed: int) -> None:
    """From routes a few of which are wrong, without annealing."""
    model = seeded(nn.Conv2d(8, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48 * 25, 10))
    network = Target(model, losses.CrossEntropy(10), (8, 10, 10)).network
    generator = torch.Generator().manual_seed(seed)
    x, k, moved = (torch.randn(1, *each, generator=generator, dtype=torch.float64) for each in SHAPES)
    values = network.forward(x)
    k = k * (values[3] > 0)
    ks = network.vjp(values, network.slopes(values), {3: k})
    [(_, grad), *_] = network.gradients(values, ks)
    route = route_of(network, 2)
    assert route is not None
    observed = route.observed(State(values[3], k, None, torch.zeros_like(k)), grad[0].reshape(48, 8, 3, 3), False)
    start, once = x + 0.02 * moved, replace(routes.ANNEALING, max_steps=1, promising=1.0)
    right, begun = (route_rows.Point(route.part, observed, each).hard.slope for each in (x, start))
    assert 3 <= int((right != begun).any(-1)[observed.known].sum()) <= 60
    found = routes.find_routes(route.part, observed, Prior((8, 10, 10), 0.0), 1e-10, start, once)
    assert found.missed < 1e-9
    assert bool((found.routes == right).all(-1)[observed.known].all())
    torch.testing.assert_close(found.x, x, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "parts",
    [
        (nn.GELU(), nn.MaxPool2d(2)),
        (nn.LayerNorm(12), nn.MaxPool2d(2)),
        (nn.MaxPool2d(2), nn.MaxPool2d(2)),
        (nn.Tanh(), nn.AvgPool2d(2)),
    ],
    ids=["not increasing", "a norm of the sample", "two pools in a row", "no kink in front of a mean"],
)
def test_a_pool_whose_routes_no_layer_tells_has_none(parts: tuple[nn.Module, ...]) -> None:
    convolution = nn.Conv2d(1, 4, 3)
    size = nn.Sequential(convolution, *parts)(torch.zeros(1, 1, 14, 14))[0].numel()
    model = seeded(convolution, *parts, nn.Flatten(), nn.Linear(size, 3))
    network = Target(model, losses.CrossEntropy(3), (1, 14, 14)).network
    node = max(at for at, each in enumerate(network.nodes) if isinstance(each.op, Pool))
    assert route_of(network, node) is None


@pytest.mark.parametrize("seed", range(2))
def test_too_few_rows_are_said_and_not_called_exact(seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4)
        )
    target, x = Target(model, losses.CrossEntropy(4), (3, 5, 5), (0.0, 1.0)), pictures(1, 3, 5, seed)
    found = Closed()(target, capture(target, x, torch.tensor([1.0])))
    assert found.status in (Status.RANK_DEFICIENT, Status.NOT_CONVERGED), found
    assert found.status is not Status.RANK_DEFICIENT or "dimensions free" in found.reason


@pytest.mark.parametrize(("seed", "size"), [(0, 4), (1, 6)])
def test_a_gradient_of_another_picture_is_not_called_exact(seed: int, size: int) -> None:
    """The pool's layer sends the gradient of another sample."""
    target, x = target_of(KINDS[seed], size), pictures(2, 1, size, seed)
    first, second = (capture(target, each[None], torch.tensor([3.0])) for each in x)
    name = next(iter(first.gradients))
    mixed = replace(first, gradients={**first.gradients, name: second.gradients[name]})
    found = Closed()(target, mixed)
    assert found.status is not Status.EXACT, found


@pytest.mark.parametrize("samples", [2, 4])
def test_batches_come_back_through_a_pool(samples: int) -> None:
    """Two Linear layers behind the pool tell the samples apart; their maxima share the layer's gradient."""
    model = seeded(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    ).float()
    target = Target(model, losses.CrossEntropy(10), (1, 14, 14), (0.0, 1.0), batch_size=samples)
    x, labels = pictures(samples, 1, 14), torch.arange(samples).float()
    found = Closed()(target, capture(target, x, labels))
    assert found.status is Status.EXACT, found
    apart = torch.cdist(x.flatten(1).double(), found.inputs.flatten(1)).square() / 196
    assert float(apart.min(1).values.max()) < 1e-8
    assert found.labels[apart.argmin(1)].tolist() == labels.tolist()


@pytest.mark.parametrize(("width", "activation"), [(24, nn.ReLU()), (32, nn.LeakyReLU(0.2))])
@pytest.mark.parametrize("seed", [0, 1])
def test_routes_of_a_layer_that_reads_more_than_the_input_has_begin_at_an_input(
    width: int, activation: nn.Module, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[float] = []
    of = unpool._from_input

    def spy(whole: unpool.Route, observed: route_rows.Observed, *others: Any) -> routes.Unpooled:
        start = of(whole, observed, *others)
        begun.append(float(start.x.std()))
        return start

    monkeypatch.setattr(unpool, "_from_input", spy)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            *(nn.Conv2d(1, 12, 3, padding=1), activation, nn.MaxPool2d(2)),
            *(nn.Conv2d(12, width, 3, padding=1), activation, nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(9 * width, 60), activation, nn.Linear(60, 5)),
        )
    target = Target(model, losses.CrossEntropy(5), (1, 12, 12), (0.0, 1.0))
    coarse = torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    x = nn.functional.interpolate(coarse, (12, 12), mode="bicubic").clamp(0, 1)
    found = Closed()(target, capture(target, x, torch.tensor([2.0])))
    assert len(begun) == 1
    assert begun[0] > 0
    assert found.status is Status.EXACT, found.reason
    assert float((found.inputs - x).square().mean()) < 1e-11


# Several updates at once.


def two_updates(kind: str = "relu, pool") -> tuple[Target, Tensor, list[Update]]:
    target, x = target_of(kind, 6), pictures(2, 1, 6)
    return target, x, [capture(target, each[None], torch.tensor([3.0])) for each in x]


@pytest.mark.parametrize("first", [0, 1])
def test_an_update_that_gets_no_further_is_followed_no_less_beside_another(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its routes are found by all layers together, as they are alone; it fell out without a word."""
    target, x, updates = two_updates()
    name, real = next(iter(updates[first].gradients)), recursion.before_pool

    def fails(network: Network, node: int, state: State, gradients: dict[str, Tensor], *more: Any) -> State | Stop:
        if torch.equal(gradients[name].float(), updates[first].gradients[name]):
            return Stop(network.nodes[node].op, Cause.LOSSY, "its routes were not found")
        return real(network, node, state, gradients, *more)

    monkeypatch.setattr(recursion, "before_pool", fails)
    for attack in (Recursive(), Closed()):
        together, alone = attack.many(target, updates), [attack(target, update) for update in updates]
        assert [(each.status, str(each)) for each in together] == [(each.status, str(each)) for each in alone]
    assert "its routes were not found" in Recursive().many(target, updates)[first].reason
    assert [each.status for each in together] == [Status.EXACT] * 2
    for found, truth in zip(together, x, strict=True):
        assert float((found.inputs - truth).square().mean()) < 1e-10


def test_an_update_that_runs_out_of_time_takes_nothing_from_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    target, _, updates = two_updates()
    begun: list[int] = []

    def late(*arguments: object) -> None:
        begun.append(1)
        if len(begun) > 1:
            raise OutOfTime

    monkeypatch.setattr(recursion, "told_by_values", late)
    assert [each.status for each in Recursive().many(target, updates)] == [Status.EXACT, Status.CUT_OFF]


def test_what_was_not_found_in_front_of_the_first_pool_is_not_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing more would be told: the attack goes on from what was found."""
    searches: list[torch.Size] = []

    def nearly(part: route_rows.Pooled, observed: Any, prior: Prior, agrees: float, start: Tensor, *_: Any) -> Any:
        searches.append(start.shape)
        return routes.Unpooled(start, route_rows.Point(part, observed, start).hard.slope, 0.3, 1)

    monkeypatch.setattr(unpool, "find_routes", nearly)
    target, x = target_of("relu, pool"), pictures(1, 1, SIZE)
    found = Closed()(target, capture(target, x, torch.tensor([3.0])))
    assert found.status is Status.NOT_CONVERGED
    assert len(searches) == 4  # by values alone, from two starts, and colder


@pytest.mark.parametrize(("silent", "enough"), [(0, True), (30, True), (46, False), (48, False)])
def test_a_layer_whose_outputs_are_mostly_silent_does_not_tell_what_it_reads(silent: int, enough: bool) -> None:
    """As that of a network that has learned may be: routes are then looked for from the network's own input."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(432, 10)),
        )
    model[3].bias.data[:silent] -= 5.0
    network, x = Target(model, losses.CrossEntropy(10), (1, 12, 12)).network, pictures(1, 1, 12).double()
    node = [at for at, each in enumerate(network.nodes) if isinstance(each.op, Pool)][1]
    values = network.forward(x)
    k = torch.randn(values[node + 1].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    layer, gradient = list(network.gradients(values, network.vjp(values, network.slopes(values), {node + 1: k})))[1]
    state, route = State(values[node + 1], k, None, torch.full_like(k, 1e-9)), route_of(network, node)
    assert route is not None
    observed = route.observed(state, gradient.reshape(48, 24, 3, 3), False)
    assert unpool._tells_enough(route.part, observed, 1e-7) == enough
    if not enough:
        found = before_pool(network, node, state, {layer.weight_name: gradient.reshape(48, 24, 3, 3)}, 1e-7)
        assert isinstance(found, Stop)
        assert found.nearest is None
