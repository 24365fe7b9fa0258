"""The verdict: what is told to someone who must decide."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_audits import open_target, result
from torch import nn

from rgap import Target, losses
from rgap.attacks import Status
from rgap.auditing import Case, DoseResponse, Response, Result, Verdict
from rgap.auditing.verdict import verdict

TARGET = open_target()
KINDS = {
    "exact": result(psnr=80.0),
    "recognisable": result(psnr=30.0, labels_right=False),
    "not recovered": result(psnr=5.0),
}


def case(*results: Result) -> Case:
    return Case("a", torch.zeros(1, 1, 4, 4), 1.0, results)


def verdict_of(*kinds: str, sweeps: tuple[DoseResponse, ...] = (), target: Target = TARGET) -> Verdict:
    return verdict([case(KINDS[kind]) for kind in kinds], sweeps, None, target)


def texts(found: Verdict) -> list[str]:
    """Every text but the limits."""
    own = dataclasses.asdict(found)
    own.pop("limits")

    def inside(value: object) -> list[str]:
        if isinstance(value, dict):
            return [text for each in value.values() for text in inside(each)]
        if isinstance(value, (list, tuple)):
            return [text for each in value for text in inside(each)]
        return [value] if isinstance(value, str) else []

    return inside(own)


@settings(max_examples=20, deadline=None)
@given(kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6))
def test_levels_and_numbers(kinds: list[str]) -> None:
    found = verdict_of(*kinds)
    exact, some = kinds.count("exact"), kinds.count("recognisable")
    none = len(kinds) - exact - some
    assert found.level.value == ("exact" if exact else "recognisable" if some else "not recovered")
    counts = f"{exact} of {len(kinds)} samples recovered exactly, {some} more recognisably, {none} not."
    assert found.sentences[0] == counts
    assert any("label" in sentence for sentence in found.sentences) is (exact > 0 == some)
    assert any("came back best" in sentence for sentence in found.sentences) is (exact + some > 0)
    if exact:
        assert any("80 dB" in sentence for sentence in found.sentences)
    assert not any("safe" in text.lower() for text in texts(found))


@pytest.mark.parametrize(
    ("kinds", "headline"),
    [
        (["exact"], "The sample can be read out of the update exactly."),
        (["exact"] * 3, "Every sample can be read out of the update exactly."),
        (["exact", "not recovered"], "1 of 2 samples can be read out of the update exactly."),
        (["recognisable"] * 2, "Every sample can be recognised in what the update gives away."),
        (["recognisable", "not recovered"], "1 of 2 samples can be recognised in what the update gives away."),
        (["not recovered"] * 2, "None of the 2 samples was recovered by the attacks that were tried."),
    ],
)
def test_headlines(kinds: list[str], headline: str) -> None:
    assert verdict_of(*kinds).headline == headline


def test_safe_is_only_said_to_be_denied() -> None:
    for kinds in (["exact"], ["recognisable"], ["not recovered"]):
        with_it = [limit for limit in verdict_of(*kinds).limits if "safe" in limit.lower()]
        assert len(with_it) == 1
        assert "no result here means that a model is safe" in with_it[0]


def test_the_limits_name_the_thresholds_and_the_closed_form() -> None:
    told = " ".join(verdict_of("exact").limits)
    assert all(number in told for number in ("50 dB", "20 dB", "0.5"))
    assert "closed form does not follow" not in told
    other = Target(TARGET.model, losses.Logistic(), (1, 4, 4))
    assert "closed form does not follow" not in " ".join(verdict_of("exact", target=other).limits)
    assert "closed form does not follow" not in " ".join(verdict_of("exact", target=open_target(classes=3)).limits)
    ended = Target(nn.Sequential(TARGET.model, nn.Tanh()), losses.Logistic(), (1, 4, 4))
    assert "closed form does not follow this model (1: tanh" in " ".join(verdict_of("exact", target=ended).limits)


def test_updates_of_zero_are_called_empty_only_if_all_are() -> None:
    zero = result(psnr=float("nan"), ssim=float("nan"), reproduced=False, status=Status.GRADIENT_ZERO)
    assert verdict([case(zero), case(zero, zero)], (), None, TARGET).level.value == "nothing sent"
    assert verdict([case(zero), case(KINDS["not recovered"])], (), None, TARGET).level.value == "not recovered"
    assert verdict([case(zero), case(KINDS["exact"])], (), None, TARGET).level.value == "exact"


def test_where_nothing_ran_nothing_is_said_of_the_updates() -> None:
    for cases in ([case()], [case(), case()]):
        found = verdict(cases, (), None, TARGET)
        assert found.level.value == "not recovered"
        assert "zero" not in found.headline


def test_the_result_that_gives_most_away_counts() -> None:
    worst_first = case(KINDS["not recovered"], KINDS["exact"], KINDS["recognisable"])
    assert worst_first.best is KINDS["exact"]
    # One that reproduces the gradient counts more than one that is merely near.
    assert case(result(psnr=90.0, reproduced=False), result(psnr=55.0)).level.value == "exact"
    nan = result(psnr=float("nan"))
    assert case(nan, KINDS["not recovered"]).best is KINDS["not recovered"]


def sweep(name: str, error: float, closes: bool) -> DoseResponse:
    off, on = Response(0.0, 90.0, 1.0, 1.0, 0.0), Response(0.5, 9.0, 0.1, 0.0 if closes else 1.0, error)
    return DoseResponse(name, "strength", f"What {name} does.", (off, on))


def test_advice_is_what_closed_the_leak_the_cheapest_first() -> None:
    sweeps = (sweep("Dear", 0.9, True), sweep("Vain", 0.01, False), sweep("Cheap", 0.1, True))
    advice = verdict_of("exact", sweeps=sweeps).advice
    assert [each.what.split()[0] for each in advice] == ["Cheap", "Dear"]
    assert advice[0].why == "What Cheap does."
    assert "0.5" in advice[0].what
    assert (advice[0].before.recovered, advice[0].after.gradient_error) == (1.0, 0.1)
    assert verdict_of("not recovered", sweeps=sweeps).advice == ()


@pytest.mark.parametrize(
    ("private", "epsilon", "caveat"),
    [
        (True, 5e7, "next to nothing"),
        (True, math.inf, "next to nothing"),
        (True, 10.5, "next to nothing"),
        (True, 10.0, None),
        (True, 0.5, None),
        (True, None, "no epsilon was counted"),
        (False, None, None),
    ],
)
def test_a_weak_guarantee_is_not_left_to_be_taken_for_a_strong_one(
    private: bool, epsilon: float | None, caveat: str | None
) -> None:
    off, on = Response(0.0, 90.0, 1.0, 1.0, 0.0), Response(0.5, 9.0, 0.1, 0.0, 0.2, epsilon)
    (advice,) = verdict_of(
        "exact", sweeps=(DoseResponse("Noise", "strength", "Differential privacy.", (off, on), private),)
    ).advice
    assert advice.why.startswith("Differential privacy.")
    assert (advice.why == "Differential privacy.") is (caveat is None)
    assert caveat is None or caveat in advice.why
    assert ("attacks tried" in advice.why) is (caveat is not None)


@pytest.mark.parametrize("residuals", [(0.5, 0.1, math.nan), (math.nan, 0.3), (0.2, 0.2, 0.1)])
def test_where_nobody_knows_the_sample_the_best_is_whose_gradient_agrees_best(residuals: tuple[float, ...]) -> None:
    unknown = dataclasses.replace(result(psnr=math.nan, ssim=math.nan, reproduced=False), compared=False)
    found = [dataclasses.replace(unknown, gradient_residual=residual) for residual in residuals]
    best = Case("a", None, None, tuple(found)).best
    assert best is not None
    assert best.gradient_residual == min(r for r in residuals if not math.isnan(r))
