"""Batches told apart sample by sample: everything that is found is one of the samples, with its label."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgap import Target, capture, losses
from rgap.inversion.subspace.head import largest_batch
from rgap.inversion.subspace.identify import Samples
from rgap.inversion.subspace.peel import Search
from rgap.linalg import deadline
from tests.inversion.subspace.cases import Case, case, perceptron

SEARCH = Search(starts=32)


def matched(found: Samples, truth: Case) -> list[int]:
    """Of each found sample the number of the one that it is, -1 where it is none."""
    apart = torch.cdist(found.x, truth.x).square() / truth.x.shape[1]
    at = [int(row.argmin()) if float(row.min()) < 1e-6 else -1 for row in apart]
    return [m if m >= 0 and float(truth.labels[m]) == float(found.labels[n]) else -1 for n, m in enumerate(at)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "leaky", "tanh", "sigmoid", "gelu"])
def test_every_sample_is_found_with_its_label_and_share(activation: str, bias: bool) -> None:
    truth = case(activation, 5, bias)
    found = SEARCH(truth.places()[0], 5)
    assert sorted(matched(found, truth)) == [0, 1, 2, 3, 4]
    torch.testing.assert_close(found.share, torch.full((5,), 0.2, dtype=torch.float64), rtol=1e-3, atol=0)


@settings(max_examples=8)
@given(
    activation=st.sampled_from(["relu", "leaky", "tanh", "gelu"]),
    samples=st.integers(2, 6),
    widths=st.tuples(st.integers(16, 40), st.integers(14, 30), st.integers(14, 24), st.integers(3, 8)),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_nothing_is_found_that_is_not_a_sample(
    activation: str, samples: int, widths: tuple[int, ...], bias: bool, seed: int
) -> None:
    truth = case(activation, samples, bias, widths, seed)
    for place in truth.places():
        if place.head.value_id == 0:
            found = SEARCH(place, samples)
            at = matched(found, truth)
            assert -1 not in at
            assert len(set(at)) == len(at)


def test_samples_that_are_the_same_are_found_once_and_counted() -> None:
    once = case("tanh", 4)
    x, labels = torch.cat([once.x, once.x[:2]]).float(), torch.cat([once.labels, once.labels[:2]]).float()
    update = capture(replace(once.target, batch_size=6), x, labels)
    truth = Case(once.target, update, once.x, once.labels)
    found = SEARCH(truth.places()[0], 6)
    at = matched(found, truth)
    assert sorted(at) == [0, 1, 2, 3]
    times = {m: round(6 * float(share)) for m, share in zip(at, found.share, strict=True)}
    assert times == {0: 2, 1: 2, 2: 1, 3: 1}


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_one_output_and_two_labels(activation: str) -> None:
    model, loss = perceptron((30, 24, 20, 1), activation), losses.Logistic()
    x = torch.rand(4, 30, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([1.0, -1.0, -1.0, 1.0])
    target = Target(model, loss, (30,), batch_size=4)
    truth = Case(target, capture(target, x, labels), x.double(), labels.double())
    assert sorted(matched(SEARCH(truth.places()[0], 4), truth)) == [0, 1, 2, 3]


@pytest.mark.parametrize("activation", ["leaky", "gelu"])
def test_labels_that_are_any_number(activation: str) -> None:
    model, loss = perceptron((30, 24, 20, 1), activation), losses.MeanSquaredError(1)
    x = torch.rand(4, 30, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0.3, -1.2, 2.0, 0.7])
    target = Target(model, loss, (30,), batch_size=4)
    truth = Case(target, capture(target, x, labels), x.double(), labels.double())
    found = SEARCH(truth.places()[0], 4)
    apart = torch.cdist(found.x, truth.x)
    assert float(apart.min(1).values.max()) < 1e-3
    torch.testing.assert_close(found.labels, truth.labels[apart.argmin(1)], rtol=1e-3, atol=1e-3)


def test_the_last_layer_alone_gives_features_and_labels() -> None:
    truth = case("tanh", 3, widths=(20, 12), labels=torch.tensor([4.0, 1.0, 7.0]))
    place = truth.places()[0]
    assert place.second is None
    assert sorted(matched(SEARCH(place, 3), truth)) == [0, 1, 2]


def test_where_equations_are_fewer_than_unknowns_there_is_no_place() -> None:
    assert case("tanh", 3, widths=(20, 12)).places()
    assert not case("tanh", 8, widths=(20, 12)).places()  # 12 classes leave 11 - 8 equations for 7 unknowns


@pytest.mark.parametrize(
    ("widths", "activation", "most"),
    # The narrowest space less one; half the second layer's inputs; for smooth ones half the first layer's outputs.
    [((30, 24, 20, 6), "relu", 12), ((30, 40, 8, 6), "relu", 7), ((20, 12), "tanh", 6), ((30, 6), "relu", 3)],
)
def test_the_largest_batch_by_count(widths: tuple[int, ...], activation: str, most: int) -> None:
    truth = case(activation, 2, widths=widths)
    assert largest_batch(truth.target.network, truth.target.loss) == most


def test_a_batch_that_is_larger_than_the_largest_has_no_place() -> None:
    most = largest_batch(case("relu", 2).target.network, losses.CrossEntropy(6))
    half = case("relu", most // 2).places()
    assert (half[0].head.value_id, half[0].left) == (0, most // 2)
    for samples in (most + 1, most + 8, 60):
        assert not [place for place in case("relu", samples).places() if place.head.value_id == 0]


def test_without_time_it_gives_what_it_has() -> None:
    place = case("relu", 4).places()[0]
    with deadline.within(0.0):
        assert len(SEARCH(place, 4)) == 0
