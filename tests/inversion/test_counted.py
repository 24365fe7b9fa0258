"""The steps of a perceptron with counts of samples, against a walk through them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rgap import Protocol, Target, losses
from rgap.attacks.local_steps import client_of, plan_of
from rgap.inversion.counted import CountedSteps, Sketch
from rgap.inversion.walk import Difference, Walk
from rgap.protocol import Sends
from tests.inversion.subspace.cases import perceptron

INPUTS, CLASSES, SAMPLES = 5, 4, 6
ORDER = ((0, 1, 2), (3, 4, 5), (3, 0, 5), (2, 4, 1), (5, 2, 4), (1, 0, 3))
MORE: list[dict[str, float]] = [{}, {"momentum": 0.9, "weight_decay": 0.1}]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("more", MORE)
def test_whole_counts_make_what_a_walk_does(more: dict[str, float], bias: bool) -> None:
    model = perceptron((INPUTS, 8, 7, CLASSES), "gelu", bias)
    target = Target(model, losses.CrossEntropy(CLASSES), (INPUTS,), batch_size=SAMPLES)
    told = Protocol(Sends.DIFFERENCE, learning_rate=0.3, epochs=3, minibatch=3, **more)  # type: ignore[arg-type]
    server, plan = client_of(target), plan_of(told, SAMPLES)
    x = torch.rand(SAMPLES, INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0, 1]).double()
    end = Walk(server, plan).all(x, labels, ORDER).end
    sent = {name: torch.rand_like(value) for name, value in end.items()}
    difference = Difference.of(sent, server.weights, 1e-7, 1e-7, plan.steps)
    counted = CountedSteps.of(server, plan, difference, labels, torch.float64)
    assert counted is not None
    counts = torch.zeros(len(ORDER), SAMPLES, dtype=torch.float64)
    for step, members in enumerate(ORDER):
        counts[step, list(members)] = 1.0
    wanted = Sketch.of(difference)({name: end[name] - sent[name] for name in end})
    for first in (0, 2):
        torch.testing.assert_close(counted.missed(x, counts[first:], ORDER[:first]), wanted)
    # Half a sample twice is a whole one.
    twice, half = torch.cat([x, x[:1]]), torch.cat([counts, counts[:, :1]], 1)
    half[:, [0, -1]] /= 2
    both = CountedSteps.of(server, plan, difference, torch.cat([labels, labels[:1]]), torch.float64)
    assert both is not None
    torch.testing.assert_close(both.missed(twice, half, ()), wanted)


@pytest.mark.parametrize(
    "model", [perceptron((INPUTS, 8, CLASSES), "relu"), nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten())]
)
def test_kinks_and_convolutions_are_others(model: nn.Module) -> None:
    shape = (INPUTS,) if isinstance(model[0], nn.Linear) else (1, 3)  # type: ignore[index]
    server = client_of(Target(model, losses.CrossEntropy(CLASSES), shape))
    plan = plan_of(Protocol(Sends.DIFFERENCE, learning_rate=0.1, steps=2), 1)
    difference = Difference.of(server.weights, server.weights, 1e-7, 1e-7, 2)
    assert CountedSteps.of(server, plan, difference, torch.zeros(1), torch.float64) is None


def test_a_sketch_keeps_the_size_of_what_it_stands_for() -> None:
    draw = torch.Generator().manual_seed(0)
    k, h = (torch.randn(9, size, generator=draw, dtype=torch.float64) for size in (100, 300))
    for rows in (100, 20):
        values = {"w": k[:, :rows].mT @ h}
        sketch = Sketch.of(Difference(values, {"w": 2.0}, 1e-7, 1e-7))
        found = sketch(values)
        assert len(found) == min(rows, 64) * 64
        assert 0.5 < float(found.norm()) / (float(values["w"].norm()) / 2) < 2
        torch.testing.assert_close(sketch.of_products({"w": k[:, :rows]}, {"w": h}), found)
