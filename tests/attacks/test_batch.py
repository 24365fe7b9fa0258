"""The closed form on updates of several samples: what it says of the whole, and of each sample."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rgap import Protocol, Target, Update, capture, losses
from rgap.attacks import Closed, Hybrid, Polish, Reconstruction, Rule, Status
from rgap.defences import DropBias
from rgap.linalg.deadline import OutOfTime, within
from tests.inversion.subspace.cases import perceptron
from tests.nn.modules import Skip

CLASSES = 6


def target_of(model: nn.Module, shape: tuple[int, ...], samples: int, **arguments: object) -> Target:
    loss = losses.CrossEntropy(CLASSES)
    return Target(model, loss, shape, (0.0, 1.0), batch_size=samples, **arguments)  # type: ignore[arg-type]


def draw(samples: int, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(samples, *shape, generator=generator)
    return x, torch.randint(0, CLASSES, (samples,), generator=generator).float()


def matched(found: Reconstruction, x: Tensor, labels: Tensor) -> float:
    """The largest error of any sample, each one compared with the sample that is nearest; every sample once."""
    apart = torch.cdist(found.inputs.flatten(1), x.double().flatten(1))
    at = apart.argmin(1)
    assert sorted(at.tolist()) == list(range(len(x)))
    assert found.labels.tolist() == labels.double()[at].tolist()
    return float(apart.min(1).values.max()) / x[0].numel() ** 0.5


def convolutional() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 12, 3, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(12, 12, 3, 1, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(192, 40),
            nn.LeakyReLU(0.2),
            nn.Linear(40, CLASSES),
        )


@pytest.mark.parametrize("activation", ["relu", "leaky", "tanh", "gelu", "sigmoid"])
@pytest.mark.parametrize("bias", [True, False])
def test_every_sample_of_a_batch_is_exact(activation: str, bias: bool) -> None:
    x, labels = draw(4, (30,))
    target = target_of(perceptron((30, 24, 20, CLASSES), activation, bias), (30,), 4)
    found = Closed()(target, capture(target, x, labels))
    assert found.status is Status.EXACT, str(found)
    assert [sample.status for sample in found.samples] == [Status.EXACT] * 4
    assert [sample.label for sample in found.samples] == found.labels.tolist()
    error = matched(found, x, labels)
    assert error < 1e-3
    assert error < 10 * max(sample.error for sample in found.samples)
    assert "order" in " ".join(found.assumptions)


def test_back_through_convolutions() -> None:
    x, labels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([4.0, 0.0, 2.0])
    target = target_of(convolutional(), (3, 8, 8), 3)
    found = Closed()(target, capture(target, x, labels))
    assert found.status is Status.EXACT, str(found)
    assert matched(found, x, labels) < 1e-3
    assert [layer.name for layer in found.layers] == ["0", "2"]


def test_where_inputs_are_not_had_labels_and_features_are() -> None:
    model = nn.Sequential(nn.AdaptiveMaxPool2d(4), nn.Flatten(), *perceptron((48, 24, 20, CLASSES), "tanh"))
    x, labels = draw(4, (3, 8, 8))
    target = target_of(model, (3, 8, 8), 4)
    found = Closed()(target, capture(target, x, labels))
    assert found.status is Status.PARTIAL
    assert not found.answers
    assert found.features is not None
    pooled = nn.functional.adaptive_max_pool2d(x, 4).flatten(1).double()
    apart = torch.cdist(found.features.values.flatten(1), pooled)
    assert float(apart.min(1).values.max()) < 1e-3
    assert found.features.labels.tolist() == labels.double()[apart.argmin(1)].tolist()
    assert "labels of all 4" in found.reason


@pytest.mark.parametrize("inside", [12, 4, 1])
def test_back_through_a_block(inside: int) -> None:
    """Its constraints are taken jointly, whether one layer after another would lead through it or not."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        inner = nn.Sequential(nn.Conv2d(12, inside, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(inside, 12, 3, 1, 1))
        behind = nn.Sequential(nn.Flatten(), nn.Linear(192, 40), nn.LeakyReLU(0.2), nn.Linear(40, CLASSES))
        stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.LeakyReLU(0.2))
        model = nn.Sequential(stem, Skip(inner, act=nn.LeakyReLU(0.2)), behind)
    x, labels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([4.0, 0.0])
    target = target_of(model, (3, 8, 8), 2)
    found = Closed()(target, capture(target, x, labels))
    assert found.status is Status.EXACT, str(found)
    assert matched(found, x, labels) < 1e-3
    assert [layer.name for layer in found.layers] == ["0.0", "1.inner.0", "1.inner.2"]


