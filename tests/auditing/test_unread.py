"""Clients with many samples behind several local steps: what a report says where nothing came back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_audits import Silent, documented, result
from torch import nn

from rgap import Audit, Protocol, Target, Update, audit_updates, capture, losses
from rgap.attacks import Attack, InvertingGradients, Status
from rgap.auditing import Case, Ended
from rgap.auditing.picture import side_by_side
from rgap.auditing.run import MANY
from rgap.auditing.unread import unread
from rgap.auditing.verdict import verdict
from rgap.cli import tables
from rgap.protocol import Optimiser, Sends
from rgap.report import render

BOUND = "40 samples x 1 epoch against the width 20 of 5"


def make_target(width: int = 20) -> Target:
    """As Flower's quickstart, in small: convolution and pool in front of Linear layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        front = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        model = nn.Sequential(*front, nn.Linear(36, width), nn.Linear(width, 20), nn.ReLU(), nn.Linear(20, 4))
    return Target(model, losses.CrossEntropy(4), (1, 8, 8), (0.0, 1.0))


def sent(target: Target, count: int, **fields: object) -> Update:
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
    settings = {"learning_rate": 0.1, "momentum": 0.9, "minibatch": 8} | fields
    return capture(target, x, torch.arange(count) % 4, Protocol(Sends.DIFFERENCE, **settings))  # type: ignore[arg-type]


def audited(*counts: int, attacks: Sequence[Attack] = (InvertingGradients(iterations=3),)) -> Audit:
    target = make_target()
    updates = {f"node {at}": sent(target, count) for at, count in enumerate(counts, 1)}
    return audit_updates(target, updates, attacks=attacks)


def test_in_place_of_noise_a_line_says_what_was_tried(tmp_path: Path) -> None:
    found = audited(40, 48)
    document = documented(found)
    page = " ".join(render(document).split())
    assert "<img" not in page
    assert '<li class="sample">' not in page
    for name, count in (("node 1", 40), ("node 2", 48)):
        line = f"{name}: nothing was recovered of its {count} samples, so that no picture is shown."
        assert any(sentence.startswith(line) for sentence in found.unread.sentences)
        assert line in page
    assert page.count("Tried: InvertingGradients (not converged, misfit of the gradient ") == 2
    assert all(sample["results"][0]["picture"] for sample in document["samples"])  # nothing is lost
    assert tables.pictures(found).row_count == 0
    with pytest.raises(ValueError, match="there is no picture to show"):
        side_by_side(found, tmp_path / "audit.png")


def test_a_client_with_few_samples_keeps_its_pictures(tmp_path: Path) -> None:
    found = audited(40, 8)
    page = render(documented(found))
    assert page.count('<li class="sample">') == 8
    assert "node 2, sample 2" in page
    assert "node 1, sample" not in page
    assert len(found.unread.sentences) == 1
    assert tables.pictures(found).row_count == 8
    side_by_side(found, tmp_path / "audit.png")


VAIN = replace(result(reproduced=False, status=Status.CUT_OFF), inputs=torch.zeros(1, 1, 4, 4), compared=False)


@pytest.mark.parametrize(
    ("one", "dropped"),
    [
        (VAIN, True),
        (replace(VAIN, inputs=None), True),
        (replace(VAIN, status=Status.REPRODUCED), False),  # it fits a step
        (replace(VAIN, reproduced=True), False),  # it has the gradient
        (replace(VAIN, features="fc"), False),  # what a layer reads of it is known
        (replace(VAIN, status=Status.EXACT), False),
    ],
)
def test_what_may_show_a_sample_is_shown(one: object, dropped: bool) -> None:
    assert isinstance(one, type(VAIN))
    cases = [Case(f"a, sample {at + 1}", None, None, (VAIN if at else one,)) for at in range(MANY)]
    assert (len(unread(cases).cases) == MANY) is dropped
    assert not unread(cases[1:]).cases  # one less is not many
    assert not unread([Case(f"node {at}", None, None, (VAIN,)) for at in range(MANY)]).cases  # each its own client
    assert not unread([replace(case, truth=torch.zeros(1, 1, 4, 4)) for case in cases]).cases


def test_the_bound_comes_before_the_time() -> None:
    found = replace(audited(40, 48), ended=Ended.TIME, unfinished=True)
    headline = found.verdict.headline
    assert headline.startswith(f"At least {BOUND}: the local steps cannot be undone one by one. So far none of the 88 ")
    assert headline.endswith(" The time was up before every attack had ended.")
    page = render(documented(found))
    assert page.index("Check this first.") < page.index("<strong>The time was up")
    whole = audited(40, attacks=[Silent()]).verdict.headline
    assert whole.startswith(f"{BOUND}: the local steps cannot be undone one by one. None of the 40 samples was ")


@pytest.mark.parametrize(
    ("counts", "fields"),
    [
        ((40, 16), {}),  # one client's steps may be undone
        ((40,), {"minibatch": None}),  # one step
        ((40,), {"optimiser": Optimiser.ADAM, "momentum": 0.0}),  # which hides sizes, whatever the width
    ],
)
def test_no_bound_is_named_that_is_not_the_reason(counts: tuple[int, ...], fields: dict[str, object]) -> None:
    target = make_target()
    updates = {f"node {count}": sent(target, count, **fields) for count in counts}
    headline = audit_updates(target, updates, attacks=[Silent()]).verdict.headline
    assert "against the width" not in headline


def test_what_leaked_is_not_hidden_behind_the_bound() -> None:
    case = Case("a", torch.zeros(1, 1, 4, 4), 1.0, (result(psnr=30.0),))
    told = verdict([case], (), None, make_target(), None, Ended.TIME, (), BOUND).headline
    assert told.startswith("The sample can be recognised in what the update gives away, and the time was up")
