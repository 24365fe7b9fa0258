"""Back through a layer and a layer, group or instance norm behind it, where ReLU hides a part of what the norm gave."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, capture, losses
from rgap.attacks import Reconstruction, Recursive, Status

SIZE = 6
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group": lambda channels: nn.GroupNorm(4, channels),
    "one group": lambda channels: nn.GroupNorm(1, channels),
    "layer": lambda channels: nn.LayerNorm([channels, SIZE, SIZE]),
}


def model(norm: Callable[[int], nn.Module], bias: bool = True) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = nn.Sequential(
            *(nn.Conv2d(2, 16, 3, padding=1, bias=bias), norm(16), nn.ReLU()),
            *(nn.Conv2d(16, 48, 3, padding=1, bias=bias), norm(48), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(48 * SIZE**2, 5)),
        )
        for module in found.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return found.eval()


def attacked(of: nn.Module) -> tuple[Reconstruction, Tensor]:
    target = Target(of, losses.CrossEntropy(5), (2, SIZE, SIZE), (0.0, 1.0))
    x = torch.rand(1, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return Recursive()(target, capture(target, x, torch.tensor([1]))), x.double()


@pytest.mark.parametrize("norm", NORMS)
def test_behind_a_norm_and_relu_a_picture_comes_back_exactly(norm: str) -> None:
    """Mean and size of each group are lost, and the cotangent takes what ReLU hides: both rows together tell them."""
    found, x = attacked(model(NORMS[norm]))
    assert found.status is Status.EXACT, found
    assert float((found.inputs - x).abs().max()) < 1e-4


def test_without_a_bias_hardly_anything_tells_the_size_of_what_a_layer_reads() -> None:
    """Only the small number that norms add to a variance."""
    found, _ = attacked(model(NORMS["group"], bias=False))
    assert found.status is Status.NOT_CONVERGED, found
    assert not found.answers
