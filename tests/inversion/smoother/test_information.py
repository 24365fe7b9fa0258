"""What rows tell of a value, against the same with every number written out in one matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rgap.inversion.smoother.information import Information, adjoint
from rgap.nn.layers import Layer, convolution, linear

VALUES, BESIDE = 7, 3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_rows(x: Tensor, d: Tensor, right: Tensor) -> Information:
    """Of the rows X x + D d = right, each with a noise of one."""
    return Information(x.mT @ x, x.mT @ d, x.mT @ right, d.mT @ d, d.mT @ right)


def same(found: Information, wanted: Information) -> None:
    for name in ("known", "cross", "right", "beside", "beside_right"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))


X, D, RIGHT = drawn(20, VALUES), drawn(20, BESIDE, seed=1), drawn(20, seed=2)
GIVEN = of_rows(X, D, RIGHT)


def test_a_linear_operation_a_shift_and_slopes() -> None:
    w, slope, by = drawn(VALUES, 5, seed=3), drawn(VALUES, seed=4), drawn(VALUES, seed=5)
    same(GIVEN.pulled(lambda columns: w.mT @ columns), of_rows(X @ w, D, RIGHT))
    same(GIVEN.scaled(slope), of_rows(X * slope, D, RIGHT))
    same(GIVEN.shifted(by), of_rows(X, D, RIGHT - X @ by))


def test_noise_of_a_value_is_noise_of_its_rows() -> None:
    variance = torch.tensor([0.0, 0.5, 0.0, 2.0, 0.0, 0.0, 1e-2], dtype=torch.float64)
    found, kept = GIVEN.blurred(variance)
    root = torch.linalg.cholesky(torch.eye(20).double() + X * variance @ X.mT)
    whiten = torch.linalg.inv(root)
    same(found, of_rows(whiten @ X, whiten @ D, whiten @ RIGHT))
    assert kept is not None
    x, d = drawn(1, VALUES, seed=6), drawn(1, BESIDE, seed=7)
    # the most likely noise, by least squares on rows and noise together
    rows = torch.cat([X[:, kept.index], torch.diag(variance[kept.index] ** -0.5)])
    left = torch.cat([RIGHT - X @ x[0] - D @ d[0], torch.zeros(3, dtype=torch.float64)])
    torch.testing.assert_close(kept.noise(x, d)[0], torch.linalg.lstsq(rows, left[:, None]).solution[:, 0])


def of_groups() -> Layer:
    weight = drawn(4, 2, 3, 3, seed=8)
    return convolution("conv", weight, None, (4, 5, 6), (2, 1), ((1, 1), (0, 2)), (1, 1), 2, "weight", None)


LAYERS = [of_groups(), linear("fc", drawn(3, 6, seed=9), None, (6,), "weight", None)]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_adjoint_of_a_layer_takes_columns(layer: Layer) -> None:
    columns = drawn(layer.outputs * layer.positions, 3)
    wanted = layer.grad_input(columns.mT.reshape(3, layer.outputs, layer.positions)).flatten(1)
    torch.testing.assert_close(adjoint(layer, columns), wanted.mT)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_gradient_rows_and_numbers_that_disturb_them(layer: Layer) -> None:
    k, shape, size = drawn(layer.outputs, layer.positions), layer.weight.shape, layer.weight.numel()
    weight, missed, effects = drawn(*shape, seed=1).square(), drawn(*shape, seed=2), drawn(4, *shape, seed=3)
    units = torch.eye(layer.unknowns, dtype=torch.float64).reshape(-1, layer.channels, layer.pixels)
    rows = layer.grad_weight(units, k.expand(layer.unknowns, *k.shape)).reshape(-1, size).mT
    root = weight.flatten().sqrt()
    own = of_rows(root[:, None] * rows, root[:, None] * effects.reshape(4, size).mT, root * missed.flatten())
    found = Information.nothing(layer.unknowns, 0, k).with_rows(layer, k, weight, missed, effects)
    same(found, own)
    # once more, for two numbers more, which are the first ones then
    more = torch.cat([drawn(2, *shape, seed=4), effects])
    whole = found.with_rows(layer, k, weight, missed, more)
    assert whole.beside.shape == (6, 6)
    torch.testing.assert_close(whole.beside[2:, 2:], 2 * own.beside)
    torch.testing.assert_close(whole.known, 2 * own.known)


def test_rows_of_a_bias_are_of_the_numbers_beside_alone() -> None:
    weight, missed, effects = drawn(4).square(), drawn(4, seed=1), drawn(BESIDE, 4, seed=2)
    root = weight.sqrt()
    x, d = torch.cat([X, torch.zeros(4, VALUES).double()]), torch.cat([D, root[:, None] * effects.mT])
    same(GIVEN.with_sums(weight, missed, effects), of_rows(x, d, torch.cat([RIGHT, root * missed])))
