"""Running statistics are a part of what an answer has to reproduce."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rgap import Protocol, Target, capture, losses
from rgap.attacks.statistics_missed import statistics_missed


def told(samples: int = 2) -> tuple[Target, Tensor]:
    """Two samples of one network: a batch norm puts out plus and minus one, whatever they are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).train()
        x = torch.randn(samples, 4)
    target = Target(model, losses.CrossEntropy(3), (4,), batch_size=samples)
    return capture(target, x, torch.arange(samples), Protocol(buffers=True)).with_batch(target), x.double()


def test_the_batch_itself_misses_nothing() -> None:
    target, x = told()
    assert statistics_missed(target, x, 0.0) < 3


@pytest.mark.parametrize("changed", ["contrast", "brightness"])
def test_what_a_norm_hides_from_the_gradient_is_seen(changed: str) -> None:
    target, x = told()
    mean = x.mean(0)
    other = mean + 1.1 * (x - mean) if changed == "contrast" else x + 0.1
    labels = torch.arange(2.0)
    whole, there = target.gradient(x, labels), target.gradient(other, labels)
    assert all(float((there[name] - g).norm()) < 1e-3 for name, g in whole.items())  # the gradient hardly tells it
    assert statistics_missed(target, other, 0.0) > 100
    assert statistics_missed(target, other, 0.2) < 3


def test_where_nothing_is_told_nothing_is_missed() -> None:
    target, x = told()
    plain = Target(target.model, target.loss, (4,), batch_size=2)
    assert statistics_missed(plain, x + 1, 0.0) == 0
    assert statistics_missed(target, x[:1], 0.0) == 0
