"""Local steps: the weights on the way, what rounding makes of a difference, and orders that do not agree with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap import Protocol, Target, capture, losses
from rgap.attacks.local_steps import client_of, plan_of
from rgap.inversion.walk import Client, Difference, Walk
from rgap.protocol import Sends
from tests.inversion.subspace.cases import perceptron

CLASSES = 6


def client(activation: str = "tanh", dtype: torch.dtype = torch.float64) -> tuple[Target, Client]:
    model = perceptron((30, 24, 20, CLASSES), activation).to(dtype)
    target = Target(model, losses.CrossEntropy(CLASSES), (30,), (0.0, 1.0), batch_size=6)
    return target, client_of(target)


def samples(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 30, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, CLASSES, (6,), generator=generator).to(dtype)


ORDER = [(0, 1), (2, 3), (4, 5), (0, 1), (2, 3), (4, 5)]
PROTOCOLS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"proximal": 0.3},
    {"summed": True},
    {"clip_norm": 0.3, "proximal": 0.2},
    {"schedule": (1.0, 0.1)},
]


@pytest.mark.parametrize("arguments", PROTOCOLS)
def test_a_walk_ends_where_the_client_does(arguments: dict[str, object]) -> None:
    target, server = client()
    x, labels = samples()
    protocol = Protocol(Sends.DIFFERENCE, learning_rate=0.1, epochs=2, minibatch=2, shuffled=False, **arguments)  # type: ignore[arg-type]
    sent = capture(target, x, labels, protocol).gradients
    walk = Walk(server, plan_of(protocol, 6)).all(x, labels, ORDER)
    for name, found in walk.end.items():
        assert torch.allclose(found, sent[name], rtol=1e-9, atol=1e-12)
        assert torch.allclose(server.weights[name] + found, walk.weights[name], rtol=1e-9)


@pytest.mark.parametrize(
    "wrong",
    [
        [(2, 3), (0, 1), (4, 5), (0, 1), (2, 3), (4, 5)],
        [(0, 1), (2, 3), (4, 5), (0, 1), (4, 5), (2, 3)],
        [(0, 2), (1, 3), (4, 5), (0, 1), (2, 3), (4, 5)],
        [(0, 1), (2, 3), (4, 5), (0, 5), (2, 3), (4, 1)],
    ],
)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_only_the_right_order_agrees_to_rounding(wrong: list[tuple[int, ...]], activation: str) -> None:
    target, server = client(activation, torch.float32)
    x, labels = samples(torch.float32)
    protocol = Protocol(Sends.DIFFERENCE, learning_rate=0.05, epochs=2, minibatch=2, shuffled=False)
    sent = {name: d.double() for name, d in capture(target, x, labels, protocol).gradients.items()}
    eps = float(torch.finfo(torch.float32).eps)
    difference, start = Difference.of(sent, server.weights, eps, eps, 6), Walk(server, plan_of(protocol, 6))
    assert difference.misfit(start.all(x.double(), labels, ORDER)) < 2
    assert difference.misfit(start.all(x.double(), labels, wrong)) > 100
