"""Up to how many samples a network gives away by count, against ranks of dense matrices and what the attack does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, capture, losses, models, rank_analysis
from rgap.attacks import Closed, Status
from tests.attacks.test_no_false_batch import drawn
from tests.inversion.test_shared_null_space import CLASSES, SHAPE, convolutional


def behind(*body: nn.Module, width: int, classes: int = 20) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in body:
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
        head = nn.Linear(width, 60), nn.LeakyReLU(0.2), nn.Linear(60, classes)
    return nn.Sequential(*body, nn.Flatten(), *head)


def target(model: nn.Module, shape: tuple[int, ...] = SHAPE, classes: int = CLASSES, samples: int = 1) -> Target:
    return Target(model, losses.CrossEntropy(classes), shape, (0.0, 1.0), batch_size=samples)


def rank(model: nn.Sequential, samples: int, with_first: bool, shape: tuple[int, ...] = SHAPE) -> int:
    """Of what one or two convolutions tell of inputs, one unit at a time: true slopes and drawn cotangents."""
    convolutions = [module for module in model if isinstance(module, nn.Conv2d)]
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(samples, *shape, generator=generator, dtype=torch.float64)
    units = torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape)
    rows: list[Tensor] = []
    for depth, convolution in enumerate(convolutions):
        weight = convolution.weight.detach().double()
        named = {"stride": convolution.stride, "padding": convolution.padding}
        z = nn.functional.conv2d(x, weight, **named)
        k = torch.randn(z.shape, generator=generator, dtype=torch.float64)
        if depth or with_first:
            gradients = [nn.grad.conv2d_weight(unit, weight.shape, k, **named) for unit in units]
            rows.append(torch.stack(gradients).flatten(1))
        units = nn.functional.conv2d(units.flatten(0, 1), weight, **named).reshape(len(units), *z.shape)
        if depth == len(convolutions) - 1:
            rows.append(units.flatten(1))
        units = units * torch.where(z > 0, 1.0, 0.2)
        x = nn.functional.leaky_relu(z, 0.2)
    matrix = torch.cat(rows, 1)
    return int(torch.linalg.matrix_rank(matrix @ matrix.mT, hermitian=True))


@pytest.mark.parametrize(("channels", "most"), [(7, 1), (9, 2), (10, 3)])
def test_gradient_rows_that_weight_rows_repeat_count_once(channels: int, most: int) -> None:
    model = behind(nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.LeakyReLU(0.2), width=25 * channels)
    analysis = rank_analysis(target(model, classes=20), measure=False)
    assert (analysis.largest_batch, analysis.largest_batch_at_most) == (most, most)
    assert rank(model, most, True) == 300 * most
    assert rank(model, most + 1, True) < 300 * (most + 1)


def test_gradient_rows_that_are_more_than_the_pixels_they_reach_tell_nothing() -> None:
    """A kernel of 3 that moves by 2 reaches every fourth pixel four times, and every other fourth once."""
    shape = (3, 4, 4)
    model = behind(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.LeakyReLU(0.2), width=24)
    analysis = rank_analysis(target(model, shape, 20), measure=False)
    assert (analysis.largest_batch, analysis.largest_batch_layer) == (4, "0")
    assert rank(model, 4, True, shape) == 48 * 4
    assert rank(model, 5, True, shape) < 48 * 5


def test_the_layer_directly_before_one_adds_virtual_constraints() -> None:
    model = convolutional()
    assert isinstance(model, nn.Sequential)
    analysis = rank_analysis(target(model), measure=False)
    # 560 gradient rows for 252 - 132 dimensions of each sample, which conv1's gradient tells beyond that.
    assert (analysis.largest_batch, analysis.largest_batch_layer, analysis.largest_batch_at_most) == (4, "2", 5)
    two = model[:4]
    assert rank(two, 4, False) == 300 * 4
    assert rank(two, 5, False) < 300 * 5
    assert rank(two, 5, True) == 300 * 5


@pytest.mark.parametrize("samples", [4])
def test_the_attack_does_what_is_foretold(samples: int) -> None:
    aim = target(convolutional(), samples=samples)
    x = torch.rand(samples, *SHAPE, generator=torch.Generator().manual_seed(2))
    found = Closed()(aim, capture(aim, x, torch.tensor([4.0, 0.0, 2.0, 1.0])))
    assert found.status is Status.EXACT, str(found)
    assert rank_analysis(aim, measure=False).largest_batch == samples


def test_eight_pictures_behind_cnn6_are_foretold() -> None:
    body = list(models.cnn6().children())[:-1]
    model = nn.Sequential(*body, nn.Linear(3200, 128), nn.LeakyReLU(0.2), nn.Linear(128, 10))
    analysis = rank_analysis(target(model, (3, 32, 32), 10), measure=False)
    assert (analysis.largest_batch, analysis.largest_batch_layer) == (9, "13"), "ten classes end it"


def test_relu_hands_nothing_down() -> None:
    analysis = rank_analysis(target(convolutional(nn.ReLU)), measure=False)
    assert analysis.largest_batch == 560 // 252


def test_what_is_measured_stands_beside_the_count() -> None:
    analysis = rank_analysis(target(convolutional()), batch_size=4)
    told = next(note for note in analysis.notes if note.startswith("by count"))
    assert told.endswith(
        "up to 5; measured at drawn batches, up to 3; measured, a batch of 4 leaves no dimensions free"
    )


@pytest.mark.parametrize("seed", [7411, 7413, 7442, 7555, 7558, 7596])
def test_drawn_batches_foretell_what_counting_does_not(seed: int) -> None:
    """Nearly straight sigmoids, wrong ones of two inputs, layers whose units are all on the same sides: of these
    networks count allows each one's batch."""
    aim, x, labels = drawn(seed)
    analysis = rank_analysis(aim)
    assert analysis.largest_batch is not None
    assert analysis.largest_batch_measured is not None
    assert analysis.largest_batch >= len(x)
    exact = Closed()(aim, capture(aim, x, labels)).status is Status.EXACT
    assert (analysis.largest_batch_measured >= len(x)) == exact
