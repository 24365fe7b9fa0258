"""What makes an audit mean something else than its reader thinks is told, and nothing else is."""

from __future__ import annotations

import re

import pytest
import torch
from small_audits import SHAPE, Silent, documented, open_target, pictures, seeded
from torch import Tensor, nn

from rgap import Target, audit, audit_updates, capture, defences, losses
from rgap.attacks import Bias, Closed
from rgap.auditing import Audit
from rgap.protocol import Protocol, Sends
from rgap.report import render


def audited(model: nn.Module, loss: object, value_range: tuple[float, float] | None = (0.0, 1.0)) -> Audit:
    target = Target(model, loss, SHAPE, value_range)  # type: ignore[arg-type]
    return audit(target, pictures(2), attacks=[Bias()])


def ends(last: nn.Module | None, outputs: int = 1) -> nn.Sequential:
    layers = [nn.Flatten(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, outputs)]
    return seeded(*layers, *([] if last is None else [last]))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = ends(None, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), x


@pytest.mark.parametrize(
    ("model", "loss", "told"),
    [
        (ends(nn.Sigmoid()), "logistic", "ends in sigmoid"),
        (ends(nn.Sigmoid()), "mse", "ends in sigmoid"),
        (ends(nn.Softmax(1), 3), "cross-entropy", "ends in softmax"),
        (ends(nn.LogSoftmax(1), 3), "mse", "ends in log_softmax"),
        (Two().double().eval(), "cross-entropy", "returns 2 values"),
        (ends(nn.Sigmoid()), "bce", ""),
        (ends(nn.Sigmoid()), None, ""),
        (ends(nn.LogSoftmax(1), 3), "cross-entropy", ""),
        (ends(nn.LogSoftmax(1), 3), "nll", ""),
        (ends(None), "logistic", ""),
    ],
)
def test_a_loss_that_the_model_may_not_be_meant_for(model: nn.Module, loss: str | None, told: str) -> None:
    found = audited(model, loss)
    assert len(found.findings) == bool(told)
    assert told in " ".join(found.findings)
    document = documented(found)
    assert document["verdict"]["findings"] == list(found.findings)
    assert ("Check this first" in render(document)) is bool(told)
    assert all(finding in str(found) for finding in found.findings)


@pytest.mark.parametrize(
    ("scale", "shift", "value_range", "told"),
    [
        (255.0, 0.0, (0.0, 1.0), True),
        (4.0, -2.0, (0.0, 1.0), True),
        (1.0, 0.0, (0.0, 255.0), True),
        (1.0, 0.0, (0.0, 1.0), False),
        (1.0, 0.0, (-1.0, 2.0), False),
        (255.0, 0.0, None, False),
    ],
)
def test_values_outside_the_range_and_a_range_that_is_not_filled(
    scale: float, shift: float, value_range: tuple[float, float] | None, told: bool
) -> None:
    x = scale * pictures(2).inputs + shift
    found = audit(Target(ends(None), "logistic", SHAPE, value_range), x, attacks=[Silent()])  # type: ignore[arg-type]
    assert len(found.findings) == told
    if told:
        assert f"from {float(x.min()):.3g} to {float(x.max()):.3g}" in found.findings[0]


@pytest.mark.parametrize(
    ("layer", "names"),
    [(nn.Dropout(0.5), "dropout"), (nn.BatchNorm1d(20), "batch norm"), (nn.Dropout(0.0), ""), (nn.Tanh(), "")],
)
@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_named_where_the_model_has_two(layer: nn.Module, names: str, training: bool) -> None:
    model = seeded(nn.Flatten(), nn.Linear(16, 20), layer, nn.Linear(20, 1)).train(training)
    found = audit(Target(model, losses.Logistic(), SHAPE, (0.0, 1.0), 2), pictures(2), attacks=[Silent()])
    mode = "training" if training else "evaluation"
    told = [sentence for sentence in found.verdict.sentences if f"audited in {mode} mode" in sentence]
    assert len(told) == bool(names)
    assert names in " ".join(told)
    assert documented(found)["target"]["mode"] == mode
    assert not any("assumes evaluation mode" in w for case in found.cases for r in case.results for w in r.warnings)


def pooled() -> Target:
    model = seeded(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 3))
    return Target(model, losses.CrossEntropy(3), SHAPE, (0.0, 1.0))


def test_what_leaked_is_the_headline_where_no_sample_was_recovered() -> None:
    found = audit(pooled(), pictures(4), attacks=[Silent()])
    assert found.read is not None
    assert (found.read.labels, found.read.features, found.read.values, found.read.layer) == (4, 4, 2, "3")
    assert found.verdict.headline == (
        "All 2 values that 3 reads and the labels of all 4 samples were read off; none of the 4 samples was recovered "
        "by the attacks that were tried."
    )


