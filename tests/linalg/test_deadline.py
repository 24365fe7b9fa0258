"""A limit of time: what holds, and which loops keep to it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rgap.linalg import cg, deadline
from rgap.linalg.deadline import OutOfTime, check, used, within


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until it is moved."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(deadline, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_without_a_limit_no_time_passes() -> None:
    check()
    with within(None):
        assert used() == 0
        check()


@pytest.mark.parametrize(("seconds", "passed", "share"), [(10.0, 0.0, 0.0), (10.0, 4.0, 0.4), (10.0, 12.0, 1.2)])
def test_the_share_that_has_passed(clock: SimpleNamespace, seconds: float, passed: float, share: float) -> None:
    with within(seconds):
        clock.now += passed
        assert used() == pytest.approx(share)
        if share >= 1:
            with pytest.raises(OutOfTime):
                check()
        else:
            check()
    assert used() == 0


@pytest.mark.parametrize(
    ("outer", "inner", "end"), [(5.0, 9.0, 5.0), (9.0, 5.0, 5.0), (5.0, None, 5.0), (0.0, 9.0, 0.0)]
)
def test_the_nearer_of_two_limits_holds(clock: SimpleNamespace, outer: float, inner: float | None, end: float) -> None:
    with within(outer), within(inner):
        clock.now += 0.99 * end
        assert used() < 1 or end == 0
        clock.now += 0.02 * end
        assert used() >= 1


def test_conjugate_gradients_end_with_the_time(clock: SimpleNamespace) -> None:
    calls = 0

    def apply(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        clock.now += 1
        return x * torch.arange(1.0, 51.0, dtype=x.dtype)

    right = torch.ones(1, 50, dtype=torch.float64)
    with within(3.5), pytest.raises(OutOfTime):
        cg.solve(apply, right, 1e-12, 50)
    assert calls == 4
