"""Orders of later epochs with several samples in wrong steps, where samples are not known well enough to tell one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rgap import Protocol, Target, losses
from rgap.attacks.local_steps import client_of, plan_of
from rgap.inversion.all_steps import Together
from rgap.inversion.orders import Sketch, descended, reordered
from rgap.inversion.walk import Walk
from rgap.protocol import Sends
from tests.inversion.subspace.cases import perceptron
from tests.inversion.test_all_steps import ORDER, SAMPLES, Order, all_steps, client, exchanged

WRONG = (*ORDER[:3], (5, 0), (3, 4), (1, 2))
AWAY = 3e-3
EXCHANGES = ((4, 5, 0, 0), (6, 7, 1, 2), (5, 6, 1, 0))
"""Steps, and which of their samples."""


def test_several_exchanges_are_found_beside_the_errors_of_samples() -> None:
    target = Target(perceptron((12, 64, 48, 6), "tanh"), losses.CrossEntropy(6), (12,), (0.0, 1.0), batch_size=12)
    told = Protocol(Sends.DIFFERENCE, learning_rate=0.01, epochs=2, minibatch=3, shuffled=True)
    server, plan, draw = client_of(target), plan_of(told, 12), torch.Generator().manual_seed(1)
    x, labels = torch.rand(12, 12, generator=draw, dtype=torch.float64), (torch.arange(12) % 6).double()
    order: Order = tuple(
        tuple(members.tolist()) for _ in range(2) for members in torch.randperm(12, generator=draw).split(3)
    )
    steps = all_steps(server, plan, labels, Walk(server, plan).all(x, labels, order))
    wrong = order
    for one, two, i, j in EXCHANGES:
        wrong = exchanged(wrong, one, wrong[one][i], two, wrong[two][j])
    off = x + AWAY * torch.randn(x.shape, generator=draw, dtype=x.dtype)
    begun, error = Together(off, wrong, {}, torch.inf), x.new_full((12,), AWAY)
    found = reordered(steps, begun, error)
    assert [set(members) for members in found.order] == [set(members) for members in order]
    assert found.misfit < 0.1 * steps.difference.misfit(steps.walk(begun))
    assert found.misfit == steps.difference.misfit(steps.walk(found))


def test_orders_that_are_told_or_too_many_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    server, plan, x, labels = client("tanh")
    steps = all_steps(server, plan, labels, Walk(server, plan).all(x, labels, ORDER))
    begun, error = Together(x, WRONG, {}, torch.inf), x.new_full((SAMPLES,), AWAY)
    assert reordered(replace(steps, plan=replace(plan, shuffled=False)), begun, error) is begun
    monkeypatch.setattr("rgap.inversion.orders.MOST", x.numel() - 1)
    assert reordered(steps, begun, error) is begun


def test_what_exchanges_add_up_to_is_taken_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randn(3 * SAMPLES, 60, generator=generator, dtype=torch.float64)
    member = torch.zeros(2, 3, SAMPLES, dtype=torch.float64)
    for of, order in enumerate((ORDER, WRONG)):
        for step, members in enumerate(order[3:]):
            member[of, step, list(members)] = 1.0
    missed = (member[1] - member[0]).flatten() @ counts
    way, _ = descended(WRONG, 3, counts, missed)
    assert [set(members) for members in way[-1]] == [set(members) for members in ORDER]
    assert descended(ORDER, 3, counts, torch.zeros_like(missed))[0] == []


def test_a_sketch_keeps_the_size_of_what_it_stands_for() -> None:
    server, plan, x, labels = client("tanh")
    difference = all_steps(server, plan, labels, Walk(server, plan).all(x, labels, ORDER)).difference
    whole = torch.cat([(d / difference.noise[name]).flatten() for name, d in difference.sent.items()])
    assert float(Sketch.of(difference)(difference.sent).norm()) == pytest.approx(float(whole.norm()))
    big = replace(difference, sent={"w": torch.ones(100, 300).double()}, noise={"w": 2.0})
    found = Sketch.of(big)(big.sent)
    assert len(found) == 64**2
    assert 0.5 < float(found.norm()) / (0.5 * 30_000**0.5) < 2
