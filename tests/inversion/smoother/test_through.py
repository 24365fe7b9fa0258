"""Steps through the local steps, from near a sample, and how unknowns are whitened."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap.inversion.prior import Prior
from rgap.inversion.smoother.setting import Setting
from rgap.inversion.smoother.sides import doubts, expecting, in_front, steps_with
from rgap.inversion.smoother.steps import KinkedSteps
from rgap.inversion.smoother.through import Near, Through, Whitened
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


def standing(steps: KinkedSteps, x: Tensor) -> list[Tensor]:
    """In front of each activation in all steps."""
    return in_front(steps, steps_with(steps, x, expecting(steps, [torch.full((1,), 1e-12)] * len(steps.activations))))


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_moves_converge_where_weights_of_later_steps_hang_on_the_sample(rate: float) -> None:
    steps, x = of(4, rate)
    z = standing(steps, x)
    slopes = [torch.where(own > 0, torch.ones_like(own), b) for own, b in zip(z, steps.below, strict=True)]
    start = x + 0.03 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    near = Near(start, z, [torch.full_like(each, 1e-9) for each in z], dict.fromkeys(steps.names, 1e-6))
    found = Through(Setting(steps, Prior((1, 5, 5), 0.5), (0.0, 1.0))).step(near, slopes)
    assert found.explained
    assert float((found.x - x).norm()) < 1e-4 * float((start - x).norm())


def test_with_sides_given_noise_is_taken_for_granted_only_where_rows_miss_more_than_the_rounding() -> None:
    steps, x = of(4)
    z, through = standing(steps, x), Through(Setting(steps, Prior((1, 5, 5), 0.5), (0.0, 1.0)))
    right = [torch.where(own > 0, torch.ones_like(own), b) for own, b in zip(z, steps.below, strict=True)]
    start = x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    near = Near(start, z, [torch.full_like(each, 1e-9) for each in z], dict.fromkeys(steps.names, 1e-3))
    sharp, blunt = (of(near, right) for of in (through.sharp, through.step))
    assert sharp.explained
    assert float((sharp.x - x).norm()) < 0.1 * float((blunt.x - x).norm())
    wrong = [own.clone() for own in right]
    wrong[0].flatten(1)[:, 0] = 1.2 - wrong[0].flatten(1)[:, 0]
    alike = through.sharp(near, wrong)
    assert torch.equal(alike.x, through.step(near, wrong).x)


def test_later_steps_are_known_where_a_unit_stood_on_its_wrong_side() -> None:
    """Its slope is found, and with it the weights of the steps behind."""
    steps, x = of(4, 0.2)
    z, through = standing(steps, x), Through(Setting(steps, Prior((1, 5, 5), 0.5), (0.0, 1.0)))
    start = x + 3e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = standing(steps, start)
    assert sum(int(((a > 0) != (b > 0)).sum()) for a, b in zip(z, before, strict=True))
    std = [torch.full_like(each, 0.03 * float(each.square().mean().sqrt())) for each in z]
    found = through.step(Near(start, before, std, dict.fromkeys(steps.names, 1e-3)))
    alone = standing(steps, found.x)
    assert sum(int(((a > 0) != (b > 0)).sum()) for a, b in zip(z, alone, strict=True))

    def off(of: list[Tensor]) -> float:
        """In the last step, in units of the errors that are said."""
        each = zip(of, z, found.std, strict=True)
        return max(float(((a[-1] - b[-1]) / s[-1]).square().mean().sqrt()) for a, b, s in each)

    assert off(found.z) < 3
    assert off(alone) > 3 * off(found.z)


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


@pytest.mark.parametrize(("number", "apart"), [(1, 1.001), (2, 12.0)])
def test_whitened_unknowns_are_told_alike_by_the_steps(number: int, apart: float) -> None:
    """With many sides in doubt, whose units change what all layers behind read."""
    steps, x = of(number)
    through = Through(Setting(steps, Prior((1, 5, 5), 0.5), (0.0, 1.0)))
    values, noise = steps.middle_network.forward(x), 3e-3
    z = [values[steps.reads(at)] for at in steps.activations]
    std = [torch.full_like(each, 0.05 * float(each.square().mean().sqrt())) for each in z]
    variance = {name: torch.full_like(g, (noise * steps.size[name]) ** 2) for name, g in steps.gradient.items()}
    run = steps_with(steps, x, expecting(steps, std))
    found = doubts(steps, in_front(steps, run), std)
    whitened, _, _ = through._factored(run, found, variance)
    assert whitened.doubts >= 20
    slopes = [torch.cat([step.slopes[at] for step in run]) for at in steps.activations]
    made, u = through._made(slopes, found, variance), torch.cat([x.flatten(), x.new_zeros(whitened.doubts)])
    moves = jacobian(made.missed, u)
    white = torch.stack([whitened.adjoint(row) for row in moves])
    told = torch.linalg.svdvals(white).square()
    assert 1 / apart < float(told.min()) <= float(told.max()) < apart
