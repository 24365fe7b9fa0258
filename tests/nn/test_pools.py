"""Pools as their windows say, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rgap import Target, losses
from rgap.nn.pools import MaxPool, MeanPool, Pool
from tests.auditing.small_audits import seeded
from tests.nn.modules import Call

POOLS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.MaxPool2d(2), (2, 8, 8)),
    "odd": (nn.MaxPool2d(2), (2, 7, 9)),
    "ceiling": (nn.MaxPool2d(2, ceil_mode=True), (2, 7, 9)),
    "overlapping": (nn.MaxPool2d(3, 2), (2, 9, 9)),
    "padded": (nn.MaxPool2d(3, 2, 1), (2, 9, 7)),
    "dilated": (nn.MaxPool2d(3, 2, 1, 2, ceil_mode=True), (2, 10, 9)),
    "oblong": (nn.MaxPool2d((2, 3), (1, 2), (1, 0)), (3, 6, 8)),
    "one dimension": (nn.MaxPool1d(3, 2, 1), (2, 11)),
    "three dimensions": (nn.MaxPool3d(2), (2, 4, 4, 6)),
    "adaptive": (nn.AdaptiveMaxPool2d((3, 2)), (2, 7, 8)),
    "global": (nn.AdaptiveMaxPool2d(1), (3, 5, 5)),
    "with indices": (nn.MaxPool2d(2, return_indices=False), (1, 6, 4)),
    "mean": (nn.AvgPool2d(2), (2, 8, 8)),
    "mean, odd": (nn.AvgPool2d(2), (2, 7, 9)),
    "mean, ceiling": (nn.AvgPool2d(2, ceil_mode=True), (2, 7, 9)),
    "mean, overlapping": (nn.AvgPool2d(3, 2), (2, 9, 9)),
    "mean, padding counted": (nn.AvgPool2d(3, 2, 1), (2, 9, 7)),
    "mean, padding not counted": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (2, 9, 7)),
    "mean, another divisor": (nn.AvgPool2d((2, 3), (1, 2), (1, 0), divisor_override=5), (3, 6, 8)),
    "mean, one dimension": (nn.AvgPool1d(3, 2, 1), (2, 11)),
    "mean, three dimensions": (nn.AvgPool3d(2), (2, 4, 4, 6)),
    "mean, adaptive": (nn.AdaptiveAvgPool2d((3, 2)), (2, 7, 8)),
    "mean of all places": (Call(lambda x: x.mean((2, 3))), (2, 5, 4)),
    "mean of all places, kept": (Call(lambda x: x.mean([-1, -2], keepdim=True)), (2, 5, 4)),
    "mean of a signal": (Call(lambda x: x.mean(-1)), (2, 7)),
}


@pytest.mark.parametrize("name", POOLS)
def test_a_pool_and_its_gradient_are_torchs(name: str) -> None:
    pool, shape = POOLS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *shape, generator=generator, dtype=torch.float64, requires_grad=True)
    model = seeded(pool, nn.Flatten(), nn.Linear(pool(x)[0].numel(), 2))
    op = Target(model, losses.CrossEntropy(2), shape).network.nodes[0].op
    assert isinstance(op, MeanPool if name.startswith("mean") else MaxPool)
    out = pool(x)
    torch.testing.assert_close(op.forward(x), out)
    k = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    [expected] = torch.autograd.grad((out * k).sum(), x)
    torch.testing.assert_close(op.vjp(k, (x,))[0], expected)
    torch.testing.assert_close(op.jvp((x,), (x,)), out)
    if isinstance(op, MaxPool):
        assert bool((op.routes(x).sum(-1) == 1).all())


def test_a_divisor_of_its_own_rule_is_left_to_torch() -> None:
    """Padding counts up to an edge that the ceiling moves."""
    pool = nn.AvgPool2d(3, 2, 1, ceil_mode=True)
    model = seeded(pool, nn.Flatten(), nn.Linear(pool(torch.zeros(2, 8, 8)).numel(), 2))
    op = Target(model, losses.CrossEntropy(2), (2, 8, 8)).network.nodes[0].op
    assert not isinstance(op, Pool)
    x = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(op.forward(x), pool(x))
