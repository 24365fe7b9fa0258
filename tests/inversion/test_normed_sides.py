"""Sides of a ReLU's values behind a batch norm in training mode, from the gradient of the layer in front."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, losses
from rgap.inversion.block_solve import SOLVER
from rgap.inversion.jacobian import Jacobian
from rgap.inversion.normed_sides import missed, other_sides, without_spoiled
from rgap.inversion.sides import OUTLYING
from rgap.inversion.state import State
from rgap.inversion.system import ConstraintSystem
from rgap.nn.network import Network

SAMPLES, EPS = 2, 1e-7


def told(seed: int) -> tuple[Network, Tensor, Tensor, dict[str, Tensor]]:
    """A convolution and its norm, pictures, the cotangent behind a ReLU, and the gradients."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inner = [nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)]
        model = nn.Sequential(*inner).double().train()
        x = torch.rand(SAMPLES, 2, 6, 6, dtype=torch.float64)
        k = torch.randn(SAMPLES, 8, 6, 6, dtype=torch.float64)
    target = Target(model, losses.CrossEntropy(2), (2, 6, 6), batch_size=SAMPLES)
    z = inner[0](x)
    y = inner[1](z)
    names = ("0.weight", "0.bias", "1.weight", "1.bias")
    grads = torch.autograd.grad((inner[2](y) * k).sum(), [dict(model.named_parameters())[name] for name in names])
    axes = (0, 2, 3)
    after = {"1.running_mean": 0.1 * z.mean(axes), "1.running_var": 0.9 + 0.1 * z.var(axes)}
    gradients = dict(zip(names, grads, strict=True))
    after = {name: each.detach() for name, each in after.items()}
    return target.of_batch(after, gradients, SAMPLES).network.up_to(2), x, k, gradients


def taken(network: Network, x: Tensor, k: Tensor, active: Tensor) -> State:
    """What is known of the norm's output where these values are taken for positive ones."""
    y, std = network.forward(x)[-1], torch.full_like(k, 1e-3)
    other = State(y * active, k * ~active, torch.zeros_like(y), std)
    return State(y * active, k * active, active.double(), std, other)


def nearly(x: Tensor) -> Tensor:
    return x + 1e-2 * torch.sin(torch.arange(x.numel()).reshape(x.shape).double())


@pytest.mark.parametrize("seed", range(4))
def test_values_on_their_wrong_side_are_found_and_nothing_else(seed: int) -> None:
    network, x, k, gradients = told(seed)
    y = network.forward(x)[-1]
    right = y > 0
    order = y.abs().flatten().argsort()
    wrong = torch.zeros_like(right).flatten()
    wrong[order[: seed + 1]] = True  # those that are nearest to their kink
    active = right ^ wrong.reshape(right.shape)
    system = ConstraintSystem(network, taken(network, x, k, active), gradients, EPS)
    assert float(missed(system, system.linearise(x)).max()) > OUTLYING
    state, near = other_sides(system, nearly(x), SOLVER)
    torch.testing.assert_close(state.cotangent, k * right)
    assert state.row_weight is not None
    assert torch.equal(state.row_weight > 0, active & right)
    assert float((near - x).abs().max()) < 1e-4
    again = ConstraintSystem(network, state, gradients, EPS)
    assert other_sides(again, x, SOLVER)[0] is state


def test_without_another_side_there_is_none_to_find() -> None:
    network, x, k, gradients = told(0)
    active = network.forward(x)[-1] > 0
    state = replace(taken(network, x, k, active), alternative=None)
    found = other_sides(ConstraintSystem(network, state, gradients, EPS), x, SOLVER)
    assert found[0] is state
    assert found[1] is x


def test_outputs_that_are_spoiled_do_not_draw_the_input_away() -> None:
    network, x, k, gradients = told(0)
    spoiled = gradients["0.weight"].clone()
    spoiled[[1, 5]] += 10
    state = taken(network, x, k, network.forward(x)[-1] > 0)
    system = ConstraintSystem(network, state, {**gradients, "0.weight": spoiled}, EPS)
    at = without_spoiled(system, nearly(x), SOLVER)
    assert float((at.x - x).abs().max()) < 1e-4
    plain = SOLVER.step(jacobian := Jacobian(system, at, {}), jacobian.weighted(system.residual(at)), at.x, None)
    assert float((plain - x).abs().max()) > 1e-2
