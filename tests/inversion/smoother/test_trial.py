"""Sides by trial: the combination of changes that leaves least, against all combinations; units put on their sides."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from rgap.inversion.smoother.sides import Doubt, expecting, steps_with
from rgap.inversion.smoother.trial import Trial, _least
from rgap.inversion.walk import Walk
from tests.inversion.smoother.test_steps import of


@pytest.mark.parametrize("seed", range(4))
def test_the_combination_that_leaves_least(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    changes = torch.randn(8, 30, generator=generator, dtype=torch.float64)
    unit, true = [0, 0, 1, 1, 2, 3, 3, 4], [1, 2, 4, 6]
    here = 0.1 * torch.randn(30, generator=generator, dtype=torch.float64) - changes[true].sum(0)
    ways = [[None, *(at for at in range(8) if unit[at] == of)] for of in range(5)]
    every = [[at for at in chosen if at is not None] for chosen in product(*ways)]
    left = [float((here + changes[chosen].sum(0)).norm()) for chosen in every]
    assert sorted(_least(here, changes, unit)) == every[left.index(min(left))] == true
    assert _least(here[:0], changes[:0, :0], []) == []


def test_units_are_put_on_the_sides_on_which_they_were() -> None:
    steps, x = of(3)
    values = steps.middle_network.forward(x)
    generator = torch.Generator().manual_seed(1)
    start = x + 3e-3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    doubts, wrong = [], 0
    there = steps.middle_network.forward(start)
    for at in steps.activations:
        z, own = values[steps.reads(at)].flatten(), there[steps.reads(at)].flatten()
        near = (z.abs() < 0.03 * z.square().mean().sqrt()).nonzero().flatten()
        doubts.append(Doubt(near, torch.ones(len(near), 3, dtype=torch.float64)))
        wrong += int(((z > 0) != (own > 0)).sum())
    assert wrong

    def misfit(x: torch.Tensor) -> float:
        walk = Walk(steps.client, steps.plan).all(x, steps.labels, ((0,),) * 3)
        return steps.difference.along(walk).misfit(walk)

    lower = 3e2 * torch.eye(x.numel(), dtype=torch.float64)
    found, slopes = Trial(steps, lower).settled(start, doubts)
    after = steps.middle_network.forward(found)
    for at in steps.activations:
        z, own = values[steps.reads(at)], after[steps.reads(at)]
        assert ((z > 0) == (own > 0)).all()
    run = steps_with(steps, x, expecting(steps, [torch.full_like(each[:1], 1e-9) for each in slopes]))
    for at, slope in zip(steps.activations, slopes, strict=True):
        torch.testing.assert_close(slope, torch.cat([step.slopes[at] for step in run]))
    assert misfit(found) < misfit(start)
    assert Trial(steps, lower).settled(x, [Doubt(each.unit[:0], each.pattern[:0]) for each in doubts])[0] is x


def test_a_unit_that_crosses_may_do_so_a_step_earlier_or_later() -> None:
    """However well it is known where it begins, and then nothing moves; farther away nothing is tried."""
    steps, x = of(4)
    z = [torch.ones(4, 2, dtype=torch.float64)]
    z[0][:, 0] = torch.tensor([-2.0, -1.0, 1.0, 2.0])
    trial = Trial(steps, torch.eye(x.numel(), dtype=torch.float64))
    for std, moves in ((1e-3, [0.0, 0.0]), (0.5, [-1.5, 1.5])):
        ways = trial._ways(z, [(0, 0)], torch.full((1,), std, dtype=torch.float64))
        assert sorted((sum(way.above), way.shift) for way in ways) == [(1, moves[0]), (3, moves[1])]
