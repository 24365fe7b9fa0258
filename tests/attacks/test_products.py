"""The joint constraints as products, against the dense normal equations of the same constraints."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rgap import capture, data, models
from rgap.attacks import Closed, Status, fading, virtual
from rgap.attacks.fading import Prior, smoothness
from rgap.attacks.joint import Known, Problem
from rgap.attacks.products import Products
from rgap.metrics import score
from rgap.target import Target
from tests.attacks.test_virtual import LOSS, masks, narrow, problem


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["leaky", "tanh", "elu"]),
    st.booleans(),
    st.sampled_from([None, (), (3, 17)]),
    st.booleans(),
)
def test_they_are_those_of_the_dense_equations(
    seed: int, kind: str, bias: bool, doubt: tuple[int, ...] | None, weighted: bool
) -> None:
    activation = {"leaky": nn.LeakyReLU(0.2), "tanh": nn.Tanh(), "elu": nn.ELU()}[kind]
    target = narrow(activation, bias, seed, size=8)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 1, 8, 8, generator=generator, dtype=torch.float64)
    made, packed = problem(target, x, 1)
    if weighted:
        weight = torch.rand(made.known.z.shape, generator=generator, dtype=torch.float64)
        gradients = {layer.weight_name: grad for layer, grad in zip(made.layers, made.grads, strict=True)}
        made = Problem(target.chain, 1, Known(made.known.k, made.known.z, weight), gradients)
    point = made.forward(packed)
    doubtful = None if doubt is None else masks(made, point, *doubt)
    gram, rhs = made.normal(point, doubtful)
    rows = Products(made, point, doubtful)
    rows._scale = list(made._scale)  # theirs are told from a few draws
    units = torch.eye(made.unknowns, dtype=torch.float64).reshape(-1, *made.shape[1:])
    found = rows(units).flatten(1)
    assert torch.allclose(found, gram, rtol=1e-9, atol=1e-11 * float(gram.abs().max()))
    assert torch.allclose(rows.right().flatten(), rhs, rtol=1e-9, atol=1e-11 * float(rhs.abs().max()))
    z, grads = torch.randn_like(made.z), [torch.randn_like(grad) for grad in made.grads]
    if doubt is not None:
        noise = made.noise(point, z, grads)
        assert torch.allclose(rows.noise(z, grads).flatten(), noise, rtol=1e-9, atol=1e-11 * float(noise.abs().max()))


def test_sizes_told_from_draws_are_near_the_true_ones() -> None:
    made, packed = problem(narrow(nn.LeakyReLU(0.2)), data.photographs(1, 12, channels=1).inputs.double(), 1)
    point = made.forward(packed)
    gram, _ = made.normal(point, masks(made, point))
    rows = Products(made, point, masks(made, point))
    assert rows.diagonal == pytest.approx(float(gram.diagonal().mean()), rel=0.5)
    assert rows._scale == pytest.approx(made._scale, rel=0.7)


@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 2, 2), (3, 1, 4), (7,)])
def test_the_prior_is_its_matrix(shape: tuple[int, ...]) -> None:
    prior = Prior(shape, 0.5)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = prior.matrix(x)
    assert prior.smooth == (smoothness(shape, x) is not None)
    assert torch.allclose(prior(x).flatten(), dense @ x.flatten())


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.2), nn.Tanh()])
def test_both_ways_lead_to_the_picture(activation: nn.Module) -> None:
    target = narrow(activation)
    truth = data.photographs(1, 12, channels=1).inputs.double()
    update = capture(target, truth, torch.tensor([1.0]))
    found = {solver: Closed(solver=solver)(target, update) for solver in ("direct", "iterative")}  # type: ignore[arg-type]
    for each in found.values():
        assert each.status is Status.EXACT, each
        assert score(each, truth).mse[0] < 1e-14
    ranks = [each.answers[0].joint.rank for each in found.values() if each.answers[0].joint is not None]
    assert ranks == [144, 144]


def test_what_all_rows_leave_free_is_counted_by_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn moves that do not come back only say that something is free."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 2, 4, 2, 2, bias=False), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(98, 1, bias=False)
        )
    target = Target(model.double(), LOSS, (1, 12, 12), (0.0, 1.0))
    truth = data.photographs(1, 12, channels=1).inputs.double()
    update = capture(target, truth, torch.tensor([1.0]))
    exact = Closed(solver="direct")(target, update)
    counted = Closed(solver="iterative")(target, update)
    monkeypatch.setattr(virtual, "COUNTED", 0)
    drawn = Closed(solver="iterative")(target, update)
    joints = [found.answers[0].joint for found in (exact, counted, drawn)]
    assert all(joint is not None for joint in joints)
    ranks = [joint.rank for joint in joints if joint is not None]
    assert ranks[0] == ranks[1] < 144
    assert ranks[2] < 144
    assert {found.status for found in (exact, counted, drawn)} == {Status.RANK_DEFICIENT}


def test_a_large_chain_is_solved_jointly_without_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fading, "_Dense", None)
    target = Target(models.cnn6_d(1, 32), LOSS, (1, 32, 32), (0.0, 1.0))
    truth = data.photographs(1, 32, channels=1).inputs
    found = Closed(solver="iterative")(target, capture(target, truth, torch.tensor([1.0])))
    assert found.status is Status.EXACT, found
    assert score(found, truth).mse[0] < 1e-8
