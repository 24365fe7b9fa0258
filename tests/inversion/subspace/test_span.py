"""Row and column spaces of a gradient, against the samples that made it."""

from __future__ import annotations

import pytest
import torch

from rgap.inversion.subspace.span import Span
from rgap.nn.layers import linear
from tests.inversion.subspace.cases import case

SAMPLES = 4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "leaky", "tanh", "sigmoid", "gelu"])
def test_the_rank_is_the_number_of_samples_and_the_spaces_hold_them(activation: str, bias: bool) -> None:
    given = case(activation, SAMPLES, bias)
    place = given.places()[0]
    first, head = place.first, place.head
    assert (first.rank, first.biased) == (SAMPLES, bias)
    row = first.row(given.x)
    inside = row @ first.v
    # Within what it says of itself: the noise of the row space.
    missed = (row - inside @ first.v.mT).norm(dim=1)
    assert bool((missed <= 10 * first.uncertainty(inside) + 1e-9).all())
    k = head.k(head.values(given.x), given.labels)
    assert bool((first.outside(k).norm(dim=1) <= 1e-4 * k.norm(dim=1)).all())
    share, moved = first.inverse_share(given.x, k)
    assert bool(((share - SAMPLES).abs() <= 10 * moved + 1e-5).all())


def test_without_a_sample_the_rank_is_lower_by_one_and_the_others_are_left() -> None:
    given = case("tanh", SAMPLES)
    place = given.places()[0]
    k = place.head.k(place.head.values(given.x), given.labels)
    share = torch.full((1,), 1 / SAMPLES, dtype=torch.float64)
    left = place.first.without(given.x[:1], k[:1], share).reduced()
    assert left.rank == SAMPLES - 1
    row = left.row(given.x)
    outside = (row - row @ left.v @ left.v.mT).norm(dim=1) / row.norm(dim=1)
    assert bool((outside[1:] < 1e-3).all())
    assert float(outside[0]) > 1e-2


def test_the_rank_of_samples_that_are_the_same_is_lower() -> None:
    twice = case("relu", SAMPLES)
    x = torch.cat([twice.x, twice.x[:2]]).float()
    labels = torch.cat([twice.labels, twice.labels[:2]]).float()
    grad = twice.target.gradient(x, labels)
    layer = twice.places()[0].first.layer
    span = Span.of(layer, grad[layer.weight_name].float().double(), grad[str(layer.bias_name)].float().double(), 1e-7)
    assert span.rank == SAMPLES


def test_a_gradient_of_full_rank_tells_nothing() -> None:
    layer = linear("fc", torch.eye(3, 4, dtype=torch.float64), None, (4,), "fc.weight", None)
    span = Span.of(layer, torch.eye(3, 4, dtype=torch.float64), None, 1e-7)
    assert span.full


@pytest.mark.parametrize("times", [0.1, 1.0, 3.0, 6.0])
def test_the_noise_is_that_of_the_gradient_where_it_is_more_than_one_rounding(times: float) -> None:
    """Sums over many samples are rounded at each of them."""
    generator = torch.Generator().manual_seed(0)
    left, right, drawn = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((40, 5), (5, 30), (40, 30))
    )
    eps, grad = 1e-7, left @ right
    rounding = times * eps * float(grad.square().mean().sqrt()) * drawn
    layer = linear("fc", torch.zeros(40, 30, dtype=torch.float64), None, (30,), "fc.weight", None)
    span = Span.of(layer, grad + rounding, None, eps)
    assert span.rank == 5
    assert span.noise / float(torch.linalg.matrix_norm(rounding, 2)) == pytest.approx(max(1.0, 1 / times), rel=0.25)
