"""Products with a derivative, against the derivative itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap.linalg import derivative
from rgap.linalg.derivative import linearised


def test_products_are_those_of_the_jacobian() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    x, v, u = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (3, 3, 5))

    def function(x: Tensor) -> Tensor:
        return (a @ x).tanh() + (a @ x.square())

    with torch.no_grad():  # whoever calls
        along, here, back = linearised(function, x)
    jacobian = torch.func.jacfwd(function)(x)
    assert torch.equal(here, function(x))
    torch.testing.assert_close(along(v), jacobian @ v)
    torch.testing.assert_close(back(u), jacobian.mT @ u)
    several = torch.stack([v, 2 * v, -v])
    torch.testing.assert_close(along(several), several @ jacobian.mT)


@pytest.mark.parametrize("at_once", [1, 8, 1000])
def test_the_jacobian_is_that_of_forward_mode(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivative, "AT_ONCE", at_once)
    a = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return torch.cat([(a @ x).softmax(0), 1 + torch.nn.functional.silu(x), torch.ones(1, dtype=x.dtype)])

    torch.testing.assert_close(derivative.jacobian(function, x), torch.func.jacfwd(function)(x))


def test_where_nothing_hangs_on_the_input_no_product_moves() -> None:
    along, here, back = linearised(lambda x: torch.ones(3, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    assert here.tolist() == [1, 1, 1]
    assert along(torch.ones(2, dtype=torch.float64)).tolist() == [0, 0, 0]
    assert back(torch.ones(3, dtype=torch.float64)).tolist() == [0, 0]
