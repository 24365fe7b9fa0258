"""What stays free of an input to first order, against the whole derivative by torch's own double backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, losses, rank_analysis
from rgap.linalg.deadline import within
from rgap.rank import analysis, local
from rgap.rank.summary import percent
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
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 9), nn.Linear(9, 3)
    )


class Recurrent(nn.Module):
    """Its own weights tell most of its input; a Linear layer reads the last step alone."""

    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.rnn, self.head = kind(10, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[:, 0])[0][:, -1])


class Norms(nn.Module):
    """The parameters of norms and a learned place tell what is behind them, and no layer does but the last."""

    def __init__(self) -> None:
        super().__init__()
        self.batch, self.layer, self.head = nn.BatchNorm2d(1), nn.LayerNorm(10), nn.Linear(10, 3)
        self.place = nn.Parameter(torch.randn(1, 10, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.batch(x)[:, 0] * self.place)).mean(1))


def target_of(make: Make, size: int = 10) -> Target:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Target(make().double().eval(), losses.CrossEntropy(3), (1, size, size), (0.0, 1.0))


def whole_ranks(target: Target, x: Tensor) -> tuple[int, int]:
    """Of the logits and the gradients of the summed loss, as functions of the inputs: with all that is plainly not
    zero, and with all that may not be."""
    model, parameters = target.model.double(), [p for p in target.model.parameters() if p.requires_grad]

    def sent(values: Tensor) -> Tensor:
        logits = model(values)
        loss = nn.functional.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long), reduction="sum")
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.cat([logits.flatten(), *(g.flatten() / g.detach().norm() for g in gradients)])

    jacobian = torch.autograd.functional.jacobian(sent, x, vectorize=True).reshape(-1, x.numel())
    sizes = torch.linalg.svdvals(jacobian)
    return int((sizes > 1e-5 * sizes[0]).sum()), int((sizes > 1e-7 * sizes[0]).sum())


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(
    "make",
    [maxima, means, global_mean, wide, Norms, *(partial(Recurrent, kind) for kind in (nn.LSTM, nn.GRU, nn.RNN))],
)
def test_it_is_what_the_whole_derivative_leaves(make: Make, samples: int) -> None:
    target = target_of(make)
    x = torch.rand(samples, 1, 10, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = rank_analysis(target, x)
    least, most = whole_ranks(target, x)
    assert found.local == local.Local(x.numel(), found.joint_free, True)
    assert found.unknowns == x.numel()
    assert x.numel() - most <= found.local.free <= x.numel() - least
    assert ("No dimension" if found.joint_free == 0 else "stay free, whatever the attack") in found.verdict


def test_without_time_it_is_a_bound() -> None:
    target = target_of(maxima)
    found = rank_analysis(target, seconds=0.0)
    assert found.local == local.Local(100, 100, False)
    assert found.joint_free is None
    assert "not measured: it takes more time" in found.verdict


@pytest.mark.parametrize(
    ("middle", "samples", "measured"),
    [
        (lambda: nn.BatchNorm1d(12), 1, False),  # torch itself takes no single sample there
        (lambda: nn.BatchNorm1d(12), 2, True),
        (lambda: nn.Dropout(), 1, False),
        (lambda: nn.LayerNorm(12), 2, True),
        (lambda: nn.BatchNorm1d(12).eval(), 2, True),
    ],
)
def test_what_is_drawn_anew_is_not_measured(middle: Callable[[], nn.Module], samples: int, measured: bool) -> None:
    part = middle()
    model = nn.Sequential(nn.Linear(6, 12), part, nn.ReLU(), nn.Unflatten(1, (3, 4)), nn.MaxPool1d(2), nn.Flatten())
    model.append(nn.Linear(6, 3))
    target = Target(model.train(part.training), losses.CrossEntropy(3), (6,), (0.0, 1.0), samples)
    assert (rank_analysis(target).local is not None) == measured


def test_what_would_not_end_in_the_time_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("begun")

    monkeypatch.setattr(local, "_rows", refuse)
    found = rank_analysis(target_of(maxima), seconds=1e-4)
    assert found.local == local.Local(100, 100, False)


@pytest.mark.parametrize("make", [maxima, means, global_mean, Norms])
def test_of_a_batch_that_takes_too_long_one_sample_is_measured(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of(make)
    x = torch.rand(3, 1, 10, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one, batch = rank_analysis(target, x[:1]), rank_analysis(target, x)
    monkeypatch.setattr(analysis, "worth", lambda products, unknowns, seconds: unknowns <= 100)
    found = rank_analysis(target, x)
    assert found.local is not None
    assert one.local is not None
    assert found.local == replace(one.local, alone=True)
    assert found.joint_free is None
    assert found.to_dict()["free_alone"] == one.joint_free
    assert found.to_dict()["free_at_most"] is None
    assert "of a batch of 3 was not measured" in found.verdict
    assert batch.joint_free is not None
    assert 3 * one.local.free <= batch.joint_free
    if one.local.free:
        assert f"{one.local.free} of 100 dimensions" in found.verdict
        assert "In a batch no fewer of each stay free" in found.verdict


def test_samples_that_training_mixes_are_not_measured_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "worth", lambda products, unknowns, seconds: unknowns <= 100)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(8), nn.Flatten(), nn.Linear(4, 3)
    )
    target = Target(model.train(), losses.CrossEntropy(3), (1, 10, 10), (0.0, 1.0), 3)
    assert rank_analysis(target).local == local.Local(300, 300, False)


@pytest.mark.parametrize("drawn", [8, 20, 60])
def test_what_was_looked_at_in_the_time_bounds_it(drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of(wide)
    monkeypatch.setattr(local, "FIRST", 8)
    looked = 0

    def look(done: int, of: int) -> None:
        nonlocal looked
        looked = done

    monkeypatch.setattr(local.deadline, "used", lambda: float(looked >= drawn))
    whole = rank_analysis(target, looked=look)
    found = whole.local
    assert found is not None
    assert not found.complete
    assert "some 100 would do" in whole.verdict
    assert found.free == 100 - looked  # of so few all are independent
    assert found.seconds is not None
    assert found.seconds > 0


@pytest.mark.parametrize(
    ("part", "told"), [(0.0, "0 %"), (1e-5, "0.001 %"), (0.999, "99 %"), (1.0, "100 %"), (0.58, "58 %")]
)
def test_a_share_is_100_per_cent_of_nothing_but_all(part: float, told: str) -> None:
    assert percent(part) == told


def test_chains_are_measured_layer_by_layer() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 30), nn.Tanh(), nn.Linear(30, 3))
    assert rank_analysis(Target(model, losses.CrossEntropy(3), (1, 10, 10))).local is None


def test_a_limit_around_it_holds() -> None:
    with within(0.0):
        found = rank_analysis(target_of(means))
    assert found.local is not None
    assert not found.local.complete
