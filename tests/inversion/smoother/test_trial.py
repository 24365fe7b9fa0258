"""Sides by trial: the combination of changes that leaves least, against all combinations; units put on their sides."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from rgap.inversion.smoother.sides import Doubt
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
    found = Trial(steps, lower).settled(start, doubts)
    after = steps.middle_network.forward(found)
    for at in steps.activations:
        z, own = values[steps.reads(at)], after[steps.reads(at)]
        assert ((z > 0) == (own > 0)).all()
    assert misfit(found) < misfit(start)
    assert Trial(steps, lower).settled(x, [Doubt(each.unit[:0], each.pattern[:0]) for each in doubts]) is x
