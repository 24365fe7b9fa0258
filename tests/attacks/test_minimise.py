"""Minimisers: that they find minima known otherwise, each system as if it were alone, and end when they should."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rgap.attacks.lbfgs import LBFGS
from rgap.attacks.minimise import Adam, Minimiser, Objective, Termination

FAST_ADAM = Adam(rate=0.1, decay=(0.5, 0.7, 0.9))
every_minimiser = pytest.mark.parametrize("minimiser", [LBFGS(), FAST_ADAM], ids=["L-BFGS", "Adam"])
seeds = st.integers(0, 2**31)


def silent(iteration: int, loss: float) -> None:
    pass


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_autograd(value: Callable[[Tensor, Tensor], Tensor]) -> Objective:
    """The objective of a function of points and system numbers."""

    def objective(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().clone().requires_grad_()
        values = value(x, which)
        return values.detach(), torch.autograd.grad(values.sum(), x)[0]

    return objective


@dataclass
class Spy:
    """An objective that remembers where it was asked."""

    f: Objective
    asked: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.append((x.clone(), which.clone()))
        return self.f(x, which)

    def times(self) -> Counter[int]:
        """How often each system was evaluated."""
        return Counter(s for _, which in self.asked for s in which.tolist())


@dataclass(frozen=True)
class Quadratics:
    """x' A x / 2 - b' x + c, of different conditions, each with minimum `lowest` at A^-1 b."""

    A: Tensor
    b: Tensor
    lowest: float = 0.0

    @property
    def where(self) -> Tensor:
        return torch.linalg.solve(self.A, self.b)

    def objective(self, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        A, apart = self.A[which], x - self.where[which]
        slope = torch.einsum("aij,aj->ai", A, apart)
        return (apart * slope).sum(1) / 2 + self.lowest, slope


def quadratics(conditions: tuple[float, ...], size: int, seed: int, lowest: float = 0.0) -> Quadratics:
    turns = torch.linalg.qr(normal(len(conditions), size, size, seed=seed))[0]
    spectra = torch.stack([torch.logspace(0, math.log10(c), size, dtype=torch.float64) for c in conditions])
    return Quadratics(turns * spectra[:, None] @ turns.mT, normal(len(conditions), size, seed=seed + 1), lowest)


# Minima.


@settings(max_examples=6, deadline=None)
@given(seeds, st.integers(1, 8))
def test_lbfgs_finds_the_minima_of_quadratics(seed: int, size: int) -> None:
    q = quadratics((1.0, 3.0, 100.0, 1e4), size, seed)
    found = LBFGS()(q.objective, 5 * normal(4, size, seed=seed + 2), Termination(400, 1e-22), silent)
    torch.testing.assert_close(found.x, q.where, rtol=0, atol=1e-9)
    assert float(found.value.max()) <= 1e-22
    assert found.ended == ("reached the value asked for",) * 4


@settings(max_examples=4, deadline=None)
@given(seeds, st.integers(1, 6))
def test_adam_finds_the_minima_of_quadratics(seed: int, size: int) -> None:
    q = quadratics((1.0, 3.0, 10.0), size, seed)
    found = FAST_ADAM(q.objective, normal(3, size, seed=seed + 2), Termination(400), silent)
    torch.testing.assert_close(found.x, q.where, rtol=0, atol=1e-2)


def rosenbrock(x: Tensor, which: Tensor) -> Tensor:
    """Minimum 0 at 1, 1, 1, ... ; a second, local one in four dimensions and more."""
    return (100 * (x[:, 1:] - x[:, :-1].square()).square() + (1 - x[:, :-1]).square()).sum(1)


def test_lbfgs_follows_rosenbrocks_valley() -> None:
    starts = torch.tensor([[-1.2, 1.0, 1.0], [2.0, -2.0, 2.0], [0.0, 0.0, 0.0], [-3.0, 5.0, 7.0]], dtype=torch.float64)
    found = LBFGS()(by_autograd(rosenbrock), starts, Termination(300, 1e-20), silent)
    torch.testing.assert_close(found.x, torch.ones_like(starts), rtol=0, atol=1e-8)


def test_lbfgs_comes_near_the_minimum_of_functions_with_kinks() -> None:
    sizes = torch.tensor([[1.0, 1.0, 1.0], [1.0, 5.0, 30.0], [2.0, 0.1, 1.0]], dtype=torch.float64)
    where = normal(3, 3, seed=0)
    f = by_autograd(lambda x, which: (sizes[which] * (x - where[which]).abs()).sum(1))
    found = LBFGS()(f, where + 10 * normal(3, 3, seed=1), Termination(300, 1e-7), silent)
    assert float(found.value.max()) <= 1e-3, found
    torch.testing.assert_close(found.x, where, rtol=0, atol=1e-2)


def test_the_signs_of_the_gradient_are_enough_for_adam() -> None:
    sizes = torch.tensor([[1e-6, 1.0, 1e6]], dtype=torch.float64)
    f = by_autograd(lambda x, which: (sizes * x.square()).sum(1))
    adam = Adam(rate=0.1, signed=True, decay=(0.5, 0.7, 0.9))
    found = adam(f, torch.tensor([[3.0, -2.0, 1.0]], dtype=torch.float64), Termination(300), silent)
    assert float(found.x.abs().max()) < 0.05


@every_minimiser
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_types_are_kept_and_the_start_is_left_alone(minimiser: Minimiser, dtype: torch.dtype) -> None:
    start = normal(3, 4, seed=0).to(dtype)
    kept = start.clone()
    found = minimiser(by_autograd(lambda x, which: x.square().sum(1)), start, Termination(20), silent)
    assert torch.equal(start, kept)
    assert found.x.dtype is found.value.dtype is dtype
    assert bool((found.value < start.square().sum(1)).all())


# Systems are independent.


@every_minimiser
@settings(max_examples=6, deadline=None)
@given(seeds, st.integers(2, 5), st.integers(0, 60))
def test_each_system_ends_as_if_it_were_alone(minimiser: Minimiser, seed: int, count: int, iterations: int) -> None:
    q = quadratics(tuple(10.0**at for at in range(count)), 4, seed, lowest=0.25)
    start = 3 * normal(count, 4, seed=seed + 2)
    stop = Termination(iterations, value=0.3, patience=20)
    together = minimiser(q.objective, start, stop, silent)
    for s in range(count):
        alone = minimiser(lambda x, which, s=s: q.objective(x, which + s), start[s : s + 1], stop, silent)
        torch.testing.assert_close(together.x[s], alone.x[0], rtol=1e-6, atol=1e-9)
        assert int(together.iterations[s]) == int(alone.iterations[0])
        assert together.ended[s] == alone.ended[0]


@every_minimiser
def test_a_system_that_has_ended_is_not_evaluated_again(minimiser: Minimiser) -> None:
    """Started at the value asked for, far from it, and where there is none."""
    spy = Spy(by_autograd(lambda x, which: torch.where(x[:, 0] > 50, math.nan, x.square().sum(1))))
    start = torch.tensor([[0.0, 0.0], [4.0, 4.0], [60.0, 0.0]], dtype=torch.float64)
    found = minimiser(spy, start, Termination(30, 1e-9), silent)
    times = spy.times()
    assert (times[0], times[2]) == (1, 1)
    assert times[1] > 1
    assert found.iterations.tolist()[0::2] == [0, 0]
    assert found.ended[0::2] == ("reached the value asked for", "diverged")
    for _, which in spy.asked:
        assert len(set(which.tolist())) == len(which)


def test_adam_evaluates_each_system_once_for_each_iteration() -> None:
    q = quadratics((1.0, 10.0, 100.0), 3, seed=0)
    spy = Spy(q.objective)
    found = Adam(rate=0.3)(spy, 3 * normal(3, 3, seed=1), Termination(80, 1e-2), silent)
    assert [spy.times()[s] for s in range(3)] == [int(n) + 1 for n in found.iterations]
    assert len(set(found.iterations.tolist())) > 1, "systems should end apart for this test to tell anything"


def test_lbfgs_ends_where_no_step_lowers_the_function() -> None:
    """At the minimum itself, above the value asked for, further iterations are wasted."""
    q = quadratics((1.0, 10.0), 3, seed=0, lowest=1.0)
    spy = Spy(q.objective)
    start = torch.stack([q.where[0], q.where[1] + 1])
    found = LBFGS()(spy, start, Termination(500), silent)
    torch.testing.assert_close(found.x, q.where, rtol=0, atol=1e-6)
    assert found.ended == ("no step lowers the loss any more",) * 2
    assert int(found.iterations.max()) < 100


# How systems end.


def scripted(values: list[list[float]]) -> Objective:
    """Values in turn, whatever the point is; each system has its own turns."""
    turn = Counter[int]()

    def objective(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        now = [values[s][turn[s]] for s in which.tolist()]
        turn.update(which.tolist())
        return torch.tensor(now, dtype=x.dtype), torch.ones_like(x)

    return objective


def test_patience_counts_from_the_last_fall_by_a_tenth() -> None:
    values = [
        [1.0, 0.95, 0.91, 0.901, 0.5, 0.5, 0.5, 0.5, 0.5],
        [1.0, 0.95, 0.89, 0.85, 0.82, 0.5, 0.5, 0.5, 0.5],
        [1.0, 2.0, 3.0, 0.8, 0.9, 1.0, 0.73, 1.0, 1.0],
    ]
    found = Adam()(scripted(values), torch.zeros(3, 1, dtype=torch.float64), Termination(8, patience=3), silent)
    assert found.iterations.tolist() == [3, 5 + 3, 3 + 3]
    assert found.value.tolist() == [0.901, 0.5, 0.73]
    assert set(found.ended) == {"did not fall by a tenth in 3 iterations"}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(1e-3, 10.0), min_size=1, max_size=20),
    st.floats(1e-3, 1.0),
    st.one_of(st.none(), st.integers(1, 8)),
)
def test_the_end_is_that_of_a_plain_loop(values: list[float], wanted: float, patience: int | None) -> None:
    best, mark, marked_at, ended, last = math.inf, math.inf, 0, "no more were allowed", 0
    for last, value in enumerate(values):
        best = min(best, value)
        if best <= 0.9 * mark:
            mark, marked_at = best, last
        if value <= wanted:
            ended = "reached the value asked for"
            break
        if patience is not None and last - marked_at >= patience:
            ended = f"did not fall by a tenth in {patience} iterations"
            break
    stop = Termination(len(values) - 1, wanted, patience)
    found = Adam()(scripted([values]), torch.zeros(1, 2, dtype=torch.float64), stop, silent)
    assert (float(found.value[0]), int(found.iterations[0]), found.ended[0]) == (best, last, ended)


def test_lbfgs_has_patience_too() -> None:
    q = quadratics((1e4,), 6, seed=3, lowest=100.0)
    found = LBFGS()(q.objective, q.where + 1e-2 * normal(1, 6, seed=4), Termination(300, patience=2), silent)
    assert found.ended == ("did not fall by a tenth in 2 iterations",)
    assert found.iterations.tolist() == [2]


@every_minimiser
@pytest.mark.parametrize("iterations", [0, 1, 7])
def test_no_more_iterations_than_allowed(minimiser: Minimiser, iterations: int) -> None:
    q = quadratics((1e4,), 6, seed=0, lowest=1.0)
    seen: list[int] = []
    start = normal(1, 6, seed=1)
    found = minimiser(q.objective, start, Termination(iterations), lambda at, loss: seen.append(at))
    assert found.iterations.tolist() == [iterations]
    assert found.ended == ("no more were allowed",)
    assert seen in (list(range(iterations + 1)), list(range(1, iterations + 1)))
    if iterations == 0:
        assert torch.equal(found.x, start)
        assert torch.equal(found.value, q.objective(start, torch.tensor([0]))[0])


@every_minimiser
def test_watchers_hear_the_least_value_so_far(minimiser: Minimiser) -> None:
    q = quadratics((1.0, 50.0), 3, seed=0)
    spy, heard = Spy(q.objective), []
    found = minimiser(spy, normal(2, 3, seed=1), Termination(15), lambda at, loss: heard.append((at, loss)))
    assert [at for at, _ in heard] == sorted({at for at, _ in heard})
    told = [loss for _, loss in heard]
    assert told == sorted(told, reverse=True)
    assert told[-1] == float(found.value.min())
    lowest = min(float(q.objective(x, which)[0].min()) for x, which in spy.asked)
    assert told[-1] == pytest.approx(lowest, rel=1e-12)


# Where the function is not finite.

wall = pytest.mark.parametrize("beyond", [math.nan, math.inf, -math.inf], ids=str)


def walled(beyond: float, wall_at: float = 1.0) -> Objective:
    """(x - 3)^2 up to a wall, and nothing finite beyond."""
    return by_autograd(lambda x, which: torch.where(x[:, 0] > wall_at, beyond, (x[:, 0] - 3).square()))


@wall
def test_adam_that_leaves_the_finite_keeps_the_best_point_before(beyond: float) -> None:
    start = torch.tensor([[0.0], [-3.0], [2.0]], dtype=torch.float64)
    found = Adam(rate=0.15)(walled(beyond), start, Termination(100, -1.0), silent)
    assert set(found.ended) == {"diverged"}
    assert found.iterations.tolist()[2] == 0 < found.iterations.tolist()[0] < found.iterations.tolist()[1]
    for s in range(2):
        assert 0.8 < float(found.x[s]) <= 1
        assert float(found.value[s]) == pytest.approx((float(found.x[s]) - 3) ** 2)
    assert float(found.value[2]) == math.inf, "it was never finite"
    assert torch.equal(found.x[2], start[2])


@pytest.mark.parametrize("beyond", [math.nan, math.inf], ids=str)
def test_lbfgs_keeps_to_where_the_function_is_finite(beyond: float) -> None:
    start = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    found = LBFGS()(walled(beyond), start, Termination(100), silent)
    assert 0.9 < float(found.x[0]) <= 1, "halving a step goes on to the wall"
    assert float(found.value[0]) == pytest.approx((float(found.x[0]) - 3) ** 2)
    assert found.ended[1] == "diverged"
    assert float(found.value[1]) == math.inf
    assert torch.equal(found.x[1], start[1])


def test_lbfgs_that_falls_without_end_keeps_the_best_finite_point() -> None:
    found = LBFGS()(walled(-math.inf), torch.zeros(1, 1, dtype=torch.float64), Termination(100, -1.0), silent)
    assert found.ended == ("diverged",)
    assert math.isfinite(float(found.value[0]))
    assert float(found.value[0]) == pytest.approx((float(found.x[0, 0]) - 3) ** 2)


@every_minimiser
def test_a_slope_that_is_not_finite_ends_in_a_reason(minimiser: Minimiser) -> None:
    def objective(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.where(x[:, :1].abs() < 2, math.nan, 2 * x)
        return x.square().sum(1), slope

    start = torch.tensor([[1.0, 1.0], [3.0, 3.0]], dtype=torch.float64)
    found = minimiser(objective, start, Termination(60), silent)
    assert torch.equal(found.x[0], start[0])
    assert found.value.tolist()[0] == 2.0
    assert float(found.value[1]) < 10
    assert bool(found.x.isfinite().all())
    assert all(found.ended)


# Adam.


@settings(max_examples=10, deadline=None)
@given(seeds, st.booleans(), st.integers(1, 40), st.sampled_from([(), (0.5,), (0.25, 0.5, 0.9)]))
def test_adam_is_that_of_torch_on_one_system_at_a_time(
    seed: int, signed: bool, iterations: int, decay: tuple[float, ...]
) -> None:
    q = quadratics((1.0, 10.0, 100.0), 4, seed)
    start = normal(3, 4, seed=seed + 2)
    found = Adam(0.07, signed, decay)(q.objective, start, Termination(iterations), silent)
    for s in range(3):
        point = start[s].clone().requires_grad_()
        optimiser = torch.optim.Adam([point], lr=0.07)
        best, best_value = point.detach().clone(), math.inf
        for iteration in range(iterations + 1):
            falls = sum(iteration >= math.ceil(fraction * iterations) for fraction in decay)
            optimiser.param_groups[0]["lr"] = 0.07 * 0.1**falls
            value = point @ q.A[s] @ point / 2 - q.b[s] @ point
            if value.item() < best_value:
                best, best_value = point.detach().clone(), value.item()
            optimiser.zero_grad()
            value.backward()
            if signed:
                point.grad.sign_()
            optimiser.step()
        torch.testing.assert_close(found.x[s], best, rtol=1e-6, atol=1e-8)


def test_adam_keeps_to_what_is_allowed() -> None:
    q = quadratics((1.0, 1.0), 3, seed=0)
    spy = Spy(q.objective)

    def project(points: Tensor) -> None:
        points.clamp_(-0.2, 0.3)

    found = FAST_ADAM(spy, 5 * normal(2, 3, seed=1), Termination(300), silent, project)
    assert all(bool((x >= -0.2).all() and (x <= 0.3).all()) for x, _ in spy.asked)
    # Condition 1: the nearest point of the box is the lowest.
    torch.testing.assert_close(found.x, q.where.clamp(-0.2, 0.3), rtol=0, atol=1e-3)
    assert not torch.equal(q.where.clamp(-0.2, 0.3), q.where)


# L-BFGS.


def test_lbfgs_refuses_what_it_cannot_keep_to() -> None:
    q = quadratics((1.0,), 3, seed=0)
    with pytest.raises(ValueError, match="L-BFGS") as refused:
        LBFGS()(q.objective, normal(1, 3, seed=1), Termination(10), silent, lambda points: None)
    assert str(refused.value) == "L-BFGS cannot keep a guess in the value range: use Adam, or boxed=False"


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(0, 4), st.data())
def test_the_direction_is_that_of_the_explicit_inverse_hessian(
    seed: int, size: int, pairs: int, data: st.DataObject
) -> None:
    """H+ = (1 - rho s y') H (1 - rho y s') + rho s s', begun at a multiple of the unit matrix."""
    steps = normal(pairs, 2, size, seed=seed)
    turns = torch.einsum("ij,psj->psi", quadratics((30.0,), size, seed).A[0], steps)
    drawn = [[data.draw(st.booleans()) for _ in range(2)] for _ in range(pairs)]
    counts = torch.tensor(drawn, dtype=torch.bool).reshape(pairs, 2)
    inverse = torch.where(counts, 1 / (steps * turns).sum(2), 0.0)
    gradient = normal(2, size, seed=seed + 5)
    found = LBFGS()._direction(gradient, steps, turns, inverse)
    for system in range(2):
        H = np.eye(size) / float(gradient[system].norm())
        used = [p for p in range(pairs) if counts[p, system]]
        if used:
            s, y = (t[used[-1], system].numpy() for t in (steps, turns))
            H = np.eye(size) * (s @ y) / (y @ y)
        for p in used:
            s, y = (t[p, system].numpy() for t in (steps, turns))
            left = np.eye(size) - np.outer(s, y) / (s @ y)
            H = left @ H @ left.T + np.outer(s, s) / (s @ y)
        expected = torch.from_numpy(-H @ gradient[system].numpy())
        torch.testing.assert_close(found[system], expected, rtol=1e-6, atol=1e-9)


