"""The audit: what is attacked with what, what is kept, and what is said of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_audits import (
    GAVE_UP,
    SHAPE,
    Picky,
    Silent,
    Watched,
    documented,
    open_target,
    pictures,
    seeded,
)  # fmt: skip
from torch import Tensor, nn

from rgap import Audit, Target, Update, audit, capture, losses, models, score
from rgap.attacks import IDLG, Attack, Bias, Closed, FeatureMatching, InvertingGradients, Outcome, Recursive, Status
from rgap.auditing import Interrupted, Level, Step
from rgap.defences import TopK
from rgap.protocol import Protocol, Sends
from rgap.store import StoreError

ABOUT = {"data": "random values"}


def levels(found: Audit) -> list[str]:
    return [case.level.value for case in found.cases]


# What is attacked.


def test_pictures_are_read_out_and_the_document_says_so(tmp_path: Path) -> None:
    target = Target(models.cnn6(1, 8).double(), losses.Logistic(), (1, 8, 8), (0.0, 1.0))
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = audit(
        target, x, attacks=[Recursive(), IDLG(iterations=5)], about={**ABOUT, "model": "CNN6", "command": "c"}
    )
    assert levels(found) == ["exact", "exact"]
    assert [case.label for case in found.cases] == [-1.0, 1.0]
    assert all(case.results[0].mse < 1e-8 for case in found.cases)
    document = documented(found)
    assert document["verdict"]["level"] == "exact"
    assert document["verdict"]["layer"]["name"] == "conv1"
    assert document["verdict"]["layer"]["role"] == "gives away"
    assert [len(sample["results"]) for sample in document["samples"]] == [1, 1]
    assert len(document["samples"][0]["results"][0]["layers"]) == len(document["target"]["layers"]) == 7
    assert (document["target"]["model"], document["made"]["command"]) == ("CNN6", "c")
    assert document["target"]["parameters"] == sum(p.numel() for p in target.model.parameters())
    assert document["complete"] is True
    assert document["attacks"][0]["exact"] == document["attacks"][0]["samples"] == 2
    assert document["attacks"][1]["samples"] is None
    found.save(tmp_path / "audit.json")
    found.render(tmp_path / "audit.html")
    assert json.loads((tmp_path / "audit.json").read_text())["samples"] == document["samples"]
    assert "<html" in (tmp_path / "audit.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.html", "audit.json"]


def test_an_audit_of_which_nothing_is_said_can_be_shown() -> None:
    documented(audit(open_target(), pictures(1), attacks=[Bias()]))


def test_the_attacks_see_no_sample() -> None:
    """Neither a tensor with a sample's values nor one of its shape reaches an attack."""
    samples, seen = pictures(2), []

    def tensors(value: Any, done: set[int]) -> list[Tensor]:
        if id(value) in done or isinstance(value, (str, int, float, type)):
            return []
        done.add(id(value))
        if isinstance(value, Tensor):
            return [value]
        inside: list[Any] = list(vars(value).values()) if hasattr(value, "__dict__") else []
        if isinstance(value, dict) or hasattr(value, "items"):
            inside += list(value.values())
        elif isinstance(value, (list, tuple, set)):
            inside += list(value)
        return [tensor for each in inside for tensor in tensors(each, done)]

    class Looks(Silent):
        def run(self, target: Target, update: Update) -> Outcome:
            seen.extend(tensors([target, update], set()))
            return GAVE_UP

    audit(open_target(), samples, attacks=[Looks()])
    assert len(seen) >= 8
    assert not any(tuple(t.shape[-3:]) == SHAPE for t in seen)
    for tensor in seen:
        for x in samples.inputs:
            assert tensor.numel() != x.numel() or not torch.allclose(tensor.flatten().double(), x.flatten())


