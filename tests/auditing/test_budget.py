"""A budget is kept, whatever is attacked: what was cut off is named, and nothing unfinished reads as a result."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from small_audits import SHAPE, Silent, documented, open_target, pictures, result, seeded
from torch import Tensor, nn

from rgap import Target, audit, capture, data, losses
from rgap.attacks import DLG, IDLG, Attack, Bias, Closed, InvertingGradients, Matching, Outcome, Status, search
from rgap.attacks.minimise import Adam, Termination
from rgap.attacks.slopes import slopes
from rgap.auditing import Audit, Case, Ended, Step
from rgap.auditing.readout import ReadOut
from rgap.auditing.verdict import verdict
from rgap.cli.audit_run import ended_by_termination
from rgap.inversion import joint, unpool
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
            time.sleep(0.001)
            check()


@pytest.mark.parametrize(
    "attack",
    [
        # Adam goes on where L-BFGS ends because no step lowers the loss any more.
        IDLG(iterations=10**7, minimiser=Adam(), tolerance=0.0),
        DLG(iterations=10**7, minimiser=Adam(), tolerance=0.0),
        InvertingGradients(iterations=10**7),
        Endless(),
    ],
    ids=lambda attack: attack.name,
)
def test_an_attack_that_overruns_is_cut_off_and_named(attack: Attack) -> None:
    start = time.perf_counter()
    found = audit(pooled(), photographs(), attacks=[attack], budget=0.5)
    assert time.perf_counter() - start < 60
    assert not found.complete
    assert found.ended is Ended.TIME
    late = [re.match(rf"{attack.name} on (\d) updates?: .*time was up", note) for note in found.not_run]
    assert sum(int(each[1]) for each in late if each) == 2
    document = documented(found)
    assert document["ended"] == "out of time"
    page = render(document)
    assert "The time was up after" in page
    assert "interrupted" not in page


@pytest.mark.usefixtures("quick_clock")
@pytest.mark.parametrize("attack", [IDLG(iterations=10**7), InvertingGradients(iterations=10**7)], ids=lambda a: a.name)
def test_a_search_that_was_cut_off_gives_the_best_that_it_had(attack: Matching) -> None:
    found = audit(pooled(), photographs(1), attacks=[attack], budget=3.0)
    (result,) = found.cases[0].results
    assert result.status in (Status.CUT_OFF, Status.NOT_CONVERGED)
    assert result.inputs is not None


def test_the_joint_solve_keeps_to_the_time_and_says_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*arguments: object, **named: object) -> None:
        raise OutOfTime

    monkeypatch.setattr(unpool, "solve_route", lambda *arguments, **named: None)  # the recursion finds none
    monkeypatch.setattr(joint, "solve_route", late)
    found = Closed()(pooled(), _update(pooled()))
    assert found.status is Status.CUT_OFF
    assert "max_pool2d" in found.reason
    assert "the time was up" in found.reason


def _update(target: Target) -> Update:
    return capture(target, photographs(1).inputs, torch.tensor([1.0]))


@pytest.mark.usefixtures("quick_clock")
def test_time_that_one_attack_does_not_need_the_others_have() -> None:
    found = audit(pooled(), photographs(1), attacks=[Silent(), Silent(Status.REPRODUCED), Endless()], budget=3.0)
    assert 2.5 < found.seconds < 3.5
    assert [run.results[0].status for run in found.attacks] == [Status.NOT_CONVERGED, Status.REPRODUCED, Status.CUT_OFF]


@pytest.mark.parametrize("attack", [IDLG(at_once=4), InvertingGradients(at_once=7), Matching(optimise_label=False)])
def test_of_many_starts_no_more_are_evaluated_than_there_is_time_for(
    attack: Matching, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def counted(*arguments: Any) -> Callable[..., Any]:
        inner = slopes(*arguments)

        def evaluate(points: Tensor, *more: Any) -> Any:
            seen.append(len(points))
            return inner(points, *more)

        return evaluate

    monkeypatch.setattr(search, "slopes", counted)
    model = seeded(nn.Flatten(), nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 60), nn.Softmax(1))
    target = Target(model, losses.CrossEntropy(60), SHAPE, (0.0, 1.0))
    update = capture(target, pictures(1).inputs, torch.tensor([1.0]))
    with within(0.0):
        found = attack(target, update)
    assert seen == [attack.at_once]
    assert found.status is Status.CUT_OFF
    assert found.inputs.shape == (1, *SHAPE)


@dataclass(frozen=True)
class Slow(Attack):
    """As good as `Bias`, and too slow for more than some updates."""

    quick: int
    begun: ClassVar[list[Update]] = []

    def run(self, target: Target, update: Update) -> Outcome:
        self.begun.append(update)
        while len(self.begun) > self.quick:
            check()
        return Bias().run(target, update)


@pytest.mark.usefixtures("quick_clock")
@pytest.mark.parametrize("quick", [0, 1, 2])
def test_updates_that_were_done_in_time_keep_their_answers(quick: int) -> None:
    Slow.begun.clear()
    found = audit(open_target(), pictures(3), attacks=[Slow(quick)], budget=2.0)
    statuses = [result.status for case in found.cases for result in case.results]
    cut = 3 - quick if quick else 1  # where the first one takes all of the time no other is begun
    assert statuses == [Status.EXACT] * quick + [Status.CUT_OFF] * cut
    assert f"Slow on {cut} update{'s' * (cut > 1)}: cut off when the time was up" in found.not_run
    assert ("Slow on 2 updates: the time was up" in found.not_run) == (quick == 0)


@pytest.mark.parametrize(
    ("kinds", "headline"),
    [
        (["leak"], "The sample can be recognised in what the update gives away, and the time was up before"),
        (["leak", ""], "1 of 2 samples can be recognised in what the update gives away, and the time was up before"),
        (["features", ""], "All 9 values that fc reads were read off; none of the 2 samples was recovered by the"),
        (
            ["features", "none"],
            "All 9 values that fc reads were read off; no attack ran, which might give more away,",
        ),
        (["", ""], "The time was up before every attack had ended. So far: none of the 2 samples was recovered"),
    ],
)
def test_what_leaked_comes_first_in_the_headline(kinds: list[str], headline: str) -> None:
    found = () if "none" in kinds else (result(psnr=30.0 if "leak" in kinds else 5.0),)
    cases = [Case(k, torch.zeros(1, *SHAPE), 1.0, found if k == kinds[0] else found[:0]) for k in kinds]
    read = ReadOut(len(kinds), layer="fc", values=9, features=len(kinds)) if "features" in kinds else None
    told = verdict(cases, (), None, open_target(), read, Ended.TIME).headline
    assert told.startswith(headline)
    assert "the time was up before every attack had ended." in told[0].lower() + told[1:]


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

        def first(step: Step) -> None:
            raise Enough(step.note)

        with pytest.raises(Enough) as told:
            audit(open_target(), pictures(2), attacks=attacks, budget=7.0, progress=first)
        assert all(word in str(told.value) for word in words)


class Enough(Exception):
    """The first word is all that is asked for."""


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
