"""ReLU and LeakyReLU with rounded kinks, where they stay and how smooth they become, and with slopes that are given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rgap.nn.soft import GivenSides, GivenSlopes, SoftKinks

KINKED: list[Callable[[Tensor], Tensor]] = [
    functional.relu,
    torch.relu,
    Tensor.relu,
    lambda z: functional.leaky_relu(z, 0.2),
    lambda z: functional.leaky_relu(z, negative_slope=-0.3),
]


@pytest.mark.parametrize("activation", KINKED)
def test_far_from_the_kink_nothing_changes_and_at_it_the_slope_is_the_mean_of_both_sides(
    activation: Callable[[Tensor], Tensor],
) -> None:
    z = torch.tensor([-50.0, 0.0, 50.0], dtype=torch.float64, requires_grad=True)
    sharp = torch.autograd.grad(activation(z).sum(), z)[0]
    with SoftKinks(0.01):
        rounded = activation(z)
    slope = torch.autograd.grad(rounded.sum(), z)[0]
    assert rounded[[0, 2]].detach().allclose(activation(z)[[0, 2]].detach())
    assert slope[[0, 2]].allclose(sharp[[0, 2]])
    assert slope[1].isclose((sharp[0] + sharp[2]) / 2)


def test_other_operations_stay_as_they_are() -> None:
    z = torch.linspace(-2, 2, 9)
    with SoftKinks(0.3):
        found = functional.elu(z), torch.sigmoid(z)
    assert found[0].equal(functional.elu(z))
    assert found[1].equal(torch.sigmoid(z))


def test_slopes_are_given_to_activations_in_turn_and_are_differentiated() -> None:
    z = torch.tensor([-2.0, 3.0], dtype=torch.float64)
    first, second = (torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in ([0.5, 0.5], [1.0, -1.0]))
    with GivenSlopes([first, second]):
        found = functional.leaky_relu(functional.relu(z), 0.2)
    assert found.tolist() == [-1.0, -1.5]
    assert [each.tolist() for each in torch.autograd.grad(found.sum(), (first, second))] == [[-2, -3], [-1, 1.5]]


@pytest.mark.parametrize(
    ("activation", "below"), [(functional.relu, 0.0), (lambda z: functional.leaky_relu(z, 0.2), 0.2)]
)
def test_values_on_given_sides_have_the_slopes_there_and_no_others_change(
    activation: Callable[[Tensor], Tensor], below: float
) -> None:
    z = torch.tensor([[-2.0, 1e-9], [-1e-9, 3.0]], dtype=torch.float64, requires_grad=True)
    with GivenSides({1: [(0, 1, False), (1, 0, True)]}):
        plain, given = activation(z), activation(z)
    assert torch.equal(plain, torch.where(z > 0, z, below * z))
    wanted = torch.tensor([[below, below], [1.0, 1.0]], dtype=z.dtype)
    assert torch.equal(given, wanted * z)
    assert torch.equal(torch.autograd.grad(given.sum(), z)[0], wanted)
