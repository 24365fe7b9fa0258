"""One hidden layer and one output: samples by the units that fire for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rgap import Target, capture, losses
from rgap.attacks import Closed, Status
from rgap.inversion.subspace.head import largest_batch
from rgap.inversion.subspace.pattern import TwoValues, by_patterns
from tests.inversion.subspace.cases import Case, perceptron


def case(activation: str, samples: int, bias: bool = True, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(samples, 40, generator=generator)
    labels = 2.0 * torch.randint(0, 2, (samples,), generator=generator) - 1
    model = perceptron((40, 60, 1), activation, bias, seed)
    target = Target(model, losses.Logistic(), (40,), (0.0, 1.0), batch_size=samples)
    return Case(target, capture(target, x, labels), x.double(), labels.double())


@pytest.mark.parametrize("low", [0.0, 0.2])
def test_derivatives_of_two_values(low: float) -> None:
    generator = torch.Generator().manual_seed(0)
    problem = TwoValues(torch.randn(9, 3, generator=generator, dtype=torch.float64), low)
    t = torch.randn(1, 3, generator=generator, dtype=torch.float64)

    def residual(t: torch.Tensor) -> torch.Tensor:
        v = problem.basis @ t
        return (v - low) * (v - 1) / (v.norm() if low == 0 else 1.0)

    j, r = torch.func.jacrev(residual)(t[0]), residual(t[0])
    gradient, gram = problem.normal(t)
    torch.testing.assert_close(gradient[0], j.mT @ r)
    torch.testing.assert_close(gram[0], j.mT @ j)
    torch.testing.assert_close(problem.cost(t)[0], r.square().mean())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "leaky"])
@pytest.mark.parametrize("samples", [2, 5])
def test_every_sample_is_found(activation: str, samples: int, bias: bool) -> None:
    truth = case(activation, samples, bias)
    found = by_patterns(truth.places()[0].reduced(), samples, 64, 6)
    direction = torch.nn.functional.normalize(found.x) @ torch.nn.functional.normalize(truth.x).mT
    assert sorted(direction.argmax(1).tolist()) == list(range(samples))
    assert float(direction.max(1).values.min()) > 1 - 1e-6
    if bias:
        at = direction.argmax(1)
        torch.testing.assert_close(found.x, truth.x[at], rtol=0, atol=1e-3)
        assert found.labels.tolist() == truth.labels[at].tolist()


@pytest.mark.parametrize("activation", ["relu", "leaky"])
def test_the_attack_says_exact_and_its_error_is_right(activation: str) -> None:
    truth = case(activation, 6)
    found = Closed()(truth.target, truth.update)
    assert found.status is Status.EXACT, str(found)
    true = torch.cdist(found.inputs, truth.x).min(1).values / 40**0.5
    stated = torch.tensor([sample.error for sample in found.samples])
    assert bool((true < 10 * stated).all())
    assert bool((stated < 100 * true).all())


@pytest.mark.parametrize("activation", ["relu", "leaky"])
def test_the_largest_batch_knows_the_place(activation: str) -> None:
    truth = case(activation, 4)
    assert largest_batch(truth.target.network, truth.target.loss) == 39
    assert Closed().obstacle(truth.target, 39) is None
    assert "39" in str(Closed().obstacle(truth.target, 40))


def test_a_gradient_that_is_of_no_batch_gives_none() -> None:
    truth = case("relu", 4)
    generator = torch.Generator().manual_seed(1)
    place = truth.places()[0].reduced()
    u = torch.linalg.qr(torch.randn(place.first.u.shape, generator=generator, dtype=torch.float64))[0]
    assert not len(by_patterns(replace(place, first=replace(place.first, u=u)), 4, 32, 2))
