"""An attack that fails is a row with its reason; the audit goes on, and its report is written."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from small_audits import documented, open_target, pictures

from rgap import Target, Update, audit, capture
from rgap.attacks import Attack, Bias, Outcome, Status
from rgap.auditing.guard import guarded, obstacle_of

FAILURES = [IndexError("tuple index out of range"), RuntimeError("one line\nsecond line"), ZeroDivisionError()]


@dataclass(frozen=True)
class Failing(Attack):
    """Raises, on updates of one size or on all."""

    error: BaseException
    above: float = 0.0

    def run(self, target: Target, update: Update) -> Outcome:
        if update.norm > self.above:
            raise self.error
        return Bias().run(target, update)


@dataclass(frozen=True)
class Obstinate(Failing):
    """Raises before it begins."""

    def obstacle(self, target: Target, samples: int) -> str | None:
        raise self.error


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_an_audit_goes_on_and_says_what_failed(error: Exception) -> None:
    found = audit(open_target(), pictures(2), [1.0, -1.0], [Failing(error), Obstinate(error), Bias()])
    document = documented(found)
    first, second, bias = found.attacks
    assert [result.status for result in first.results] == [Status.NOT_CONVERGED] * 2
    assert all(type(error).__name__ in result.reason for result in first.results)
    assert type(error).__name__ in (second.obstacle or "")
    assert [result.status for result in bias.results] == [Status.EXACT] * 2
    assert "second line" not in str(document)


def test_updates_on_which_nothing_fails_have_their_answers() -> None:
    target = open_target()
    x = pictures(3).inputs
    updates = [capture(target, x[at : at + 1], torch.tensor([1.0])) for at in range(3)]
    norms = sorted(update.norm for update in updates)
    found = guarded(Failing(IndexError("here"), above=(norms[1] + norms[2]) / 2), target, updates)
    for each, update in zip(found, updates, strict=True):
        failed = update.norm == norms[2]
        assert each.status is (Status.NOT_CONVERGED if failed else Status.EXACT)
        assert ("IndexError: here" in each.reason) is failed


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()], ids=lambda e: type(e).__name__)
def test_what_is_no_failure_is_not_caught(error: BaseException) -> None:
    target = open_target()
    update = capture(target, pictures(1).inputs, torch.tensor([1.0]))
    with pytest.raises(type(error)):
        guarded(Failing(error), target, [update])
    with pytest.raises(type(error)):
        obstacle_of(Obstinate(error), target, 1)
