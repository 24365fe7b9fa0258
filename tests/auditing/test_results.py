"""Judging: which reconstruction belongs to which sample, and how near it came."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_audits import found, nothing, result

from rgap.attacks import JointReport, LayerReport, Status
from rgap.auditing.results import EXACT_PSNR, RECOGNISABLE_PSNR, RECOGNISABLE_SSIM, Level, Result, judge
from rgap.checks import Preflight

RANGE = (0.0, 1.0)


def random_batch(count: int, seed: int, shape: tuple[int, ...] = (3,)) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_batches_are_matched_so_that_the_errors_are_least_altogether(count: int, seed: int) -> None:
    truth, guess = random_batch(count, seed), random_batch(count, seed + 1)
    judged = judge(found("Some", guess, torch.ones(count)), truth, [1.0] * count, RANGE)
    totals = [
        sum(float((guess[at] - truth[n]).square().mean()) for n, at in enumerate(order))
        for order in itertools.permutations(range(count))
    ]
    assert sum(each.mse for each in judged) == pytest.approx(min(totals))
    # Every reconstruction is given to one sample.
    given_out = torch.cat([each.inputs for each in judged if each.inputs is not None])
    assert sorted(given_out.flatten().tolist()) == sorted(guess.flatten().tolist())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_a_batch_does_not_matter(order: tuple[int, ...]) -> None:
    truth, labels = random_batch(3, 0), torch.tensor([0.0, 1.0, 1.0])
    judged = judge(found("Some", truth[list(order)], labels[list(order)]), truth, labels.tolist(), RANGE)
    assert [each.mse for each in judged] == [0.0] * 3
    assert all(each.level is Level.EXACT and each.labels_right for each in judged)
    assert all(
        each.inputs is not None and torch.equal(each.inputs[0], own) for each, own in zip(judged, truth, strict=True)
    )


def test_wrong_labels_are_told_but_do_not_count_against_the_picture() -> None:
    truth = random_batch(2, 0)
    for each in judge(found("Some", truth, torch.tensor([1.0, 1.0])), truth, [1.0, -1.0], RANGE):
        assert not each.labels_right
        assert each.level is Level.EXACT


def test_samples_stay_without_where_there_are_fewer_reconstructions() -> None:
    truth = random_batch(3, 0)
    first, second, third = judge(found("Some", truth[2:], torch.ones(1)), truth, [1.0] * 3, RANGE)
    assert third.mse == 0
    for each in (first, second):
        assert each.inputs is None
        assert math.isnan(each.mse)
        assert each.level is Level.NOTHING


def test_without_an_answer_there_is_nothing_to_judge() -> None:
    (only,) = judge(nothing("Some", Preflight(("odd",), ())), random_batch(1, 0), [1.0], RANGE)
    assert (only.status, only.reason, only.level, only.warnings) == (
        Status.NOT_CONVERGED,
        "gave up",
        Level.NOTHING,
        ("odd",),
    )
    assert only.inputs is None
    assert all(math.isnan(x) for x in (only.mse, only.psnr, only.ssim, only.best_mse, only.gradient_residual))
    assert (only.labels, only.labels_right, only.reproduced, only.twins) == ((), False, False, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e308])
def test_an_answer_that_is_no_number_is_not_exact(bad: float) -> None:
    truth = random_batch(2, 0, (1, 3, 3))
    guess = truth.clone()
    guess[1, 0, 0, 0] = bad
    good, spoilt = judge(found("Some", guess, torch.ones(2)), truth, [1.0] * 2, RANGE)
    assert good.level is Level.EXACT
    assert spoilt.level is not Level.EXACT  # one pixel that is no number hides no picture
    json.dumps(spoilt.to_dict(), allow_nan=False)


@pytest.mark.parametrize("turn", [1, -1])
def test_the_best_answer_is_found_among_twins(turn: int) -> None:
    truth = random_batch(1, 0)
    answers = [truth + 0.5, truth + 0.1, truth + 0.3][::turn]
    (only,) = judge(found("Some", *answers, torch.ones(1)), truth, [1.0], RANGE)
    assert only.mse == pytest.approx(0.25 if turn == 1 else 0.09)
    assert only.best_mse == pytest.approx(0.01)
    assert only.twins == 2


@pytest.mark.parametrize("turn", [1, -1])
def test_a_twin_that_is_no_number_does_not_hide_the_others(turn: int) -> None:
    truth = random_batch(1, 0)
    answers = [torch.full_like(truth, math.nan), truth + 0.1][::turn]
    (only,) = judge(found("Some", *answers, torch.ones(1)), truth, [1.0], RANGE)
    assert only.best_mse == pytest.approx(0.01)


def test_a_dimmed_picture_is_still_the_picture() -> None:
    truth = random_batch(1, 0, (1, 4, 4))
    (dim,) = judge(found("Some", 0.05 * truth, torch.ones(1)), truth, [1.0], RANGE)
    assert dim.psnr < RECOGNISABLE_PSNR < dim.shape_psnr
    assert dim.level is Level.RECOGNISABLE
    for blank in (torch.zeros_like(truth), torch.ones_like(truth)):
        (none,) = judge(found("Some", blank, torch.ones(1)), truth, [1.0], RANGE)
        # The factor that helps most still leaves the spread of the sample.
        spread = float(truth.square().mean() if not blank.any() else truth.var(correction=0))
        assert none.shape_psnr == pytest.approx(-10 * math.log10(spread))


# Levels.


@pytest.mark.parametrize(
    ("quality", "level"),
    [
        ({"psnr": EXACT_PSNR}, Level.EXACT),
        ({"psnr": EXACT_PSNR, "reproduced": False}, Level.RECOGNISABLE),
        ({"psnr": math.nextafter(EXACT_PSNR, 0)}, Level.RECOGNISABLE),
        ({"shape_psnr": 100.0}, Level.RECOGNISABLE),
        ({"psnr": RECOGNISABLE_PSNR, "reproduced": False}, Level.RECOGNISABLE),
        ({"psnr": math.nextafter(RECOGNISABLE_PSNR, 0)}, Level.NOTHING),
        ({"ssim": RECOGNISABLE_SSIM}, Level.RECOGNISABLE),
        ({"ssim": math.nextafter(RECOGNISABLE_SSIM, 0)}, Level.NOTHING),
        ({"shape_psnr": RECOGNISABLE_PSNR}, Level.RECOGNISABLE),
        ({"psnr": math.nan, "ssim": math.nan, "shape_psnr": math.nan}, Level.NOTHING),
        ({"psnr": math.nan, "ssim": 0.9, "shape_psnr": math.nan}, Level.RECOGNISABLE),
        ({"psnr": 30.0, "ssim": math.nan}, Level.RECOGNISABLE),
    ],
)
def test_levels_at_their_thresholds(quality: dict[str, float], level: Level) -> None:
    assert result(**quality).level is level  # type: ignore[arg-type]


def test_the_thresholds_are_those_that_are_documented() -> None:
    assert (RECOGNISABLE_PSNR, RECOGNISABLE_SSIM) == (20.0, 0.5)
    assert [level.rank for level in (Level.NOTHING, Level.RECOGNISABLE, Level.EXACT)] == [1, 2, 3]


# Through JSON and back.

numbers = st.floats(allow_nan=True, allow_infinity=True)
texts = st.lists(st.text(max_size=8), max_size=3).map(tuple)
results = st.builds(
    Result,
    attack=st.text(max_size=8),
    status=st.sampled_from(Status),
    reason=st.text(max_size=8),
    mse=numbers,
    psnr=numbers,
    ssim=numbers,
    shape_psnr=numbers,
    best_mse=numbers,
    gradient_residual=numbers,
    reproduced=st.booleans(),
    error=numbers,
    seconds=st.floats(0, 1e6),
    labels=st.lists(st.sampled_from([-1.0, 0.0, 1.0, 7.0]), max_size=3).map(tuple),
    labels_right=st.booleans(),
    twins=st.integers(0, 9),
    assumptions=texts,
    warnings=texts,
    layers=st.lists(st.builds(LayerReport, condition=numbers, error=numbers), max_size=2).map(tuple),
    joint=st.none() | st.builds(JointReport, layers=st.just(("a", "b")), condition=numbers),
    inputs=st.none() | st.integers(0, 99).map(lambda seed: random_batch(1, seed)),
)


@settings(max_examples=25, deadline=None)
@given(before=results)
def test_a_result_survives_json(before: Result) -> None:
    text = json.dumps(before.to_dict(), allow_nan=False)
    after = Result.from_dict(json.loads(text), before.inputs)
    assert json.dumps(after.to_dict(), allow_nan=False) == text
    for name in ("attack", "status", "reason", "reproduced", "seconds", "labels", "labels_right", "twins"):
        assert getattr(after, name) == getattr(before, name)
    assert (after.assumptions, after.warnings) == (before.assumptions, before.warnings)
    assert after.inputs is before.inputs
    assert [(layer.name, layer.rank, layer.open_since) for layer in after.layers] == [
        (layer.name, layer.rank, layer.open_since) for layer in before.layers
    ]
    assert (after.joint is None) is (before.joint is None)
    if after.joint is not None and before.joint is not None:
        assert (after.joint.layers, after.joint.free) == (before.joint.layers, before.joint.free)
    for name in ("mse", "psnr", "ssim", "shape_psnr", "best_mse", "gradient_residual", "error"):
        one, other = getattr(before, name), getattr(after, name)
        assert other == one or (math.isnan(other) and not math.isfinite(one))
