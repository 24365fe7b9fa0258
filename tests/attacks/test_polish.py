"""Gauss-Newton on the gradient residual: from near the truth to the truth, and never away from it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rgap import Target, Update, capture, data, losses, models, score
from rgap.attacks import IDLG, Answer, Polish, Reconstruction, Recursive, Status
from rgap.attacks.base import gradient_residual, residual_tolerance
from rgap.attacks.polish import _move, _residual
from rgap.checks import preflight
from rgap.linalg.derivative import linearised

# torch's forward mode compiles formulas of its own when first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

SHAPE = (1, 5, 5)
POLISH = Polish(inner=60)
"""Few unknowns need few inner iterations."""


def smooth(
    loss: losses.Loss | None = None, labels: tuple[float, ...] = (1.0,), dtype: torch.dtype = torch.float64
) -> tuple[Target, Tensor, Update]:
    """A network without kinks, a batch, and its update."""
    loss = losses.CrossEntropy(3) if loss is None else loss
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, loss.outputs)).to(dtype)
    target = Target(model, loss, SHAPE, (0.0, 1.0))
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(len(labels), *SHAPE, generator=generator, dtype=torch.float64)
    return target, x, capture(target, x, torch.tensor(labels))


def begin(
    target: Target,
    update: Update,
    inputs: Tensor,
    labels: tuple[float, ...] = (1.0,),
    status: Status = Status.NOT_CONVERGED,
    twins: tuple[Answer, ...] = (),
) -> Reconstruction:
    """What another attack may have found."""
    y = torch.tensor(labels, dtype=torch.float64)
    answer = Answer(inputs, y, math.nan, gradient_residual(target, update, inputs, y), math.nan)
    found = preflight(target, update), residual_tolerance(update.dtype), target.value_range
    return Reconstruction("Other", status, "as it said", (answer, *twins), ("what it assumed",), *found)


def noise(like: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("loss", [losses.CrossEntropy(3), losses.Logistic()], ids=lambda loss: loss.name)
@settings(max_examples=3, deadline=None)
@given(st.floats(-6, -1), st.integers(0, 2**31))
def test_near_the_truth_the_truth_is_found(loss: losses.Loss, size: float, seed: int) -> None:
    target, x, update = smooth(loss)
    start = begin(target, update, x + 10**size * noise(x, seed))
    found = replace(POLISH, start=start)(target, update)
    assert score(found, x).mse[0] < 1e-20, (size, found)
    assert found.status is Status.REPRODUCED
    assert found.gradient_residual < 1e-10
    assert found.attack == "Polish"
    assert "of Other lowered to" in found.reason


def test_a_batch_is_polished_as_a_whole() -> None:
    target, x, update = smooth(labels=(2.0, 0.0))
    start = begin(target, update, x + 1e-2 * noise(x), (2.0, 0.0))
    found = replace(POLISH, start=start)(target, update)
    assert float((found.inputs - x).square().mean()) < 1e-18
    assert found.labels.tolist() == [2.0, 0.0]


def test_the_rounding_of_the_gradient_is_all_that_is_left() -> None:
    target, x, update = smooth(dtype=torch.float32)
    found = replace(POLISH, start=begin(target, update, x + 1e-2 * noise(x)))(target, update)
    assert found.gradient_residual < 1e-6
    assert score(found, x).mse[0] < 1e-9
    assert found.status is Status.REPRODUCED


def test_the_answer_of_an_attack_is_polished() -> None:
    target, x, update = smooth()
    attack = IDLG(iterations=30)
    before, after = attack(target, update), replace(POLISH, start=attack)(target, update)
    assert before.status is Status.NOT_CONVERGED
    assert after.status is Status.REPRODUCED
    assert score(after, x).mse[0] < 1e-4 * score(before, x).mse[0]
    assert after.gradient_residual < 1e-4 * before.gradient_residual
    assert after.assumptions == (*before.assumptions, "the label is the one that iDLG gives")
    given_ = replace(POLISH, start=before)(target, update)
    assert torch.equal(given_.inputs, after.inputs)
    assert given_.assumptions == after.assumptions
    assert after.seconds > 0


def test_the_certificate_is_that_of_the_new_answer() -> None:
    target, x, update = smooth()
    start = begin(target, update, x + 0.3 * noise(x))
    found = Polish(start, steps=1)(target, update)
    expected = gradient_residual(target, update, found.inputs, found.labels)
    assert found.gradient_residual == pytest.approx(expected, rel=1e-12)
    assert expected < start.gradient_residual


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 2**31), st.floats(-3, 2), st.sampled_from([0.0, 1.0, 2.0]), st.booleans())
def test_no_answer_is_worse_than_its_start(seed: int, size: float, label: float, noisy: bool) -> None:
    """Not from far away, with a wrong label, or on a gradient of noise."""
    target, x, update = smooth()
    if noisy:
        update = Update({name: noise(g, seed) for name, g in update.gradients.items()})
    start = begin(target, update, x + 10**size * noise(x, seed), (label,))
    found = Polish(start, steps=3, inner=20)(target, update)
    assert found.gradient_residual <= start.gradient_residual
    if found.gradient_residual == start.gradient_residual:
        assert torch.equal(found.inputs, start.inputs)
    expected = gradient_residual(target, update, found.inputs, found.labels)
    assert found.gradient_residual == pytest.approx(expected, rel=1e-12)
    assert (found.status is Status.REPRODUCED) == (expected <= found.tolerance)


def test_the_truth_stays_the_truth() -> None:
    target, x, update = smooth()
    start = begin(target, update, x, status=Status.EXACT)
    found = replace(POLISH, start=start)(target, update)
    assert found.status is Status.EXACT
    assert torch.equal(found.inputs, x)
    assert found.reason == "no step improves on Other: as it said"


def test_networks_with_kinks_are_not_made_worse() -> None:
    target = Target(models.cnn6(1, 12), losses.Logistic(), (1, 12, 12), (0.0, 1.0))
    x = data.photographs(1, 12, channels=1).inputs
    update = capture(target, x, torch.tensor([1.0]))
    before, after = Recursive()(target, update), Polish(steps=2, inner=30)(target, update)
    assert before.status is after.status is Status.EXACT
    assert after.gradient_residual <= before.gradient_residual
    assert score(after, x).mse[0] < 1e-8
    assert after.layers == before.layers


# Statuses.


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_start_that_is_not_finite_is_given_back(bad: float) -> None:
    target, x, update = smooth()
    broken = x.clone()
    broken[0, 0, 2, 2] = bad
    start = begin(target, update, broken)
    assert math.isnan(start.gradient_residual)
    found = replace(POLISH, start=start)(target, update)
    assert torch.equal(found.inputs.nan_to_num(7.0), broken.nan_to_num(7.0))
    assert (found.status, found.attack) == (Status.NOT_CONVERGED, "Polish")
    assert found.reason.startswith("no step improves on Other")


@pytest.mark.parametrize("status", [Status.GRADIENT_ZERO, Status.NOT_CONVERGED])
def test_without_an_answer_there_is_nothing_to_polish(status: Status) -> None:
    target, x, update = smooth()
    start = replace(begin(target, update, x, status=status), answers=())
    found = replace(POLISH, start=start)(target, update)
    assert (found.attack, found.status, found.reason, found.answers) == ("Polish", status, "Other: as it said", ())


@pytest.mark.parametrize(
    "status", [Status.EXACT, Status.AMBIGUOUS, Status.RANK_DEFICIENT, Status.ILL_CONDITIONED, Status.REPRODUCED]
)
def test_what_the_start_knows_of_its_answer_is_kept(status: Status) -> None:
    target, x, update = smooth()
    twin = begin(target, update, x + 1).answers[0]
    start = begin(target, update, x + 1e-3 * noise(x), status=status, twins=(twin,))
    found = replace(POLISH, start=start)(target, update)
    assert found.status is status
    assert found.twins == (twin,)
    assert score(found, x).mse[0] < 1e-18


def test_lower_is_not_yet_low() -> None:
    target, x, update = smooth()
    start = begin(target, update, x + 0.5 * noise(x))
    found = Polish(start, steps=1, inner=1)(target, update)
    assert found.gradient_residual < start.gradient_residual
    assert found.gradient_residual > found.tolerance
    assert found.status is Status.NOT_CONVERGED


# One step.


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 10.0]))
def test_a_step_is_the_damped_least_squares_solution(seed: int, damping: float) -> None:
    target, x, update = smooth()
    start = begin(target, update, x + 0.1 * noise(x, seed))
    residual = _residual(target, update, start.answers[0])
    at = start.inputs.reshape(-1)
    J, r = torch.func.jacrev(residual)(at), residual(at)
    weight = damping * float((J.mT @ r).norm() / r.norm())
    stacked = torch.cat([J, weight * torch.eye(len(at), dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, torch.cat([-r, torch.zeros_like(at)])[:, None]).solution[:, 0]
    # By LSMR, which is not done before its last product where little is damped, and by the Jacobian itself.
    for inner in (500, len(at) - 1) if damping >= 1 else (500,):
        move, length = _move(residual, at, damping, inner)
        torch.testing.assert_close(move, expected, rtol=1e-6, atol=1e-9)
        assert length == pytest.approx(float(expected.norm()), rel=1e-6)


def test_the_residual_is_in_units_of_each_entrys_rounding() -> None:
    target, x, update = smooth()
    inputs = x + 0.1 * noise(x)
    answer = begin(target, update, inputs).answers[0]
    found = target.gradient(inputs, torch.tensor([1.0]))
    entries = []
    for name, g in update.gradients.items():
        largest = float(g.abs().max())
        for one, other in zip(found[name].flatten().tolist(), g.flatten().tolist(), strict=True):
            entries.append((one - other) / (abs(other) + 0.1 * largest))
    expected = torch.tensor(entries, dtype=torch.float64) / len(entries) ** 0.5
    torch.testing.assert_close(_residual(target, update, answer)(inputs.reshape(-1)), expected, rtol=1e-9, atol=1e-12)


def test_products_are_those_of_the_matrix_of_derivatives() -> None:
    target, x, update = smooth()
    residual = _residual(target, update, Answer(x, torch.tensor([1.0]), math.nan, 0.0, math.nan))
    at = (x + 0.1 * noise(x)).reshape(-1)
    J = torch.autograd.functional.jacobian(residual, at)
    along, here, back = linearised(residual, at)
    v, u = noise(at, 1), noise(here, 2)
    assert torch.equal(here, residual(at))
    torch.testing.assert_close(along(v), J @ v)
    torch.testing.assert_close(back(u), J.mT @ u)