@pytest.mark.parametrize("unit", [0, 37, 150])
def test_a_value_that_its_error_puts_on_the_wrong_side_of_its_kink_is_put_right(unit: int) -> None:
    """It spoils the gradient rows of the layer in front for all samples, which share them."""
    x, labels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([4.0, 0.0, 2.0])
    target = target_of(convolutional(), (3, 8, 8), 3)
    row = torch.func.grad(lambda each: target.network.forward(each[None])[1].flatten()[unit])(x[1].double())
    z = target.network.forward(x.double())[1][1].flatten()[unit]
    x[1] -= (row * (z + 1e-7) / row.square().sum()).float()
    found = Closed()(target, capture(target, x, labels))
    assert found.status in (Status.EXACT, Status.PARTIAL), str(found)
    assert found.gradient_residual < found.tolerance
    assert matched(found, x, labels) < 1e-3


@pytest.mark.parametrize("samples", [2, 3])
def test_what_counting_rules_out_is_said_at_once(samples: int) -> None:
    """Of what one layer tells no more gets to the layers in front than its input has numbers."""
    layers = [nn.Conv2d(3, 4, 5, 2, 2), nn.Sigmoid(), nn.Conv2d(4, 4, 5, 2, 2), nn.Sigmoid()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, CLASSES))
    x = torch.rand(samples, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    target = target_of(model, (3, 16, 16), samples)
    found = Closed()(target, capture(target, x, torch.arange(samples).float()))
    assert found.status is Status.PARTIAL, str(found)
    assert found.features is not None
    # Of each 64 values behind, 256 between and 768 in front; 400 and 300 weights for all of them.
    rows = min(256 * samples, 64 * samples + 400) + 300
    assert f"leave {768 * samples - rows} of {768 * samples} dimensions free" in found.reason


@pytest.mark.parametrize("told", [3, 5, 7])
@pytest.mark.parametrize("activation", ["relu", "leaky"])
def test_a_batch_size_that_the_rank_contradicts_is_a_finding(told: int, activation: str) -> None:
    x, labels = draw(5, (30,))
    target = target_of(perceptron((30, 24, 20, CLASSES), activation), (30,), told)
    update = capture(replace(target, batch_size=5), x, labels)
    found = Closed()(target, Update(dict(update.gradients), replace(update.header, batch_size=told)))
    said = [each for each in found.preflight.findings if "has rank 5" in each]
    assert len(said) == (told != 5)
    assert all(f"of {told} samples" in each for each in said)
    assert (found.status is Status.EXACT) is (told <= 5), str(found)
    if told <= 5:
        assert matched(found, x, labels) < 1e-3


def test_samples_that_are_the_same_are_given_as_often_as_they_are() -> None:
    x, labels = draw(3, (30,))
    x, labels = torch.cat([x, x[:2]]), torch.cat([labels, labels[:2]])
    target = target_of(perceptron((30, 24, 20, CLASSES), "tanh"), (30,), 5)
    found = Closed()(target, capture(target, x, labels))
    assert found.status is Status.EXACT, str(found)
    apart = torch.cdist(found.inputs, x.double())
    assert sorted(apart.argmin(1).tolist()) in (
        [0, 0, 1, 1, 2],
        [0, 0, 2, 4, 4],
        [0, 1, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [2, 3, 3, 4, 4],
    )
    assert float(apart.min(1).values.max()) < 1e-3


def test_a_sample_without_a_gradient_is_missing_and_the_others_are_certified() -> None:
    x, labels = draw(4, (30,))
    target = target_of(perceptron((30, 24, 20, CLASSES), "relu"), (30,), 4)
    three = capture(replace(target, batch_size=3), x[:3], labels[:3])
    # As if the loss of the fourth were saturated: its gradient is zero, and the mean is over four.
    update = Update({name: 0.75 * g for name, g in three.gradients.items()}, replace(three.header, batch_size=4))
    found = Closed()(target, update)
    assert found.status is Status.PARTIAL
    assert "3 of 4" in found.reason
    assert matched(found, x[:3], labels[:3]) < 1e-3


@pytest.mark.parametrize("summed", [False, True])
def test_a_mean_over_clients_is_a_batch(summed: bool) -> None:
    x, labels = draw(4, (30,))
    target = target_of(perceptron((30, 24, 20, CLASSES), "leaky"), (30,), 2)
    found = Closed()(target, capture(target, x, labels, Protocol(clients=2, summed=summed)))
    assert found.status is Status.EXACT, str(found)
    assert matched(found, x, labels) < 1e-3
    assert any("whose" in each for each in found.assumptions)


def test_a_batch_that_is_too_large_is_refused_with_the_number_that_is_not() -> None:
    target = target_of(perceptron((30, 24, 20, CLASSES), "relu"), (30,), 2)
    attack = Closed()
    assert attack.obstacle(target, 12) is None
    assert "12" in str(attack.obstacle(target, 13))
    x, labels = draw(40, (30,))
    found = attack(replace(target, batch_size=40), capture(replace(target, batch_size=40), x, labels))
    assert found.status is Status.NOT_CONVERGED
    assert not found.answers


def test_all_gradients_zero() -> None:
    target = target_of(perceptron((30, 24, 20, CLASSES), "relu"), (30,), 3)
    x, labels = draw(3, (30,))
    update = capture(target, x, labels)
    zero = Update({name: torch.zeros_like(g) for name, g in update.gradients.items()}, update.header)
    assert Closed()(target, zero).status is Status.GRADIENT_ZERO


@pytest.mark.parametrize("changed", ["first layer of another batch", "noise", "scaled"])
def test_a_gradient_that_is_of_no_batch_is_not_exact(changed: str) -> None:
    x, labels = draw(4, (30,))
    target = target_of(perceptron((30, 24, 20, CLASSES), "relu"), (30,), 4)
    update = capture(target, x, labels)
    gradients = dict(update.gradients)
    if changed == "first layer of another batch":
        other = capture(target, *draw(4, (30,), seed=7)).gradients
        gradients |= {name: other[name] for name in list(gradients)[:2]}
    elif changed == "noise":
        generator = torch.Generator().manual_seed(0)
        gradients = {n: g + 1e-3 * g.norm() * torch.randn(g.shape, generator=generator) for n, g in gradients.items()}
    else:
        name = next(iter(gradients))
        gradients[name] = 1.01 * gradients[name]
    found = Closed()(target, Update(gradients, update.header))
    assert found.status is not Status.EXACT
    assert all(sample.status is not Status.EXACT for sample in found.samples)


@pytest.mark.parametrize("activation", ["relu", "leaky", "tanh"])
def test_gradients_of_biases_that_were_zeroed_are_as_good_as_not_sent(activation: str) -> None:
    """The samples come back all the same; what they would send is not what was sent, so nothing is certified."""
    x, labels = draw(4, (30,))
    target = target_of(perceptron((30, 24, 20, CLASSES), activation), (30,), 4)
    found = Closed()(target, DropBias()(capture(target, x, labels)))
    assert found.status is Status.NOT_CONVERGED
    assert matched(found, x, labels) < 1e-3
    assert Status.EXACT not in [sample.status for sample in found.samples]


@pytest.mark.parametrize("frozen", [("0.weight",), ("0.weight", "0.bias"), ("4.weight",)])
def test_a_layer_whose_gradient_was_zeroed_stops_nothing_and_certifies_nothing(frozen: tuple[str, ...]) -> None:
    x, labels = draw(4, (30,))
    target = target_of(perceptron((30, 24, 20, CLASSES), "tanh"), (30,), 4)
    update = capture(target, x, labels)
    gradients = {name: torch.zeros_like(g) if name in frozen else g for name, g in update.gradients.items()}
    found = Closed()(target, Update(gradients, update.header))
    assert found.status in (Status.NOT_CONVERGED, Status.PARTIAL, Status.RANK_DEFICIENT), str(found)
    assert Status.EXACT not in [sample.status for sample in found.samples]


@pytest.mark.parametrize("activation", ["relu", "leaky", "sigmoid"])
def test_a_batch_for_which_the_time_is_up_is_cut_off(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rgap.inversion.batch.by_labels", lambda *arguments: None)  # else it may be found at once
    x, labels = draw(4, (30,))
    target = target_of(perceptron((30, 24, 20, CLASSES), activation), (30,), 4)
    with within(0.0):
        found = Closed()(target, capture(target, x, labels))
    assert found.status is Status.CUT_OFF


def test_what_was_told_apart_is_kept_where_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*arguments: object) -> None:
        raise OutOfTime

    monkeypatch.setattr("rgap.attacks.batch.back", late)
    x, labels = draw(4, (30,))
    target = target_of(perceptron((30, 24, 20, CLASSES), "tanh"), (30,), 4)
    found = Closed()(target, capture(target, x, labels))
    assert found.status is Status.PARTIAL
    assert "the labels of all 4 samples" in found.reason
    assert "the time was up" in found.reason
    assert found.features is not None
    assert sorted(found.features.labels.tolist()) == sorted(labels.tolist())


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("low", [0.0, -1.0])
def test_a_network_of_odd_functions_leaves_signs_to_the_value_range(classes: int, low: float) -> None:
    """Through tanh without biases -x gives -z, and with the other one of two labels the same gradient."""
    x, labels = draw(4, (30,))
    x, labels = low + (1 - low) * x, labels % 2
    labels = 2 * labels - 1 if classes == 1 else labels
    loss: losses.Loss = losses.Logistic() if classes == 1 else losses.CrossEntropy(2)
    model = perceptron((30, 24, 20, classes), "tanh", False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    target = Target(model, loss, (30,), (low, 1.0), batch_size=4)
    found = Closed()(target, capture(target, x, labels))
    if low < 0:
        assert {sample.status for sample in found.samples} == {Status.AMBIGUOUS}
        assert found.status is Status.AMBIGUOUS
    else:
        assert found.status is Status.EXACT, str(found)
        assert matched(found, x, labels) < 1e-3


@pytest.mark.parametrize("activation", ["relu", "leaky", "gelu"])
def test_polishing_moves_no_sample_to_explain_one_that_is_missing(activation: str) -> None:
    x, labels = draw(4, (30,))
    target = target_of(perceptron((30, 24, 20, CLASSES), activation), (30,), 4)
    update = capture(target, x, labels)
    whole = Closed()(target, update)
    best = whole.answers[0]
    fewer = replace(best, inputs=best.inputs[:3], labels=best.labels[:3], samples=best.samples[:3])
    partial = replace(whole, status=Status.PARTIAL, answers=(fewer,))
    found = Polish(partial, steps=2)(target, update)
    assert found.status is Status.PARTIAL
    assert torch.equal(found.inputs, fewer.inputs)
    assert "missing" in found.reason
    polished = Polish(whole, steps=1)(target, update)
    assert polished.samples == whole.samples
    assert polished.features is whole.features


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_of_several_attacks_the_one_that_is_kept_keeps_its_samples_and_features(samples: int) -> None:
    x, labels = draw(samples, (30,))
    target = target_of(perceptron((30, 24, 20, CLASSES), "leaky"), (30,), samples)
    found = Hybrid((Closed(),), Rule.RESIDUAL)(target, capture(target, x, labels))
    assert [sample.status for sample in found.samples] == [Status.EXACT] * samples
    assert found.features is not None
    assert sorted(found.features.labels.tolist()) == sorted(labels.tolist())
