"""The constraints of several steps that share their gradient rows, against plain differences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rgap import Target, losses
from rgap.inversion.state import State
from rgap.inversion.steps_system import StepsJacobian, StepsSystem
from rgap.inversion.system import ConstraintSystem

SIZES = (1, 2)


def steps() -> tuple[StepsSystem, Tensor]:
    """Two steps, of one and of two samples, through two convolutions whose weights differ."""
    systems, made, generator = [], dict[str, Tensor](), torch.Generator().manual_seed(0)
    x = torch.rand(sum(SIZES), 2, 4, 4, generator=generator, dtype=torch.float64)
    parts = []
    for step, own in enumerate(x.split_with_sizes(SIZES)):
        torch.manual_seed(step)
        model = nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(3, 3, 3, 1, 1), nn.Flatten())
        network = Target(
            nn.Sequential(*model, nn.Linear(48, 2)).double(), losses.CrossEntropy(2), (2, 4, 4), (0.0, 1.0)
        ).network.up_to(4)
        value = network.forward(own)[-1]
        k = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        state = State(value, k, None, torch.full_like(value, 1e-6))
        parts.append((network, state))
        alone = {layer.weight_name: torch.zeros_like(layer.weight[0]) for layer in network.layers}
        system = ConstraintSystem(network, state, alone, 1e-7)
        names = [layer.weight_name for layer in network.layers]
        for name, grad in zip(names, (each[0, 0] for each in system.made(system.linearise(own))), strict=True):
            made[name] = made.get(name, torch.zeros_like(grad)) + grad
    for network, state in parts:
        systems.append(ConstraintSystem(network, state, made, 1e-7))
    return StepsSystem(tuple(systems)), x


def test_the_inputs_leave_nothing_and_others_do() -> None:
    system, x = steps()
    rows = system.residual(system.linearise(x))
    assert max(float(each.abs().max()) for each in (rows.weight, *rows.gradient)) < 1e-12
    moved = x.clone()
    moved[0] += 0.1  # of the first step's sample: the second step's rows of weights are met still
    rows = system.residual(system.linearise(moved))
    assert float(rows.weight[0, 1:].abs().max()) < 1e-12
    assert min(float(each.norm()) for each in (rows.weight[0, :1], *rows.gradient)) > 1e-3


def test_products_are_those_of_the_derivative() -> None:
    system, x = steps()
    at = system.linearise(x)
    jacobian = StepsJacobian(system, at, 0)
    direction = torch.randn(1, *x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-6  # so small that no unit changes its side
    there, here = system.residual(system.linearise(x + step * direction[0])), system.residual(at)
    moved = (jacobian.weighted(here) - jacobian.weighted(there)) / step
    assert torch.allclose(jacobian.mv(direction), moved, rtol=1e-5, atol=1e-6 * float(moved.abs().max()))
    dense = jacobian.to_dense()
    rows = torch.randn(2, len(dense), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.allclose(jacobian.rmv(rows).flatten(1), rows @ dense, rtol=1e-9, atol=1e-9 * float(dense.abs().max()))
    gram = jacobian.normal(direction).flatten(1)
    assert torch.allclose(gram, direction.flatten(1) @ dense.mT @ dense, rtol=1e-9, atol=1e-9 * float(gram.abs().max()))


def test_what_units_in_doubt_explain_is_their_own_steps() -> None:
    system, x = steps()
    at = system.linearise(x)
    jacobian = StepsJacobian(system, at, 2)
    planted = [own[0].whole(system.systems[0].gradients[0]) for own in jacobian.doubted]
    assert all(len(basis) for basis in planted)
    missed = [torch.zeros_like(grad) for grad in system.systems[0].gradients]
    missed[0] = 3.0 * planted[1][0].reshape(missed[0].shape)
    found = jacobian.explained(missed)
    assert float(found[0][0].norm()) < 1e-9
    assert torch.allclose(found[1][0], missed[0], atol=1e-9)
    assert not any(float(each[1].norm()) for each in found)
