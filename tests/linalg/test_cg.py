"""Conjugate gradients, against dense solutions of each system by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rgap.linalg import cg


def matrices(seed: int, systems: int, count: int, rank: int, decades: float = 1.0) -> Tensor:
    """Positive semidefinite ones, (systems, count, count), whose eigenvalues spread over so many decades."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(systems, count, rank, generator=generator, dtype=torch.float64))[0]
    values = 10 ** (-decades * torch.rand(systems, rank, generator=generator, dtype=torch.float64))
    return (rows * values[:, None]) @ rows.mT


def times(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: (matrix @ x.flatten(1)[..., None]).reshape(x.shape)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 12), st.data())
def test_every_system_has_its_own_solution_of_least_norm(
    seed: int, systems: int, half: int, data: st.DataObject
) -> None:
    count = 2 * half
    matrix = matrices(seed, systems, count, data.draw(st.integers(1, count)))
    generator = torch.Generator().manual_seed(seed + 1)
    right = times(matrix)(torch.randn(systems, 2, half, generator=generator, dtype=torch.float64))
    found = cg.solve(times(matrix), right, 1e-12, 20 * count)
    expected = (torch.linalg.pinv(matrix, hermitian=True, rtol=1e-6) @ right.flatten(1)[..., None]).reshape(right.shape)
    assert bool(found.converged.all())
    assert torch.allclose(found.x, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 12))
def test_the_condition_is_that_of_the_matrix_when_all_directions_were_seen(seed: int, count: int) -> None:
    matrix = matrices(seed, 2, count, count)
    right = torch.randn(2, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = cg.solve(times(matrix), right, 1e-13, 10 * count)
    values = torch.linalg.eigvalsh(matrix)
    assert found.condition == pytest.approx((values[:, -1] / values[:, 0]).numpy(), rel=1e-3)


def test_a_good_preconditioner_saves_steps_and_changes_nothing_else() -> None:
    matrix = matrices(3, 2, 60, 60, decades=4.0)
    right = torch.randn(2, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = torch.linalg.inv(matrix + 1e-4 * torch.eye(60, dtype=torch.float64))
    plain = cg.solve(times(matrix), right, 1e-10, 2000)
    helped = cg.solve(times(matrix), right, 1e-10, 2000, precondition=times(near))
    assert helped.steps < plain.steps / 4
    assert torch.allclose(helped.x, plain.x, rtol=1e-4, atol=1e-4 * float(plain.x.abs().max()))


def test_systems_that_are_done_stand_still_while_others_go_on() -> None:
    matrix = matrices(5, 2, 30, 30, decades=3.0)
    right = torch.randn(2, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = torch.tensor([1e10, 1.0], dtype=torch.float64)  # the first one has nothing to do
    found = cg.solve(times(matrix), right, 1e-8, 1000, size)
    assert not found.x[0].any()
    alone = cg.solve(times(matrix[1:]), right[1:], 1e-8, 1000, size[1:])
    assert torch.allclose(found.x[1:], alone.x, rtol=1e-5, atol=1e-6 * float(alone.x.abs().max()))


def test_nothing_to_solve_and_nothing_seen() -> None:
    zero = torch.zeros(1, 4, dtype=torch.float64)
    none = cg.solve(lambda x: x, zero, 1e-9, 10)
    assert none.steps == 0
    assert not none.x.any()
    blind = cg.solve(lambda x: 0 * x, zero + 1, 1e-9, 10)
    assert not bool(blind.converged.any())
    assert not blind.x.any()


def test_too_few_steps_are_said_to_be_too_few() -> None:
    matrix = matrices(7, 1, 40, 40, decades=3.0)
    right = torch.ones(1, 40, dtype=torch.float64)
    assert not bool(cg.solve(times(matrix), right, 1e-10, 3).converged.any())


@pytest.mark.parametrize("stumbles", [1, 2, 3, 5])
def test_a_step_that_rounding_spoilt_ends_what_is_known_of_the_condition(stumbles: int) -> None:
    """A product of the wrong sign, as float32 can give one of a matrix that is nearly singular."""
    matrix, calls = matrices(3, 2, 12, 12), 0
    right = torch.randn(2, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def apply(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        found = times(matrix)(x)
        return torch.stack([-found[0] if calls == stumbles else found[0], found[1]])

    found = cg.solve(apply, right, 1e-12, 60)
    values = torch.linalg.eigvalsh(matrix)
    truth = values[:, -1] / values[:, 0]
    assert bool((found.condition >= 1).all())
    assert float(found.condition[0]) <= float(truth[0]) * (1 + 1e-6)  # from fewer steps: a lower bound
    assert float(found.condition[1]) == pytest.approx(float(truth[1]), rel=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 5), st.floats(-1, 5)), max_size=8))
def test_whatever_the_steps_were_the_condition_is_a_number(steps: list[tuple[float, float]]) -> None:
    lengths, turns = ([torch.tensor([pair[at]]) for pair in steps] for at in range(2))
    found = cg.Result(torch.zeros(1, 3), torch.zeros(1), torch.ones(1, dtype=torch.bool), lengths, turns)
    assert float(found.condition[0]) > 0
