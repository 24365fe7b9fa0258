"""The direction of a convolution's input from its gradient alone, against the input that made it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rgap.inversion.subspace.patches import Direction, input_direction, readable
from rgap.nn.layers import Layer, convolution, linear

EPS = 2.0**-24


def layer_of(outputs: int, shape: tuple[int, int, int], kernel: int, stride: int = 1, padding: int = 0) -> Layer:
    torch.manual_seed(0)
    weight = nn.Conv2d(shape[0], outputs, kernel, bias=False).weight.detach().double()
    strides, both = (stride, stride), ((padding, padding),) * 2
    return convolution("", weight, None, shape, strides, both, (1, 1), 1, "weight", None)


def read(layer: Layer, silent: int = 0) -> tuple[Tensor, Direction | None]:
    """An input and what the gradient of one loss tells of it.

    Args:
        silent: positions at which no output has a cotangent.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(1, layer.channels, layer.pixels, generator=generator, dtype=torch.float64)
    k = torch.randn(1, layer.outputs, layer.positions, generator=generator, dtype=torch.float64)
    k[..., :silent] = 0
    grad = layer.grad_weight(x, k)[0, 0].float().double()
    return x / x.norm(), input_direction(layer, grad, EPS)


@pytest.mark.parametrize(
    "layer",
    [
        layer_of(40, (6, 6, 6), 3, padding=1),
        layer_of(36, (6, 6, 6), 3, padding=1),  # as many outputs as positions
        layer_of(30, (3, 9, 9), 5),
        layer_of(64, (12, 4, 4), 3, padding=1),
        layer_of(20, (8, 7, 7), 4),
        linear("", torch.randn(9, 30, dtype=torch.float64), None, (30,), "weight", None),
    ],
    ids=["padded", "square", "5 x 5", "small", "4 x 4", "linear"],
)
def test_the_input_is_told_up_to_its_size(layer: Layer) -> None:
    assert readable(layer)
    x, found = read(layer)
    assert found is not None
    off = min(float((found.x - x).norm()), float((found.x + x).norm()))
    assert off < 1e-3
    stated = float(found.error.norm())
    assert 0.1 * off < stated < 30 * off


@pytest.mark.parametrize(
    "layer",
    [
        layer_of(35, (6, 6, 6), 3, padding=1),  # one output too few
        layer_of(40, (2, 6, 6), 3, padding=1),  # patches of 18 values, 36 positions
        layer_of(8, (6, 9, 9), 2, stride=3, padding=0),  # pixels that nothing reads
    ],
    ids=["outputs", "values", "unread"],
)
def test_too_small_a_space_is_not_asked(layer: Layer) -> None:
    assert not readable(layer)


@pytest.mark.parametrize("silent", [4, 12, 30])
def test_positions_that_say_nothing_leave_it_open_or_are_told_by_their_neighbours(silent: int) -> None:
    x, found = read(layer_of(40, (6, 6, 6), 3, padding=1), silent)
    if found is not None:  # about right, and another look at the gradient decides
        assert min(float((found.x - x).norm()), float((found.x + x).norm())) < 0.5


@pytest.mark.parametrize("layer", [layer_of(40, (6, 8, 8), 2, stride=2), layer_of(40, (40, 4, 4), 1)])
def test_patches_that_do_not_overlap_are_not_tied_together(layer: Layer) -> None:
    assert read(layer)[1] is None


def test_a_gradient_of_nothing_tells_nothing() -> None:
    layer = layer_of(40, (6, 6, 6), 3, padding=1)
    assert input_direction(layer, torch.zeros(40, 54, dtype=torch.float64), EPS) is None
