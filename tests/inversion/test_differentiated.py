"""Constraints of smooth networks, differentiated with their cotangents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rgap import Target, capture, data, losses
from rgap.attacks import Closed, Status
from rgap.inversion.differentiated import Fading, differentiated_steps
from rgap.inversion.jacobian import Jacobian
from rgap.inversion.joint import JointSolve
from rgap.inversion.prior import Prior
from rgap.inversion.state import State
from rgap.inversion.system import ConstraintSystem

EPS = float(torch.finfo(torch.float32).eps)
SIZE = 8


def pooled(activation: nn.Module, steep: float, seed: int) -> nn.Sequential:
    """As average pools leave it, with weights of the convolutions so many times larger than torch draws them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            *(nn.Conv2d(1, 6, 5, padding=2), activation, nn.AvgPool2d(2)),
            *(nn.Conv2d(6, 16, 3, padding=1), activation, nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(16 * 4, 12), activation, nn.Linear(12, 4)),
        )
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                layer.weight *= steep
    return model


def picture() -> torch.Tensor:
    return data.photographs(1, SIZE, channels=1).inputs


def in_front(model: nn.Sequential, x: torch.Tensor, spoilt: float = 0.0) -> ConstraintSystem:
    """What is known of the picture from the second pool on, from a gradient in float32, to which something is added."""
    target = Target(model, losses.CrossEntropy(4), (1, SIZE, SIZE), (0.0, 1.0))
    network, label = target.network, torch.tensor([2.0])
    gradients = {name: g.float().double() + spoilt for name, g in target.gradient(x, label).items()}
    front = network.up_to(6)
    values = network.forward(x.double())
    k = target.loss.output_gradient(values[-1], label.double())
    cotangent = network.vjp(values, network.slopes(values), {len(values) - 1: k})[6]
    assert cotangent is not None
    return ConstraintSystem(front, State(values[6], cotangent, None, EPS * values[6].abs()), gradients, EPS)


def test_the_derivative_is_that_of_the_residual() -> None:
    system = in_front(pooled(nn.Sigmoid(), 4.0, 0).double(), picture())
    x = picture().double()
    generator = torch.Generator().manual_seed(0)
    moves = torch.randn(3, *system.in_shape, generator=generator, dtype=torch.float64)
    fixed = Jacobian(system, system.linearise(x), {})
    system = system.differentiated()
    jacobian = Jacobian(system, system.linearise(x), {})

    def residual(at: torch.Tensor) -> torch.Tensor:
        return jacobian.weighted(system.residual(system.linearise(at)))[0]

    step = 1e-6
    by_differences = torch.stack([(residual(x - step * v) - residual(x + step * v)) / (2 * step) for v in moves])
    found = jacobian.mv(moves)
    assert float((found - by_differences).norm()) <= 1e-7 * float(found.norm())
    assert float((fixed.mv(moves) - by_differences).norm()) > 0.1 * float(found.norm())
    rows = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    back = jacobian.rmv(rows)
    assert torch.allclose(torch.einsum("dr,dr->d", found, rows), torch.einsum("d...,d...->d", moves, back))


def test_directions_are_taken_one_by_one_where_torch_has_no_rule_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    system = in_front(pooled(nn.Tanh(), 2.0, 0).double(), picture()).differentiated()
    jacobian = Jacobian(system, system.linearise(picture().double()), {})
    moves = torch.randn(3, *system.in_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = jacobian.mv(moves)
    back = jacobian.rmv(rows)
    grad = torch.autograd.grad

    def alone(*of: Any, is_grads_batched: bool = False, **how: Any) -> Any:
        if is_grads_batched:
            raise RuntimeError("no rule")
        return grad(*of, **how)

    monkeypatch.setattr(torch.autograd, "grad", alone)
    assert torch.allclose(jacobian.mv(moves), rows)
    assert torch.allclose(jacobian.rmv(rows), back)


@pytest.mark.parametrize(("activation", "seed"), [(nn.Sigmoid(), 1), (nn.Tanh(), 0)], ids=str)
def test_what_stands_in_front_of_pools_is_found_where_slopes_bend_much(activation: nn.Module, seed: int) -> None:
    """From a gradient in float32; steps that take slopes for fixed do not find it."""
    target = Target(pooled(activation, 8.0, seed), losses.CrossEntropy(4), (1, SIZE, SIZE), (0.0, 1.0))
    x = picture()
    update = capture(target, x, torch.tensor([2.0]))
    assert Closed(joint=JointSolve(differentiated=0))(target, update).status is Status.NOT_CONVERGED
    found = Closed()(target, update)
    assert found.status is Status.EXACT, found
    [answer] = found.answers
    assert answer.joint is not None
    assert answer.joint.free == 0
    error = float((answer.inputs - x[0]).square().mean().sqrt())
    assert error < 1e-4
    # Of what the layers in front leave more is stated than is left once the whole network's gradient was asked.
    assert error / 5 < answer.error < 20 * error


def test_steps_that_lead_nowhere_end() -> None:
    """Towards a gradient that no input has."""
    system = in_front(pooled(nn.Sigmoid(), 4.0, 0).double(), picture(), 5.0).differentiated()
    steps: list[int] = []
    found = differentiated_steps(
        system, Prior((1, SIZE, SIZE), 0.5), 200 * EPS, Fading(patience=3), lambda step, distance: steps.append(step)
    )
    assert found.distance > 200 * EPS
    assert len(steps) < 30
