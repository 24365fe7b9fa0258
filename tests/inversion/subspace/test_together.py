"""All samples at once, where a single one is hardly told from a mixture of the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap import Target, capture, losses
from rgap.inversion.subspace.together import HeadSystem, by_labels, solve_together
from tests.inversion.subspace.cases import Case, case, perceptron

DISTINCT = torch.tensor([4.0, 1.0, 7.0, 2.0])


def alike(activation: str, labels: Tensor = DISTINCT) -> Case:
    """Samples so small beside the biases that all outputs are nearly the same."""
    model, loss = perceptron((30, 24, 9), activation, gain=1.0), losses.CrossEntropy(9)
    x = 0.01 * torch.rand(len(labels), 30, generator=torch.Generator().manual_seed(3))
    target = Target(model, loss, (30,), batch_size=len(labels))
    return Case(target, capture(target, x, labels), x.double(), labels.double())


@pytest.mark.parametrize("activation", ["relu", "leaky", "tanh", "gelu"])
def test_the_labels_of_samples_that_are_much_alike_tell_them_apart(activation: str) -> None:
    truth = alike(activation)
    found = by_labels(truth.places()[0], truth.gradients, truth.update.precision, 4)
    assert found is not None
    at = torch.cdist(found.x, truth.x).argmin(1)
    assert sorted(at.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(found.x, truth.x[at], rtol=0, atol=2e-4)
    assert found.labels.tolist() == truth.labels[at].tolist()


def test_labels_that_repeat_leave_the_rank_lower_and_nothing_is_said() -> None:
    truth = alike("relu", torch.tensor([4.0, 4.0, 7.0, 2.0]))
    for place in truth.places():
        if place.left < 4:
            assert by_labels(place, truth.gradients, truth.update.precision, 4) is None


def test_from_nearby_the_samples_are_found() -> None:
    truth = case("sigmoid", 3)
    place = truth.places()[0].reduced()
    share = torch.full((3,), 1 / 3, dtype=torch.float64)
    system = HeadSystem(place, truth.labels, share, truth.gradients, truth.update.precision)
    true = place.cotangent_condition(truth.labels).unknowns_of(place.first.row(truth.x))
    assert float(system.residual(true).square().mean()) < 10**2
    t, left = solve_together(system, true + 1e-3)
    assert left < 10
    torch.testing.assert_close(system.inputs(t), truth.x, rtol=0, atol=1e-3)
