"""The Linear layers at the end of a network as a client of their own, against the whole network's gradients."""

from __future__ import annotations

import torch
from torch import nn

from rgap import Target, losses
from rgap.attacks.local_steps import client_of, plan_of
from rgap.inversion.head_steps import HeadClient
from rgap.protocol import Protocol, Sends
from tests.inversion.subspace.cases import perceptron

HEAD = ("3.weight", "3.bias", "5.weight", "5.bias")


def convolved(activation: type[nn.Module] = nn.LeakyReLU, head: int = 2) -> Target:
    torch.manual_seed(0)
    last = [nn.Linear(36, 20), activation(), nn.Linear(20, 4)] if head == 2 else [nn.Linear(36, 4)]
    model = nn.Sequential(nn.Conv2d(2, 4, 3, 1, 1), activation(), nn.Flatten(), *last).double()
    return Target(model, losses.CrossEntropy(4), (2, 3, 3), (0.0, 1.0), batch_size=4)


def test_its_gradients_are_those_of_the_whole_network() -> None:
    target = convolved()
    client = client_of(target)
    head = HeadClient.of(client, client.weights)
    assert head is not None
    assert sorted(head.client.weights) == sorted(HEAD)
    x, labels = torch.rand(3, 2, 3, 3, dtype=torch.float64), torch.tensor([0.0, 3.0, 1.0])
    features = client.network(client.weights).forward(x)[head.value_id].flatten(1)
    whole, own = client.gradient(client.weights, x, labels), head.client.gradient(head.client.weights, features, labels)
    for name in HEAD:
        assert torch.allclose(own[name], whole[name], rtol=1e-12, atol=1e-15)
        again = head.client.differentiable(head.client.weights, features, labels)[name]
        assert torch.equal(again, own[name])


def test_cotangents_are_the_slopes_of_the_loss_at_each_step() -> None:
    target = convolved(nn.Tanh)
    client, protocol = client_of(target), Protocol(Sends.DIFFERENCE, learning_rate=0.3, epochs=1, minibatch=2)
    head, plan = HeadClient.of(client, client.weights), plan_of(protocol, 4)
    assert head is not None
    features, labels, order = (
        torch.randn(4, 36, dtype=torch.float64),
        torch.tensor([0.0, 1.0, 2.0, 3.0]),
        [(2, 0), (1, 3)],
    )
    found = head.cotangents(plan, features, labels, order)
    layers = target.model[3:]
    assert isinstance(layers, nn.Sequential)
    for members in order:  # torch's own steps
        h = features[list(members)].clone().requires_grad_()
        loss = nn.functional.cross_entropy(layers(h), labels[list(members)].long())
        loss.backward()
        assert h.grad is not None
        assert torch.allclose(found[list(members)], -0.3 * h.grad, rtol=1e-9, atol=1e-15)
        with torch.no_grad():
            for p in layers.parameters():
                assert p.grad is not None
                p -= 0.3 * p.grad
                p.grad = None


def test_there_is_none_where_nothing_stands_in_front_or_one_layer_behind() -> None:
    whole = Target(perceptron((12, 8, 6, 3), "tanh"), losses.CrossEntropy(3), (12,), (0.0, 1.0))
    for target in (whole, convolved(head=1)):
        client = client_of(target)
        assert HeadClient.of(client, client.weights) is None
    client = client_of(convolved())
    assert HeadClient.of(client, {name: w for name, w in client.weights.items() if name != "5.weight"}) is None