def test_attacks_that_do_not_apply_are_named_with_the_reason() -> None:
    found = audit(open_target(2), pictures(2), attacks=[Picky(), Bias(), Silent()], about=ABOUT)
    picky, bias, silent = found.attacks
    assert picky.obstacle == "it is a matter of taste, with 2 samples"
    assert "of 2 samples in one update" in str(bias.obstacle)
    assert (picky.results, bias.results, silent.obstacle, len(silent.results)) == ((), (), None, 2)
    assert [r.attack for case in found.cases for r in case.results] == ["Silent", "Silent"]
    document = documented(found)["attacks"]
    assert [each["applies"] for each in document] == [False, False, True]
    assert document[0]["reason"] == picky.obstacle
    assert document[0]["exact"] is document[0]["median_psnr"] is None
    assert (document[2]["exact"], document[2]["recognisable"], document[2]["median_psnr"]) == (0, 0, None)


def test_what_one_attack_reads_out_exactly_is_not_given_to_the_next() -> None:
    first, second, third = Watched("A", fails_on=(1, 3)), Watched("B", fails_on=(1,)), Watched("C")
    found = audit(open_target(), pictures(4), attacks=[first, second, third], about=ABOUT)
    assert [len(each.seen) for each in (first, second, third)] == [4, 2, 1]
    # The ones left are those that failed, in their order.
    assert second.seen[0] is first.seen[1]
    assert second.seen[1] is first.seen[3]
    assert third.seen[0] is first.seen[3]
    assert [[r.attack for r in case.results] for case in found.cases] == [["A"], ["A", "B"], ["A"], ["A", "B", "C"]]
    assert [case.best.attack for case in found.cases if case.best is not None] == ["A", "B", "A", "C"]
    assert [len(ran.results) for ran in found.attacks] == [4, 2, 1]
    documented(found)


def test_an_attack_is_named_as_it_names_itself() -> None:
    """Results and attacks are brought together by name: both have the one that the documents use."""
    found = audit(open_target(), pictures(1), attacks=[Closed(), Bias(), IDLG(iterations=1)], about=ABOUT)
    assert [ran.name for ran in found.attacks] == ["Closed", "Bias", "iDLG"]
    assert [len(ran.results) for ran in found.attacks] == [1, 0, 0]


def test_two_settings_of_one_attack_are_told_apart() -> None:
    tried = [IDLG(iterations=1), IDLG(iterations=2)]
    found = audit(open_target(), pictures(2), attacks=tried, about=ABOUT)
    assert [len(case.results) for case in found.cases] == [2, 2]
    assert [len(ran.results) for ran in found.attacks] == [2, 2]
    assert [each["samples"] for each in documented(found)["attacks"]] == [2, 2]


def test_labels_are_taken_in_turn_or_as_given() -> None:
    def labels(classes: int, given: list[float] | None = None) -> list[float]:
        found = audit(open_target(classes=classes), pictures(4), given, [Silent()])
        return [case.label for case in found.cases]

    assert labels(1) == [-1, 1, -1, 1]
    assert labels(3) == [0, 1, 2, 0]
    assert labels(3, [2.0, 2.0, 0.0, 1.0]) == [2, 2, 0, 1]
    found = audit(open_target(), pictures(2), [1.0, 1.0], [Bias()])
    assert [case.results[0].labels for case in found.cases] == [(1.0,), (1.0,)]


@pytest.mark.parametrize(
    ("batch_size", "clients", "updates", "left"), [(2, 1, 3, 1), (1, 3, 2, 1), (2, 2, 1, 3), (1, 1, 7, 0)]
)
def test_samples_are_grouped_into_updates(batch_size: int, clients: int, updates: int, left: int) -> None:
    watched, samples, target = Watched(inner=Silent()), pictures(7), open_target(batch_size)
    found = audit(target, samples, attacks=[watched], protocol=Protocol(clients=clients), about=ABOUT)
    assert len(watched.seen) == updates
    assert [case.name for case in found.cases] == list(samples.names[: 7 - left])
    assert any(f"{left} samples that do not fill another update" in note for note in found.not_run) is (left > 0)
    # The mean over clients of equal batches is the mean over all of them.
    labels = torch.tensor([-1.0, 1.0] * 4)
    for at, update in enumerate(watched.seen):
        own = slice(at * batch_size * clients, (at + 1) * batch_size * clients)
        whole = target.gradient(samples.inputs[own], labels[own])
        for name, g in update.gradients.items():
            torch.testing.assert_close(g, whole[name])
    document = documented(found)
    assert (document["settings"]["samples"], document["protocol"]["clients"]) == (7 - left, clients)
    assert document["target"]["batch_size"] == batch_size


