"""Units at their kinks: found on their wrong side, and brought to the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rgap import Protocol, Target, Update, capture, data, losses, models, score
from rgap.attacks import Recursive, Status
from rgap.attacks.closed import agreement
from rgap.inversion import refine_sides as refine_sides_module
from rgap.inversion.doubted import read_columns
from rgap.inversion.refine_sides import _best_flips, _changes, _nearest_units, flipped, refine_sides, step_over
from rgap.inversion.state import State
from rgap.inversion.system import ConstraintSystem
from rgap.protocol import Sends
from rgap.update import Header


def small() -> tuple[Target, torch.Tensor]:
    target = Target(models.cnn6(1, 10).double(), losses.Logistic(), (1, 10, 10))
    return target, data.photographs(1, 10, channels=1).inputs.double()


NODE, UNIT = 5, 7
"""The activation behind conv3, and one of its units."""


def system_of(target: Target, x: torch.Tensor, labels: torch.Tensor) -> ConstraintSystem:
    """All constraints, from the gradients of one batch; what the network puts out takes no part."""
    z = target.network.forward(x)[-1]
    k = target.loss.output_gradient(z, labels) / len(x)
    gradients = {name: g.double() for name, g in target.gradient(x, labels).items()}
    return ConstraintSystem(target.network, State(z, k, torch.zeros_like(z), torch.zeros_like(z)), gradients, 2e-16)


def height(target: Target, x: torch.Tensor) -> float:
    """How far the unit of the first sample is from its kink."""
    network = target.network
    return float(network.forward(x)[network.nodes[NODE].reads[0]].reshape(-1)[UNIT])


def over(system: ConstraintSystem, x: torch.Tensor) -> torch.Tensor:
    return step_over(system, system.linearise(x), [(NODE, UNIT)])


def put_at_kink(system: ConstraintSystem, target: Target, x: torch.Tensor, distance: float) -> torch.Tensor:
    """The inputs nearest to x at which the unit's pre-activation is the given distance from zero."""
    moved = x
    for _ in range(4):  # the pattern of the other units may change on the way
        value = height(target, moved)
        moved = moved + (over(system, moved) - moved) * (value - distance) / (2 * value)
    return moved


LABEL = torch.tensor([1.0], dtype=torch.float64)


def test_step_over_brings_units_to_the_other_side() -> None:
    target, x = small()
    system = system_of(target, x, LABEL)
    moved = put_at_kink(system, target, x, 1e-9)
    assert abs(height(target, moved)) < 1e-6
    assert height(target, over(system, moved)) * height(target, moved) < 0


@pytest.mark.parametrize("samples", [1, 2])
def test_a_unit_on_the_wrong_side_is_found_and_mended(samples: int) -> None:
    target, first = small()
    x = torch.cat([first, first.flip(3)])[:samples]
    labels = torch.tensor([1.0, -1.0], dtype=torch.float64)[:samples]
    right = put_at_kink(system_of(target, x, labels), target, x, 1e-9)
    system = system_of(target, right, labels)
    wrong = over(system, right)
    assert float((wrong - right).abs().max()) < 1e-5
    assert system.distance(system.linearise(wrong)) > 1e-5, "the test needs a unit whose side shows in the gradient"
    mended = refine_sides(system, wrong, 1e-6)
    assert float((mended - right).abs().max()) < 1e-5
    assert system.distance(system.linearise(mended)) < 1e-6


