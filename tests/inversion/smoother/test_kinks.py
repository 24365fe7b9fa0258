"""Moments of a kinked activation at normal values, against sums over a fine grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap.inversion.smoother.kinks import passed, unpassed

GRID = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
DENSITY = torch.exp(-GRID.square() / 2)
CASES = [(0.3, 0.5, 0.2), (-1.0, 0.7, 0.01), (2.0, 0.1, 0.5), (0.0, 3.0, 1.0)]


def mean(values: Tensor) -> float:
    return float((values * DENSITY).sum() / DENSITY.sum())


@pytest.mark.parametrize(("centre", "std", "below"), CASES)
def test_what_comes_out_has_its_moments(centre: float, std: float, below: float) -> None:
    z = centre + std * GRID
    f = torch.where(z > 0, z, below * z)
    found = passed(*(torch.tensor([each], dtype=torch.float64) for each in (centre, std, below)))
    slope = mean((f - mean(f)) * (z - centre)) / std**2
    left = mean((f - mean(f) - slope * (z - centre)).square())
    upper = mean((z > 0).double())
    assert float(found.mean) == pytest.approx(mean(f), abs=1e-4)
    assert float(found.upper) == pytest.approx(upper, abs=1e-4)
    assert float(found.slope) == pytest.approx(slope, abs=1e-4)
    assert float(found.slope_variance) == pytest.approx((1 - below) ** 2 * upper * (1 - upper), abs=1e-4)
    assert float(found.residual) == pytest.approx(left, abs=1e-4 * max(1, std**2))


@pytest.mark.parametrize(("centre", "std", "below"), CASES)
def test_what_went_in_has_its_moments(centre: float, std: float, below: float) -> None:
    x = centre + std * GRID
    z = torch.where(x > 0, x, x / below)
    found = unpassed(*(torch.tensor([each], dtype=torch.float64) for each in (centre, std, below)))
    assert float(found[0]) == pytest.approx(mean(z), rel=1e-4, abs=1e-6)
    assert float(found[1]) == pytest.approx(mean((z - mean(z)).square()) ** 0.5, rel=1e-4)
