"""A random search for answers that are called exact and are not; `benchmarks/certificates.py` searches on."""

from __future__ import annotations

import pytest
import torch
from benchmark import load
from torch import nn

from rgap import Target, Update, capture, losses
from rgap.attacks import Closed, Status

certificates = load("certificates")


@pytest.mark.search
@pytest.mark.parametrize("part", range(3))
def test_no_certificate_is_false(part: int, first_seed: int) -> None:
    seeds = range(100 * first_seed + 2 * part, 100 * first_seed + 2 * part + 2)
    found = [each for seed in seeds for each in certificates.outcomes(seed)]
    assert found
    assert [each for each in found if each.false] == []


def test_an_answer_from_a_coarse_gradient_is_as_near_as_it_says() -> None:
    """Where Gauss-Newton steps ended as soon as the gradient agreed, its error was 24 times the stated one."""
    torch.manual_seed(1)
    model = nn.Sequential(
        *(nn.Conv2d(1, 24, 3, padding=1), nn.SiLU(), nn.AvgPool2d(3, 2, 1), nn.Flatten()),
        *(nn.Linear(384, 60), nn.SiLU(), nn.Linear(60, 4)),
    )
    target, x = Target(model, losses.CrossEntropy(4), (1, 7, 7), (0.0, 1.0)), torch.rand(1, 1, 7, 7)
    clean = capture(target, x, torch.zeros(1)).gradients
    found = Closed()(target, Update({name: grad.bfloat16().float() for name, grad in clean.items()}))
    assert found.status is Status.EXACT
    assert float((found.inputs - x).square().mean().sqrt()) < 4 * found.answers[0].error


def test_pixels_that_no_mean_reads_are_free() -> None:
    """A mean over windows of 2 leaves the last row and column of 5 x 5 values out, and so 13 of 49 pixels."""
    torch.manual_seed(2)
    model = nn.Sequential(
        *(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(48, 10), nn.ReLU(), nn.Linear(10, 4)),
    )
    target, x = Target(model, losses.CrossEntropy(4), (1, 7, 7), (0.0, 1.0)), torch.rand(1, 1, 7, 7)
    found = Closed()(target, capture(target, x, torch.zeros(1)))
    assert found.status is Status.RANK_DEFICIENT
    joint = found.answers[0].joint
    assert joint is not None
    assert joint.free == 13
    assert float((found.inputs - x)[..., :6, :6].square().mean()) < 1e-8


@pytest.mark.parametrize("seed", [0, 3])
def test_steps_that_converge_slowly_go_on(seed: int) -> None:
    """A last layer of one output, and slopes that move with the input: each step leaves two thirds of the error."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(3, 24, 2, bias=False), nn.GELU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()),
        nn.Linear(216, 1, bias=False),
    )
    target, x = Target(model, losses.Logistic(), (3, 8, 8), (0.0, 1.0)), torch.rand(1, 3, 8, 8)
    found = Closed()(target, capture(target, x, torch.ones(1)))
    assert found.status is Status.EXACT
    assert float((found.inputs - x).square().mean().sqrt()) < 4 * found.answers[0].error
