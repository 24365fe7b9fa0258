"""All layers in front of what is known, solved together."""

from __future__ import annotations

import torch
from torch import nn

from rgap import Target, losses
from rgap.inversion.gauss_newton import Solution
from rgap.inversion.joint import JointSolve
from rgap.inversion.prior import Prior
from rgap.inversion.state import State
from rgap.inversion.system import ConstraintSystem
from rgap.linalg.least_squares import Direct
from tests.auditing.small_audits import seeded

EPS = 1e-9


def test_what_few_rows_tell_is_told_to_their_last_digits() -> None:
    """From an input that agrees but for what is allowed: each step leaves a part of what steep slopes bend."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = seeded(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(18, 3))
        x, off = torch.rand(1, 1, 6, 6, dtype=torch.float64), 1e-3 * torch.randn(1, 1, 6, 6, dtype=torch.float64)
    network = Target(model, losses.CrossEntropy(3), (1, 6, 6), (0.0, 1.0)).network
    front = network.up_to(3)
    value = front.forward(x)[-1]
    system = ConstraintSystem(front, State(value, torch.zeros_like(value), None, torch.full_like(value, EPS)), {}, EPS)
    begun = Solution(x + off, system.distance(system.linearise(x + off)), 1)
    assert 1e-5 < begun.distance < 1e-2
    solve, prior, generator = JointSolve(), Prior((1, 6, 6), 0.5), torch.Generator().manual_seed(0)
    found = solve.solve(system, Direct(1e-6), prior, 1e-2, None, generator, lambda step, distance: None, begun)
    assert found.report.rank == 18 == system.unknowns - found.report.free
    assert system.distance(system.linearise(found.x)) < 10 * EPS
    moved = float((found.x - begun.x).square().mean().sqrt())
    assert 0 < moved < 2 * float(off.square().mean().sqrt())  # what is free stays
