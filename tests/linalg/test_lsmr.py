"""LSMR on tensors, against a factor."""

from __future__ import annotations

import pytest
import torch

from rgap.linalg.lsmr import lsmr


@pytest.mark.parametrize("damp", [0.0, 0.7])
def test_it_ends_at_the_damped_least_squares_solution(damp: float) -> None:
    generator = torch.Generator().manual_seed(0)
    J, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((9, 5), (9,)))
    found = lsmr(lambda v: J @ v, lambda u: J.mT @ u, right, 5, 50, damp)
    rows = torch.cat([J, damp * torch.eye(5, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(rows, torch.cat([right, right.new_zeros(5)])[:, None]).solution[:, 0]
    torch.testing.assert_close(found, wanted)
    fewer = lsmr(lambda v: J @ v, lambda u: J.mT @ u, right, 5, 2, damp)
    assert float((fewer - wanted).norm()) > 1e-3