class Remembers(LBFGS):
    """Tells how many pairs each direction was made from."""

    def _direction(self, gradient: Tensor, steps: Tensor, turns: Tensor, inverse: Tensor) -> Tensor:
        lengths.append(len(steps))
        return super()._direction(gradient, steps, turns, inverse)


lengths: list[int] = []


@pytest.mark.parametrize("history", [1, 2, 5])
def test_the_history_is_as_long_as_asked_for(history: int) -> None:
    lengths.clear()
    q = quadratics((1e4,), 8, seed=0)
    Remembers(history=history)(q.objective, normal(1, 8, seed=1), Termination(12), silent)
    assert lengths == [min(at, history) for at in range(12)]


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(-4.0, 4.0))
def test_a_line_search_ends_where_both_conditions_hold(seed: int, size: float) -> None:
    """Sufficient decrease and less slope, on a quartic that is bounded below; from steps too short and too long."""

    def value(x: Tensor, which: Tensor) -> Tensor:
        return (x.square() - 1).square().sum(1) + 0.3 * x.sin().sum(1)

    f = by_autograd(value)
    start = 2 * normal(4, 3, seed=seed)
    which = torch.arange(4)
    before, gradient = f(start, which)
    direction = -gradient * 10.0**size
    moved, after, slopes, found = LBFGS(trials=100)._search(f, which, start, before, gradient, direction)
    assert bool(found.all())
    torch.testing.assert_close(after, f(moved, which)[0])
    torch.testing.assert_close(slopes, f(moved, which)[1])
    slope = (gradient * direction).sum(1)
    length = ((moved - start) * direction).sum(1) / direction.square().sum(1)
    assert bool((length > 0).all())
    torch.testing.assert_close(start + length[:, None] * direction, moved, rtol=1e-9, atol=1e-9)
    assert bool((after <= before + 1e-4 * length * slope + 1e-12).all())
    assert bool(((slopes * direction).sum(1) >= 0.9 * slope - 1e-9 * slope.abs()).all())
