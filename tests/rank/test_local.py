"""What stays free of an input to first order, against the whole derivative by torch's own double backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, losses, rank_analysis
from rgap.linalg.deadline import within
from rgap.rank import local
from tests.nn.modules import Skip

Make = Callable[[], nn.Module]


def maxima() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
    )


def means() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.LeakyReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 5, 3), nn.LeakyReLU()),
        *(nn.Flatten(), nn.Linear(45, 3)),
    )


def global_mean() -> nn.Module:
    inner = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1))
    block = Skip(inner, nn.Identity(), nn.ReLU())
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, 1, 1), nn.ReLU(), block),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    )


def wide() -> nn.Module:
    """Enough rows: nothing stays free."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 40), nn.Linear(40, 3)
    )


def target_of(make: Make, size: int = 10) -> Target:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Target(make().double().eval(), losses.CrossEntropy(3), (1, size, size), (0.0, 1.0))


def whole_rank(target: Target, x: Tensor) -> int:
    """Of the logits and the gradients of the summed loss, as functions of the inputs."""
    model, parameters = target.model.double(), [p for p in target.model.parameters() if p.requires_grad]

    def sent(values: Tensor) -> Tensor:
        logits = model(values)
        loss = nn.functional.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long), reduction="sum")
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.cat([logits.flatten(), *(g.flatten() / g.norm() for g in gradients)])

    jacobian = torch.autograd.functional.jacobian(sent, x).reshape(-1, x.numel())
    return int(torch.linalg.matrix_rank(jacobian, rtol=1e-6))


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("make", [maxima, means, global_mean, wide])
def test_it_is_what_the_whole_derivative_leaves(make: Make, samples: int) -> None:
    target = target_of(make)
    x = torch.rand(samples, 1, 10, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = rank_analysis(target, x)
    assert found.local == local.Local(x.numel() - whole_rank(target, x), True)
    assert found.joint_free == found.local.free
    assert ("No dimension" if found.joint_free == 0 else "stay free, whatever the attack") in found.verdict


def test_without_time_it_is_a_bound() -> None:
    target = target_of(maxima)
    found = rank_analysis(target, seconds=0.0)
    assert found.local == local.Local(100, False)
    assert found.joint_free is None
    assert "not measured: it takes more time" in found.verdict


@pytest.mark.parametrize(
    ("middle", "samples", "measured"),
    [
        (lambda: nn.BatchNorm1d(12), 1, False),  # torch itself takes no single sample there
        (lambda: nn.BatchNorm1d(12), 2, False),
        (lambda: nn.Dropout(), 1, False),
        (lambda: nn.LayerNorm(12), 2, True),
        (lambda: nn.BatchNorm1d(12).eval(), 2, True),
    ],
)
def test_samples_that_are_mixed_or_drawn_anew_are_not_measured_alone(
    middle: Callable[[], nn.Module], samples: int, measured: bool
) -> None:
    part = middle()
    model = nn.Sequential(nn.Linear(6, 12), part, nn.ReLU(), nn.Unflatten(1, (3, 4)), nn.MaxPool1d(2), nn.Flatten())
    model.append(nn.Linear(6, 3))
    target = Target(model.train(part.training), losses.CrossEntropy(3), (6,), (0.0, 1.0), samples)
    assert (rank_analysis(target).local is not None) == measured


def test_what_would_not_end_in_the_time_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("begun")

    monkeypatch.setattr(local, "_Sketch", refuse)
    found = rank_analysis(target_of(maxima), seconds=1e-4)
    assert found.local == local.Local(100, False)


@pytest.mark.parametrize("drawn", [8, 20, 60])
def test_what_was_looked_at_in_the_time_bounds_it(drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of(wide)
    monkeypatch.setattr(local, "FIRST", 8)
    looked = 0

    def look(done: int, of: int) -> None:
        nonlocal looked
        looked = done

    monkeypatch.setattr(local.deadline, "used", lambda: float(looked >= drawn))
    found = rank_analysis(target, looked=look).local
    assert found is not None
    assert not found.complete
    assert 100 - looked <= found.free < 100


def test_chains_are_measured_layer_by_layer() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 30), nn.Tanh(), nn.Linear(30, 3))
    assert rank_analysis(Target(model, losses.CrossEntropy(3), (1, 10, 10))).local is None


def test_a_limit_around_it_holds() -> None:
    with within(0.0):
        found = rank_analysis(target_of(means))
    assert found.local is not None
    assert not found.local.complete
