"""Clients that take several local steps: every sample, the order of the minibatches, and what is never certified."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgap import Protocol, Target, Update, capture, losses
from rgap.attacks import Closed, Reconstruction, Status
from rgap.attacks.base import none_certified_alone
from rgap.attacks.result import Answer, Outcome, Sample
from rgap.client import orders as orders_of
from rgap.inversion.step_bounds import Limit
from rgap.protocol import Optimiser, Sends
from tests.inversion.subspace.cases import perceptron

CLASSES = 6
WIDTHS = (30, 48, 40, CLASSES)
RATE = 0.1


def target_of(activation: str = "leaky", samples: int = 6, widths: tuple[int, ...] = WIDTHS) -> Target:
    return Target(perceptron(widths, activation), losses.CrossEntropy(CLASSES), (widths[0],), (0.0, 1.0), samples)


def draw(samples: int, seed: int = 0, inputs: int = WIDTHS[0]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(samples, inputs, generator=generator)
    return x, torch.randint(0, CLASSES, (samples,), generator=generator).float()


def protocol(**arguments: Any) -> Protocol:
    return Protocol(Sends.DIFFERENCE, **{"learning_rate": RATE, "shuffled": False, **arguments})


def send(target: Target, x: Tensor, labels: Tensor, told: Protocol) -> Update:
    return capture(target, x, labels, told)


def matched(found: Reconstruction, x: Tensor, labels: Tensor) -> list[int]:
    """Of each sample that was found the number of the one it is, each once."""
    apart = torch.cdist(found.inputs.flatten(1), x.double().flatten(1))
    at = apart.argmin(1)
    assert sorted(at.tolist()) == list(range(len(x)))
    assert found.labels.tolist() == labels.double()[at].tolist()
    assert float(apart.min(1).values.max()) / x[0].numel() ** 0.5 < 1e-3
    return at.tolist()


def in_order(found: Reconstruction, x: Tensor, labels: Tensor, told: Protocol) -> None:
    """Every sample, and each step's own samples, of a client that does not shuffle."""
    at, start = matched(found, x, labels), 0
    sizes = told.minibatches(len(x))
    assert len(found.steps) == len(sizes)
    for size, members in zip(sizes, found.steps, strict=True):
        assert sorted(at[each] for each in members) == list(range(start, start + size))
        start = (start + size) % len(x)


@pytest.mark.parametrize("activation", ["relu", "leaky", "tanh", "gelu"])
def test_every_sample_and_the_order_of_the_minibatches(activation: str) -> None:
    x, labels = draw(6)
    target, told = target_of(activation), protocol(epochs=2, minibatch=2)
    found = Closed()(target, send(target, x, labels, told))
    assert found.status is Status.EXACT, str(found)
    in_order(found, x, labels, told)


@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.5, "summed": True, "learning_rate": 0.02}], ids=str)
def test_real_labels_come_back_with_their_samples(arguments: dict[str, Any]) -> None:
    """Of a regression: each label is told by how much its sample counts in its step."""
    model = perceptron((*WIDTHS[:-1], 1), "leaky")
    target = Target(model, losses.MeanSquaredError(), (WIDTHS[0],), (0.0, 1.0), 6)
    x, labels = draw(6)[0], torch.randn(6, generator=torch.Generator().manual_seed(1))
    told = protocol(**{"epochs": 2, "minibatch": 2, **arguments})
    found = Closed()(target, send(target, x, labels, told))
    assert found.status is Status.EXACT, str(found)
    at = torch.cdist(found.inputs, x.double()).argmin(1)
    torch.testing.assert_close(found.labels, labels.double()[at], rtol=0, atol=1e-4)
    in_order(replace(found, answers=(replace(found.answers[0], labels=labels.double()[at]),)), x, labels, told)


