"""All local steps together: samples in each other's steps, units on wrong sides, and orders that are not told apart."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from rgap import Protocol, Target, losses
from rgap.attacks.local_steps import client_of, plan_of
from rgap.inversion.all_steps import AllSteps, Together
from rgap.inversion.step_sides import with_other_sides
from rgap.inversion.subspace.step import Place, layer_of
from rgap.inversion.walk import Client, Difference, Plan, Unit, Walk, kinks
from rgap.protocol import Sends
from tests.inversion.subspace.cases import perceptron

CLASSES, SAMPLES, INPUTS = 6, 6, 30
Order = tuple[tuple[int, ...], ...]
ORDER: Order = ((0, 1), (2, 3), (4, 5), (3, 0), (5, 2), (1, 4))
EPS = float(torch.finfo(torch.float32).eps)
AWAY = 1e-5
"""By which samples are off."""


def client(activation: str) -> tuple[Client, Plan, Tensor, Tensor]:
    """A client, its steps, and samples with labels."""
    model = perceptron((INPUTS, 24, 20, CLASSES), activation)
    target = Target(model, losses.CrossEntropy(CLASSES), (INPUTS,), (0.0, 1.0), batch_size=SAMPLES)
    told = Protocol(Sends.DIFFERENCE, learning_rate=0.05, epochs=2, minibatch=2, shuffled=True)
    x = torch.rand(SAMPLES, INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return client_of(target), plan_of(told, SAMPLES), x, torch.arange(SAMPLES).double()


def all_steps(server: Client, plan: Plan, labels: Tensor, walk: Walk) -> AllSteps:
    """Of what a walk's steps make."""
    difference = Difference.of(walk.end, server.weights, EPS, EPS, plan.steps)
    segments = Place.layers(server.network(server.weights), walk.end)
    assert segments is not None
    return AllSteps(server, plan, difference, layer_of(server.network(server.weights), segments[0]), labels)


def off(x: Tensor) -> Tensor:
    return x + AWAY * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)


def exchanged(order: Order, one: int, i: int, two: int, j: int) -> Order:
    swap = {i: j, j: i}
    return tuple(
        tuple(swap.get(each, each) for each in members) if step in (one, two) else members
        for step, members in enumerate(order)
    )


@pytest.mark.parametrize("activation", ["tanh", "leaky"])
@pytest.mark.parametrize("wrong", [(0, 1, 2, 4), (4, 5, 5, 1)])
def test_samples_in_each_other_s_step_are_put_right(activation: str, wrong: tuple[int, int, int, int]) -> None:
    server, plan, x, labels = client(activation)
    steps = all_steps(server, plan, labels, Walk(server, plan).all(x, labels, ORDER))
    begun = Together(off(x), exchanged(ORDER, *wrong), {}, torch.inf)
    assert steps.difference.misfit(steps.walk(begun)) > 100
    found = steps.settle(begun, x.new_full((SAMPLES,), AWAY), 2.0)
    assert [set(members) for members in found.order] == [set(members) for members in ORDER]
    assert found.misfit < 2
    assert float((found.x - x).norm()) < 0.3 * float((begun.x - x).norm())


def test_every_exchange_of_two_samples_is_told_apart_but_that_of_equal_ones() -> None:
    server, plan, x, labels = client("tanh")
    pairs = [(step, i, j) for step in (3, 5) for i, j in combinations(range(SAMPLES), 2)]
    steps = all_steps(server, plan, labels, Walk(server, plan).all(x, labels, ORDER))
    at = Together(x, ORDER, {}, 1.0)
    assert steps.told_apart(at, pairs)
    twins, alike = x.clone(), labels.clone()
    twins[4], alike[4] = x[0], labels[0]
    steps = all_steps(server, plan, alike, Walk(server, plan).all(twins, alike, ORDER))
    at = replace(at, x=twins)
    assert not steps.told_apart(at, pairs)
    assert steps.told_apart(at, [each for each in pairs if set(each[1:]) != {0, 4}])


def at_kinks(server: Client, plan: Plan, x: Tensor, labels: Tensor) -> list[Unit]:
    """Of each activation and each step the unit that stands nearest to its kink."""
    walk, found = Walk(server, plan).all(x, labels, ORDER), []
    for step, members in enumerate(ORDER):
        network = server.network(walk.trail[step])
        values = network.forward(x[list(members)])
        for activation, node in enumerate(kinks(network)):
            z = values[network.nodes[node].reads[0]].abs()
            row, unit = divmod(int(z.argmin()), z.shape[1])
            found.append(Unit(step, members[row], activation, unit))
    return found


@pytest.mark.parametrize("activation", ["relu", "leaky"])
def test_a_unit_on_its_wrong_side_is_told(activation: str) -> None:
    """The client has one unit on the other side; of all that are tried only that one's walk gives what was sent."""
    server, plan, x, labels = client(activation)
    natural = Walk(server, plan).all(x, labels, ORDER)
    units = at_kinks(server, plan, x, labels)
    for unit in units[::5]:
        network = server.network(natural.trail[unit.step])
        node = kinks(network)[unit.activation]
        z = float(network.forward(x[[unit.sample]])[network.nodes[node].reads[0]][0, unit.unit])
        walk = Walk(server, plan, sides={unit: not z > 0}).all(x, labels, ORDER)
        steps = all_steps(server, plan, labels, walk)
        begun = Together(x, ORDER, {}, torch.inf)
        if steps.difference.misfit(steps.walk(begun)) < 2:
            continue  # nothing came in at it
        alone = [
            each
            for each in units
            if steps.difference.misfit(Walk(server, plan, sides={each: not z > 0}).all(x, labels, ORDER)) < 2
        ]
        assert alone == [unit]
        error = x.new_full((SAMPLES,), abs(z))
        found = steps.settle(begun, error, 2.0)
        assert found.misfit < 2
        assert found.sides == {unit: not z > 0}
        assert float((found.x - x).abs().max()) < 1e-4


@pytest.mark.parametrize("activation", ["relu", "leaky"])
def test_on_the_way_units_sides_are_told_by_what_later_samples_miss(activation: str) -> None:
    """That one of the step before which is not on the client's side; where all are, none."""
    server, plan, x, labels = client(activation)
    told = 0
    for unit in at_kinks(server, plan, x, labels)[:-2]:
        step = unit.step + 1
        natural = Walk(server, plan).all(x, labels, ORDER[:step])
        network = server.network(natural.trail[unit.step])
        node = kinks(network)[unit.activation]
        z = float(network.forward(x[[unit.sample]])[network.nodes[node].reads[0]][0, unit.unit])
        right = Walk(server, plan, sides={unit: not z > 0}).all(x, labels, ORDER)
        sent = Difference.of(right.end, server.weights, EPS, EPS, plan.steps)
        found = []
        for walk in (right.instead(right.sides, step), natural):
            network, left = server.network(walk.weights), walk.left(sent.sent)
            place = Place.of(network, server.loss, left, sent.noise, None, sum(plan.sizes[step:]))
            error = x.new_full((SAMPLES,), 0.6 * abs(z) + AWAY)
            found.append(with_other_sides(walk, ORDER[:step], x, labels, error, place, x[list(ORDER[step])]))
        assert found[0] == right.sides
        assert found[1] in ({}, right.sides)
        told += bool(found[1])
    assert told > 3
