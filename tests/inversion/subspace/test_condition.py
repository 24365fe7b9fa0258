"""The equations of one sample of a batch: against a residual that is written out, and its automatic derivative."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap.inversion.subspace.condition import Condition, CotangentCondition, RowCondition
from rgap.linalg.levenberg_marquardt import levenberg_marquardt
from tests.inversion.subspace.cases import Case, case

SAMPLES = 3
every = pytest.mark.parametrize(
    ("activation", "bias"),
    [(name, bias) for name in ("relu", "leaky", "tanh", "sigmoid", "gelu") for bias in (True, False)],
)
smooth = pytest.mark.parametrize(
    ("activation", "bias"), [(name, bias) for name in ("tanh", "sigmoid", "gelu") for bias in (True, False)]
)


def conditions(given: Case, count: int) -> tuple[RowCondition, CotangentCondition]:
    place = given.places()[0].reduced()
    labels = given.labels[:1].expand(count)
    row = place.condition(labels)
    assert isinstance(row, RowCondition)
    return row, place.cotangent_condition(labels)


def outside(basis: Tensor, values: Tensor) -> Tensor:
    return values - values @ basis @ basis.mT


def row_residual(condition: RowCondition, t: Tensor) -> Tensor:
    """(h, 1) outside the second row space; without a bias in units of what bends."""

    def behind(t: Tensor) -> Tensor:
        x = condition.inputs(t[None])
        layer = condition.first.layer
        z = x @ layer.weight[0].mT + layer.offset[:, 0]
        h = condition.between.forward(z)[-1][0]
        return torch.cat([h, h.new_ones(1)]) if condition.second.biased else h

    r = outside(condition.second.v, behind(t))
    if condition.first.biased:
        return r
    zero = torch.zeros_like(t)
    curved = behind(t) - behind(zero) - condition._at_zero[1] @ t
    return r / curved.norm()


@every
def test_derivatives_of_the_row_condition(activation: str, bias: bool) -> None:
    condition, _ = conditions(case(activation, SAMPLES, bias), 2)
    t = torch.randn(2, condition.unknowns, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gradient, gram = condition.normal(t)
    for at in range(2):
        r = row_residual(condition, t[at])
        j = torch.func.jacrev(lambda each: row_residual(condition, each))(t[at])
        torch.testing.assert_close(gradient[at], j.mT @ r, rtol=1e-7, atol=1e-9 * float(gradient.abs().max()))
        torch.testing.assert_close(gram[at], j.mT @ j, rtol=1e-7, atol=1e-9 * float(gram.abs().max()))


@smooth
def test_derivatives_of_the_cotangent_condition(activation: str, bias: bool) -> None:
    given = case(activation, SAMPLES, bias)
    _, condition = conditions(given, 2)
    loss, network = given.target.loss, given.places()[0].head.network
    t = torch.randn(2, condition.unknowns, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gradient, gram = condition.normal(t)

    def residual(t: Tensor) -> Tensor:
        def of_z(z: Tensor) -> Tensor:
            for node in network.nodes[1:]:
                z = node.op.forward(z)
            return loss.per_sample(z, condition.labels[:1]).sum()

        z = network.nodes[0].op.forward(condition.inputs(t[None]))
        return outside(condition.first.u, torch.func.grad(of_z)(z)[0])

    for at in range(2):
        j = torch.func.jacfwd(residual)(t[at])
        torch.testing.assert_close(
            gradient[at], j.mT @ residual(t[at]), rtol=1e-7, atol=1e-9 * float(gradient.abs().max())
        )
        torch.testing.assert_close(gram[at], j.mT @ j, rtol=1e-7, atol=1e-9 * float(gram.abs().max()))


@every
def test_the_samples_satisfy_it_as_far_as_rounding_explains_and_mixtures_do_not(activation: str, bias: bool) -> None:
    given = case(activation, SAMPLES, bias)
    row, cotangent = conditions(given, SAMPLES)
    cotangent = CotangentCondition(cotangent.first, cotangent.behind, cotangent.loss, given.labels)
    every_condition: list[Condition] = [row] if activation in ("relu", "leaky") else [row, cotangent]
    mixed = (given.x + given.x.roll(1, 0)) / 2
    for condition in every_condition:
        t = condition.unknowns_of(condition.first.row(given.x))
        assert bool((condition.cost(t) <= 30**2 * condition.allowed(t)).all())
        t = condition.unknowns_of(condition.first.row(mixed))
        assert bool((condition.cost(t) > 30**2 * condition.allowed(t)).all())


@smooth
def test_its_error_is_that_of_the_samples_found(activation: str, bias: bool) -> None:
    given = case(activation, SAMPLES, bias)
    _, condition = conditions(given, SAMPLES)
    condition = CotangentCondition(condition.first, condition.behind, condition.loss, given.labels)
    t, _ = levenberg_marquardt(condition, condition.unknowns_of(condition.first.row(given.x)))
    true = (condition.inputs(t) - given.x).square().mean(1).sqrt()
    stated = condition.error(t)
    assert bool((true < 10 * stated).all())
    assert bool((stated < 300 * true).all())
