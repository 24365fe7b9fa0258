"""What norms hide of an input: brought back where the gradient tells it, and counted as error where it hardly does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, Update, capture, losses
from rgap.attacks import Closed, Recursive, Status
from rgap.attacks.hidden import along_hidden


def made(*layers: nn.Module) -> Target:
    model = nn.Sequential(*layers).eval()
    return Target(model, losses.CrossEntropy(6), (1, 5, 5), (0.0, 1.0))


def sent(target: Target, seed: int) -> tuple[Tensor, Tensor, Update]:
    x = torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    return x.double(), torch.tensor([2.0]), capture(target, x, torch.tensor([2.0]))


def grouped(groups: int) -> Target:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return made(
            nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(groups, 32), nn.Tanh(), nn.Flatten(), nn.Linear(800, 6)
        )


@pytest.mark.parametrize("by", [1e-4, 1e-2])
def test_an_input_whose_size_or_brightness_is_off_is_moved_back(by: float) -> None:
    target = grouped(2)
    x, label, update = sent(target, 0)
    for wrong in ((1 + by) * x, x + by):
        moved, error = along_hidden(target, update, wrong, label, torch.tensor([1e-7], dtype=torch.float64))
        assert float((moved - x).abs().max()) < max(0.01 * by, 1e-5)
        assert float(error) < 1e-4


def test_without_a_norm_an_input_is_left_as_it_is() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = made(nn.Conv2d(1, 32, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(800, 6))
    x, label, update = sent(target, 0)
    error = torch.tensor([1e-7], dtype=torch.float64)
    moved, same = along_hidden(target, update, 1.01 * x, label, error)
    assert torch.equal(moved, 1.01 * x)
    assert torch.equal(same, error)


def test_the_error_of_what_hardly_anything_tells_is_stated() -> None:
    """One group for each channel: the bias is taken away as well, and what is left is the number under the root."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(32, 32), nn.ReLU()]
        target = made(*layers, nn.Flatten(), nn.Linear(800, 6))
    for seed in range(4):
        x, _, update = sent(target, seed)
        found = Recursive()(target, update)
        assert found.status in (Status.EXACT, Status.ILL_CONDITIONED), found
        off = float((found.inputs - x).square().mean().sqrt())
        assert off > 1e-6  # many times what the layers' own solves say
        assert off < 5 * found.answers[0].error


@pytest.mark.parametrize("samples", [1, 2])
def test_of_several_samples_behind_a_norm_none_is_called_exact(samples: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(2, 32), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(800, 30), nn.ReLU(), nn.Linear(30, 6)),
        ).eval()
    target = Target(model, losses.CrossEntropy(6), (1, 5, 5), (0.0, 1.0), samples)
    x = torch.rand(samples, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    found = Closed()(target, capture(target, x, torch.arange(samples)))
    assert found.status is (Status.EXACT if samples == 1 else Status.REPRODUCED), found
    assert float(torch.cdist(found.inputs.flatten(1), x.double().flatten(1)).amin(0).max()) < 1e-2
