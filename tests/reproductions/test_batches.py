"""What the recursion gives for a batch: the linear combination that its own derivation foretells."""

from __future__ import annotations

from itertools import permutations
from math import exp

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rgap import Target, attacks, capture, losses, models
from rgap.attacks import Answer
from rgap.inversion.refine_sides import NEAR
from rgap.reproductions.base import Options, labels
from rgap.reproductions.batches import PHOTOGRAPHS, assigned, batches, by_margins, by_slopes, measured

PIXELS = 12


def batch(b: int, seed: int) -> Tensor:
    """Pictures of 3 x 4 random values, in float64."""
    return torch.rand(b, 1, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attacked(model: nn.Module, inputs: Tensor, y: Tensor) -> Answer:
    """What the recursion puts first."""
    target = Target(model, losses.Logistic(), tuple(inputs.shape[1:]), (0.0, 1.0), batch_size=len(inputs))
    return attacks.Recursive()(target, capture(target, inputs, y)).answers[0]


def plain_margins(model: nn.Module, inputs: Tensor, y: Tensor) -> list[float]:
    with torch.no_grad():
        return [float(label * model(x[None])) for x, label in zip(inputs, y, strict=True)]


def foretold(model: nn.Module, inputs: Tensor, y: Tensor, found: Answer) -> Tensor:
    target = Target(model, losses.Logistic(), tuple(inputs.shape[1:]))
    return by_slopes(target.network, losses.Logistic(), inputs, y.double(), float(found.labels[0]), found.margin)


sizes = st.tuples(st.integers(2, 5), st.lists(st.integers(1, 9), max_size=3), st.integers(0, 2**31))


@given(sizes)
@settings(deadline=None, max_examples=8)
def test_without_activations_the_margins_alone_tell_the_coefficients(drawn: tuple[int, list[int], int]) -> None:
    b, hidden, seed = drawn
    model, inputs, y = models.fcn3(PIXELS, hidden, nn.Identity, seed=seed).double(), batch(b, seed), labels(b)
    found = attacked(model, inputs, y)
    # In plain numbers: the margin solves Eq. 11 with the mean of the products, and k = y l'(mu).
    own, margin, label = plain_margins(model, inputs, y), found.margin, float(found.labels[0])
    product = sum(-mu / (1 + exp(mu)) for mu in own) / b
    assert -margin / (1 + exp(margin)) == pytest.approx(product, rel=1e-8, abs=1e-12)
    k = -label / (1 + exp(margin))
    coefficients = [-sign / (1 + exp(mu)) / (b * k) for sign, mu in zip(y.tolist(), own, strict=True)]
    expected = sum(c * x for c, x in zip(coefficients, inputs, strict=True))
    torch.testing.assert_close(found.inputs[0], expected, rtol=1e-8, atol=1e-8)
    got = by_margins(losses.Logistic(), torch.tensor(own, dtype=torch.float64), y.double(), label, margin)
    torch.testing.assert_close(got, torch.tensor(coefficients, dtype=torch.float64), rtol=1e-10, atol=0)


@given(sizes)
@settings(deadline=None, max_examples=8)
def test_with_activations_the_slopes_of_the_pictures_tell_the_coefficients(drawn: tuple[int, list[int], int]) -> None:
    b, hidden, seed = drawn
    model, inputs, y = models.fcn3(PIXELS, hidden, seed=seed).double(), batch(b, seed), labels(b)
    found = attacked(model, inputs, y)
    # Nearer than that the attack moves an answer across kinks that it takes for the cause, off the combination.
    assume(found.gradient_residual > NEAR or found.gradient_residual < 1e-8)
    expected = (foretold(model, inputs, y, found)[:, None, None, None] * inputs).sum(0)
    torch.testing.assert_close(found.inputs[0], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.search
@pytest.mark.parametrize("slope", [0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("b", [2, 5])
def test_with_one_hidden_layer_the_margins_alone_are_off_by_the_slope_at_most(
    slope: float, b: int, first_seed: int
) -> None:
    """Each c_i is k_i/(b k) times a mean of d_i/d, the slopes of picture and combination: between slope and 1/slope."""
    ratios = []
    for seed in range(first_seed, first_seed + 5):
        model = models.fcn3(PIXELS, (40,), lambda: nn.LeakyReLU(slope), seed=seed).double()
        inputs, y = batch(b, seed), labels(b)
        found = attacked(model, inputs, y)
        own = torch.tensor(plain_margins(model, inputs, y), dtype=torch.float64)
        guess = by_margins(losses.Logistic(), own, y.double(), float(found.labels[0]), found.margin)
        ratios.append(measured(found.inputs, inputs)[0] / guess)
    ratio = torch.cat(ratios)
    assert slope - 1e-8 <= float(ratio.min())
    assert float(ratio.max()) <= 1 / slope + 1e-8
    assert float((ratio - 1).abs().max()) > 1e-4  # so that the bound is worth something


@pytest.mark.parametrize("b", [2, 5])
def test_the_answer_is_a_combination_of_the_pictures_and_of_nothing_else(b: int) -> None:
    model, inputs, y = models.fcn3(PIXELS, (30, 20), seed=1).double(), batch(b, 1), labels(b)
    found = attacked(model, inputs, y)
    coefficients, unexplained = measured(found.inputs, inputs)
    assert unexplained < 1e-20
    torch.testing.assert_close(coefficients, foretold(model, inputs, y, found), rtol=1e-8, atol=1e-8)
    assert measured(found.inputs, inputs[1:])[1] > 1e-3  # without one of them it is none


def test_what_a_combination_leaves_is_its_distance() -> None:
    inputs = torch.eye(4, dtype=torch.float64)[:2].reshape(2, 1, 2, 2)
    answer = torch.tensor([[[3.0, -2.0], [6.0, 0.0]]], dtype=torch.float64)
    coefficients, unexplained = measured(answer, inputs)
    assert coefficients.tolist() == pytest.approx([3.0, -2.0])
    assert unexplained == pytest.approx(36 / 49)


@given(st.integers(1, 5), st.integers(0, 2**31))
@settings(deadline=None, max_examples=15)
def test_the_assignment_is_the_best_of_all(b: int, seed: int) -> None:
    truth, found = batch(b, seed), batch(b, seed + 1)
    order, errors = assigned(found, truth)
    every = [
        sum(float((found[at] - picture).square().mean()) for at, picture in zip(tried, truth, strict=True))
        for tried in permutations(range(b))
    ]
    assert sum(errors) == pytest.approx(min(every))
    assert errors == pytest.approx([float((found[at] - x).square().mean()) for at, x in zip(order, truth, strict=True)])


@pytest.mark.parametrize(("count", "size"), [(1, 2), (10, 2), (12, 2), (13, 2), (30, 2), (5, 5), (10, 5), (3, 7)])
def test_batches_hold_different_pictures_however_many_there_are(count: int, size: int) -> None:
    found = batches(Options(), count, size)
    assert [tuple(each.shape) for each in found] == [(size, 1, 28, 28)] * count
    for each in found:
        assert len({x.numpy().tobytes() for x in each}) == size
    dealt = torch.cat(found)
    assert len({x.numpy().tobytes() for x in dealt}) == min(count * size, PHOTOGRAPHS - PHOTOGRAPHS % size)
    again = batches(Options(), count, size)
    assert torch.equal(torch.cat(again), dealt)


def test_there_are_as_many_photographs_as_said() -> None:
    assert len(Options().grey(PHOTOGRAPHS)) == PHOTOGRAPHS
    with pytest.raises(ValueError, match=f"expected 1 to {PHOTOGRAPHS}"):
        Options().grey(PHOTOGRAPHS + 1)
