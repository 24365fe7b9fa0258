"""What every attack must do. A new attack adds one row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from networks import Client, clients
from torch import nn

from rgap import NotAChain, Target, Update, UpdateError, capture, data, losses, models, score
from rgap.attacks import Attack, Closed, Recursive, Status

ATTACKS = [Recursive(), Closed()]
every_attack = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
DRAWN = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def small() -> tuple[Target, torch.Tensor, Update]:
    target = Target(models.cnn6(1, 12).double(), losses.Logistic(), (1, 12, 12), (0.0, 1.0))
    x = data.photographs(1, 12, channels=1).inputs.double()
    return target, x, capture(target, x, torch.tensor([1.0]))


@every_attack
@DRAWN
@given(client=clients())
def test_exact_is_never_said_of_a_wrong_answer(attack: Attack, client: Client) -> None:
    found = attack(client.target, capture(client.target, client.x, client.y))
    if found.status is Status.EXACT:
        assert score(found, client.x).mse[0] <= 1e-12
        assert float(found.labels[0]) == float(client.y[0])
    if found.status is Status.GRADIENT_ZERO:
        assert found.answers == ()


@every_attack
@DRAWN
@given(client=clients())
def test_the_certificate_is_the_distance_of_the_recomputed_gradient(attack: Attack, client: Client) -> None:
    update = capture(client.target, client.x, client.y)
    model = client.target.model
    for answer in attack(client.target, update).answers:
        loss = client.target.loss(model(answer.inputs), answer.labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        distance = sum(
            float(((torch.zeros_like(u) if g is None else g) - u).square().sum())
            for g, u in zip(gradients, update.gradients.values(), strict=True)
        )
        assert answer.gradient_residual == pytest.approx(math.sqrt(distance) / update.norm, rel=1e-6, abs=1e-12)


@every_attack
def test_the_same_update_gives_the_same_answer_and_nothing_is_changed(attack: Attack) -> None:
    target, _, update = small()
    weights = {name: p.clone() for name, p in target.model.named_parameters()}
    gradients = {name: g.clone() for name, g in update.gradients.items()}
    state = torch.get_rng_state()
    first, second = attack(target, update), attack(target, update)
    assert torch.equal(first.inputs, second.inputs)
    assert first.answers[0].error == second.answers[0].error
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], p) for name, p in target.model.named_parameters())
    assert all(torch.equal(gradients[name], g) for name, g in update.gradients.items())
    assert all(p.grad is None for p in target.model.parameters())


@every_attack
def test_answers_have_the_inputs_shape_and_every_aid_is_listed(attack: Attack) -> None:
    target, x, update = small()
    found = attack(target, update)
    assert found.inputs.shape == x.shape
    assert found.labels.shape == (1,)
    assert found.inputs.dtype == torch.float64
    assert found.assumptions
    assert found.seconds > 0
    assert str(found).startswith(f"{attack.name}: exact")


@every_attack
def test_an_update_that_does_not_fit_is_refused(attack: Attack) -> None:
    target, _, update = small()
    with pytest.raises(UpdateError, match="names do not fit"):
        attack(target, Update(dict(list(update.gradients.items())[1:])))
    other = Target(models.cnn6(1, 12, seed=5).double(), losses.Logistic(), (1, 12, 12))
    with pytest.raises(UpdateError, match="another model or another checkpoint"):
        attack(other, update)


@every_attack
def test_a_model_that_is_no_chain_is_refused_with_its_obstacles(attack: Attack) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.GELU(), nn.Flatten(), nn.Linear(2, 1))
    target = Target(model, losses.Logistic(), (1, 4, 4))
    with pytest.raises(NotAChain, match=r"max_pool2d[\s\S]*gelu"):
        attack(target, capture(target, torch.rand(1, 1, 4, 4), torch.tensor([1.0])))


@every_attack
def test_a_gradient_of_nothing_but_noise_ends_in_a_status(attack: Attack) -> None:
    target, _, update = small()
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: torch.randn(g.shape, generator=generator, dtype=g.dtype) * g.norm() / g.numel() ** 0.5
        for name, g in update.gradients.items()
    }
    found = attack(target, Update(noise))
    assert found.status not in (Status.EXACT, Status.AMBIGUOUS)
    assert found.reason
