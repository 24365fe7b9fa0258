"""The prior, against the sum that it stands for."""

from __future__ import annotations

import pytest
import torch

from rgap import data
from rgap.inversion.prior import COLOUR, Prior


@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 2, 2), (3, 4, 2), (3, 1, 4), (7,)])
@pytest.mark.parametrize("samples", [1, 2])
def test_the_prior_is_its_matrix(shape: tuple[int, ...], samples: int) -> None:
    prior = Prior(shape, 0.5)
    x = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert prior.smooth == (len(shape) == 3 and min(shape[1:]) >= 2)
    assert torch.allclose(prior(x).flatten(), prior.matrix(x, samples) @ x.flatten())


def test_smoothness_is_the_sum_of_squared_differences() -> None:
    x = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slow = sum(
        float((x[c, i, j] - x[c, a, b]) ** 2)
        for c in range(2)
        for i in range(3)
        for j in range(4)
        for a, b in ((i + 1, j), (i, j + 1))
        if a < 3 and b < 4
    )
    assert float(x.flatten() @ Prior((2, 3, 4), 0.0)(x).flatten()) == pytest.approx(slow)


def test_what_differs_between_colours_counts_many_times() -> None:
    x = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slow = 0.0
    for i in range(4):
        for j in range(5):
            for a, b in ((i + 1, j), (i, j + 1)):
                if a < 4 and b < 5:
                    apart = [float(x[c, i, j] - x[c, a, b]) for c in range(3)]
                    grey = sum(apart) / 3
                    slow += 3 * grey**2 + COLOUR * sum((each - grey) ** 2 for each in apart)
    prior = Prior((3, 4, 5), 0.0)
    assert "colours" in str(prior)
    assert float(x.flatten() @ prior(x).flatten()) == pytest.approx(slow)


def test_a_coloured_prior_finds_photographs_better(photograph: torch.Tensor) -> None:
    """Every fifth value of a photograph, and nothing else."""
    known = torch.arange(0, photograph.numel(), 5)
    found = {}
    for coloured in (True, False):
        prior = Prior(tuple(photograph.shape) if coloured else (1, *photograph.shape[1:]), 0.5)
        matrix = prior.matrix(photograph, 1 if coloured else 3)
        free = torch.ones(photograph.numel(), dtype=torch.bool).index_fill(0, known, False)
        x = photograph.flatten().clone()
        x[free] = torch.linalg.solve(matrix[free][:, free], -matrix[free][:, ~free] @ x[~free])
        found[coloured] = float((x - photograph.flatten()).square().mean())
    assert found[True] < found[False] / 1.5


@pytest.fixture
def photograph() -> torch.Tensor:
    return data.photographs(1, 16).inputs[0].double()