def test_features_and_labels_that_are_not_right_do_not_count() -> None:
    """A defence that moves them takes them away."""
    target, x = pooled(), pictures(1).inputs
    update = capture(target, x, torch.tensor([1.0]))
    for truth, labels, features, right in ((x, [1.0], 1, 1), (x, [2.0], 1, 0), (1 - x, [1.0], 0, 1)):
        found = audit_updates(target, {"a": update}, {"a": (truth, labels)}, attacks=[Silent()])
        assert found.read is not None
        assert (found.read.features, found.read.labels) == (features, right)
    unknown = audit_updates(target, {"a": update}, attacks=[Silent()])
    assert unknown.read is not None
    assert (unknown.read.features, unknown.read.labels, unknown.read.known) == (1, 1, False)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("defence", "features", "labels"),
    [
        (defences.Clip(0.01), True, True),  # every value by the same factor
        (defences.GaussianNoise(0.02), False, True),
        (defences.LaplaceNoise(0.02), False, True),
        (defences.Quantise(6), False, True),
        (defences.Sign(), False, True),
        (defences.DPSGD(0.1, 20.0), False, False),
    ],
)
def test_what_a_defence_hides_is_not_said_to_be_read_off(
    defence: defences.Defence, features: bool, labels: bool, known: bool
) -> None:
    """Whether or not the auditor knows the sample: a client that defends itself sends no more than it sends."""
    model = seeded(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 9), nn.Tanh(), nn.Linear(9, 3))
    target, x = Target(model, losses.CrossEntropy(3), SHAPE, (0.0, 1.0)), pictures(1).inputs
    sent = defence(capture(target, x, torch.tensor([1.0])), torch.Generator().manual_seed(0))
    found = audit_updates(target, {"a": sent}, {"a": (x, [1.0])} if known else {}, attacks=[Silent()])
    assert found.read is not None
    assert (found.read.features > 0) == features
    assert found.read.labels == labels or known
    told = [line for line in found.verdict.sentences if "reads could not be read off" in line]
    assert bool(told) != features


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("classes", "repeats", "steps"), [(3, (15, 6, 3), 1), (2, (15, 7), 1), (3, (10, 4, 1), 3)])
def test_how_often_each_label_occurs_is_told_of_batches(
    classes: int, repeats: tuple[int, ...], steps: int, known: bool
) -> None:
    labels = [float(label) for label, count in enumerate(repeats) for _ in range(count)]
    target, x = open_target(len(labels), classes), pictures(len(labels)).inputs
    protocol = Protocol(Sends.DIFFERENCE, learning_rate=0.1, steps=steps)
    sent = capture(target, x, torch.tensor(labels), protocol)
    found = audit_updates(target, {"a": sent}, {"a": (x, labels)} if known else {}, attacks=[Silent()])
    assert found.read is not None
    if known and steps == 1:
        assert not found.read.counts
        assert 0.9 * len(labels) <= found.read.labels <= len(labels)
        return
    assert found.read.labels == 0
    ((_, own),) = found.read.counts
    right = sum(min(count, own[label]) for label, count in enumerate(repeats))
    assert right >= 0.8 * len(labels)
    assert found.read.counted_right == (right if known else None)
    (told,) = [line for line in found.verdict.sentences if line.startswith("How often each label occurs is estimated")]
    assert f"{own[0.0]} of label 0" in told
    assert "times" not in told
    assert (f"right for {right} of {len(labels)} samples" in told) == known


def test_batches_and_models_without_biases_are_read_as_far_as_they_go() -> None:
    for target, labels, features in (
        (open_target(2, 3), True, False),
        (Target(seeded(nn.Flatten(), nn.Linear(16, 2, bias=False)), losses.CrossEntropy(2), SHAPE), False, False),
        (open_target(1, 3), True, True),
    ):
        read = audit(target, pictures(2), attacks=[Silent()]).read
        assert read is not None
        assert (read.samples, read.features > 0) == (2, features)
        assert read.labels > 0 or not labels


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_verdict_and_ranks_tell_one_story(seed: int) -> None:
    """Free dimensions that a prior filled protect nothing."""
    layers = (nn.Conv2d(1, 12, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(12, 4, 3, 2), nn.LeakyReLU(0.2), nn.Flatten())
    model = seeded(*layers, nn.Linear(4, 1), seed=seed)
    found = audit(Target(model, losses.Logistic(), SHAPE, (0.0, 1.0)), pictures(2), attacks=[Closed()])
    document = documented(found)
    seen = document["verdict"]["level"] in ("exact", "recognisable")
    page = render(document)
    if seen:
        assert re.search("(?<!No layer )protects the input", page) is None
        assert document["verdict"]["layer"] is None or document["verdict"]["layer"]["role"] == "gives away"
    else:
        assert document["verdict"]["layer"] is None or document["verdict"]["layer"]["role"] == "protects"


@pytest.mark.parametrize(("scale", "told"), [(1e5, True), (3e4, True), (1.0, False)])
def test_inputs_that_saturate_the_loss_are_told(scale: float, told: bool) -> None:
    target = Target(seeded(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), losses.CrossEntropy(3), (4,))
    x = scale * torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    largest = [float(target.outputs(each[None]).argmax()) for each in x]
    found = audit(target, (x, largest), attacks=[Bias()])
    assert any("saturate the loss" in finding and "--mean and --std" in finding for finding in found.findings) is told


@pytest.mark.parametrize(
    ("outputs", "loss", "told"), [(4, "mse", True), (3, "mse", False), (4, "cross-entropy", False)]
)
def test_a_model_that_may_give_back_its_input_is_told(outputs: int, loss: str, told: bool) -> None:
    target = Target(seeded(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, outputs)), loss, (4,))  # type: ignore[arg-type]
    found = audit(target, torch.rand(1, 4), attacks=[Bias()])
    assert any("as an autoencoder" in finding for finding in found.findings) is told
