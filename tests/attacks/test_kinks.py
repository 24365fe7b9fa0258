"""Units at their kinks."""

from __future__ import annotations

import torch

from rgap import Target, capture, data, losses, models
from rgap.attacks.kinks import settle, step_over


def small() -> tuple[Target, torch.Tensor]:
    target = Target(models.cnn6(1, 10).double(), losses.Logistic(), (1, 10, 10))
    return target, data.photographs(1, 10, channels=1).inputs.double()


def put_at_kink(target: Target, x: torch.Tensor, depth: int, unit: int, distance: float) -> torch.Tensor:
    """The input nearest to x at which one unit's pre-activation is the given distance from zero."""
    chain = target.chain
    moved = chain[0].pack_input(x)
    for _ in range(4):  # the pattern of the other units may change on the way
        value = float(chain.forward(moved)[1][depth].reshape(-1)[unit])
        over = step_over(chain, moved, [(depth, unit)])  # moves the value to its negative, along a line
        moved = moved + (over - moved) * (value - distance) / (2 * value)
    return moved


def test_step_over_brings_units_to_the_other_side() -> None:
    target, x = small()
    chain = target.chain
    moved = put_at_kink(target, x, 2, 7, 1e-9)
    before = chain.forward(moved)[1][2].reshape(-1)[7]
    after = chain.forward(step_over(chain, moved, [(2, 7)]))[1][2].reshape(-1)[7]
    assert abs(float(before)) < 1e-6
    assert float(after) * float(before) < 0


def test_a_unit_on_the_wrong_side_is_found_and_mended() -> None:
    target, x = small()
    chain = target.chain
    right = put_at_kink(target, x, 2, 7, 1e-9)
    wrong = step_over(chain, right, [(2, 7)])
    assert float((wrong - right).abs().max()) < 1e-5
    label = torch.tensor([1.0], dtype=torch.float64)
    update = capture(target, chain[0].unpack_input(right), label)
    gradients = {name: g.double() for name, g in update.gradients.items()}
    k = label * target.loss.slope(label * chain.forward(right)[1][-1].reshape(1))
    settled = settle(chain, gradients, wrong, k.reshape(1, 1, 1), 1e-6)
    there = target.gradients(chain[0].unpack_input(wrong), label)
    residual = sum(float((there[n][0] - g).square().sum()) for n, g in gradients.items()) ** 0.5 / update.norm
    assert residual > 1e-5, "the test needs a unit whose side shows in the gradient"
    assert float((settled - right).abs().max()) < 1e-5
    there = target.gradients(chain[0].unpack_input(settled), label)
    assert sum(float((there[n][0] - g).square().sum()) for n, g in gradients.items()) ** 0.5 / update.norm < 1e-6


def test_an_input_that_agrees_is_left_alone() -> None:
    target, x = small()
    chain, label = target.chain, torch.tensor([1.0], dtype=torch.float64)
    packed = chain[0].pack_input(x)
    gradients = {name: g.double() for name, g in capture(target, x, label).gradients.items()}
    k = label * target.loss.slope(label * chain.forward(packed)[1][-1].reshape(1))
    settled = settle(chain, gradients, packed, k.reshape(1, 1, 1), 1e-8)
    assert torch.equal(settled, packed)
