"""What a search is held to beside the gradient, each against a slow oracle, and the constants of the presets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rgap import Protocol, Target, capture, losses
from rgap.attacks import (
    DLG,
    IDLG,
    LBFGS,
    Adam,
    FeatureMatching,
    InvertingGradients,
    Matching,
    Modern,
    SeeThroughGradients,
    Status,
)
from rgap.attacks.distance import LayerWise, cosine, moments, squared, total_variation
from rgap.attacks.known import known
from rgap.attacks.minimise import Termination
from rgap.attacks.search import Search
from rgap.attacks.simulate import LocalSteps
from rgap.attacks.start import Normal, Tiled
from rgap.linalg import deadline
from rgap.nn.reads import read_by
from rgap.protocol import Optimiser, Sends

SMOOTH = FeatureMatching(iterations=10, finish=4)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def perceptron() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3)))


def network() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(64, 3)))


def inputs(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def pictures(count: int = 1) -> tuple[Target, Tensor, Tensor]:
    target = Target(network(), losses.CrossEntropy(3), (3, 6, 6), (0.0, 1.0), count)
    return target, inputs(count, 3, 6, 6), torch.arange(count) % 3


def vectors(count: int) -> tuple[Target, Tensor, Tensor]:
    target = Target(perceptron(), losses.CrossEntropy(3), (8,), (0.0, 1.0), count)
    return target, inputs(count, 8), (torch.arange(count) % 3).double()


# Constants.


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (DLG(), {"distance": squared, "minimiser": LBFGS(), "optimise_label": True, "iterations": 300}),
        (IDLG(), {"distance": squared, "minimiser": LBFGS(), "optimise_label": False, "iterations": 300}),
        (
            InvertingGradients(),
            {
                "distance": cosine,
                "minimiser": Adam(0.1 / 4, signed=True, decay=(3 / 8, 5 / 8, 7 / 8)),
                "iterations": 4800,
                "boxed": True,
            },
        ),
        (
            SeeThroughGradients(),
            {
                "distance": squared,
                "minimiser": Adam(0.1 / 4, cosine=True, warmup=50, noise=0.01),
                "iterations": 20_000,
                "statistics": 0.1,
                "consensus": 0.01,
            },
        ),
        (
            Modern(),
            {
                "distance": cosine,
                "minimiser": Adam(0.1 / 4, signed=True, cosine=True, warmup=50),
                "variation": 0.1 * 4,
                "features": 0.1,
                "opponents": 1.0,
                "start": Tiled(4),
                "iterations": 24_000,
            },
        ),
    ],
    ids=lambda each: each.name if isinstance(each, Matching) else "",
)
def test_presets_have_the_published_constants(attack: Matching, expected: dict[str, object]) -> None:
    assert {name: getattr(attack, name) for name in expected} == expected


# Distances and priors.


@pytest.mark.parametrize("growth", [1.0, 2.0, 0.5])
def test_the_layer_wise_distance_is_the_mean_of_relative_ones(growth: float) -> None:
    given = {"a": inputs(3, 2), "b": 0.1 * inputs(4), "c": 3 * inputs(2)}
    found = {name: g + 0.1 * inputs(*g.shape).cos() for name, g in given.items()}
    each = [float((found[n] - g).norm() / g.norm()) ** 2 for n, g in given.items()]
    expected = sum(growth**i * one for i, one in enumerate(each)) / sum(growth**i for i in range(3))
    assert float(LayerWise(growth)(found, given)) == pytest.approx(expected, rel=1e-2)
    assert math.isfinite(float(LayerWise()(found, {**given, "b": torch.zeros(4, dtype=torch.float64)})))


def test_opponents_are_the_differences_of_each_two_colours() -> None:
    x = inputs(2, 3, 4, 5)
    pairs = torch.stack([x[:, a] - x[:, b] for a, b in itertools.combinations(range(3), 2)], 1)
    both = (float(total_variation(x)) + float(total_variation(pairs))) / 2
    assert float(total_variation(x, opponents=1.0)) == pytest.approx(both)
    grey = x[:, :1]
    assert float(total_variation(grey, opponents=1.0)) == float(total_variation(grey))


def test_tiles_repeat() -> None:
    target, _, _ = pictures()
    drawn = Tiled(4).draw((2, 3, 6, 7), target, torch.Generator().manual_seed(0))
    for i, j in itertools.product(range(6), range(7)):
        assert torch.equal(drawn[..., i, j], drawn[..., i % 4, j % 4])


# Adam.


@pytest.mark.parametrize(("warmup", "iterations"), [(0, 10), (3, 10), (7, 40)])
def test_the_rate_rises_and_falls_as_torch_has_it(warmup: int, iterations: int) -> None:
    adam = Adam(0.3, cosine=True, warmup=warmup)
    point = torch.zeros(1, requires_grad=True)
    cosine_of = torch.optim.SGD([point], lr=0.3)
    falls = torch.optim.lr_scheduler.CosineAnnealingLR(cosine_of, iterations)
    for at in range(iterations):
        expected = cosine_of.param_groups[0]["lr"] * (min(1, (at + 1) / warmup) if warmup else 1)
        assert adam._rate(at, iterations) == pytest.approx(expected, abs=1e-9)
        cosine_of.step()
        falls.step()


def test_noise_is_of_the_rates_size() -> None:
    def flat(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        return -x.sum(1).abs(), torch.zeros_like(x)

    start = torch.zeros(1, 4000, dtype=torch.float64)
    moved = Adam(0.1, noise=0.5)(flat, start, Termination(1, -math.inf), lambda done, value: None)
    assert float(moved.x.std()) == pytest.approx(0.05, rel=0.1)


# What layers read.


@pytest.mark.parametrize("plain", [True, False])
def test_what_a_module_reads_is_what_the_modules_before_it_give(plain: bool) -> None:
    target, x, _ = pictures(2)
    weights = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    found = target.gradient_function(torch.float64, plain, ["3", "0"])(x, weights)
    torch.testing.assert_close(found[read_by("3")], target.model[:3](x))
    torch.testing.assert_close(found[read_by("0")], x)
    without = target.gradient_function(torch.float64, plain)(x, weights)
    assert set(found) - set(without) == {read_by("3"), read_by("0")}
    assert all(torch.equal(found[name], g) for name, g in without.items())
    assert not any(module._forward_pre_hooks for module in target.model.modules())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_features_and_labels_are_those_of_the_samples(count: int) -> None:
    target, x, y = vectors(count)
    found = known(target, capture(target, x, y), values=True, statistics=True)
    [(name, values)] = found.values.items()
    at = int(name.partition(":")[0])
    truth = target.model[:at](x).detach()
    order = torch.cdist(values, truth).argmin(1)
    assert sorted(order.tolist()) == list(range(count))
    torch.testing.assert_close(values, truth[order], rtol=1e-6, atol=1e-6)
    assert found.assumptions
    if count > 1:
        assert found.labels is not None
        assert torch.equal(found.labels, y[order])


@pytest.mark.parametrize("features", [0.0, 0.3, 5.0])
def test_the_slope_of_the_features_term_is_that_of_finite_differences(features: float) -> None:
    target, x, y = pictures()
    update = capture(target, x, y)
    attack = replace(SMOOTH, features=features, variation=0.0, dtype=torch.float64)
    aid = known(target, update, features > 0, statistics=False)
    search = Search(attack, target, [update], 1, [aid])
    objective, which, point = search._objective(), torch.tensor([0]), inputs(1, 108) ** 2
    value, slope = objective(point, which)
    for at in range(0, 108, 17):
        move = torch.zeros_like(point)
        move[0, at] = 1e-6
        change = (objective(point + move, which)[0] - objective(point - move, which)[0]) / 2e-6
        assert float(change[0]) == pytest.approx(float(slope[0, at]), rel=1e-4, abs=1e-8)
    at = target.model[:3](point.reshape(1, 3, 6, 6))
    truth = target.model[:3](x).detach()
    apart = float((at.detach() - truth).norm() / truth.norm()) ** 2
    plain = Search(replace(attack, features=0.0), target, [update], 1)._objective()(point, which)[0]
    assert float(value[0] - plain[0]) == pytest.approx(features * apart, rel=1e-5, abs=1e-9)


def test_starts_are_drawn_to_the_mean_of_their_update_alone() -> None:
    target, x, y = pictures()
    updates = [capture(target, each, y) for each in (x, x.flip(-1))]
    attack = replace(SMOOTH, features=0.0, variation=0.0, restarts=3, dtype=torch.float64)
    points, which = inputs(6, 108), torch.arange(6)
    with_, without = (
        Search(replace(attack, consensus=weight), target, updates, 1)._objective()(points, which)
        for weight in (0.7, 0.0)
    )
    for own in (slice(0, 3), slice(3, 6)):
        apart = points[own] - points[own].mean(0)
        torch.testing.assert_close(with_[0][own] - without[0][own], 0.35 * apart.square().sum(1), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(with_[1][own] - without[1][own], 0.7 * apart, rtol=1e-6, atol=1e-9)


# Statistics of batch norms.


def test_statistics_that_were_sent_are_those_of_the_batch() -> None:
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    target = Target(seeded(lambda: nn.Sequential(*layers)).train(), losses.CrossEntropy(3), (3, 6, 6), (0.0, 1.0), 2)
    x, y = inputs(2, 3, 6, 6), torch.tensor([0, 2])
    protocol = Protocol(sends=Sends.DIFFERENCE, learning_rate=0.1, buffers=True)
    update = capture(target, x, y, protocol).to_gradient(target)[0]
    found = known(target, update, values=False, statistics=True)
    [sent] = found.statistics.values()
    torch.testing.assert_close(sent, moments(target.model[0](x)).detach(), rtol=1e-9, atol=1e-9)
    attack = SeeThroughGradients(iterations=3)
    assert any("running statistics" in each for each in attack(target, capture(target, x, y, protocol)).assumptions)


# Local steps.


@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(Sends.DIFFERENCE, learning_rate=0.1, steps=3),
        Protocol(Sends.DIFFERENCE, learning_rate=0.1, epochs=2, minibatch=2, shuffled=False),
        Protocol(Sends.DIFFERENCE, learning_rate=0.2, minibatch=3, shuffled=False, momentum=0.9, weight_decay=0.1),
        Protocol(Sends.DIFFERENCE, learning_rate=0.1, epochs=2, minibatch=2, shuffled=False, proximal=0.3, summed=True),
    ],
    ids=range(4),
)
@pytest.mark.parametrize("plain", [True, False])
def test_simulated_steps_give_what_the_client_sends(protocol: Protocol, plain: bool) -> None:
    target, x, y = vectors(4)
    client = LocalSteps.of(protocol, 4)
    assert client is not None
    gradient = target.gradient_function(torch.float64, plain)
    found = client.difference(target, gradient, torch.float64)(x, torch.eye(3, dtype=torch.float64)[y.long()])
    for name, sent in capture(target, x, y, protocol).gradients.items():
        torch.testing.assert_close(found[name], sent, rtol=1e-9, atol=1e-12)


def test_what_is_not_simulated_is_taken_for_one_step() -> None:
    kind = {"learning_rate": 0.1, "epochs": 2}
    assert LocalSteps.of(Protocol(), 4) is None
    assert LocalSteps.of(Protocol(Sends.DIFFERENCE, optimiser=Optimiser.ADAM, **kind), 4) is None
    assert LocalSteps.of(Protocol(Sends.DIFFERENCE, clip_norm=1.0, **kind), 4) is None
    assert LocalSteps.of(Protocol(Sends.DIFFERENCE, learning_rate=0.1), 4) is None


def test_a_sample_of_several_steps_is_found_through_them() -> None:
    target, x, y = vectors(1)
    update = capture(target, x, y, Protocol(Sends.DIFFERENCE, learning_rate=0.5, steps=3))
    found = SMOOTH(target, update)
    assert found.assumptions[0] == "3 local steps are simulated, every epoch in the same order of the samples"
    assert found.status is Status.REPRODUCED, found
    torch.testing.assert_close(found.inputs, x, rtol=0, atol=1e-4)


# The end.


@pytest.mark.parametrize("label", [0, 2])
def test_the_end_is_exact_on_a_smooth_network(label: int) -> None:
    target, x, _ = pictures()
    found = SMOOTH(target, capture(target, x, torch.tensor([label])))
    assert found.status is Status.REPRODUCED, found
    assert float((found.inputs - x).square().mean()) < 1e-12
    assert any("Gauss-Newton" in each for each in found.assumptions)
    assert any("reads, exactly" in each for each in found.assumptions)


def test_a_batch_is_found_with_its_labels() -> None:
    target, x, y = vectors(3)
    found = SMOOTH(target, capture(target, x, y))
    order = torch.cdist(found.inputs, x).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    torch.testing.assert_close(found.inputs, x[order], rtol=0, atol=1e-5)
    assert torch.equal(found.labels, y[order])


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_the_end_keeps_to_the_time(seconds: float) -> None:
    target, x, y = pictures()
    update = capture(target, x, y)
    with deadline.within(seconds):
        found = replace(SMOOTH, iterations=10**6, tolerance=0.0, start=Normal())(target, update)
    assert found.status in (Status.CUT_OFF, Status.REPRODUCED)
    assert found.answers


def test_a_share_of_the_time_is_of_what_is_left() -> None:
    assert deadline.share(0.5) is None
    with deadline.within(100.0):
        half = deadline.share(0.5)
        assert half is not None
        assert 49 < half <= 50
    with deadline.within(0.0):
        assert deadline.share(0.5) == 0.0