def test_real_labels_of_clipped_steps_are_not_guessed() -> None:
    """How much a sample counts tells either its label or how much was clipped."""
    target = Target(perceptron((*WIDTHS[:-1], 1), "leaky"), losses.MeanSquaredError(), (WIDTHS[0],), (0.0, 1.0), 6)
    x, labels = draw(6)[0], torch.randn(6, generator=torch.Generator().manual_seed(1))
    told = protocol(epochs=1, minibatch=2, clip_norm=0.05)
    found = Closed()(target, send(target, x, labels, told))
    assert found.status is not Status.EXACT, str(found)
    assert all(each.status is not Status.EXACT for each in found.samples)


@pytest.mark.parametrize(
    "arguments",
    [
        {"momentum": 0.9, "weight_decay": 5e-2},
        {"momentum": 0.5, "nesterov": True, "schedule": (1.0, 0.3)},
        {"proximal": 0.5},
        {"summed": True, "learning_rate": 0.05},
        {"minibatch": 4},
        {"minibatch": None, "epochs": 1, "steps": 3},
    ],
)
def test_however_the_client_trains(arguments: dict[str, Any]) -> None:
    x, labels = draw(6, seed=1)
    target, told = target_of(), protocol(**{"epochs": 2, "minibatch": 2, **arguments})
    found = Closed()(target, send(target, x, labels, told))
    assert found.status is Status.EXACT, str(found)
    in_order(found, x, labels, told)


@pytest.mark.parametrize("arguments", [{}, {"proximal": 0.5}, {"momentum": 0.5}])
def test_clipped_steps_are_followed(arguments: dict[str, Any]) -> None:
    """What clipping divides by depends on all samples of a step."""
    x, labels = draw(6, seed=1)
    target, told = target_of(), protocol(epochs=2, minibatch=2, clip_norm=0.5, **arguments)
    found = Closed()(target, send(target, x, labels, told))
    assert found.status is Status.EXACT, str(found)
    in_order(found, x, labels, told)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_samples_that_an_epoch_leaves_out_are_found_in_a_later_one(seed: int) -> None:
    x, labels = draw(7, seed)
    target, told = target_of(samples=7), protocol(epochs=3, minibatch=3, shuffled=True, drop_last=True)
    generator = torch.Generator().manual_seed(seed)
    found = Closed()(target, capture(target, x, labels, told, generator))
    orders = [set(at.tolist()) for at in orders_of(7, told, torch.Generator().manual_seed(seed))]
    assert found.status is Status.EXACT, str(found)
    assert len(set.union(*orders[:2])) < 7
    apart = torch.cdist(found.inputs, x.double())
    assert float(apart.min(1).values.max()) < 1e-3
    assert [{int(apart[each].argmin()) for each in members} for members in found.steps] == orders


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_shuffled_client_s_later_epochs_are_recognised(seed: int) -> None:
    x, labels = draw(6, seed)
    target = target_of()
    orders = [[0, 1], [2, 3], [4, 5], [5, 2], [0, 3], [1, 4]]
    update = by_hand(target, x, labels, orders)
    found = Closed()(target, update)
    assert found.status is Status.EXACT, str(found)
    at = matched(found, x, labels)
    assert [sorted(at[each] for each in members) for members in found.steps] == [sorted(each) for each in orders]
    assert all(f"{step}: {', '.join(map(str, each))}" in str(found) for step, each in enumerate(found.steps, 1))
    assert found.preflight.passed


def by_hand(target: Target, x: Tensor, labels: Tensor, orders: list[list[int]]) -> Update:
    """What torch's SGD makes of the model in steps on these samples, as two epochs of a shuffled client."""
    told = protocol(epochs=2, minibatch=2, shuffled=True)
    sent = capture(target, x, labels, told)
    names, model = list(target.parameters), target.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
    for members in orders:
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[members]), labels[members].long()).backward()
        optimiser.step()
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    return Update({name: after[name] - before[name] for name in names}, sent.header)


