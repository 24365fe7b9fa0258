"""Operators by their products, and the solvers on them, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap.linalg.least_squares import Direct, Iterative, null_space_probe, probes
from rgap.linalg.operator import LinearOperator


class Dense(LinearOperator):
    """A matrix whose directions are (3, 4)."""

    def __init__(self, matrix: Tensor):
        self.matrix, self.in_shape, self.like = matrix, (3, 4), matrix
        self.values = 12
        self.mean_diagonal = float((matrix.T @ matrix).diagonal().mean())

    def mv(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.T

    def rmv(self, rows: Tensor) -> Tensor:
        return (rows @ self.matrix).reshape(-1, *self.in_shape)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_matrices_are_derived_from_products(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rgap.linalg.operator.CHUNK_VALUES", 12 * chunk)
    matrix = drawn(20, 12)
    operator = Dense(matrix)
    assert torch.allclose(operator.to_dense(), matrix)
    assert torch.allclose(operator.gram(), matrix.T @ matrix)
    assert torch.equal(probes(operator, 2), probes(operator, 2))


@pytest.mark.parametrize("rows", [20, 5])
@pytest.mark.parametrize("limit", [0.0, 4e8])
def test_a_product_that_is_taken_often_is_the_same_by_a_factor(
    rows: int, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a direction that the rows hardly see, where a matrix J'J would lose all digits."""
    monkeypatch.setattr("rgap.linalg.operator.WRITTEN_OUT", limit)
    left, _, right = torch.linalg.svd(drawn(rows, 12), full_matrices=False)
    sigma = torch.logspace(0, -10, min(rows, 12), dtype=torch.float64)
    operator, x = Dense(left @ torch.diag(sigma) @ right), right[-1].reshape(1, 3, 4)
    for _ in range(3):
        assert float(x.flatten() @ operator.repeated(x).flatten()) == pytest.approx(1e-20, rel=1e-4)
        found = operator.repeated(drawn(2, 3, 4, seed=1))
        torch.testing.assert_close(found, operator.normal(drawn(2, 3, 4, seed=1)))
    assert (operator.factor is None) is (limit == 0.0)


@pytest.mark.parametrize("solver", [Direct(1e-9), Iterative(rtol=1e-12)])
def test_a_step_without_a_regulariser_is_least_squares(solver: Direct | Iterative) -> None:
    matrix, right, x = drawn(20, 12), drawn(1, 20, seed=1), drawn(1, 3, 4, seed=2)
    residual = right - Dense(matrix).mv(x)
    found = solver.step(Dense(matrix), residual, x, None)
    expected = torch.linalg.lstsq(matrix, right[0, :, None]).solution[:, 0]
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", [Direct(1e-9), Iterative(rtol=1e-9)])
@pytest.mark.parametrize("rank", [12, 9])
def test_rank_condition_and_error_are_those_of_the_singular_values(solver: Direct | Iterative, rank: int) -> None:
    matrix = drawn(20, rank) @ drawn(rank, 12, seed=1)
    noise = drawn(1, 20, seed=2)
    found = solver.determine(Dense(matrix), noise)
    sigma = torch.linalg.svdvals(matrix)[:rank]
    moved = torch.linalg.pinv(matrix, rtol=1e-9) @ noise[0]
    if isinstance(solver, Direct):
        assert found.rank == rank
    else:  # an estimate, but whether anything is free is certain
        assert (found.rank == 12) == (rank == 12)
    assert found.condition == pytest.approx(float(sigma[0] / sigma[-1]), rel=0.3)
    assert found.std == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-3)
    assert solver.propagate(Dense(matrix), noise) == pytest.approx(found.std, rel=0.05)


def test_noise_is_followed_to_what_rows_hardly_show() -> None:
    """However coarsely the steps are solved: it moves most what converges last."""
    left, right = torch.linalg.qr(drawn(20, 12))[0], torch.linalg.qr(drawn(12, 12, seed=1))[0]
    matrix = left * torch.logspace(0, -3, 12, dtype=left.dtype) @ right
    noise = drawn(1, 20, seed=2)
    moved = torch.linalg.pinv(matrix) @ noise[0]
    found = Iterative(rtol=0.05).determine(Dense(matrix), noise)
    assert found.std == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-2)


@pytest.mark.parametrize("solver", [Direct(1e-9), Iterative(rtol=0.05)])
def test_a_move_is_precise_in_what_rows_hardly_show(solver: Direct | Iterative) -> None:
    """However coarsely the steps are solved, it leaves less than noise of every direction."""
    left, right = torch.linalg.qr(drawn(20, 12))[0], torch.linalg.qr(drawn(12, 12, seed=1))[0]
    matrix = left * torch.logspace(0, -3, 12, dtype=left.dtype) @ right
    noise, residual = 1e-3 * drawn(1, 20, seed=2), drawn(1, 20, seed=3)
    expected = torch.linalg.pinv(matrix) @ residual[0]
    sure = solver.determine(Dense(matrix), noise, residual)
    assert sure.noise == pytest.approx(float((noise @ matrix).norm()))
    assert sure.move is not None
    for move in (sure.move, solver.move(Dense(matrix), residual, sure)):
        assert move.shape == (3, 4)
        assert float((move.flatten() - expected).square().mean().sqrt()) < 0.1 * sure.std


def test_free_dimensions_are_those_that_do_not_come_back() -> None:
    basis = torch.linalg.qr(drawn(200, 200))[0][:, :12]  # of the null space
    moves = drawn(400, 200, seed=1)
    seen = moves - moves @ basis @ basis.T
    assert null_space_probe(moves, moves, 1e-3) == 0
    assert null_space_probe(moves, seen, 1e-3) == pytest.approx(12, abs=1)
