"""Updates of several samples that an attack tells apart: each has a label, a status and a reason of its own."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from small_audits import pictures
from torch import Tensor, nn

from rgap import Target, Update, audit, audit_updates, capture, losses, models
from rgap.attacks import Answer, BatchFeatures, Bias, Closed, Reconstruction, Recursive, Sample, Status
from rgap.auditing import AttackRun, Audit, Case, Level, describe
from rgap.auditing.results import Result, from_certificate, judge
from rgap.auditing.verdict import verdict
from rgap.checks import Preflight, batch_size_misfit
from rgap.cli import tables
from rgap.report import render
from rgap.report.reading import check

CLASSES = 6
RANGE = (0.0, 1.0)


def layers() -> nn.Sequential:
    model = models.mlp(16, (14, 12), CLASSES, nn.Tanh, seed=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def perceptron(samples: int = 4) -> Target:
    return Target(layers(), losses.CrossEntropy(CLASSES), (1, 4, 4), RANGE, samples)


def pooled(samples: int = 2) -> Target:
    """What the first Linear layer reads is known, and the pool before it hides the picture."""
    model = nn.Sequential(nn.MaxPool2d(2), layers())
    return Target(model, losses.CrossEntropy(CLASSES), (1, 8, 8), RANGE, samples)


def one(*statuses: Status, features: bool = True) -> Reconstruction:
    """A batch in which these samples were told apart, sample n being all n / 10."""
    count = len(statuses)
    x = torch.stack([torch.full((1, 4, 4), at / 10) for at in range(count)]).double()
    labels = torch.arange(count).double()
    samples = tuple(Sample(status, float(at), at / 1e6, f"why {at}") for at, status in enumerate(statuses))
    answer = Answer(x, labels, math.nan, 1.0, math.nan, samples=samples)
    read = BatchFeatures("fc", x, labels)
    return Reconstruction(
        "Some", Status.PARTIAL, "the whole", (answer,), (), Preflight((), ()), 0.1, features=read if features else None
    )


def read_only(*labels: float) -> Reconstruction:
    """A batch of which labels and features are known alone."""
    read = BatchFeatures("fc", torch.zeros(len(labels), 3), torch.tensor(labels))
    return Reconstruction("Some", Status.PARTIAL, "no inputs", (), (), Preflight((), ()), 0.1, features=read)


def truth(count: int) -> Tensor:
    return torch.stack([torch.full((1, 4, 4), at / 10) for at in range(count)]).double()


@pytest.mark.parametrize("statuses", [(Status.EXACT, Status.ILL_CONDITIONED), (Status.EXACT,) * 3, (Status.AMBIGUOUS,)])
@pytest.mark.parametrize("missing", [0, 2])
def test_each_sample_has_the_verdict_that_the_attack_gave_it(statuses: tuple[Status, ...], missing: int) -> None:
    """Whichever place it has in the batch: reconstructions are matched, and verdicts go with them."""
    count = len(statuses) + missing
    order = list(reversed(range(count)))
    judged = judge(one(*statuses), truth(count)[order], [float(at) for at in order], RANGE)
    for result, at in zip(judged, order, strict=True):
        assert result.of == count
        if at >= len(statuses):
            assert (result.status, result.labels, result.inputs) == (Status.NOT_CONVERGED, (), None)
            assert "not among" in result.reason
            continue
        assert (result.status, result.reason, result.error) == (statuses[at], f"why {at}", at / 1e6)
        assert (result.labels, result.labels_right) == ((float(at),), True)
        # Certified on its own, though the rest of the batch is left in the gradient.
        assert (result.level is Level.EXACT) is (statuses[at] is Status.EXACT)


@pytest.mark.parametrize("statuses", [(Status.EXACT, Status.ILL_CONDITIONED), (Status.EXACT,) * 3, (Status.AMBIGUOUS,)])
def test_without_the_truth_the_certificate_of_each_sample_counts(statuses: tuple[Status, ...]) -> None:
    judged = from_certificate(one(*statuses), len(statuses) + 1)
    assert [result.status for result in judged] == [*statuses, Status.NOT_CONVERGED]
    assert [result.level is Level.EXACT for result in judged] == [*(s is Status.EXACT for s in statuses), False]
    assert [result.labels for result in judged] == [*((float(at),) for at in range(len(statuses))), ()]


@pytest.mark.parametrize(
    ("told", "labels", "right"),
    [
        ((1.0, 0.0), [0.0, 1.0], [True, True]),
        ((1.0, 1.0), [1.0, 1.0], [True, True]),
        ((2.0,), [0.0, 2.0], [False, True]),
        ((1.0, 1.0), [1.0, 0.0], [True, False]),
    ],
)
def test_labels_and_features_that_are_known_without_inputs_belong_to_samples(
    told: tuple[float, ...], labels: list[float], right: list[bool]
) -> None:
    judged = judge(read_only(*told), truth(2), labels, RANGE)
    assert [result.labels_right for result in judged] == right
    assert [bool(result.features) for result in judged] == right
    assert all(result.level is Level.NOTHING and result.inputs is None for result in judged)
    assert [bool(result.features) for result in from_certificate(read_only(*told), 2)] == [True, len(told) == 2]


@pytest.mark.parametrize(("told", "said"), [((0.0, 1.0), "all 2"), ((1.0,), "1 of 2"), ((5.0,), "")])
def test_what_is_known_without_inputs_is_in_the_verdict(told: tuple[float, ...], said: str) -> None:
    judged = judge(read_only(*told), truth(2), [0.0, 1.0], RANGE)
    cases = [Case("a", truth(2)[at : at + 1], float(at), (result,)) for at, result in enumerate(judged)]
    text = str(verdict(cases, (), None, perceptron()))
    assert (f"the labels of {said} samples, exactly, and all values that fc reads of each" in text) is bool(said)


@pytest.mark.parametrize("certified", [0, 1, 3])
def test_the_verdict_names_the_share_that_is_certified(certified: int) -> None:
    statuses = (*(Status.EXACT,) * certified, *(Status.ILL_CONDITIONED,) * (3 - certified))
    judged = judge(one(*statuses), truth(3), [0.0, 1.0, 2.0], RANGE)
    cases = [Case("a", truth(3)[at : at + 1], float(at), (result,)) for at, result in enumerate(judged)]
    assert any(
        each.startswith(f"{certified} of 3 samples certified")
        for each in verdict(cases, (), None, perceptron()).sentences
    )
    assert AttackRun("Some", None, tuple(judged)).certified == certified


def table_of(found: Audit) -> str:
    from rich.console import Console

    console = Console(width=140)
    with console.capture() as text:
        console.print(tables.attacks(found))
    return text.get()


def test_an_audit_of_batches_runs_the_closed_form_by_default_and_leaves_out_what_takes_one_sample() -> None:
    found = audit(perceptron(), pictures(8), attacks=(Bias(), Recursive(), Closed()))
    obstacles = {run.name: run.obstacle for run in found.attacks}
    assert obstacles["Closed"] is None
    assert obstacles["Bias"]
    assert obstacles["Recursive"]
    for case in found.cases:
        assert case.best is not None
        assert (case.best.status, case.level, case.best.labels) == (Status.EXACT, Level.EXACT, (case.label,))
    assert "8 of 8 samples certified" in str(found)
    assert "certified" in table_of(found)
    document = found.to_dict()
    check(json.loads(json.dumps(document)))
    assert [attack["certified"] for attack in document["attacks"]] == [None, None, 8]
    assert "Certified" in render(document)


@pytest.mark.parametrize(("told", "said"), [(1, "or more"), (3, "or more"), (5, ""), (6, "of fewer"), (8, "of fewer")])
def test_a_number_of_samples_that_the_gradient_contradicts_is_a_finding_of_the_verdict(told: int, said: str) -> None:
    update = capture(perceptron(5), pictures(5).inputs.float(), torch.arange(5).float())
    wrong = Update(dict(update.gradients), replace(update.header, batch_size=told))
    found = audit_updates(perceptron(told), {"client": wrong}, attacks=[Bias()])
    ranks = [each for each in found.verdict.findings if "has rank 5" in each]
    assert len(ranks) == bool(said)
    assert all(said in each and f"of {told} sample" in each for each in ranks)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid])
@pytest.mark.parametrize("samples", [2, 4, 7])
def test_a_number_of_samples_that_is_right_is_no_finding(activation: type[nn.Module], samples: int) -> None:
    model = models.mlp(16, (14, 12), CLASSES, activation, seed=3)
    target = Target(model, losses.CrossEntropy(CLASSES), (1, 4, 4), RANGE, samples)
    update = capture(target, pictures(samples).inputs.float(), torch.arange(samples).float() % CLASSES)
    assert batch_size_misfit(target, update) is None


def test_updates_of_batches_that_a_server_was_sent_count_sample_by_sample() -> None:
    target, x = perceptron(3), pictures(6).inputs.float()
    updates = {
        f"client-{at}": capture(target, x[3 * at : 3 * at + 3], torch.tensor([0.0, 3.0, 3.0 + at])) for at in range(2)
    }
    found = audit_updates(target, updates, attacks=[Closed()])
    assert [case.level for case in found.cases] == [Level.EXACT] * 6
    assert "6 of 6 samples certified" in str(found)
    assert sorted(case.best.labels for case in found.cases[3:] if case.best) == [(0.0,), (3.0,), (4.0,)]


def test_pictures_that_a_pool_hides_leave_labels_and_features_in_the_verdict() -> None:
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    found = audit(pooled(), x, attacks=[Closed()])
    results: list[Result] = [case.best for case in found.cases if case.best is not None]
    assert [result.status for result in results] == [Status.PARTIAL] * 4
    assert "The labels of all 4 samples, exactly, and all values that 1.fc1 reads of each" in found.verdict.headline


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_batch_is_described_sample_by_sample(count: int) -> None:
    target = perceptron(count)
    update = capture(target, pictures(count).inputs.float(), torch.arange(count).float())
    document = describe(Closed()(target, update))
    json.dumps(document, allow_nan=False)
    samples = document["answers"][0]["samples"]
    assert [sample["status"] for sample in samples] == ["exact"] * count
    assert sorted(sample["label"] for sample in samples) == list(range(count))
    assert sorted(document["features"]["labels"]) == list(range(count))
