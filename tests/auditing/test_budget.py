"""A budget is kept, whatever is attacked: what was cut off is named, and nothing unfinished reads as a result."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_audits import SHAPE, Silent, documented, open_target, pictures, seeded
from torch import Tensor, nn

from rgap import Target, audit, data, losses
from rgap.attacks import DLG, IDLG, Attack, Bias, Closed, InvertingGradients, Matching, Outcome, Status
from rgap.attacks.minimise import Adam, Termination
from rgap.auditing import Audit, Ended, Step
from rgap.cli.audit_run import ended_by_termination
from rgap.inversion import joint
from rgap.linalg.deadline import OutOfTime, check, within
from rgap.protocol import Protocol, Sends
from rgap.report import render
from rgap.update import Update


def pooled(width: int = 4) -> Target:
    """Its layers in front of the pooling are solved jointly, which leads nowhere."""
    model = seeded(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(width * 25, 20), nn.ReLU(),
        nn.Linear(20, 4),
    )  # fmt: skip
    return Target(model, losses.CrossEntropy(4), (1, 12, 12), (0.0, 1.0))


def photographs(count: int = 2) -> data.Images:
    return data.photographs(count, size=12, channels=1)


@dataclass(frozen=True)
class Endless(Silent):
    """Asks for the time as every solver does, and never ends by itself."""

    def run(self, target: Target, update: Update) -> Outcome:
        while True:
            time.sleep(0.01)
            check()


@pytest.mark.parametrize(
    "attack",
    [IDLG(iterations=10**7), DLG(iterations=10**7, tolerance=0.0), InvertingGradients(iterations=10**7), Endless()],
    ids=lambda attack: attack.name,
)
def test_an_attack_that_overruns_is_cut_off_and_named(attack: Attack) -> None:
    start = time.perf_counter()
    found = audit(pooled(), photographs(), attacks=[attack], budget=0.5)
    assert time.perf_counter() - start < 60
    assert not found.complete
    assert found.ended is Ended.TIME
    assert any(note.startswith(f"{attack.name} on 2 updates: ") and "time was up" in note for note in found.not_run)
    document = documented(found)
    assert document["ended"] == "out of time"
    page = render(document)
    assert "The time was up after" in page
    assert "interrupted" not in page


@pytest.mark.parametrize("attack", [IDLG(iterations=10**7), InvertingGradients(iterations=10**7)], ids=lambda a: a.name)
def test_a_search_that_was_cut_off_gives_the_best_that_it_had(attack: Matching) -> None:
    found = audit(pooled(), photographs(1), attacks=[attack], budget=0.5)
    (result,) = found.cases[0].results
    assert result.status in (Status.CUT_OFF, Status.NOT_CONVERGED)
    assert result.inputs is not None


def test_the_joint_solve_keeps_to_the_time_and_says_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*arguments: object, **named: object) -> None:
        raise OutOfTime

    monkeypatch.setattr(joint, "solve_route", late)
    found = Closed()(pooled(), _update(pooled()))
    assert found.status is Status.CUT_OFF
    assert "max_pool2d" in found.reason
    assert "the time was up" in found.reason


def _update(target: Target) -> Update:
    from rgap import capture

    return capture(target, photographs(1).inputs, torch.tensor([1.0]))


def test_time_that_one_attack_does_not_need_the_others_have() -> None:
    found = audit(pooled(), photographs(1), attacks=[Silent(), Silent(Status.REPRODUCED), Endless()], budget=0.6)
    assert 0.5 < found.seconds < 5
    assert [len(run.results) for run in found.attacks] == [1, 1, 0]


def test_no_headline_is_a_result_where_the_time_was_up() -> None:
    for attacks, target in (
        ([Silent(), Endless()], pooled()),
        ([Endless()], pooled()),
        ([Silent(), Endless()], open_target()),
    ):
        x = photographs(2) if target.input_shape != SHAPE else pictures(2)
        found = audit(target, x, attacks=attacks, budget=0.3)
        assert "time was up" in found.verdict.headline or found.verdict.headline.startswith("No attack ran")
    whole = audit(open_target(), pictures(2), attacks=[Bias(), Endless()], budget=5.0)
    assert whole.verdict.headline == "Every sample can be read out of the update exactly."
    assert whole.complete


def test_what_was_cut_off_is_done_again(tmp_path: Path) -> None:
    """With the results of attacks that had ended kept, there is more time for it."""

    def run(budget: float) -> Audit:
        attacks = [IDLG(iterations=30, patience=None, tolerance=0.0)]
        return audit(pooled(), photographs(1), attacks=attacks, budget=budget, folder=tmp_path)

    first = run(0.001)
    assert not first.complete
    second = run(60.0)
    assert second.complete
    assert second.cases[0].results[0].status is not Status.CUT_OFF
    assert run(0.0).complete


def test_adams_rate_falls_before_the_time_is_up() -> None:
    """A search that is cut off has had its small steps too."""
    steps: list[float] = []

    def far(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(0.002)
        steps.append(float(x[0, 0]))
        return 1e6 - x.sum(1), -torch.ones_like(x)

    minimiser = Adam(rate=1.0, signed=True, decay=(3 / 8, 5 / 8, 7 / 8))
    with within(0.4):
        found = minimiser(far, torch.zeros(1, 1, dtype=torch.float64), Termination(10**6), lambda done, loss: None)
    moves = [after - before for before, after in pairwise(steps)]
    assert found.cut_off
    assert moves[0] > 0.5
    assert moves[-1] < 0.01


def test_it_is_told_before_it_begins_what_will_be_tried_and_how_long_that_takes() -> None:
    for attacks, words in (
        (
            [Bias(), IDLG(iterations=3)],
            ("Bias, iDLG (about ", " here) on 2 samples in evaluation mode", "7 s at the most"),
        ),
        ([InvertingGradients(iterations=10**6)], ("InvertingGradients (about ", "7 s at the most")),
        ([Bias()], ("Trying Bias on 2 samples",)),
    ):
        steps: list[Step] = []
        audit(open_target(), pictures(2), attacks=attacks, budget=7.0, progress=steps.append)
        assert all(word in steps[0].note for word in words)


@pytest.mark.parametrize(
    ("samples", "protocol", "told"),
    [
        (32, Protocol(), "Each update is of 32 samples. Attacks"),
        (
            40,
            Protocol(Sends.DIFFERENCE, learning_rate=0.1, epochs=2, minibatch=20),
            "of 40 samples after 4 local steps",
        ),
        (2, Protocol(Sends.DIFFERENCE, steps=32, learning_rate=0.1), "of 2 samples after 32 local steps"),
        (2, Protocol(Sends.DIFFERENCE, steps=3, learning_rate=0.1), ""),
    ],
)
def test_a_client_of_much_data_gets_a_word_before_minutes_are_spent(
    samples: int, protocol: Protocol, told: str
) -> None:
    steps: list[Step] = []
    audit(
        open_target(samples),
        pictures(samples),
        attacks=[IDLG(iterations=1)],
        protocol=protocol,
        budget=0.0,
        progress=steps.append,
    )
    assert ("Each update is of" in steps[0].note) is bool(told)
    assert told in steps[0].note


@pytest.mark.parametrize("restarts", [1, 3])
def test_an_estimate_grows_with_what_is_asked(restarts: int) -> None:
    target = pooled()
    few, many = (IDLG(iterations=n, restarts=restarts).estimate(target, 2) for n in (10, 1000))
    assert few is not None
    assert many is not None
    assert many > 20 * few > 0
    assert Closed().estimate(target, 2) is None


def test_termination_ends_what_runs_as_an_interrupt_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), ended_by_termination():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
