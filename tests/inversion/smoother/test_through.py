"""Steps through the local steps, from near a sample, and how unknowns are whitened."""

from __future__ import annotations

import pytest
import torch

from rgap.inversion.prior import Prior
from rgap.inversion.smoother.setting import Setting
from rgap.inversion.smoother.through import Through, Whitened
from rgap.inversion.walk import Walk
from tests.inversion.smoother.test_steps import of


@pytest.mark.parametrize("number", [2, 5])
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
    for found in Through(setting).passes(start):
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