@pytest.mark.parametrize("told", [2, 4])
@pytest.mark.parametrize(
    "arguments", [{}, {"weight_decay": 5e-2}, {"weight_decay": 1e-3, "momentum": 0.9, "epochs": 2}], ids=str
)
def test_the_rank_tells_how_many_samples_there_are(told: int, arguments: dict[str, Any]) -> None:
    x, labels = draw(6, seed=3)
    target, does = target_of(), protocol(minibatch=2, **arguments)
    update = send(target, x, labels, does)
    update = Update(update.gradients, replace(update.header, batch_size=told))
    found = Closed()(target, update)
    assert found.status is Status.EXACT, str(found)
    in_order(found, x, labels, does)
    assert "rank" in " ".join(found.assumptions)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 3},
        {"epochs": 1},
        {"learning_rate": 0.05},
        {"momentum": 0.9},
        {"minibatch": 3},
        {"weight_decay": 0.1},
        {"minibatch": None, "epochs": 1, "steps": 2},
    ],
)
def test_what_another_protocol_says_is_not_certified(wrong: dict[str, Any]) -> None:
    x, labels = draw(6, seed=4)
    target, does = target_of(), {"epochs": 2, "minibatch": 2}
    update = send(target, x, labels, protocol(**does))
    update = Update(update.gradients, replace(update.header, protocol=protocol(**{**does, **wrong})))
    found = Closed()(target, update)
    assert found.status is not Status.EXACT
    assert not any(sample.status is Status.EXACT for sample in found.samples)


@pytest.mark.parametrize(
    ("limit", "arguments", "widths", "samples"),
    [
        (Limit.WIDTH, {"epochs": 9, "minibatch": 2}, WIDTHS, 6),
        (Limit.WIDTH, {"epochs": 2, "minibatch": 2}, (30, 48, 10, CLASSES), 6),
        (Limit.SIZES, {"epochs": 2, "minibatch": 2, "optimiser": Optimiser.ADAM}, WIDTHS, 6),
        (Limit.PRECISION, {"epochs": 2, "minibatch": 2, "learning_rate": 1e-7}, WIDTHS, 6),
        (Limit.PLACE, {"epochs": 2, "minibatch": 2}, (30, CLASSES), 4),
    ],
)
def test_where_it_ends_the_numbers_are_told(
    limit: Limit, arguments: dict[str, Any], widths: tuple[int, ...], samples: int
) -> None:
    x, labels = draw(samples)
    target = target_of(samples=samples, widths=widths)
    found = Closed()(target, send(target, x, labels, protocol(**arguments)))
    assert found.bound is not None
    assert found.bound.limit is limit, str(found)
    assert str(found.bound) in str(found)
    assert found.status is not Status.EXACT
    assert not any(sample.status is Status.EXACT for sample in found.samples)


def test_behind_convolutions_it_is_told_how_many_features_would_be_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.rand(6, 1, 8, 8, generator=generator), torch.zeros(6)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 20), nn.ReLU(), nn.Linear(20, CLASSES)
    )
    target = Target(model, losses.CrossEntropy(CLASSES), (1, 8, 8), (0.0, 1.0), 6)
    found = Closed()(target, send(target, x, labels, protocol(epochs=5, minibatch=2)))
    assert found.bound is not None
    assert found.bound.limit is Limit.PLACE
    text = str(found.bound)
    assert "15 local steps" in text
    assert "up to 19 vectors apart with 108 inputs and 20 outputs" in text
    assert "6 samples in 5 epochs leave 30" in text
    assert "up to 3 samples" in text


@pytest.mark.parametrize("status", [Status.PARTIAL, Status.EXACT])
def test_of_steps_taken_for_one_no_sample_is_certified_by_its_part_alone(status: Status) -> None:
    samples = (Sample(Status.EXACT, 0.0, 1e-6, "its own part"), Sample(Status.REPRODUCED, 1.0, 1e-6, "out of range"))
    answer = Answer(torch.zeros(2, 3), torch.tensor([0.0, 1.0]), float("nan"), 0.9, 1e-6, samples=samples)
    found = none_certified_alone(Outcome(status, "told", (answer,)))
    if status is Status.EXACT:  # all of the gradient agrees
        assert found.answers[0].samples == samples
        return
    assert found.status is Status.NOT_CONVERGED
    assert "taken for one" in found.reason
    assert [each.status for each in found.answers[0].samples] == [Status.NOT_CONVERGED, Status.REPRODUCED]