def test_progress_is_told() -> None:
    steps: list[Step] = []
    audit(open_target(), pictures(2), attacks=[Watched("A"), Silent()], progress=steps.append)
    assert [step.what for step in steps] == ["labels", "rank analysis", "A", "Silent"]
    assert all(0 <= step.done <= step.total == 4 for step in steps)


# Refusals.


@pytest.mark.parametrize(
    ("count", "batch_size", "clients", "labels", "message"),
    [
        (0, 1, 1, None, "got 0 samples, expected 1 or more"),
        (5, 3, 2, None, r"got 5 samples, expected 6 or more: batch size 3 times 2 clients"),
        (2, 1, 1, [1.0], "got 1 labels for 2 samples, expected one for each"),
        (1, 1, 1, [1.0, 1.0], "got 2 labels for 1 samples, expected one for each"),
        (1, 1, 1, [0.0], r"got label 0.*write class 0 as -1"),
    ],
)
def test_samples_and_labels_that_do_not_fit_are_refused(
    count: int, batch_size: int, clients: int, labels: list[float] | None, message: str, tmp_path: Path
) -> None:
    watched = Watched()
    with pytest.raises(ValueError, match=message):
        audit(
            open_target(batch_size), pictures(count), labels, [watched], protocol=Protocol(clients=clients),
            folder=tmp_path / "results",
        )  # fmt: skip
    assert watched.seen == []
    assert list(tmp_path.iterdir()) == []


def test_samples_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got inputs of shape \(1, 1, 5, 5\), expected"):
        audit(open_target(), torch.rand(1, 1, 5, 5), attacks=[Silent()])


# Budget.


def test_a_budget_of_nothing_runs_nothing_and_says_so() -> None:
    watched = Watched()
    found = audit(open_target(), pictures(2), attacks=[watched], defences=[], budget=0.0, about=ABOUT)
    assert watched.seen == []
    assert found.not_run == ("Watched on 2 updates: the time was up",)
    assert not found.complete
    assert [case.results for case in found.cases] == [(), ()]
    assert [case.best for case in found.cases] == [None, None]
    document = documented(found)
    assert document["complete"] is False
    assert document["settings"]["budget"] == 0
    assert [sample["best"] for sample in document["samples"]] == [None, None]


def test_what_was_not_tried_is_not_called_empty() -> None:
    """That nothing ran is no reason to say that the updates hold nothing."""
    for attacks, budget in (([Bias()], 0.0), ([Picky()], None), ([], None)):
        document = documented(audit(open_target(), pictures(1), attacks=attacks, budget=budget, about=ABOUT))["verdict"]
        assert document["level"] == "not recovered"
        assert "zero" not in document["headline"]


class Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    import sys

    made = Clock()
    monkeypatch.setattr(sys.modules["rgap.auditing.run"], "time", SimpleNamespace(perf_counter=made))
    return made


def test_an_attack_that_began_in_time_ends(clock: Clock) -> None:
    class Slow(Silent):
        def run(self, target: Target, update: Update) -> Outcome:
            clock.now += 1
            return GAVE_UP

    found = audit(open_target(), pictures(2), attacks=[Slow(), Silent()], budget=1.5, about=ABOUT)
    assert [[r.attack for r in case.results] for case in found.cases] == [["Slow", "Silent"], ["Silent"]]
    assert "Slow on 1 update: the time was up" in found.not_run
    assert not found.complete
    assert found.seconds == 1.0


def test_updates_of_which_one_takes_long_are_attacked_one_after_the_other(clock: Clock) -> None:
    """All at once none would be done in time: of an attack that has an answer at any time, they are."""
    groups = []

    class Slow(Silent):
        def run(self, target: Target, update: Update) -> Outcome:
            clock.now += 3
            return GAVE_UP

        def _timed(self, target: Target, updates: Sequence[Update]) -> list[tuple[Outcome, float]]:
            groups.append(len(updates))
            return super()._timed(target, updates)

    class Anytime(Slow):
        anytime = True

    audit(open_target(), pictures(5), attacks=[Slow()], budget=10.0, about=ABOUT)
    assert groups == [1, 2, 1]
    audit(open_target(), pictures(5), attacks=[Slow()], budget=100.0, about=ABOUT)
    assert groups[3:] == [1, 4]
    audit(open_target(), pictures(5), attacks=[Anytime()], budget=10.0, about=ABOUT)
    assert groups[5:] == [5]


