"""Who watches an attack hears how far it has come, and nobody else does."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rgap import Target, Update, capture, losses
from rgap.attacks import DLG, Attack, Bias, Closed, InvertingGradients, Matching, Polish, progress
from rgap.attacks.minimise import Adam
from rgap.attacks.progress import Reporter, Tick, watching


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until it is moved."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def small() -> tuple[Target, Update]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    target = Target(model, losses.Logistic(), (4,), (0.0, 1.0))
    return target, capture(target, torch.full((1, 4), 0.3), torch.tensor([1.0]))


@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (DLG(iterations=20, tolerance=0.0), "DLG"),
        (InvertingGradients(iterations=20), "InvertingGradients"),
        (Matching(minimiser=Adam(), iterations=20), "Matching"),
    ],
)
def test_watchers_hear_every_iteration(often: None, attack: Matching, name: str) -> None:
    ticks: list[Tick] = []
    with watching(ticks.append):
        attack(*small())
    done = [tick.done for tick in ticks]
    assert done == sorted(set(done))
    assert done[-1] == 20
    assert len(done) >= 20
    assert {tick.what for tick in ticks} == {name}
    assert {tick.total for tick in ticks} == {20}
    told = [tick.loss for tick in ticks]
    assert told == sorted(told, reverse=True)
    assert all(tick.rate > 0 and tick.left >= 0 for tick in ticks[1:])
    assert ticks[-1].left == 0


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_polish_tells_its_steps(often: None) -> None:
    ticks: list[Tick] = []
    with watching(ticks.append):
        Polish(DLG(iterations=5), steps=3)(*small())
    assert [tick.done for tick in ticks if tick.what == "Polish"] == [1, 2, 3]


def of(batch: int, loss: losses.Loss, shape: tuple[int, ...], *layers: nn.Module) -> tuple[Target, Update]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*layers).double()
        for p in model.parameters():
            nn.init.uniform_(p, -0.5, 0.5)
        x = torch.rand(batch, *shape, dtype=torch.float64)
    target = Target(model, loss, shape, (0.0, 1.0), batch)
    return target, capture(target, x, torch.arange(batch).double() if loss.labels[0] == 0 else torch.ones(batch))


OPEN = (nn.Conv2d(1, 12, 3, 1, 1), nn.Sigmoid(), nn.Conv2d(12, 4, 3, 2), nn.LeakyReLU(0.2), nn.Flatten())
POOLED = (
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(64, 20),
    nn.ReLU(),
    nn.Linear(20, 4),
)


@pytest.mark.parametrize(
    ("attack", "target", "told"),
    [
        (Closed(), of(1, losses.Logistic(), (1, 4, 4), *OPEN, nn.Linear(4, 1)), "Closed, layers together, step"),
        (Closed(), of(1, losses.CrossEntropy(4), (1, 4, 4), *POOLED), "Closed"),
        (
            Bias(),
            of(1, losses.Logistic(), (1, 4, 4), nn.Conv2d(1, 9, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 1)),
            "Bias",
        ),
    ],
    ids=["jointly", "through a pool", "layers in front of a bias"],
)
def test_the_closed_form_tells_how_far_it_is(
    often: None, attack: Attack, target: tuple[Target, Update], told: str
) -> None:
    ticks: list[Tick] = []
    with watching(ticks.append):
        attack(*target)
    own = [tick for tick in ticks if tick.what == told]
    assert len(own) >= 2
    assert all(tick.done <= tick.total for tick in own)


def test_nobody_hears_outside(often: None) -> None:
    ticks: list[Tick] = []
    with watching(ticks.append):
        pass
    Reporter("DLG", 3)(1, 0.5)
    DLG(iterations=3)(*small())
    assert ticks == []


def test_an_inner_watcher_hears_in_place_of_the_outer_one(often: None) -> None:
    outer: list[Tick] = []
    inner: list[Tick] = []
    report = Reporter("DLG", 9)
    with watching(outer.append):
        report(1, 0.5)
        with watching(inner.append):
            report(2, 0.4)
        report(3, 0.3)
    assert [tick.done for tick in outer] == [1, 3]
    assert [tick.done for tick in inner] == [2]


def test_an_exception_ends_the_watch(often: None) -> None:
    outer: list[Tick] = []
    inner: list[Tick] = []
    report = Reporter("DLG", 9)
    with watching(outer.append):
        with pytest.raises(RuntimeError, match="enough"), watching(inner.append):
            raise RuntimeError("enough")
        report(1, 0.5)
    report(2, 0.5)
    assert ([tick.done for tick in outer], inner) == ([1], [])


def test_an_exception_of_the_watcher_ends_the_attack(often: None) -> None:
    """As an interrupt does."""

    def stop(tick: Tick) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watching(stop):
        DLG(iterations=3)(*small())
    DLG(iterations=3)(*small())


def test_reports_are_seldom_and_the_last_one_is_made(clock: SimpleNamespace) -> None:
    ticks: list[Tick] = []
    report = Reporter("DLG", 100)
    with watching(ticks.append):
        for done in range(1, 101):
            clock.now += 0.01
            report(done, 1.0 / done)
    times = [tick.done for tick in ticks]
    assert times[-1] == 100
    assert len(times) in range(9, 12)
    assert all(later - earlier >= 10 for earlier, later in pairwise(times[:-1]))


def test_rates_and_what_is_left_are_told(clock: SimpleNamespace) -> None:
    ticks: list[Tick] = []
    report = Reporter("DLG", 100)
    with watching(ticks.append):
        clock.now += 4.0
        report(20, 0.25)
    assert (ticks[0].what, ticks[0].done, ticks[0].total, ticks[0].loss) == ("DLG", 20, 100, 0.25)
    assert ticks[0].rate == pytest.approx(5.0)
    assert ticks[0].left == pytest.approx(16.0)
    assert Tick("DLG", 0, 100, 0.25, 0.0).left == float("inf")
