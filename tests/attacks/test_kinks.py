"""Units at their kinks."""

from __future__ import annotations

import pytest
import torch

from rgap import Protocol, Target, Update, capture, data, losses, models, score
from rgap.attacks import Recursive, Status
from rgap.attacks.closed import agreement
from rgap.attacks.kinks import settle, step_over
from rgap.protocol import Sends
from rgap.update import Header


def small() -> tuple[Target, torch.Tensor]:
    target = Target(models.cnn6(1, 10).double(), losses.Logistic(), (1, 10, 10))
    return target, data.photographs(1, 10, channels=1).inputs.double()


PLACE, UNIT = 5, 7
"""The activation after conv3, and one of its units."""


def height(target: Target, x: torch.Tensor) -> float:
    """How far the unit is from its kink."""
    network = target.network
    return float(network.forward(x)[network.nodes[PLACE].reads[0]].reshape(-1)[UNIT])


def put_at_kink(target: Target, x: torch.Tensor, distance: float) -> torch.Tensor:
    """The input nearest to x at which the unit's pre-activation is the given distance from zero."""
    moved = x
    for _ in range(4):  # the pattern of the other units may change on the way
        value = height(target, moved)
        over = step_over(target.network, moved, [(PLACE, UNIT)])  # moves the value to its negative, along a line
        moved = moved + (over - moved) * (value - distance) / (2 * value)
    return moved


def k_of(target: Target, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return target.loss.output_gradient(target.network.forward(x)[-1], label)


def test_step_over_brings_units_to_the_other_side() -> None:
    target, x = small()
    moved = put_at_kink(target, x, 1e-9)
    after = height(target, step_over(target.network, moved, [(PLACE, UNIT)]))
    assert abs(height(target, moved)) < 1e-6
    assert after * height(target, moved) < 0


def test_a_unit_on_the_wrong_side_is_found_and_mended() -> None:
    target, x = small()
    right = put_at_kink(target, x, 1e-9)
    wrong = step_over(target.network, right, [(PLACE, UNIT)])
    assert float((wrong - right).abs().max()) < 1e-5
    label = torch.tensor([1.0], dtype=torch.float64)
    update = capture(target, right, label)
    gradients = {name: g.double() for name, g in update.gradients.items()}
    settled = settle(target.network, gradients, wrong, k_of(target, right, label), 1e-6)
    there = target.gradients(wrong, label)
    residual = sum(float((there[n][0] - g).square().sum()) for n, g in gradients.items()) ** 0.5 / update.norm
    assert residual > 1e-5, "the test needs a unit whose side shows in the gradient"
    assert float((settled - right).abs().max()) < 1e-5
    there = target.gradients(settled, label)
    assert sum(float((there[n][0] - g).square().sum()) for n, g in gradients.items()) ** 0.5 / update.norm < 1e-6


def test_an_input_that_agrees_is_left_alone() -> None:
    target, x = small()
    label = torch.tensor([1.0], dtype=torch.float64)
    gradients = {name: g.double() for name, g in capture(target, x, label).gradients.items()}
    settled = settle(target.network, gradients, x, k_of(target, x, label), 1e-8)
    assert torch.equal(settled, x)


@pytest.mark.parametrize("eps", [2.0**-52, 2.0**-23, 1e-5, 1e-4, 1e-3, 1e-2, 0.1])
def test_sides_are_looked_for_wherever_an_answer_would_be_refused(eps: float) -> None:
    """However coarse the gradient."""
    update = Update({"weight": torch.ones(1, dtype=torch.float64)}, Header(precision=eps))
    assert agreement(eps) < update.tolerance


def test_the_coarse_gradient_of_a_weight_difference_settles_its_sides() -> None:
    target = Target(models.cnn6(), losses.Logistic(), (3, 32, 32), (0.0, 1.0))
    x, protocol = data.photographs(1).inputs, Protocol(Sends.DIFFERENCE, learning_rate=0.05)
    found = Recursive()(target, capture(target, x, torch.tensor([-1.0]), protocol))
    assert found.status is Status.EXACT
    assert score(found, x).psnr[0] > 50