def test_two_units_that_hide_each_other_are_mended_together() -> None:
    """Two patches that are nearly the same, one on each side of the kink, and an input with both on the other."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 1, 2, 2, bias=False), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(6, 1, bias=False)
    ).double()
    x = torch.rand(1, 1, 2, 12, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
        model[3].weight[0, 1] = 1.2 * model[3].weight[0, 0]
        kernel = model[0].weight[0, 0]
        for place, height in ((0, -1e-9), (1, 1e-9)):
            patch = x[0, 0, :, :2] + 0.02 * place * torch.rand(2, 2, generator=generator, dtype=torch.float64)
            patch = patch - kernel * ((kernel * patch).sum() - height) / kernel.square().sum()
            x[0, 0, :, 2 * place : 2 * place + 2] = patch
    target = Target(model, losses.Logistic(), (1, 2, 12))
    system = system_of(target, x, LABEL)
    units = [(1, 0), (1, 1)]
    astray = step_over(system, system.linearise(x), units)
    missed = system.distance_by_layer(system.linearise(astray))
    assert 1e-3 < missed < 0.2
    for unit in units:
        alone = step_over(system, system.linearise(astray), [unit])
        assert system.distance_by_layer(system.linearise(alone)) > missed
    mended = refine_sides(system, astray, 1e-8)
    assert system.distance_by_layer(system.linearise(mended)) < 1e-8


def test_an_input_that_agrees_is_left_alone() -> None:
    target, x = small()
    assert torch.equal(refine_sides(system_of(target, x, LABEL), x, 1e-8), x)


@pytest.mark.parametrize("eps", [2.0**-52, 2.0**-23, 1e-5, 1e-4, 1e-3, 1e-2, 0.1])
def test_sides_are_looked_for_wherever_an_answer_would_be_refused(eps: float) -> None:
    """However coarse the gradient."""
    update = Update({"weight": torch.ones(1, dtype=torch.float64)}, Header(precision=eps))
    assert agreement(eps) < update.tolerance


def test_the_coarse_gradient_of_a_weight_difference_settles_its_sides() -> None:
    target = Target(models.cnn6(), losses.Logistic(), (3, 32, 32), (0.0, 1.0))
    x, protocol = data.photographs(1).inputs, Protocol(Sends.DIFFERENCE, learning_rate=0.05)
    found = Recursive()(target, capture(target, x, torch.tensor([-1.0]), protocol))
    # Each layer's own rounding is its weights', which the stated error errs on the large side of.
    assert found.status in (Status.EXACT, Status.ILL_CONDITIONED), str(found)
    assert found.gradient_residual <= found.tolerance
    assert score(found, x).psnr[0] > 50


BODIES = [
    ([nn.Linear(6, 9), nn.LeakyReLU(0.2), nn.Linear(9, 4)], (6,)),
    ([nn.Linear(40, 9), nn.ReLU(), nn.Linear(9, 7), nn.LeakyReLU(0.1), nn.Linear(7, 4)], (40,)),
    (
        [nn.Conv2d(2, 4, 3, 2, 1, groups=2), nn.PReLU(), nn.Conv2d(4, 3, 2), nn.Flatten(), nn.ReLU(), nn.Linear(12, 4)],
        (2, 6, 6),
    ),
    ([nn.Conv2d(1, 3, 3), nn.LeakyReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)], (1, 6, 6)),
]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("body", "shape"), BODIES)
def test_the_other_side_of_a_unit_changes_the_gradient_as_a_slope_of_that_side_does(
    body: list[nn.Module], shape: tuple[int, ...], samples: int
) -> None:
    generator = torch.Generator().manual_seed(samples)
    model = nn.Sequential(*body).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    x = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    target = Target(model, losses.CrossEntropy(4), shape, batch_size=samples)
    system = system_of(target, x, (torch.arange(samples) % 4).double())
    at = system.linearise(x + 0.1)
    near = _nearest_units(system, at)
    assert len({node for node, _ in near}) == len(at.slopes)
    columns = read_columns(system, at)
    here, changes = _changes(system, at, columns, system.residual(at).gradient, near)

    def missed(slopes: dict[int, torch.Tensor]) -> float:
        rows = system.residual(system.with_slopes(at, slopes)).gradient
        return sum(float((row / grad.norm()).square().sum()) for row, grad in zip(rows, system.gradients, strict=True))

    for unit, change in zip(near, changes, strict=True):
        more = float((here + change).square().sum() - here.square().sum())
        expected = missed(flipped(system, at.slopes, unit)) - missed(at.slopes)
        assert abs(more - expected) < 1e-12 * max(1.0, missed(at.slopes))
    best = min(near, key=lambda unit: missed(flipped(system, at.slopes, unit)))
    with_pairs = _best_flips(system, at, columns, near)
    few = 2 * max(sum(each.numel() for each in of) for of in (at.values, system.gradients))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine_sides_module, "PAIRS", few)
        assert _best_flips(system, at, columns, near) == [best]
    for unit in with_pairs[1:]:
        assert unit != with_pairs[0]
    slopes = at.slopes
    for unit in with_pairs:
        slopes = flipped(system, slopes, unit)
    assert missed(slopes) <= missed(flipped(system, at.slopes, best)) + 1e-12
