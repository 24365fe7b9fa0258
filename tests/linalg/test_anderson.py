"""Anderson's acceleration against a direct solve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap.linalg.anderson import anderson


@pytest.mark.parametrize("growth", [0.5, 0.95, 1.5, -3.0])
def test_it_finds_the_fixed_point_of_a_linear_map(growth: float) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    sizes = torch.linspace(0.0, 0.6, 12, dtype=torch.float64)
    sizes[0] = growth  # one direction that shrinks slowly, or grows: alone the iteration would be slow, or diverge
    matrix, b = basis @ sizes.diag() @ basis.mT, torch.randn(12, generator=generator, dtype=torch.float64)

    def move(x: Tensor) -> tuple[Tensor, float]:
        by = matrix @ x + b - x
        return by, float(by.norm())

    found, misfit = anderson(move, torch.zeros_like(b), 30, 1e-10)
    expected = torch.linalg.solve(torch.eye(12, dtype=torch.float64) - matrix, b)
    assert misfit <= 1e-10
    assert float((found - expected).norm()) < 1e-8 * float(expected.norm())


def test_the_best_point_is_given_back_where_nothing_helps() -> None:
    def move(x: Tensor) -> tuple[Tensor, float]:
        return torch.full_like(x, torch.inf), 1 + float(x.norm())

    found, misfit = anderson(move, torch.zeros(3, dtype=torch.float64), 10, 1e-10)
    assert found.tolist() == [0.0] * 3
    assert misfit == 1.0
