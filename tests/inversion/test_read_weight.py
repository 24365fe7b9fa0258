"""Gradient rows weighed by what errors of what their layer reads do to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rgap import Target, losses
from rgap.inversion.read_weight import ByReadings, can_weigh
from rgap.nn.layer import Layer
from rgap.nn.ops import Linear

OUTPUTS, CHANNELS, DEAD = 4, 2, 2


def layer_of(groups: int = 1) -> Layer:
    model = nn.Sequential(nn.Conv2d(CHANNELS, OUTPUTS, 3, padding=1, groups=groups), nn.Flatten(), nn.Linear(100, 2))
    op = Target(model.double(), losses.CrossEntropy(2), (CHANNELS, 5, 5), (0.0, 1.0)).network.nodes[0].op
    assert isinstance(op, Linear)
    return op.layer


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_the_inverse_of_the_covariance() -> None:
    """Of two samples that share the rows; an output without a gradient has no rows."""
    layer, k, own = layer_of(), drawn(2, OUTPUTS, 25, seed=1), drawn(OUTPUTS, seed=2).square() + 0.1
    k[:, DEAD] = 0.0
    outputs, columns, error = torch.tensor([0, 3, 3]), drawn(3, 9 * CHANNELS, seed=3), 0.7
    reads = torch.eye(2 * layer.unknowns, dtype=torch.float64).reshape(-1, 2, CHANNELS, 25)
    rows = torch.stack([layer.rows(each, k)[1].sum(0).flatten() for each in reads], 1)
    covariance = error * rows @ rows.mT + torch.diag(own.repeat_interleave(9 * CHANNELS))
    for output, column in zip(outputs.tolist(), columns, strict=True):
        whole = torch.zeros(OUTPUTS, 9 * CHANNELS, dtype=torch.float64)
        whole[output] = column
        covariance += torch.outer(whole.flatten(), whole.flatten())
    alive = (torch.arange(OUTPUTS) != DEAD).repeat_interleave(9 * CHANNELS)
    grads = drawn(3, 1, OUTPUTS, 9 * CHANNELS, seed=4)
    expected = torch.zeros(3, len(alive), dtype=torch.float64)
    expected[:, alive] = torch.linalg.solve(covariance[alive][:, alive], grads.flatten(1)[:, alive].mT).mT
    weight = ByReadings(layer, k, error, own, outputs, columns)
    torch.testing.assert_close(weight(grads).flatten(1), expected, rtol=1e-9, atol=1e-9)
    unit = 3.0
    single = weight.single(unit)((grads / unit).float()).double() / unit
    torch.testing.assert_close(single.flatten(1), expected, rtol=1e-3, atol=1e-4)


def test_a_layer_of_several_groups_is_weighed_otherwise() -> None:
    assert can_weigh(layer_of(), drawn(1, OUTPUTS, 25, seed=1))
    assert not can_weigh(layer_of(), torch.zeros(1, OUTPUTS, 25))
    assert not can_weigh(layer_of(2), drawn(1, OUTPUTS, 25, seed=1))
