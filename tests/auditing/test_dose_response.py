"""Sweeps: what still leaks at each strength of a defence, and what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_audits import Robust, Silent, Watched, documented, open_target, pictures

from rgap import Audit, Target, Update, audit, capture
from rgap.attacks import Attack, Bias, Outcome, Status
from rgap.auditing import Accounting, DoseResponse, Response
from rgap.defences import DPSGD, Clip, Defence, GaussianNoise, Sign, TopK, gradient_error
from rgap.linalg.deadline import check
from rgap.protocol import Protocol

ABOUT = {"data": "random values"}


def run(defence: Defence, *attacks: Attack, count: int = 2, **asked: object) -> Audit:
    return audit(
        open_target(), pictures(count), attacks=attacks or [Bias()], defences=[defence], about=ABOUT, **asked
    )  # type: ignore[arg-type]  # fmt: skip


def sweep_of(*recovered: float) -> DoseResponse:
    points = tuple(Response(float(at), 30.0 * share, math.nan, share, 0.1 * at) for at, share in enumerate(recovered))
    return DoseResponse("Noise", "deviation", "Adds noise.", points)


# One sweep.


@given(recovered=st.lists(st.sampled_from([0.0, 0.25, 1.0]), max_size=6))
def test_a_leak_is_closed_from_the_weakest_point_on_that_stays_closed(recovered: list[float]) -> None:
    found = sweep_of(1.0, *recovered).closes_at
    closing = [at for at in range(1, len(recovered) + 1) if not any(recovered[at - 1 :])]
    assert (None if found is None else found.strength) == (min(closing) if closing else None)


def test_sentences_say_the_strength_or_that_there_is_none() -> None:
    closed, open_ = sweep_of(1.0, 0.5, 0.0, 0.0), sweep_of(1.0, 0.5, 0.0, 0.25)
    assert closed.sentence == "From deviation 2 on no sample was recognisable to the attacks tried."
    assert "at deviation 3 25% of the samples are still recognisable" in open_.sentence
    assert open_.sentence.startswith("No strength tried closes the leak")
    assert DoseResponse("Noise", "deviation", "", ()).sentence == "No strength was tried."


# In an audit.


def test_noise_closes_the_leak_and_each_point_is_the_truth() -> None:
    found = run(GaussianNoise())
    (sweep,) = found.sweeps
    assert [point.strength for point in sweep.points] == [0.0, *GaussianNoise.levels]
    off, *armed = sweep.points
    assert (off.recovered, off.gradient_error) == (1.0, 0.0)
    assert off.median_psnr > 100
    assert armed[-1].recovered == 0
    # Independently: the noise of the documented seed, one sample after the other.
    samples = pictures(2)
    target, labels = open_target(), torch.tensor([-1.0, 1.0])
    for point in armed[:3]:
        errors, quality = [], []
        for at in range(2):
            sent = capture(target, samples.inputs[at : at + 1], labels[at : at + 1])
            noisy = GaussianNoise(point.strength)(sent, torch.Generator().manual_seed(at))
            errors.append(gradient_error(sent, noisy))
            guess = Bias()(target, noisy).inputs
            quality.append(-10 * math.log10(float((guess - samples.inputs[at]).square().mean())))
        assert point.gradient_error == pytest.approx(sum(errors) / 2)
        assert point.median_psnr == pytest.approx(sum(quality) / 2)
    assert sweep.closes_at is not None
    document = documented(found)
    (defence,) = document["defences"]
    assert (defence["name"], defence["strength"]) == ("GaussianNoise", "deviation")
    assert defence["closes_at"] == sweep.closes_at.strength
    assert defence["sentence"] == sweep.sentence
    (advice,) = document["verdict"]["advice"]
    assert f"{sweep.closes_at.strength:g}" in advice["what"]
    assert (advice["before"]["recovered"], advice["after"]["recovered"]) == (1.0, 0.0)
    assert advice["cost"]["gradient_error"] == sweep.closes_at.gradient_error


def test_the_noise_is_the_seeds() -> None:
    def points(seed: int) -> list[tuple[float, float]]:
        (sweep,) = run(GaussianNoise(), seed=seed).sweeps
        return [(point.median_psnr, point.gradient_error) for point in sweep.points]

    assert points(0) == points(0)
    assert points(0)[1:] != points(1)[1:]
    assert points(0)[0] == points(1)[0]


def test_levels_go_from_weak_to_strong_whatever_their_numbers() -> None:
    (sweep,) = run(TopK()).sweeps
    errors = [point.gradient_error for point in sweep.points]
    assert errors == sorted(errors)
    assert [point.strength for point in sweep.points[1:]] == list(TopK.levels)


def test_a_defence_that_is_on_or_off_is_told_in_words() -> None:
    found = run(Sign())
    document = documented(found)
    assert [point["strength"] for point in document["defences"][0]["points"]] == [0.0, 1.0]
    assert document["defences"][0]["closes_at"] == 1.0
    for text in (document["defences"][0]["sentence"], *(advice["what"] for advice in document["verdict"]["advice"])):
        assert "  " not in text


def test_clipping_hides_nothing_of_a_linear_layer_with_a_bias() -> None:
    (sweep,) = run(Clip()).sweeps
    assert sweep.closes_at is None
    assert {point.recovered for point in sweep.points} == {1.0}


def test_epsilon_is_given_only_where_it_is_counted() -> None:
    audited = run(DPSGD(), count=1)
    (plain,) = audited.sweeps
    assert {point.epsilon for point in plain.points} == {None}
    assert ["no epsilon was counted" in advice.why for advice in audited.verdict.advice] == [True]
    counted = Accounting(0.01, 100)
    (noise,) = run(GaussianNoise(), count=1, accounting=counted).sweeps
    assert {point.epsilon for point in noise.points} == {None}
    found = run(DPSGD(), count=1, accounting=counted)
    (private,) = found.sweeps
    assert private.points[0].epsilon is None
    for point in private.points[1:]:
        assert point.epsilon == DPSGD(multiplier=point.strength).epsilon(0.01, 100, 1e-5)
    assert documented(found)["defences"][0]["points"][-1]["epsilon"] == private.points[-1].epsilon


@pytest.mark.parametrize("fields", [(0.0, 10, 1e-5), (1.5, 10, 1e-5), (0.1, -1, 1e-5), (0.1, 10, 0.0)])
def test_accounting_that_makes_no_sense_is_refused_before_anything_runs(fields: tuple[float, int, float]) -> None:
    watched = Watched()
    with pytest.raises(ValueError, match=r"expected 0 < rate <= 1"):
        run(DPSGD(), watched, count=1, accounting=Accounting(*fields))
    assert watched.seen == []


def test_where_nothing_leaks_no_defence_is_swept() -> None:
    silent = Watched(inner=Silent())
    found = run(GaussianNoise(), silent)
    assert found.sweeps == ()
    assert len(silent.seen) == 2
    assert "the defences: nothing leaked that they could close" in found.not_run
    assert documented(found)["defences"] == []


def test_without_time_no_defence_is_swept_and_that_is_told(tmp_path: Path) -> None:
    audit(open_target(), pictures(1), attacks=[Bias()], folder=tmp_path, about=ABOUT)
    found = run(GaussianNoise(), count=1, folder=tmp_path, budget=0.0)
    assert found.sweeps == ()
    assert not found.complete
    assert any(note.startswith("GaussianNoise") and "time" in note for note in found.not_run)


def test_a_sweep_goes_on_from_the_folder(tmp_path: Path) -> None:
    first, second = Watched(), Watched()
    one = run(GaussianNoise(), first, folder=tmp_path)
    other = run(GaussianNoise(), second, folder=tmp_path)
    assert len(first.seen) == 2 * (1 + len(GaussianNoise.levels))
    assert second.seen == []
    assert [each.points for each in one.sweeps] == [each.points for each in other.sweeps]


def test_few_samples_are_swept() -> None:
    watched = Watched()
    run(Sign(), watched, count=6)
    # Six in the audit, four with the defence; those without it are known.
    assert len(watched.seen) <= 6 + 4 + 4
    defended = [update for update in watched.seen if all(len(g.abs().unique()) <= 2 for g in update.gradients.values())]
    assert len(defended) == 4


def test_no_strength_of_nothing_is_advised() -> None:
    """Where only samples leak that are not swept, a sweep has nothing to say on what closes the leak."""
    found = run(GaussianNoise(), Watched(fails_on=(0, 1, 2, 3, *range(6, 99))), count=6)
    assert [case.level.value for case in found.cases] == ["not recovered"] * 4 + ["exact"] * 2
    for advice in documented(found)["verdict"]["advice"]:
        assert advice["before"]["recovered"] > 0
    for each in found.sweeps:
        assert each.closes_at is None or each.closes_at.strength > 0


def test_a_robust_attack_is_swept_beside_the_best() -> None:
    """The closed form breaks down first: that it does closes no leak that another attack finds."""
    x = tuple(pictures(2).inputs[at : at + 1] for at in range(2))
    robust = Robust(samples=x)
    found = run(GaussianNoise(), Bias(), robust)
    (sweep,) = found.sweeps
    assert {point.recovered for point in sweep.points} == {1.0}
    assert sweep.closes_at is None


def test_a_point_that_not_every_attack_could_try_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a leak would be called closed that the attack left out still finds."""
    import sys
    from types import SimpleNamespace

    now = [0.0]
    monkeypatch.setattr(sys.modules["rgap.auditing.run"], "time", SimpleNamespace(perf_counter=lambda: now[0]))
    x = tuple(pictures(2).inputs[at : at + 1] for at in range(2))

    class Slow(Watched):
        def run(self, *given: object) -> object:  # type: ignore[override]
            now[0] += 1
            return super().run(*given)  # type: ignore[arg-type]

    whole = run(GaussianNoise(), Slow(), Robust(samples=x)).sweeps[0].points
    for budget in (3, 4, 12, 14, 16, 18):
        now[0] = 0.0
        found = run(GaussianNoise(), Slow(), Robust(samples=x), budget=budget + 0.5)
        swept = found.sweeps[0].points if found.sweeps else ()
        assert [point.recovered for point in swept] == [point.recovered for point in whole[: len(swept)]]
        assert found.complete is (len(swept) == len(whole))


