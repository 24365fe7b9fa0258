"""Steps through the local steps, from near a sample, and how unknowns are whitened."""

from __future__ import annotations

import pytest
import torch

from rgap.inversion.prior import Prior
from rgap.inversion.smoother.setting import Setting
from rgap.inversion.smoother.sides import doubts, steps_with
from rgap.inversion.smoother.through import Through, Whitened
from rgap.inversion.walk import Walk
from rgap.linalg.derivative import jacobian
from tests.inversion.smoother.test_steps import of


@pytest.mark.parametrize("number", [2, 4])
def test_units_on_their_wrong_sides_are_settled(number: int) -> None:
    steps, x = of(number)
    setting = Setting(steps, Prior((1, 5, 5), 0.5), (0.0, 1.0))
    start = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def misfit(x: torch.Tensor) -> float:
        walk = Walk(steps.client, steps.plan).all(x, steps.labels, ((0,),) * number)
        return steps.difference.along(walk).misfit(walk)

    values, there = (steps.middle_network.forward(each) for each in (x, start))
    wrong = [((values[steps.reads(at)] > 0) != (there[steps.reads(at)] > 0)).sum() for at in steps.activations]
    assert sum(wrong) > 0
    assert misfit(start) > 100
    for found in Through(setting).passes(start, 1e-3):
        if misfit(found.x) <= 2:
            break
    assert misfit(found.x) <= 2
    assert found.explained
    assert float((found.x - x).norm() / x.norm()) < 1e-3


def test_whitening_is_undone_by_its_adjoint() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64).tril() + 3 * torch.eye(6, dtype=torch.float64)
    whitened = Whitened(root, 2)
    v, u = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    assert float(whitened.unwhitened(v) @ u) == pytest.approx(float(v @ whitened.adjoint(u)))
    # what is whitened has the metric of the factor, doubts first
    found = whitened.unwhitened(v)
    found = torch.cat([found[4:], found[:4]])
    torch.testing.assert_close(root.mT @ found, v)


@pytest.mark.parametrize(("number", "apart"), [(1, 1.001), (2, 10.0)])
def test_whitened_unknowns_are_told_alike_by_the_steps(number: int, apart: float) -> None:
    """With many sides in doubt, whose units change what all layers behind read."""
    steps, x = of(number)
    through = Through(Setting(steps, Prior((1, 5, 5), 0.5), (0.0, 1.0)))
    values, noise = steps.middle_network.forward(x), 3e-3
    z = [values[steps.reads(at)] for at in steps.activations]
    std = [torch.full_like(each, 0.05 * float(each.square().mean().sqrt())) for each in z]
    variance = {name: torch.full_like(g, (noise * steps.size[name]) ** 2) for name, g in steps.gradient.items()}
    run = steps_with(steps, x, std)
    found = doubts(steps, run, std)
    whitened, _, _ = through._factored(run, found, variance)
    assert whitened.doubts >= 20
    slopes = [torch.cat([step.slopes[at] for step in run]) for at in steps.activations]
    made, u = through._made(slopes, found, variance), torch.cat([x.flatten(), x.new_zeros(whitened.doubts)])
    moves = jacobian(made.at(made.trail(u)), u)
    white = torch.stack([whitened.adjoint(row) for row in moves])
    told = torch.linalg.svdvals(white).square()
    assert 1 / apart < float(told.min()) <= float(told.max()) < apart
