"""Orders of later epochs that are found anew, where samples are not known well enough to tell them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rgap import Protocol, Target, losses
from rgap.attacks.local_steps import client_of, plan_of
from rgap.inversion.all_steps import AllSteps, Together
from rgap.inversion.orders import reordered
from rgap.inversion.walk import Walk
from rgap.protocol import Sends
from tests.inversion.subspace.cases import perceptron
from tests.inversion.test_all_steps import Order, all_steps

AWAY, SAMPLES, STEPS = 3e-3, 6, 3


def client(activation: str = "tanh", epochs: int = 3) -> tuple[AllSteps, Tensor, Order]:
    """The steps of a client, its samples and their order."""
    model = perceptron((SAMPLES, 32, 24, 6), activation)
    target = Target(model, losses.CrossEntropy(6), (SAMPLES,), (0.0, 1.0), batch_size=SAMPLES)
    told = Protocol(Sends.DIFFERENCE, learning_rate=0.01, epochs=epochs, minibatch=2, shuffled=True)
    server, plan, draw = client_of(target), plan_of(told, SAMPLES), torch.Generator().manual_seed(1)
    x = torch.rand(SAMPLES, SAMPLES, generator=draw, dtype=torch.float64)
    labels = (torch.arange(SAMPLES) % 6).double()
    order: Order = tuple(
        tuple(sorted(members.tolist()))
        for _ in range(epochs)
        for members in torch.randperm(SAMPLES, generator=draw).split(2)
    )
    return all_steps(server, plan, labels, Walk(server, plan).all(x, labels, order)), x, order


def begun(x: Tensor, order: Order) -> Together:
    """Samples that are off, with all later epochs as the first one."""
    off = x + AWAY * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    return Together(off, (order[:STEPS] * (len(order) // STEPS)), {}, torch.inf)


def test_orders_of_which_nothing_is_known_are_found_beside_the_errors_of_samples() -> None:
    steps, x, order = client()
    at, error = begun(x, order), x.new_full((SAMPLES,), 3 * AWAY)
    found = reordered(steps, at, error, [])
    assert found.order == order
    assert found.misfit == steps.difference.misfit(steps.walk(found))
    assert found.misfit < 0.01 * steps.difference.misfit(steps.walk(at))


def test_an_epoch_with_few_samples_alike_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, x, order = client()
    monkeypatch.setattr("rgap.inversion.orders.ROUNDS", 1)
    wrong, error = begun(x, order), x.new_full((SAMPLES,), AWAY)
    few, many = [(4, 0, 1)] * STEPS, [(7, 0, 1)] * (STEPS + 1)
    found = reordered(steps, wrong, error, few + many).order
    assert found[: 2 * STEPS] == wrong.order[: 2 * STEPS]
    assert found[2 * STEPS :] != wrong.order[2 * STEPS :]


def test_orders_that_are_told_or_too_many_or_behind_kinks_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, x, order = client()
    at, error = begun(x, order), x.new_full((SAMPLES,), AWAY)
    assert reordered(replace(steps, plan=replace(steps.plan, shuffled=False)), at, error, []) is at
    assert reordered(client("relu")[0], at, error, []) is at
    assert reordered(client(epochs=1)[0], replace(at, order=order[:STEPS]), error, []).order == order[:STEPS]
    monkeypatch.setattr("rgap.inversion.orders.MOST", x.numel() - 1)
    assert reordered(steps, at, error, []) is at
