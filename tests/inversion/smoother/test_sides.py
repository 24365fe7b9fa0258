"""Slopes in doubt: how they vary together, against draws, and what they do, against differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap.inversion.smoother.sides import doubts, effects, steps_with
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
    run = steps_with(steps, x, std)
    found = doubts(steps, run, std)
    assert sum(len(doubt.unit) for doubt in found)
    generator = torch.Generator().manual_seed(0)
    for j, doubt in enumerate(found):
        z = torch.cat([step.values[steps.reads(steps.activations[j])] for step in run]).flatten(1)
        for unit in doubt.unit.unique().tolist():
            pattern = doubt.pattern[doubt.unit == unit]
            drawn = z[:, unit] + float(std[j].flatten()[unit]) * torch.randn(40_000, 1, generator=generator).double()
            slopes = torch.where(drawn > 0, 1.0, 0.2).mT
            assert (torch.cov(slopes) - pattern.mT @ pattern).abs().max() < 0.02


def test_each_does_to_the_gradients_what_its_slopes_do() -> None:
    steps, x, std = doubtful(1)
    run = steps_with(steps, x, std)
    found = doubts(steps, run, std)
    columns = effects(steps, run, found)
    weights = dict(steps.client.weights)

    def gradient(d: Tensor) -> dict[str, Tensor]:
        parts = torch.split(d, [len(doubt.unit) for doubt in found])
        expected = [run[0].slopes[at] for at in steps.activations]
        slopes = [doubt.added(slope, own) for doubt, slope, own in zip(found, expected, parts, strict=True)]
        with GivenSlopes(slopes):
            return steps.client.differentiable(weights, x, steps.labels)

    number = sum(len(doubt.unit) for doubt in found)
    names = list(columns)
    for at in range(0, number, 3):
        unit = torch.zeros(number, dtype=torch.float64)
        unit[at] = 1e-6
        up, down = gradient(unit), gradient(-unit)
        for name in names:
            own = at - (number - (len(columns[name]) - 4))  # the last four are the output's
            change = (up[name] - down[name]) / 2e-6
            if own < 0:
                k_alone = change.abs().max() < 10 * WIDTH * steps.size[name]
                assert k_alone
                continue
            wanted = columns[name][own]
            assert float((change - wanted).norm()) <= 0.2 * float(wanted.norm()) + WIDTH * steps.size[name]


@pytest.mark.parametrize("number", [1, 3])
def test_with_no_doubt_they_are_the_steps_themselves(number: int) -> None:
    steps, x, std = doubtful(number)
    run = steps_with(steps, x, [1e-9 * each for each in std])
    assert not sum(len(doubt.unit) for doubt in doubts(steps, run, [1e-9 * each for each in std]))
    made = [steps.rows(step.network, step.values, step.cotangents) for step in run]
    for name in steps.names:
        mean = sum(share * each[name][0] for share, each in zip(steps.shares, made, strict=True))
        assert float((mean - steps.gradient[name]).norm()) < 1e-3 * float(steps.gradient[name].norm())