def test_several_samples_of_one_update_are_swept_together() -> None:
    target, samples = open_target(2), pictures(6)
    robust = Robust(samples=tuple(samples.inputs[at : at + 2] for at in (0, 2, 4)))
    found = audit(
        target, samples, attacks=[robust], defences=[Sign()], protocol=Protocol(clients=1), about=ABOUT
    )  # fmt: skip
    (sweep,) = found.sweeps
    assert [point.recovered for point in sweep.points] == [1.0, 1.0]
    documented(found)


@dataclass(frozen=True)
class Slow(Attack):
    """Needs a while for what is not sent as it was."""

    def run(self, target: Target, update: Update) -> Outcome:
        found = Bias().run(target, update)
        while found.status is not Status.EXACT:
            check()
        return found


@pytest.mark.usefixtures("quick_clock")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_defence_has_its_share_of_the_time(count: int) -> None:
    """And one that is cut off is not said to close what it was not tried long enough on."""
    armed = [Sign(), TopK(), GaussianNoise()][:count]
    found = audit(open_target(), pictures(1), attacks=[Slow()], defences=armed, budget=2.0 * count)
    assert [sweep.name for sweep in found.sweeps] == [defence.name for defence in armed]
    assert all(sweep.closes_at is None for sweep in found.sweeps)
    assert sum("the time was up" in note for note in found.not_run) == count
