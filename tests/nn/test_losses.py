"""One suite for every loss. A new one adds one row to LOSSES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from rgap.nn import losses
from rgap.nn.losses import Loss


@dataclass(frozen=True)
class Row:
    ours: Loss
    name: str
    oracle: Callable[[Tensor], Tensor]
    """The loss of every margin."""
    attained: bool = True
    """Whether a sample can have the lowest product; a loss with a corner only comes near."""


LOSSES = [
    Row(losses.Logistic(), "logistic", lambda mu: -functional.logsigmoid(mu)),
    Row(losses.Exponential(), "exponential", lambda mu: torch.exp(-mu)),
    Row(losses.Hinge(), "hinge", lambda mu: functional.relu(1 - mu), attained=False),
    Row(losses.SquaredHinge(), "squared-hinge", lambda mu: functional.relu(1 - mu).square()),
]
every_loss = pytest.mark.parametrize("row", LOSSES, ids=lambda row: row.name)

STEP = 4e-3
# Shifted off the round numbers, where the hinges have their corner and where every product is zero.
GRID = torch.arange(-60, 60, STEP, dtype=torch.float64) + STEP / np.pi


def slope(row: Row, mu: Tensor) -> Tensor:
    """From autograd."""
    mu = mu.clone().requires_grad_()
    return torch.autograd.grad(row.oracle(mu).sum(), mu)[0]


def at(row: Row, mu: float) -> float:
    return float(slope(row, torch.tensor([mu], dtype=torch.float64)))


PRODUCTS = {row.name: GRID * slope(row, GRID) for row in LOSSES}
SLOPES = {row.name: slope(row, GRID) for row in LOSSES}


@every_loss
def test_the_value_is_that_of_torch(row: Row) -> None:
    # torch's softplus is linear from 20 on.
    torch.testing.assert_close(row.ours.value(GRID), row.oracle(GRID), rtol=1e-9, atol=0)


@every_loss
def test_the_slope_is_that_of_autograd(row: Row) -> None:
    torch.testing.assert_close(row.ours.slope(GRID), SLOPES[row.name], rtol=1e-12, atol=1e-15)
    assert bool((row.ours.slope(GRID) <= 0).all())


@every_loss
def test_the_slope_that_training_sees_is_the_same(row: Row) -> None:
    mu = torch.tensor([-1.5, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(row.ours.value(mu).sum(), mu)[0]
    torch.testing.assert_close(found, row.ours.slope(mu.detach()), rtol=1e-12, atol=0)


@every_loss
def test_a_batch_gives_the_mean(row: Row) -> None:
    outputs = torch.tensor([0.3, -2.0, 0.7], dtype=torch.float64)
    labels = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    expected = (
        sum(float(row.oracle(torch.tensor(y * o))) for y, o in zip(labels.tolist(), outputs.tolist(), strict=True)) / 3
    )
    for given_outputs in (outputs, outputs[:, None]):
        assert float(row.ours(given_outputs, labels)) == pytest.approx(expected, rel=1e-6)


# Roots.


@every_loss
@settings(max_examples=60, deadline=None)
@given(
    product=st.one_of(
        st.floats(-1.2, 40.0, allow_subnormal=False),
        st.floats(-1e-3, 1e-3, allow_subnormal=False),
        st.floats(-0.6, -1e-6),
    )
)
@example(product=0.0)
@example(product=1e-12)
@example(product=-1e-12)
@example(product=55.0)
def test_every_root_on_a_grid_is_found_and_no_other(row: Row, product: float) -> None:
    roots = row.ours.roots(product)
    assert list(roots) == sorted(roots)
    for mu in roots:
        assert at(row, mu) < 0
        assert mu * at(row, mu) == pytest.approx(product, rel=1e-9, abs=1e-12)
    side = (PRODUCTS[row.name] - product).sign()
    alive = SLOPES[row.name] < 0
    crossings = ((side[1:] != side[:-1]) & alive[1:] & alive[:-1]).nonzero()[:, 0]
    brackets = [(float(GRID[i]), float(GRID[i + 1])) for i in crossings.tolist()]
    for low, high in brackets:
        assert any(low - 1e-12 <= mu <= high + 1e-12 for mu in roots), (low, high, roots)
    for mu in roots:
        # Two roots within one step, or one next to the corner, cross no bracket.
        seen = any(low - 1e-12 <= mu <= high + 1e-12 for low, high in brackets)
        twin = (
            sum(abs(mu - other) < 2 * STEP for other in roots) == 2 or product < row.ours.lowest_product + 4 * STEP**2
        )
        assert seen or twin or not -60 < mu < 1 - STEP or mu > 59, (mu, brackets)


@every_loss
@settings(max_examples=60, deadline=None)
@given(mu=st.floats(-300.0, 30.0))
def test_a_margin_is_among_the_roots_of_its_product(row: Row, mu: float) -> None:
    here = at(row, mu)
    if here == 0:
        return
    roots = row.ours.roots(mu * here)
    # Where the curve is flat the rounding of the product moves the root: by its square root at the minimum.
    near = 1e-9 * (1 + abs(mu)) if abs(mu * here - row.ours.lowest_product) > 1e-3 else 1e-6
    if mu > 0:
        nearby = at(row, mu + 1e-6)
        change = abs((mu + 1e-6) * nearby - mu * here) / 1e-6
        near = max(near, 1e-15 / max(change, 1e-9))
    assert any(abs(root - mu) <= near for root in roots), roots


@every_loss
def test_the_lowest_product_is_the_minimum_of_the_grid(row: Row) -> None:
    lowest = float(PRODUCTS[row.name].min())
    # The grid misses a smooth minimum by the square of its step, a corner by the step.
    assert row.ours.lowest_product <= lowest + 1e-15
    assert row.ours.lowest_product == pytest.approx(lowest, abs=STEP**2 if row.attained else STEP)


@every_loss
def test_around_the_minimum_roots_meet_and_vanish(row: Row) -> None:
    lowest = row.ours.lowest_product
    where = float(GRID[PRODUCTS[row.name].argmin()])
    if row.attained:
        (mu,) = row.ours.roots(lowest)
        assert mu == pytest.approx(where, abs=STEP)
        # Rounding may push a product below what is possible.
        (rounded,) = row.ours.roots(lowest * (1 + 1e-8))
        assert rounded == mu
        low, high = row.ours.roots(lowest * (1 - 1e-4))
        assert low < mu < high
    else:
        assert row.ours.roots(lowest) == ()
        (mu,) = row.ours.roots(lowest * (1 - 1e-4))
        assert mu == pytest.approx(where, abs=2 * STEP)
    for factor in (1 + 1e-4, 1.5, 100.0):
        assert row.ours.roots(lowest * factor) == ()


@every_loss
def test_a_product_of_zero_with_a_gradient_is_a_margin_of_zero(row: Row) -> None:
    assert row.ours.roots(0.0) == (0.0,)


# Margins from slopes.


@every_loss
@settings(max_examples=60, deadline=None)
@given(mu=st.floats(-20.0, 20.0))
def test_margin_inverts_the_slope_where_one_margin_has_it(row: Row, mu: float) -> None:
    here = at(row, mu)
    shared = bool(((SLOPES[row.name] == here) & ((GRID - mu).abs() > 0.5)).any())
    found = row.ours.margin(here)
    if shared:
        assert found is None
    else:
        assert found is not None
        # A slope near -1 has lost the digits of its distance from it.
        curvature = abs(at(row, mu + 1e-3) - at(row, mu - 1e-3)) / 2e-3
        assert found == pytest.approx(mu, abs=1e-14 * (1 + abs(here)) / curvature + 1e-12)


@every_loss
@pytest.mark.parametrize("value", [-1e6, -3.0, -1.0, -0.5, 0.0, 1e-9, 0.5, 3.0])
def test_margin_of_a_slope_that_no_margin_has(row: Row, value: float) -> None:
    wide = torch.linspace(-6e5, 1e3, 1001, dtype=torch.float64)
    reached = slope(row, torch.cat([wide, GRID]))
    if not float(reached[reached.isfinite() & (reached < 0)].min()) < value < 0:
        found = row.ours.margin(value)
        assert found is None or at(row, found) == pytest.approx(value)


# Labels and names.


@every_loss
def test_labels_of_two_classes_are_taken(row: Row) -> None:
    row.ours.check_labels(torch.tensor([1.0, -1.0]))
    row.ours.check_labels(torch.tensor([[1], [-1]]))


@every_loss
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([2.0], "got label 2, expected -1 or 1 for the {} loss"),
        ([1.0, 0.5, 3.0], "got label 0.5, expected -1 or 1 for the {} loss"),
        ([1.0, 0.0], "got label 0, expected -1 or 1 for the {} loss; write class 0 as -1"),
        ([7.0, 0.0], "got label 7, expected -1 or 1 for the {} loss; write class 0 as -1"),
        ([float("nan")], "got label nan, expected -1 or 1 for the {} loss"),
    ],
)
def test_other_labels_are_refused(row: Row, labels: list[float], message: str) -> None:
    with pytest.raises(ValueError, match="got label") as refused:
        row.ours.check_labels(torch.tensor(labels))
    assert str(refused.value) == message.format(row.name)


@every_loss
def test_a_loss_is_found_by_its_name(row: Row) -> None:
    assert row.ours.name == row.name
    assert losses.by_name(row.name) == row.ours


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    known = ", ".join(sorted(row.name for row in LOSSES))
    with pytest.raises(ValueError, match="unknown loss") as refused:
        losses.by_name("Logistic")
    assert str(refused.value) == f"unknown loss 'Logistic': expected one of {known}"


def test_every_loss_has_a_row() -> None:
    assert {type(row.ours) for row in LOSSES} == set(losses._NAMES)
