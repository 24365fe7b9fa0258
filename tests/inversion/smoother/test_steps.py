"""The steps of a chain with kinks, as far as its values are known, against the steps themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rgap import Protocol, Target, capture, losses
from rgap.attacks.local_steps import client_of, plan_of
from rgap.inversion.smoother.steps import Guess, KinkedSteps, is_kinked_chain
from rgap.inversion.walk import Difference, Walk
from rgap.models.chains import chain
from rgap.protocol import Sends

EPS = float(torch.finfo(torch.float32).eps)


def of(steps: int, rate: float = 0.05, **more: float) -> tuple[KinkedSteps, Tensor]:
    torch.manual_seed(0)
    model = chain(((6, 3, 1, 1), (8, 3, 2, 1)), 3, 5, 4, lambda: nn.LeakyReLU(0.2), bias=True)
    target = Target(model, losses.CrossEntropy(4), (3, 5, 5), (0.0, 1.0))
    x, label = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(0)), torch.ones(1)
    told = Protocol(Sends.DIFFERENCE, learning_rate=rate, steps=steps, **more)  # type: ignore[arg-type]
    client, plan = client_of(target), plan_of(told, 1)
    sent = {name: d.double() for name, d in capture(target, x, label, told).gradients.items()}
    return KinkedSteps(client, plan, Difference.of(sent, client.weights, EPS, EPS, steps), label.double()), x.double()


def at(steps: KinkedSteps, x: Tensor) -> Guess:
    """Of the sample itself, with no doubt."""
    values = steps.middle_network.forward(x)
    z = [values[steps.reads(node)] for node in steps.activations]
    nowhere = [torch.zeros_like(each) for each in z]
    places = [each.expand(steps.plan.steps, *each.shape[1:]) for each in nowhere]
    return Guess(x, z, [torch.full_like(each, 1e-12) for each in z], places, nowhere)


@pytest.mark.parametrize("more", [{}, {"momentum": 0.9}, {"weight_decay": 1e-2}], ids=str)
def test_at_the_sample_they_give_what_was_sent(more: dict[str, float]) -> None:
    steps, x = of(3, **more)
    guess = at(steps, x)
    made = steps.run(guess, steps.middle(guess).apart, None, tied=False)
    walk = Walk(steps.client, steps.plan).all(x, steps.labels, ((0,),) * 3)
    for weights, wanted in zip(made.trail, walk.trail, strict=True):
        for name, w in wanted.items():
            torch.testing.assert_close(weights[name], w)
    for name in steps.names:
        assert float((made.gradient[name] - steps.gradient[name]).norm() / steps.gradient[name].norm()) < 1e-3
    # and tied to what was sent, from the gradients of these steps
    again = steps.run(guess, steps.middle(guess).apart, made, tied=True)
    for name in steps.names:
        torch.testing.assert_close(again.gradient[name], made.gradient[name], rtol=1e-3, atol=1e-5)


def test_which_networks_are_taken() -> None:
    def taken(model: nn.Module, shape: tuple[int, ...]) -> bool:
        network = Target(model, losses.CrossEntropy(4), shape, (0.0, 1.0)).network
        return is_kinked_chain(network, [name for name, _ in model.named_parameters()])

    def network(activation: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), activation, nn.Flatten(), nn.Linear(4 * 9, 4))

    shape = (3, 5, 5)
    assert taken(network(nn.LeakyReLU(0.2)), shape)
    assert not taken(network(nn.ReLU()), shape)
    assert not taken(network(nn.Sigmoid()), shape)
    pooled = nn.Sequential(nn.Conv2d(3, 4, 2), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 4))
    assert not taken(pooled, shape)
