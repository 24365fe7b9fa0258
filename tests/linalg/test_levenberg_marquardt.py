"""Nonlinear least squares from many starts: against problems whose solutions are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.linalg.levenberg_marquardt import levenberg_marquardt


@dataclass(frozen=True)
class Rosenbrock:
    """r = (steep (y - x^2), target - x), a target for each start."""

    target: Tensor
    steep: float = 10.0

    def select(self, index: Tensor) -> Rosenbrock:
        return Rosenbrock(self.target[index], self.steep)

    def residual(self, t: Tensor) -> Tensor:
        return torch.stack([self.steep * (t[:, 1] - t[:, 0] ** 2), self.target - t[:, 0]], 1)

    def cost(self, t: Tensor) -> Tensor:
        return self.residual(t).square().sum(1)

    def normal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        zero, one = torch.zeros(len(t), dtype=t.dtype), torch.ones(len(t), dtype=t.dtype)
        j = torch.stack(
            [torch.stack([-2 * self.steep * t[:, 0], self.steep * one], 1), torch.stack([-one, zero], 1)], 1
        )
        r = self.residual(t)
        return (j.mT @ r[:, :, None])[:, :, 0], j.mT @ j


def test_each_start_ends_at_its_own_solution() -> None:
    target = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    start = torch.tensor([[-1.2, 1.0], [3.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
    t, cost = levenberg_marquardt(Rosenbrock(target), start, max_steps=200)
    torch.testing.assert_close(t, torch.stack([target, target**2], 1))
    assert float(cost.max()) < 1e-20
    torch.testing.assert_close(start[0], torch.tensor([-1.2, 1.0], dtype=torch.float64))  # left as it was


def test_a_start_that_has_arrived_is_left_alone() -> None:
    target = torch.tensor([1.0], dtype=torch.float64)
    start = torch.tensor([[1.001, 1.002]], dtype=torch.float64)
    t, cost = levenberg_marquardt(Rosenbrock(target), start, found=1.0)
    torch.testing.assert_close(t, start)
    assert float(cost) == float(Rosenbrock(target).cost(start))


@dataclass(frozen=True)
class Infeasible:
    """r = (t, 1): no step lowers |r| below 1. Counts how often it was asked."""

    asked: list[int]

    def select(self, index: Tensor) -> Infeasible:
        return self

    def cost(self, t: Tensor) -> Tensor:
        return t.square().sum(1) + 1

    def normal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.append(len(t))
        return t.clone(), torch.eye(t.shape[1], dtype=t.dtype).expand(len(t), -1, -1)


def test_a_start_without_progress_is_given_up() -> None:
    problem = Infeasible([])
    _, cost = levenberg_marquardt(problem, torch.full((4, 2), 0.5, dtype=torch.float64), max_steps=100, patience=5)
    assert len(problem.asked) <= 10
    assert float(cost.max()) < 1 + 1e-6
