"""Solving with positive semidefinite matrices, against singular values and pseudo-inverses of the rows behind them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rgap.linalg import psd

TOLERANCE = 1e-7
"""Below the square root of rounding: nothing smaller can be told from zero."""


def rows(count: int, spectrum: Tensor, seed: int) -> Tensor:
    """R = U S V' with drawn U, V: count unknowns, the singular values given and zeros for the rest."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=torch.float64))[0] for _ in "uv")
    return u[:, : len(spectrum)] * spectrum @ v[:, : len(spectrum)].T


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rows R of any rank with singular values spread over up to three decades, of any size; and a right-hand side."""
    count = draw(st.integers(1, 25))
    rank, decades = draw(st.integers(0, count)), draw(st.floats(0, 3))
    size, seed = 10.0 ** draw(st.integers(-6, 6)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    spectrum = size * 10 ** (-decades * torch.rand(rank, generator=generator, dtype=torch.float64))
    rhs = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return rows(count, spectrum, seed), rhs


@settings(max_examples=40, deadline=None)
@given(matrices())
def test_solve_is_the_pseudo_inverse(drawn: tuple[Tensor, Tensor]) -> None:
    r, rhs = drawn
    found = psd.factor(r.T @ r, TOLERANCE).solve(rhs)
    inverse = torch.linalg.pinv(r, rtol=1e-6)
    expected = inverse @ (inverse.T @ rhs)
    scale = float(expected.norm())
    # The condition of M is that of R squared.
    assert float((found - expected).norm()) <= 1e-8 * scale


@settings(max_examples=40, deadline=None)
@given(matrices())
def test_rank_and_condition_are_those_of_the_rows(drawn: tuple[Tensor, Tensor]) -> None:
    r, _ = drawn
    found = psd.factor(r.T @ r, TOLERANCE)
    values = torch.linalg.svdvals(r)
    kept = values[values > 1e-6 * values[0]]
    assert found.rank == len(kept)
    if found.rank == 0:
        assert found.condition == 1.0
        return
    condition = float(kept[0] / kept[-1])
    if found.method == "cholesky":
        # Estimated from below; what it lacks must fit in the margin that is left before a matrix is called definite.
        assert 0.3 * condition <= found.condition <= condition * (1 + 1e-6)
    else:
        assert found.condition == pytest.approx(condition, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(matrices())
def test_null_is_an_orthonormal_basis_of_what_the_rows_do_not_see(drawn: tuple[Tensor, Tensor]) -> None:
    r, _ = drawn
    found = psd.factor(r.T @ r, TOLERANCE)
    null = found.null
    count = len(r)
    assert null.shape == (count, count - found.rank)
    assert torch.allclose(null.T @ null, torch.eye(count - found.rank, dtype=torch.float64), atol=1e-12)
    # The matrix holds squares, so its null space is known to the square root of rounding.
    assert float((r @ null).norm()) <= 1e-6 * float(r.norm())


@settings(max_examples=20, deadline=None)
@given(matrices(), st.sampled_from([float("nan"), 1e9, 0.0]))
def test_only_the_lower_triangle_is_read(drawn: tuple[Tensor, Tensor], above: float) -> None:
    r, rhs = drawn
    whole = r.T @ r
    half = whole.clone()
    half[torch.ones_like(half, dtype=torch.bool).triu(1)] = above
    found, expected = psd.factor(half, TOLERANCE), psd.factor(whole, TOLERANCE)
    assert (found.rank, found.method) == (expected.rank, expected.method)
    assert found.condition == pytest.approx(expected.condition, rel=1e-9)
    assert torch.allclose(found.solve(rhs), expected.solve(rhs), rtol=1e-6, atol=0)


def test_definite_matrices_take_the_fast_path_and_others_do_not() -> None:
    spectrum = torch.logspace(0, -3, 10, dtype=torch.float64)
    full, short = rows(10, spectrum, 0), rows(10, spectrum[:-1], 0)
    assert psd.factor(full.T @ full, TOLERANCE).method == "cholesky"
    assert psd.factor(short.T @ short, TOLERANCE).method == "eigen"


@pytest.mark.parametrize(
    ("count", "rank", "decades"), [(300, 299, 2), (300, 180, 3), (300, 100, 3), (256, 2, 0), (300, 299, 0)]
)
def test_a_plain_rank_is_told_by_pivots_as_by_eigenvalues(
    count: int, rank: int, decades: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = rows(count, torch.logspace(0, -decades, rank, dtype=torch.float64), 5)
    found = psd.factor(r.T @ r, TOLERANCE)
    monkeypatch.setattr(psd, "PIVOTED", count + 1)
    oracle = psd.factor(r.T @ r, TOLERANCE)
    assert (found.method, oracle.method) == ("pivoted", "eigen")
    assert found.rank == oracle.rank == rank
    assert 0.3 * oracle.condition <= found.condition <= oracle.condition * (1 + 1e-6)
    right = torch.linspace(-1, 1, 2 * count, dtype=torch.float64).reshape(count, 2)
    assert torch.allclose(found.solve(right), oracle.solve(right), rtol=1e-6, atol=1e-6 * 10**decades)
    assert torch.allclose(found.null @ found.null.T, oracle.null @ oracle.null.T, atol=1e-7)


@pytest.mark.parametrize("decades", [4.5, 5.5, 6.5, 7.5])
def test_eigenvalues_decide_where_the_spectrum_goes_through_the_tolerance(decades: float) -> None:
    r = rows(300, torch.logspace(0, -decades, 300, dtype=torch.float64), 6)
    short = r - r @ torch.linalg.svd(r)[2][:5].T @ torch.linalg.svd(r)[2][:5]  # without its five largest
    found = psd.factor(short.T @ short, TOLERANCE)
    values = torch.linalg.svdvals(short)
    # One or two lie so near the tolerance that rounding moves them across.
    assert abs(found.rank - int((values > max(TOLERANCE, (300 * 2.2e-16) ** 0.5) * values[0]).sum())) <= 2


@pytest.mark.parametrize("smallest", [1e-2, 1e-3, 1e-4, 1e-5])
def test_the_tolerance_is_on_singular_values_of_the_rows(smallest: float) -> None:
    spectrum = torch.tensor([1.0, 0.5, 0.2, smallest], dtype=torch.float64)
    r = rows(4, spectrum, 1)
    below, above = (psd.factor(r.T @ r, smallest * factor) for factor in (0.1, 10.0))
    assert (below.rank, above.rank) == (4, 3)
    assert below.condition == pytest.approx(1 / smallest, rel=0.05)
    assert above.condition == pytest.approx(5.0, rel=1e-6)
    # What is cut off is not solved for.
    direction = torch.linalg.svd(r)[2][-1:]
    assert float((direction @ above.solve(torch.ones(4, 1, dtype=torch.float64))).abs()) < 1e-6
    assert float((direction @ above.null).abs()) == pytest.approx(1.0, rel=1e-6)


def test_rounding_is_not_called_rank_whatever_the_tolerance() -> None:
    r = rows(12, torch.ones(7, dtype=torch.float64), 2)
    assert psd.factor(r.T @ r, 0.0).rank == 7


@pytest.mark.parametrize("factor", [1e10, 1e18])
def test_what_is_left_of_a_larger_matrix_is_compared_with_it(factor: float) -> None:
    r = rows(5, torch.logspace(0, -1, 5, dtype=torch.float64), 3)
    alone, part = psd.factor(r.T @ r, TOLERANCE), psd.factor(r.T @ r, TOLERANCE, size=factor)
    assert alone.rank == 5
    if factor == 1e10:
        assert part.rank == 5
        assert part.condition == pytest.approx(math.sqrt(factor) * 10, rel=0.05)
    else:
        assert part.rank == 0
        assert part.condition == 1.0
        assert torch.equal(part.solve(torch.ones(5, 1, dtype=torch.float64)), torch.zeros(5, 1, dtype=torch.float64))
        assert part.null.shape == (5, 5)


def test_a_smaller_size_changes_nothing() -> None:
    r = rows(5, torch.logspace(0, -1, 5, dtype=torch.float64), 3)
    assert psd.factor(r.T @ r, TOLERANCE, size=0.5).condition == psd.factor(r.T @ r, TOLERANCE).condition


def test_an_empty_matrix() -> None:
    found = psd.factor(torch.zeros(0, 0, dtype=torch.float64), TOLERANCE)
    assert (found.rank, found.condition) == (0, 1.0)
    assert found.solve(torch.zeros(0, 3, dtype=torch.float64)).shape == (0, 3)
    assert found.null.shape == (0, 0)


@pytest.mark.parametrize("count", [1, 4])
def test_a_zero_matrix(count: int) -> None:
    found = psd.factor(torch.zeros(count, count, dtype=torch.float64), TOLERANCE)
    assert (found.rank, found.condition) == (0, 1.0)
    assert torch.equal(found.solve(torch.ones(count, 1, dtype=torch.float64)), torch.zeros(count, 1).double())
    assert found.null.shape == (count, count)


@pytest.mark.parametrize("value", [1e-12, 4.0, 1e12])
def test_one_unknown(value: float) -> None:
    found = psd.factor(torch.tensor([[value]], dtype=torch.float64), TOLERANCE)
    assert found.rank == 1
    assert found.condition == pytest.approx(1.0)
    assert float(found.solve(torch.tensor([[2.0]], dtype=torch.float64))) == pytest.approx(2 / value)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(0, 2**31))
def test_cholesky_solve(count: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lower = torch.randn(count, count, generator=generator, dtype=torch.float64).tril(-1) / count
    lower += torch.eye(count, dtype=torch.float64)
    rhs = torch.randn(count, width, generator=generator, dtype=torch.float64)
    assert torch.allclose(psd.cholesky_solve(rhs, lower), torch.linalg.solve(lower @ lower.T, rhs), rtol=1e-8)
