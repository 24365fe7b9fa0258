"""The rows of a pooled layer as products, in both precisions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap.inversion import route_rows, routes
from rgap.inversion.routed import RoutedRows
from rgap.inversion.unpool import route_of
from tests.inversion.test_unpool import behind_the_pool, pictures, target_of

every_step = pytest.mark.parametrize(
    ("kind", "decided"),
    [(kind, decided) for kind in ("relu, pool", "batch norm", "relu, mean") for decided in (False, True)],
)


def drawn(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(kind: str, decided: bool, size: float = 1.0) -> tuple[RoutedRows, Tensor]:
    """Those of a step on the way, with all gradients of such a size and none of the first output, and its input."""
    target, x = target_of(kind, 6), pictures(1, 1, 6).double()
    state, gradients, node, _ = behind_the_pool(target, x)
    route = route_of(target.network, node, 0)
    assert route is not None
    observed = route.observed(state, gradients[route.weight_name], False)
    for of_output in (observed.cotangent[:, 0], observed.grad[0, 0]):
        of_output.zero_()
    for each in (observed.cotangent, observed.grad):
        each.mul_(size)
    step = route_rows.Step(route_rows.Point(route.part, observed, 0.7 * x + 0.1), 3.0, 0.3, routes.SETTLED)
    step = step.decided() if decided else step
    return step.products(step.weigher()), x


@every_step
def test_back_is_the_adjoint_of_the_rows_with_their_weights(kind: str, decided: bool) -> None:
    rows, x = rows_of(kind, decided)
    move = drawn(x, 1)
    values, grads = rows.each(move)
    v, g = drawn(values, 2), drawn(grads, 3)
    assert rows.apart is not None
    expected = (rows.weight * values * v).sum() + rows.variance * (rows.apart(grads) * g).sum()
    assert float((move * rows.back(v, g)).sum()) == pytest.approx(float(expected), rel=1e-9)
    torch.testing.assert_close(rows.normal(move[None])[0], rows.back(values, grads))


@every_step
@pytest.mark.parametrize("size", [1.0, 1e-12])
def test_products_in_float32_are_the_same_but_for_its_rounding(kind: str, decided: bool, size: float) -> None:
    """Also of gradients so small that the inverse of their squares is large, and of an output without any."""
    rows, x = rows_of(kind, decided, size)
    single, move = rows.single, drawn(x, 1)[None]
    assert single is not None
    found, expected = single.normal(move.float()), rows.normal(move)
    assert found.dtype == torch.float32
    assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())
