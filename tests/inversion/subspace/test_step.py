"""How many vectors a weight difference holds, by its singular values."""

from __future__ import annotations

import pytest
import torch

from rgap.inversion.subspace.step import ABOVE, _above

SHAPE = (60, 400)


@pytest.mark.parametrize("times", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("vectors", [0, 1, 12])
def test_rounding_that_is_larger_than_foretold_is_no_vector(vectors: int, times: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rounding = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    k, x = (torch.randn(n, vectors, generator=generator, dtype=torch.float64) for n in SHAPE)
    sizes = torch.linalg.svdvals(10 * k @ x.mT + times * rounding)
    rank, norm = _above(sizes, SHAPE, 1.0)
    assert rank == vectors
    edge = float(torch.linalg.matrix_norm(rounding, 2))
    assert norm == pytest.approx(max(1.0, times) * edge, rel=0.2)


def test_few_singular_values_show_no_rounding() -> None:
    sizes = torch.tensor([50.0, 40.0, 30.0], dtype=torch.float64)
    rank, norm = _above(sizes, (3, 9), 10.0)
    assert norm == 10 * (3**0.5 + 3)
    assert rank == int((sizes > ABOVE * norm).sum())
