"""Conjugate gradients in two precisions, against dense solutions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rgap.linalg import mixed
from tests.linalg.test_cg import matrices, times


class Counted:
    """A matrix as a product that counts how often it is taken, in each precision."""

    def __init__(self, matrix: Tensor):
        self.matrix, self.taken = matrix, {torch.float64: 0, torch.float32: 0}

    def __call__(self, x: Tensor) -> Tensor:
        self.taken[x.dtype] += 1
        return times(self.matrix.to(x.dtype))(x)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 10), st.floats(0.0, 2.0), st.integers(-60, 60))
def test_every_system_is_solved_to_its_own_target(
    seed: int, systems: int, half: int, decades: float, size: int
) -> None:
    """Also where float32 has no place for the right side."""
    count = 2 * half
    matrix = matrices(seed, systems, count, count, decades)
    product = Counted(matrix)
    right = 10.0**size * drawn(seed, systems, 2, half)
    norm = right.flatten(1).norm(dim=1)
    target = norm * 10 ** -torch.linspace(3, 10, systems, dtype=torch.float64)
    found = mixed.solve(product, product, right, target, 20 * count)
    left = (right - times(matrix)(found.x)).flatten(1).norm(dim=1)
    assert bool((left <= 1.01 * target + 1e-12 * norm).all())
    assert product.taken[torch.float32] >= product.taken[torch.float64]


@pytest.mark.parametrize("given", ["wrong", "worse than nothing", "none"])
def test_what_is_no_help_in_float32_is_solved_in_float64(given: str) -> None:
    product, right = Counted(matrices(0, 2, 12, 12)), drawn(1, 2, 12)
    fast: dict[str, Callable[[Tensor], Tensor] | None] = {
        "wrong": Counted(matrices(5, 2, 12, 12, 2.0)),
        "worse than nothing": lambda x: 1e-3 * x,
        "none": None,
    }
    found = mixed.solve(product, fast[given], right, 1e-10 * right.norm(dim=1), 200)
    expected = torch.linalg.solve(product.matrix, right)
    torch.testing.assert_close(found.x, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
    assert found.parts[-1].x.dtype == torch.float64


def test_its_condition_is_that_of_all_it_saw() -> None:
    matrix, right = matrices(0, 2, 12, 12, 1.5), drawn(1, 2, 12)
    found = mixed.solve(times(matrix), times(matrix.float()), right, 1e-9 * right.norm(dim=1), 200)
    values = torch.linalg.eigvalsh(matrix)
    assert found.condition == pytest.approx((values[:, -1] / values[:, 0]).numpy(), rel=1e-2)


def test_it_ends_where_it_is_told_to() -> None:
    product, right = Counted(matrices(0, 2, 30, 30, 3.0)), drawn(1, 2, 30)
    shown: list[Tensor] = []

    def enough(x: Tensor) -> bool:
        shown.append(x)
        return len(shown) >= 7

    target = 1e-12 * right.norm(dim=1)
    for fast in (product, None):
        shown.clear()
        found = mixed.solve(product, fast, right, target, 200, enough=enough)
        assert found.steps == 7
        torch.testing.assert_close(shown[-1], found.x, check_dtype=False)
    assert mixed.solve(product, product, right, target, 200, patience=9).steps == 9
    assert mixed.solve(product, product, right, target, 9).parts[0].steps == 9
    assert [part.steps for part in mixed.solve(product, product, right, target, 9, cycle=5).parts] == [5, 4]