def test_an_attack_that_is_exact_has_all_the_time_that_is_left(clock: Clock) -> None:
    class Slow(Bias):
        def run(self, target: Target, update: Update) -> Outcome:
            clock.now += 3
            return super().run(target, update)

    found = audit(open_target(), pictures(5), attacks=[Slow(), Silent()], budget=17.0, about=ABOUT)
    assert levels(found) == ["exact"] * 5
    found = audit(open_target(), pictures(5), attacks=[Silent(), Slow()], budget=8.0, about=ABOUT)
    assert levels(found) == ["exact"] * 3 + ["not recovered"] * 2


def test_an_audit_that_took_long_but_left_nothing_out_is_complete(clock: Clock) -> None:
    class Slow(Silent):
        def run(self, target: Target, update: Update) -> Outcome:
            clock.now += 1
            return GAVE_UP

    found = audit(open_target(2), pictures(3), attacks=[Slow()], budget=0.5, about=ABOUT)
    assert found.not_run == ("1 samples that do not fill another update",)
    assert found.complete


# A folder.


def run_in(folder: Path, count: int = 3, target: Target | None = None, **asked: Any) -> tuple[Audit, list[int]]:
    first, second = Watched("A", fails_on=(0,)), Watched("B")
    samples = asked.pop("samples", pictures(count))
    attacks = asked.pop("attacks", [first, second])
    found = audit(target or open_target(), samples, attacks=attacks, folder=folder, about=ABOUT, **asked)
    return found, [len(first.seen), len(second.seen)]


def content(found: Audit) -> dict[str, Any]:
    """Everything but the times of this run."""
    document = documented(found)
    return {name: value for name, value in document.items() if name != "made"}


def test_what_is_in_the_folder_is_not_run_again(tmp_path: Path) -> None:
    first, ran = run_in(tmp_path)
    assert ran == [3, 1]
    second, again = run_in(tmp_path)
    assert again == [0, 0]
    assert content(first) == content(second)
    for one, other in zip(first.cases, second.cases, strict=True):
        for a, b in zip(one.results, other.results, strict=True):
            assert (a.inputs is None) is (b.inputs is None)
            assert a.inputs is None or (b.inputs is not None and torch.equal(a.inputs, b.inputs))
    _, fresh = run_in(tmp_path, fresh=True)
    assert fresh == [3, 1]


def test_what_is_in_the_folder_counts_when_no_time_is_left(tmp_path: Path) -> None:
    first, _ = run_in(tmp_path)
    second, ran = run_in(tmp_path, budget=0.0)
    assert ran == [0, 0]
    assert levels(second) == levels(first)
    assert second.complete
    assert not any("time" in note for note in second.not_run)


def test_more_attacks_go_on_from_the_folder(tmp_path: Path) -> None:
    a, b = Watched("A", fails_on=(0, 1)), Watched("B")
    run_in(tmp_path, count=2, attacks=[a])
    found, _ = run_in(tmp_path, count=2, attacks=[replace(a, seen=[]), b])
    assert len(b.seen) == 2
    assert levels(found) == ["exact", "exact"]


@pytest.mark.parametrize(
    "other",
    [
        {"count": 2},
        {"seed": 1},
        {"labels": [1.0, 1.0, 1.0]},
        {"protocol": Protocol(Sends.DIFFERENCE, 1, 0.1)},
        {"target": open_target(3)},
        {"target": Target(open_target().model, losses.Exponential(), SHAPE, (0.0, 1.0))},
        {"target": Target(seeded(*open_target().model, seed=1), losses.Logistic(), SHAPE, (0.0, 1.0))},
    ],
)
def test_a_folder_with_another_audit_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    run_in(tmp_path)
    watched = Watched("A")
    with pytest.raises(StoreError, match="holds a run with other settings"):
        run_in(tmp_path, **other, attacks=[watched])
    assert watched.seen == []
    # Forgetting it is allowed.
    run_in(tmp_path, **other, attacks=[watched], fresh=True)
    assert watched.seen != []


