"""Null spaces of Gram matrices, against all eigenvectors."""

from __future__ import annotations

import pytest
import torch

from rgap.rank import measured

COUNT = 90


@pytest.mark.parametrize("decades", [0.0, 3.0, 5.0])
@pytest.mark.parametrize("rank", [0, 1, 20, 44, 45, 46, 80, 89, 90])
def test_a_null_space_is_what_eigenvectors_span(rank: int, decades: float) -> None:
    generator = torch.Generator().manual_seed(rank)
    drawn = torch.randn(2, COUNT, COUNT, generator=generator, dtype=torch.float64)
    left, right = torch.linalg.qr(drawn)[0]
    sizes = torch.logspace(0, -decades, rank, dtype=torch.float64)
    rows = left[:, :rank] * sizes @ right[:, :rank].mT
    found = measured._null(rows.mT @ rows)
    assert found.shape == (COUNT, COUNT - rank)
    expected = right[:, rank:] @ right[:, rank:].mT
    # The range's smallest direction is told from rounding by so much in the squares.
    torch.testing.assert_close(found @ found.mT, expected, rtol=0, atol=1e-13 * 10 ** (2 * decades) + 1e-12)
