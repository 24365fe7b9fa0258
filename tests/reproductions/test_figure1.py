"""The search that the closed forms are compared with, and that the comparison would notice a wrong one."""

from __future__ import annotations

from dataclasses import replace
from math import exp

import numpy as np
import pytest
import torch
from scipy.special import lambertw
from torch import Tensor

from rgap.losses import Exponential, Logistic, MarginLoss
from rgap.reproductions.figure1 import CURVES, Curve, _measured

every_curve = pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.ours.name)


@every_curve
def test_the_plain_product_is_that_of_the_loss(curve: Curve) -> None:
    """By autograd, from the loss itself: Eq. 25 as printed would fail here."""
    for at in np.linspace(-5, min(curve.end, 20) - 0.01, 50):
        mu = torch.tensor(float(at), dtype=torch.float64, requires_grad=True)
        [slope] = torch.autograd.grad(curve.ours.value(mu), mu)
        assert curve.product(float(at)) == pytest.approx(float((mu * slope).detach()), rel=1e-9, abs=1e-15)


@every_curve
def test_the_turning_point_is_the_lowest_of_all(curve: Curve) -> None:
    where, lowest = curve.turning()
    assert lowest == pytest.approx(curve.product(where))
    assert all(curve.product(mu) >= lowest - 1e-12 for mu in np.linspace(-9, min(curve.end, 30), 5000).tolist()[:-1])


def test_the_logistic_product_turns_where_lambert_says() -> None:
    w = float(lambertw(exp(-1)).real)
    assert CURVES[0].turning() == pytest.approx((1 + w, -w), abs=1e-7)


@every_curve
@pytest.mark.parametrize("share", [0.99, 0.5, 1e-3, -0.2, -3.0])
def test_roots_have_the_product_and_none_is_left_out(curve: Curve, share: float) -> None:
    product = share * curve.turning()[1]
    roots = curve.roots(product)
    assert [curve.product(mu) for mu in roots] == pytest.approx([product] * len(roots), rel=1e-9)
    # Crossings on a fine grid: as many as roots.
    grid = np.linspace(-12, min(curve.end, 30) - 1e-9, 40_001)
    above = np.array([curve.product(float(mu)) for mu in grid]) > product
    assert int((above[1:] != above[:-1]).sum()) == len(roots)


class Shifted(Logistic):
    """Its roots are off by a thousandth."""

    def roots(self, product: float) -> tuple[float, ...]:
        return tuple(mu + 1e-3 for mu in super().roots(product))


class Forgetful(Exponential):
    """It follows one branch only."""

    def roots(self, product: float) -> tuple[float, ...]:
        return super().roots(product)[:1]


@pytest.mark.parametrize(("loss", "error", "missing"), [(Shifted(), 1e-3, False), (Forgetful(), 0.0, True)])
def test_wrong_roots_are_noticed(loss: MarginLoss, error: float, missing: bool) -> None:
    curve = replace(next(each for each in CURVES if isinstance(loss, type(each.ours))), ours=loss)
    found = _measured(curve, 20).values
    assert found["greatest_error"] == pytest.approx(error, abs=1e-9)
    assert (found["missing"] > 0) == missing


def test_the_minimum_and_turning_point_are_the_losses_own() -> None:
    class Lower(Logistic):
        @property
        def lowest_product(self) -> float:
            return -0.3

        def slope(self, mu: Tensor) -> Tensor:
            return super().slope(mu)

    found = _measured(replace(CURVES[0], ours=Lower()), 5).values
    assert found["minimum"] == -0.3
    assert found["minimum_by_search"] == pytest.approx(-0.278465, abs=1e-6)
