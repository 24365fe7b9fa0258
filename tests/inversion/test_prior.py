"""The prior, against the sum that it stands for."""

from __future__ import annotations

import pytest
import torch

from rgap.inversion.prior import Prior


@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 2, 2), (3, 1, 4), (7,)])
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