def alike(what: str) -> dict[str, Any]:
    """An audit with the same weights and the same sums over the samples as the one before."""
    net, x = open_target().model, pictures(3).inputs
    if what == "order":
        return {"samples": x.mul(256).round().div(256).flip(0)}
    smooth = nn.Sequential(*net[:2], nn.Sigmoid(), net[3]) if what == "activation" else net
    value_range = (0.0, 2.0) if what == "value range" else (0.0, 1.0)
    return {"target": Target(smooth.eval(), losses.Logistic(), SHAPE, value_range)}


@pytest.mark.parametrize("what", ["order", "activation", "value range"])
def test_a_folder_with_an_audit_that_looks_alike_is_refused(what: str, tmp_path: Path) -> None:
    """Nothing in the folder is true of the other audit."""
    labels, x = [1.0, 1.0, 1.0], pictures(3).inputs.mul(256).round().div(256)
    run_in(tmp_path, samples=x, labels=labels)
    with pytest.raises(StoreError, match="holds a run with other settings"):
        run_in(tmp_path, **{"samples": x, "labels": labels, **alike(what)})


def test_the_folder_is_of_use_to_another_process(tmp_path: Path) -> None:
    """No row is filed under an address in memory, which the next process would not find."""
    tried = [IDLG(iterations=1), InvertingGradients(iterations=1)]
    audit(open_target(), pictures(1), attacks=tried, folder=tmp_path, about=ABOUT)
    keys = [json.loads(line)["key"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(keys) == 2
    assert [re.findall(r"0x[0-9a-f]{6,}", key) for key in keys] == [[], []]


def test_an_interruption_keeps_what_was_done(tmp_path: Path) -> None:
    count = 11
    whole, interrupted = Watched("A"), Watched("A", interrupted_at=9)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_in(tmp_path, count, attacks=[interrupted])
    assert len(interrupted.seen) == 9
    assert isinstance(stopped.value, Interrupted)
    document = documented(stopped.value.audit)
    assert document["complete"] is False
    assert any("interrupted" in each for each in document["not_run"])
    assert [sample["level"] for sample in document["samples"]] == ["exact"] * 8 + ["not recovered"] * 3
    found, _ = run_in(tmp_path, count, attacks=[whole])
    # The updates that were attacked together with the one at which it ended are done again.
    assert len(whole.seen) == 3
    assert levels(found) == ["exact"] * count


# Models that are no chain.


def rank_deficient() -> Target:
    model = seeded(
        nn.Conv2d(1, 1, 3, 2, 1, bias=False), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(4, 1, bias=False)
    )  # fmt: skip
    return Target(model, losses.Logistic(), SHAPE, (0.0, 1.0))


def test_the_layer_that_protects_is_named() -> None:
    found = audit(rank_deficient(), pictures(1), attacks=[Recursive(), Silent()], about=ABOUT)
    assert found.rank is not None
    assert found.rank.joint_free
    assert levels(found) == ["not recovered"]
    layer = documented(found)["verdict"]["layer"]
    assert (layer["name"], layer["role"]) == ("0", "protects")
    # Of 16 values the convolution's 9 gradient rows and 4 outputs leave 3 open at the least.
    free = int(layer["why"].split(" of the 16 ")[0].split()[-1])
    assert 3 <= free <= 16


@pytest.mark.parametrize("classes", [1, 3])
def test_a_model_that_is_no_chain(classes: int) -> None:
    """The recursion names where it stops, and an activation at the end leaves it nowhere to begin."""
    layers = (nn.Conv2d(1, 3, 3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, classes))
    loss = losses.Logistic() if classes == 1 else losses.CrossEntropy(classes)
    target = Target(seeded(*layers), loss, SHAPE, (0.0, 1.0))
    found = audit(target, pictures(2), attacks=[Recursive(), IDLG(iterations=2)], about=ABOUT)
    recursive, idlg = found.attacks
    assert recursive.obstacle is None
    assert ["stops at 2: avg_pool2d" in result.reason for result in recursive.results] == [True, True]
    assert len(idlg.results) == 2
    document = documented(found)
    assert document["target"]["layers"] == []
    assert any("avg_pool2d" in obstacle for obstacle in document["target"]["obstacles"])
    target = Target(seeded(*layers, nn.Tanh()), loss, SHAPE, (0.0, 1.0))
    found = audit(target, pictures(2), attacks=[Recursive(), IDLG(iterations=2)], about=ABOUT)
    assert "tanh" in str(found.attacks[0].obstacle)
    document = documented(found)
    assert any("closed form does not follow this model" in limit for limit in document["verdict"]["limits"])
    assert document["rank"] is not None


class Untraceable(nn.Module):
    """Asks for values, which tracing does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.only = seeded(nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        scale = 2.0 if float(x.detach().abs().sum()) >= 0 else 1.0
        result: Tensor = scale * self.only(x.flatten(1))
        return result


def test_a_model_that_cannot_be_traced() -> None:
    target = Target(Untraceable().double().eval(), losses.Logistic(), SHAPE, (0.0, 1.0))
    found = audit(target, pictures(1), attacks=[Closed(), Bias(), Silent()], about=ABOUT)
    assert found.rank is None
    assert "rank analysis: the model cannot be traced" in found.not_run
    assert found.complete
    assert [ran.obstacle is None for ran in found.attacks] == [False, False, True]
    assert documented(found)["rank"] is None


def test_rows_of_a_table() -> None:
    model = seeded(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3))
    target = Target(model, losses.CrossEntropy(3), (5,))
    rows = torch.rand(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = audit(target, rows, attacks=[Closed(), Bias(), IDLG(iterations=2)], about=ABOUT)
    assert levels(found) == ["exact"] * 3
    assert [case.name for case in found.cases] == ["sample-0", "sample-1", "sample-2"]
    for case, row in zip(found.cases, rows, strict=True):
        (result,) = case.results
        assert result.inputs is not None
        torch.testing.assert_close(result.inputs, row[None], rtol=0, atol=1e-8)
    document = documented(found)
    for sample in document["samples"]:
        assert sample["picture"] is None
        assert [(each["picture"], each["ssim"]) for each in sample["results"]] == [(None, None)]


@pytest.mark.parametrize("value", [0.5, 1e6])
def test_a_sample_all_of_one_value_can_be_judged_without_a_range(value: float) -> None:
    model = seeded(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    target = Target(model, losses.CrossEntropy(3), (5,))
    found = audit(target, torch.full((1, 5), value, dtype=torch.float64), attacks=[Silent()], about=ABOUT)
    documented(found)


def test_all_of_nothing_is_called_that() -> None:
    """A hinge that is met gives a gradient of zero."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).double()
    nn.init.zeros_(model[1].weight)
    nn.init.constant_(model[1].bias, 5.0)
    target = Target(model, losses.Hinge(), SHAPE, (0.0, 1.0))
    found = audit(target, pictures(2), [1.0, 1.0], [Closed(), Bias()], about=ABOUT)
    assert {r.status for case in found.cases for r in case.results} == {Status.GRADIENT_ZERO}
    document = documented(found)["verdict"]
    assert document["level"] == "nothing sent"
    assert "zero" in document["headline"]


def test_weight_differences_are_read_out() -> None:
    protocol = Protocol(Sends.DIFFERENCE, 1, 0.1)
    found = audit(open_target(), pictures(2), attacks=[Bias()], protocol=protocol, about=ABOUT)
    assert levels(found) == ["exact", "exact"]
    sent = documented(found)["protocol"]
    assert (sent["sends"], sent["learning_rate"], sent["steps"], sent["optimiser"]) == (
        "difference",
        0.1,
        1,
        "sgd",
    )
    several = audit(open_target(), pictures(1), attacks=[Bias()], protocol=replace(protocol, steps=3), about=ABOUT)
    (result,) = several.cases[0].results
    assert any("3 local steps" in note for note in result.assumptions)
    documented(several)


def test_the_default_attacks_come_in_the_order_of_their_cost() -> None:
    from rgap.auditing import ATTACKS

    kinds: list[type[Attack]] = [type(attack) for attack in ATTACKS]
    assert kinds == [Bias, Closed, FeatureMatching, InvertingGradients]
    assert Level.EXACT.value == "exact"


def test_printed_it_is_its_verdict() -> None:
    found = audit(open_target(), pictures(1), attacks=[Bias()], about=ABOUT)
    assert repr(found) == str(found)
    assert str(found).splitlines() == [found.verdict.headline, *found.verdict.sentences]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("bias", ["Bias"]),
        ("Bias", ["Bias"]),
        (Bias, ["Bias"]),
        (Bias(), ["Bias"]),
        (["Inverting_Gradients", Bias, "iDLG", Recursive()], ["InvertingGradients", "Bias", "iDLG", "Recursive"]),
    ],
)
def test_attacks_are_taken_as_people_name_them(given: Any, names: list[str]) -> None:
    found = audit(open_target(), pictures(1), attacks=given, budget=0.0)
    assert [run.name for run in found.attacks] == names


