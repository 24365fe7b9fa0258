"""Updates that a server was sent: what the certificate alone says, and what the truth adds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_audits import Silent, Watched, found, nothing, open_target, pictures, result
from torch import Tensor

from rgap import Target, Update, UpdateError, audit, audit_updates, capture, losses, models
from rgap.attacks import Bias, Closed, JointReport, Status
from rgap.auditing import Case, Level
from rgap.auditing.picture import side_by_side
from rgap.auditing.results import from_certificate
from rgap.auditing.verdict import verdict
from rgap.checks import Preflight
from rgap.cli.condition import Condition
from rgap.report import render
from rgap.store import StoreError


def chain() -> Target:
    return Target(models.fcn3(16, seed=1), losses.Logistic(), (1, 4, 4), (0.0, 1.0))


def sent(target: Target, count: int = 2) -> tuple[dict[str, Update], dict[str, tuple[Tensor, list[float]]]]:
    x = pictures(count).inputs
    labels = [1.0, -1.0, 1.0, -1.0][:count]
    truth = {f"client-{at}": (x[at : at + 1], [labels[at]]) for at in range(count)}
    return {name: capture(target, own, torch.tensor(y)) for name, (own, y) in truth.items()}, truth


def test_a_certificate_counts_where_nobody_knows_the_sample(tmp_path: Path) -> None:
    target = chain()
    updates, truth = sent(target)
    found = audit_updates(target, updates, attacks=[Closed()])
    assert [case.name for case in found.cases] == list(updates)
    for case in found.cases:
        assert case.truth is None
        assert case.best is not None
        assert case.best.status is Status.EXACT
        assert case.level is Level.EXACT
        assert case.best.inputs is not None
        assert float((case.best.inputs - truth[case.name][0]).abs().max()) < 1e-3  # the certificate was right
    assert found.verdict.headline == "Every sample can be read out of the update exactly."
    assert any("Nobody here knows these samples" in note for note in found.verdict.limits)
    assert not found.sweeps
    assert not any("defences" in note for note in found.not_run)
    page = render(found.to_dict())
    assert "<figcaption>Original<" not in page
    assert "Misfit of the gradient" in page
    side_by_side(found, tmp_path / "audit.png")


def test_a_picture_that_was_found_is_a_leak_without_a_certificate() -> None:
    """The bias attack finds the picture, but does not say that it is the only one: without the truth nobody can."""
    target = open_target()
    updates, truth = sent(target)
    watched = Watched(inner=Bias())
    alone, compared = (audit_updates(target, updates, known, attacks=[watched]) for known in (None, truth))
    statuses = {case.best.status for case in alone.cases if case.best is not None}
    expected = Level.EXACT if statuses == {Status.EXACT} else Level.RECOGNISABLE
    assert {case.level for case in alone.cases} == {expected}
    assert {case.level for case in compared.cases} == {Level.EXACT}
    assert not any("Nobody here knows" in note for note in compared.verdict.limits)


def test_nothing_certain_is_said_so() -> None:
    target = chain()
    updates, truth = sent(target)
    found = audit_updates(target, updates, {"client-0": truth["client-0"]}, attacks=[Silent()])
    assert found.verdict.headline.startswith("None of the 2 samples was certainly recovered")
    assert found.summary == (
        "0 of 2 samples recovered exactly, 0 more recognisably, 1 not, 1 cannot be judged without the original."
    )
    assert any("Nobody here knows 1 of these samples" in note for note in found.verdict.limits)
    assert [case.label for case in found.cases] == [1.0, None]
    render(found.to_dict())


def test_with_the_truth_it_is_the_audit_of_the_samples() -> None:
    target = chain()
    updates, truth = sent(target)
    theirs = audit_updates(target, updates, truth, attacks=[Closed()])
    ours = audit(target, pictures(2), [1.0, -1.0], attacks=[Closed()])
    for a, b in zip(theirs.cases, ours.cases, strict=True):
        assert a.best is not None
        assert b.best is not None
        assert (a.level, a.label, a.best.mse) == (b.level, b.label, b.best.mse)


def test_a_batch_has_a_sample_for_each_place() -> None:
    target = Target(chain().model, losses.Logistic(), (1, 4, 4), (0.0, 1.0), batch_size=3)
    x = pictures(3).inputs
    update = capture(target, x, torch.tensor([1.0, -1.0, 1.0]))
    found = audit_updates(target, {"c": update}, attacks=[Silent()])
    assert [case.name for case in found.cases] == ["c, sample 1", "c, sample 2", "c, sample 3"]


def test_what_does_not_fit_is_refused() -> None:
    target = chain()
    updates, truth = sent(target)
    with pytest.raises(ValueError, match="got no updates, expected one or more by name"):
        audit_updates(target, {})
    with pytest.raises(ValueError, match="got the truth of someone, expected some of client-0, client-1"):
        audit_updates(target, updates, {"someone": truth["client-0"]})
    two = torch.cat([truth["client-0"][0]] * 2)
    with pytest.raises(ValueError, match=r"client-0: got samples of shape \(2, 1, 4, 4\) and 1 labels, expected \(1,"):
        audit_updates(target, updates, {"client-0": (two, [1.0])})
    with pytest.raises(UpdateError, match="another model or another checkpoint"):
        audit_updates(Target(models.fcn3(16, seed=2), losses.Logistic(), (1, 4, 4)), updates)


def test_the_folder_holds_the_updates_that_were_given(tmp_path: Path) -> None:
    """The same samples behind other updates, as behind a defence, are another audit."""
    target = chain()
    updates, truth = sent(target)
    first = Watched()
    audit_updates(target, updates, truth, attacks=[first], folder=tmp_path)
    again = Watched()
    audit_updates(target, updates, truth, attacks=[again], folder=tmp_path)
    assert (len(first.seen), len(again.seen)) == (2, 0)
    noisy = {n: Update({k: g + 1 for k, g in u.gradients.items()}, u.header) for n, u in updates.items()}
    with pytest.raises(StoreError):
        audit_updates(target, noisy, truth, attacks=[again], folder=tmp_path)


def test_without_an_answer_nothing_is_vouched_for() -> None:
    (only,) = from_certificate(nothing("Some", Preflight((), ())), 1)
    assert only.level is Level.NOTHING
    assert only.inputs is None


@pytest.mark.parametrize(
    ("free", "error", "reproduced", "level"),
    [
        (0, 1e-3, True, Level.RECOGNISABLE),
        (8, 1e-3, True, Level.RECOGNISABLE),
        (8, float("nan"), True, Level.RECOGNISABLE),
        (60, 1e-3, True, Level.NOTHING),  # a prior filled most of it
        (8, 0.5, True, Level.NOTHING),  # its rounding may have moved it that far
        (8, 1e-3, False, Level.NOTHING),  # it is another input
    ],
)
def test_what_was_found_counts_by_what_stays_free(free: int, error: float, reproduced: bool, level: Level) -> None:
    joint = JointReport(("conv1", "conv2"), 100, 120, 100 - free, 10.0, 3, True, "smooth")
    x = torch.linspace(0, 1, 16).reshape(1, 1, 4, 4)
    made = replace(
        result(reproduced=reproduced), status=Status.RANK_DEFICIENT, error=error, joint=joint, inputs=x, compared=False
    )
    assert made.level is level
    case = Case("a", None, None, (made,))
    assert Condition("recognisable", ">", 0.0).holds([case]) is (level is Level.RECOGNISABLE)
    found = verdict([case], (), None, chain())
    assert found.level is level
    if level is Level.RECOGNISABLE:
        assert found.headline.startswith("The sample was found, up to what no constraint decides")
        assert any(f"{free:.1f}% of its dimensions" in sentence for sentence in found.sentences)


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_one_input_that_stands_for_several_samples_is_none_of_them(samples: int) -> None:
    answers = found("Some", torch.rand(1, 1, 4, 4), torch.ones(1))
    made = from_certificate(answers, samples)
    assert len(made) == samples
    assert [each.inputs is None for each in made] == [samples > 1] * samples
    assert [each.level is Level.NOTHING for each in made][1:] == [True] * (samples - 1)
