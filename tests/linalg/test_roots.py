"""Roots against functions whose roots are known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgap.linalg.roots import bisect, find_roots, minimise

GRID = torch.linspace(-10.0, 10.0, 401, dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-9.9, 9.9), min_size=1, max_size=4, unique=True))
def test_the_roots_of_a_polynomial_are_found(roots: list[float]) -> None:
    """Also two between neighbours of the grid, and those on it; never more than there are."""
    roots = sorted(roots)
    apart = min((b - a for a, b in pairwise(roots)), default=1.0)

    def polynomial(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x - root for root in roots]).prod(0)

    found, turned = find_roots(polynomial, GRID)
    assert not len(turned)
    assert len(found) <= len(roots)
    for root in found.tolist():
        assert min(abs(root - each) for each in roots) < 1e-6
    if apart > 0.11:  # no three in two steps of the grid
        assert found.sort().values.tolist() == pytest.approx(roots, abs=1e-8)


@pytest.mark.parametrize("above", [1e-3, -1e-3])
def test_two_roots_that_meet_are_a_turn_or_two_roots(above: float) -> None:
    found, turned = find_roots(lambda x: (x - 0.512) ** 2 + above, GRID, near=1e-2)
    if above > 0:
        assert (len(found), turned.tolist()) == (0, pytest.approx([0.512], abs=1e-6))
        assert not any(map(len, find_roots(lambda x: (x - 0.512) ** 2 + above, GRID, near=1e-4)))
    else:
        assert not len(turned)
        assert found.sort().values.tolist() == pytest.approx([0.512 - 1e-3**0.5, 0.512 + 1e-3**0.5], abs=1e-12)


def test_a_jump_is_a_change_of_sign_and_what_is_no_number_is_below() -> None:
    found, _ = find_roots(lambda x: torch.where(x < 0.3, -1.0, 2.0).to(x), GRID)
    assert found.tolist() == pytest.approx([0.3], abs=1e-12)
    found, _ = find_roots(lambda x: torch.where(x < 0.3, float("nan"), 2.0).to(x), GRID)
    assert len(found) == 1


def test_bisection_and_golden_section_end_at_the_rounding() -> None:
    low, high = torch.zeros(2, dtype=torch.float64), torch.tensor([2.0, 3.0], dtype=torch.float64)
    assert bisect(lambda x: x * x < 2, low, high).tolist() == pytest.approx([2**0.5] * 2, rel=1e-15)
    assert minimise(lambda x: (x - 1.25).abs(), low, high).tolist() == pytest.approx([1.25] * 2, abs=1e-11)