@pytest.mark.parametrize("given", ["top-k", "TopK", TopK, TopK(), [TopK], ["TopK"]])
def test_defences_are_taken_as_people_name_them(given: Any) -> None:
    found = audit(open_target(), pictures(1), attacks=Bias, defences=given)
    assert [each.name for each in found.sweeps] == ["TopK"]


@pytest.mark.parametrize("given", ["biass", "", ["bias", "dgl"], "TopK", ["top-k"]])
def test_what_is_no_attack_is_refused_in_one_line(given: Any) -> None:
    with pytest.raises(ValueError, match="expected one of") as refused:
        audit(open_target(), pictures(1), attacks=given)
    assert "\n" not in str(refused.value)


def test_what_is_printed_is_a_few_lines() -> None:
    """At the prompt of an interpreter, too: no tensor is written out."""
    target = open_target()
    x = pictures(1)
    update = capture(target, x.inputs, torch.tensor([1.0]))
    found = Bias()(target, update)
    for each in (update, found, audit(target, x, attacks=Bias)):
        assert repr(each) == str(each)
        assert len(str(each)) < 1000
        assert "tensor(" not in str(each)
    with pytest.raises(TypeError):
        Bias()(target, dict(update.gradients))  # type: ignore[arg-type]
    assert score(found, truth=x.inputs.numpy()).mse == score(found, truth=x.inputs).mse


