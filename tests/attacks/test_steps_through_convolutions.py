"""Several local steps, each on all samples, of a client whose network convolves: all parameters together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rgap import Protocol, Target, Update, capture, losses
from rgap.attacks import Closed, Status, local_steps
from rgap.inversion.step_bounds import Limit
from rgap.linalg.deadline import within
from rgap.models.chains import chain
from rgap.protocol import Sends

SIZE = 5
CONVOLUTIONS = ((6, 3, 1, 1), (8, 3, 2, 1))


def target_of(activation: Callable[[], nn.Module], classes: int = 1) -> Target:
    torch.manual_seed(0)
    model = chain(CONVOLUTIONS, 3, SIZE, classes, activation, bias=classes > 1)
    loss = losses.Logistic() if classes == 1 else losses.CrossEntropy(classes)
    return Target(model, loss, (3, SIZE, SIZE), (0.0, 1.0))


def sample(seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)), torch.ones(1)


def protocol(rate: float, steps: int) -> Protocol:
    return Protocol(Sends.DIFFERENCE, learning_rate=rate, steps=steps)


def off(found: Tensor, x: Tensor) -> float:
    return float((found - x.double()).square().mean().sqrt())


@pytest.mark.parametrize(
    ("activation", "classes", "rate", "steps"),
    [
        (nn.Sigmoid, 1, 0.1, 2),
        (nn.ReLU, 4, 0.1, 2),
        (lambda: nn.LeakyReLU(0.2), 4, 0.01, 3),
        (lambda: nn.LeakyReLU(0.2), 1, 0.1, 2),
    ],
)
def test_a_sample_behind_several_steps_is_exact(
    activation: Callable[[], nn.Module], classes: int, rate: float, steps: int
) -> None:
    (x, label), target = sample(), target_of(activation, classes)
    found = Closed()(target, capture(target, x, label, protocol(rate, steps)))
    assert found.status is Status.EXACT, str(found)
    assert found.labels.tolist() == label.tolist()
    assert off(found.inputs, x) < min(1e-3, 5 * found.answers[0].error)
    assert found.steps == ((0,),) * steps
    assert found.preflight.passed


@pytest.mark.parametrize("told", [protocol(0.05, 2), protocol(0.1, 3), protocol(0.11, 2)])
def test_what_another_protocol_says_is_not_exact(told: Protocol) -> None:
    (x, label), target = sample(), target_of(nn.Sigmoid)
    update = capture(target, x, label, protocol(0.1, 2))
    found = Closed()(target, Update(update.gradients, replace(update.header, protocol=told)))
    assert found.status is not Status.EXACT


def test_the_stated_error_grows_as_the_rate_falls_until_nothing_is_exact() -> None:
    """The weights are rounded, and by how much they moved is what the samples are known by."""
    (x, label), target = sample(), target_of(nn.Sigmoid)
    stated = []
    for rate in (1e-2, 1e-3, 1e-5):
        found = Closed()(target, capture(target, x, label, protocol(rate, 2)))
        stated.append(found.answers[0].error)
        assert off(found.inputs, x) < 5 * stated[-1]
    assert 3 < stated[1] / stated[0] < 30
    assert found.status is not Status.EXACT, str(found)


def photograph(size: int) -> tuple[Tensor, Tensor]:
    """Smooth, and of more values than steps are differentiated for."""
    drawn = torch.rand(1, 3, size + 4, size + 4, generator=torch.Generator().manual_seed(0))
    x = nn.functional.avg_pool2d(drawn, 5, 1)
    return (x - x.min()) / (x.max() - x.min()), torch.ones(1)


def large(classes: int, size: int = 8) -> Target:
    torch.manual_seed(0)
    model = chain(((8, 3, 1, 1), (12, 3, 2, 1)), 3, size, classes, lambda: nn.LeakyReLU(0.2), bias=classes > 1)
    loss = losses.Logistic() if classes == 1 else losses.CrossEntropy(classes)
    return Target(model, loss, (3, size, size), (0.0, 1.0))


@pytest.fixture
def few_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so few samples' values steps are differentiated, and larger ones are quick."""
    monkeypatch.setattr(local_steps, "MOST_VALUES", 150)


@pytest.mark.usefixtures("few_values")
@pytest.mark.parametrize(("classes", "rate", "steps"), [(1, 0.01, 2), (4, 0.001, 5)])
def test_a_larger_sample_behind_kinks_is_exact(classes: int, rate: float, steps: int) -> None:
    (x, label), target = photograph(8), large(classes)
    found = Closed()(target, capture(target, x, label, protocol(rate, steps)))
    assert found.status is Status.EXACT, str(found)
    assert found.labels.tolist() == label.tolist()
    assert off(found.inputs, x) < min(1e-3, 5 * found.answers[0].error)
    assert found.steps == ((0,),) * steps


@pytest.mark.usefixtures("few_values")
def test_a_larger_sample_of_another_protocol_is_not_exact() -> None:
    (x, label), target = photograph(8), large(4)
    update = capture(target, x, label, protocol(0.01, 2))
    with within(20.0):
        found = Closed()(target, Update(update.gradients, replace(update.header, protocol=protocol(0.012, 2))))
    assert found.status is not Status.EXACT


@pytest.mark.usefixtures("few_values")
def test_where_there_is_no_time_it_says_how_much_it_would_take() -> None:
    (x, label), target = photograph(12), large(4, 12)
    update = capture(target, x, label, protocol(0.01, 2))
    with within(0.05):
        found = Closed()(target, update)
    assert found.status is not Status.EXACT
    assert found.bound is not None
    assert found.bound.limit is Limit.TIME
