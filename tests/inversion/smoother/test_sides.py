"""Slopes in doubt: how they vary together, against draws, and what they do, against differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap.inversion.smoother.effects import effects
from rgap.inversion.smoother.sides import doubts, expecting, in_front, steps_with
from rgap.inversion.smoother.steps import KinkedSteps
from rgap.nn.soft import GivenSlopes
from tests.inversion.smoother.test_steps import of

WIDTH = 0.02


def doubtful(steps: int) -> tuple[KinkedSteps, Tensor, list[Tensor]]:
    setting, x = of(steps)
    values = setting.middle_network.forward(x)
    there = [values[setting.reads(at)] for at in setting.activations]
    return setting, x, [torch.full_like(z, WIDTH * float(z.square().mean().sqrt())) for z in there]


def test_sides_vary_together_as_draws_do() -> None:
    steps, x, std = doubtful(3)
    there = in_front(steps, steps_with(steps, x, expecting(steps, std)))
    found = doubts(steps, there, std)
    assert sum(len(doubt.unit) for doubt in found)
    generator = torch.Generator().manual_seed(0)
    for j, doubt in enumerate(found):
        z = there[j].flatten(1)
        for unit in doubt.unit.unique().tolist():
            pattern = doubt.pattern[doubt.unit == unit]
            drawn = z[:, unit] + float(std[j].flatten()[unit]) * torch.randn(40_000, 1, generator=generator).double()
            slopes = torch.where(drawn > 0, 1.0, 0.2).mT
            assert (torch.cov(slopes) - pattern.mT @ pattern).abs().max() < 0.02


@pytest.mark.parametrize("number", [1, 3])
def test_each_does_to_the_gradients_what_its_slopes_do(number: int) -> None:
    steps, x, std = doubtful(number)
    run = steps_with(steps, x, expecting(steps, std))
    found = doubts(steps, in_front(steps, run), std)
    columns = effects(steps, run, found)
    made = [steps.rows(step.network, step.values, step.cotangents) for step in run]
    gradients = [{name: rows[0] for name, rows in each.items()} for each in made]
    trail = [steps.now(gradients[:t]) for t in range(number)]

    def gradient(d: Tensor) -> dict[str, Tensor]:
        """The mean of the steps, whose weights stay."""
        parts = torch.split(d, [len(doubt.unit) for doubt in found])
        total = {name: torch.zeros_like(w) for name, w in steps.client.weights.items()}
        for t, share in enumerate(steps.shares):
            slopes = [
                doubt.added(torch.cat([step.slopes[at] for step in run]), own)[t]
                for at, doubt, own in zip(steps.activations, found, parts, strict=True)
            ]
            with GivenSlopes(slopes):
                each = steps.client.differentiable(trail[t], x, steps.labels)
            total = {name: own + share * each[name] for name, own in total.items()}
        return total

    doubtful_slopes = sum(len(doubt.unit) for doubt in found)
    assert doubtful_slopes
    for at in range(doubtful_slopes):
        unit = torch.zeros(doubtful_slopes, dtype=torch.float64)
        unit[at] = 1e-5
        up, down = gradient(unit), gradient(-unit)
        for name, own in columns.items():
            assert len(own) == doubtful_slopes + 4  # the last four are the output's
            change = (up[name] - down[name]) / 2e-5
            assert float((change - own[at]).norm()) <= 1e-5 * float(change.norm()) + 1e-7 * steps.size[name]


@pytest.mark.parametrize("number", [1, 3])
def test_with_no_doubt_they_are_the_steps_themselves(number: int) -> None:
    steps, x, std = doubtful(number)
    sharp = [1e-9 * each for each in std]
    run = steps_with(steps, x, expecting(steps, sharp))
    assert not sum(len(doubt.unit) for doubt in doubts(steps, in_front(steps, run), sharp))
    made = [steps.rows(step.network, step.values, step.cotangents) for step in run]
    for name in steps.names:
        mean = sum(share * each[name][0] for share, each in zip(steps.shares, made, strict=True))
        assert float((mean - steps.gradient[name]).norm()) < 1e-3 * float(steps.gradient[name].norm())