def maps(flip: int) -> losses.LabelMaps:
    """Two masks that differ in one pixel."""
    masks = torch.zeros(1, 4, 4)
    masks[0, flip, flip] = 1
    return losses.LabelMaps(masks, 2)


def smoothed(much: float) -> losses.OfFunction:
    return losses.OfFunction(lambda outputs, targets: much * outputs.logsumexp(1).mean() - outputs.mean(), 32)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (maps(0), maps(1)),
        (losses.CrossEntropy(32), losses.CrossEntropy(32, label_smoothing=0.1)),
        (losses.CrossEntropy(32, label_smoothing=0.1), losses.CrossEntropy(32, label_smoothing=0.2)),
        (losses.CrossEntropy(32), losses.CrossEntropy(32, weight=(1.0,) * 31 + (2.0,))),
        (smoothed(0.1), smoothed(0.2)),
    ],
)
def test_a_folder_keeps_losses_of_other_settings_apart_and_goes_on(
    tmp_path: Path, own: losses.Loss, other: losses.Loss
) -> None:
    def run_with(loss: losses.Loss) -> int:
        watched = Watched("A", inner=Silent())
        model = seeded(nn.Flatten(), nn.Linear(16, 32), nn.Unflatten(1, (2, 4, 4)))
        if not isinstance(loss, losses.LabelMaps):
            model = model[:2]
        target = Target(model, loss, SHAPE, (0.0, 1.0))
        audit(target, pictures(2), labels=[0, 0], attacks=[watched], folder=tmp_path)
        return len(watched.seen)

    assert run_with(own) == 2
    assert run_with(own) == 0  # it is all there
    with pytest.raises(StoreError, match="holds a run with other settings"):
        run_with(other)
