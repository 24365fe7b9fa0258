"""How many vectors a weight difference holds, by its singular values, and which inputs are the same sample."""

from __future__ import annotations

import pytest
import torch

from rgap.inversion.subspace.step import ABOVE, NEAR, Place, _above
from tests.inversion.subspace.cases import case

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


@pytest.mark.parametrize("noise", [1e-7, 1e-5])
def test_an_input_within_its_error_of_a_sample_is_that_sample(noise: float) -> None:
    drawn, samples = case("tanh", 5, dtype=torch.float64), 5
    generator = torch.Generator().manual_seed(0)
    left = {
        name: g + noise * torch.randn(g.shape, generator=generator, dtype=torch.float64)
        for name, g in drawn.gradients.items()
    }
    place = Place.of(drawn.target.network, drawn.target.loss, left, dict.fromkeys(left, noise), None, samples)
    x = place.solve(drawn.x, 20)
    away = torch.randn(x.shape, generator=generator, dtype=torch.float64) @ place.spaces.first.v[:-1]
    away = away @ place.spaces.first.v[:-1].mT
    away = away / away.square().mean(1, keepdim=True).sqrt()
    again = x + 3 * place.error(x)[:, None] * away
    far = ((again - x).norm(dim=1) > NEAR * x.norm(dim=1)).tolist()
    assert any(far) is (noise == 1e-5)
    for at in range(samples):
        others = x[[each for each in range(samples) if each != at]]
        assert place.twice(again[at], x[[at]])
        assert not place.twice(x[at], others)
        assert not place.twice(x[at], x[:0])
