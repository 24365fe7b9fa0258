"""What one layer leaves open and the layer before it tells."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, capture, losses, score
from rgap.attacks import Closed, Recursive, Status
from rgap.inversion import null_space
from rgap.nn.ops import Linear

Make = Callable[[], nn.Sequential]


def convolutions() -> nn.Sequential:
    """144 pixels, 294 values behind conv1, of which conv2's 64 outputs and 216 gradient rows leave a part open."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 4, 2, 2, bias=False), nn.LeakyReLU(0.2),
        nn.Conv2d(6, 4, 3, 2, 1, bias=False), nn.LeakyReLU(0.2),
        nn.Conv2d(4, 24, 3, 1, 1, bias=False), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(384, 1, bias=False),
    )  # fmt: skip


def one_dimension() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 12, 4, 2, 1), nn.ELU(),
        nn.Conv1d(12, 8, 3, 2, 1), nn.ELU(),
        nn.Conv1d(8, 16, 3, 1, 1), nn.ELU(),
        nn.Flatten(), nn.Linear(16 * 18, 3),
    )  # fmt: skip


def rows_of_features() -> nn.Sequential:
    """Linear layers on each of 24 positions."""
    return nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(),
        nn.Linear(16, 8), nn.Tanh(),
        nn.Linear(8, 9), nn.Tanh(),
        nn.Flatten(), nn.Linear(24 * 9, 4),
    )  # fmt: skip


KINDS: list[tuple[Make, tuple[int, ...], losses.Loss, float]] = [
    (convolutions, (1, 12, 12), losses.Logistic(), 1.0),
    (one_dimension, (2, 72), losses.CrossEntropy(3), 2.0),
    (rows_of_features, (24, 6), losses.CrossEntropy(4), 0.0),
]


def prepared(make: Make, shape: tuple[int, ...], loss: losses.Loss, dtype: torch.dtype) -> tuple[Target, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = Target(make().to(dtype), loss, shape, (0.0, 1.0))
        return target, torch.rand(1, *shape, dtype=dtype)  # nothing that a prior of neighbours could guess


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0].__name__)
def test_the_layer_before_tells_what_one_leaves_open(
    kind: tuple[Make, tuple[int, ...], losses.Loss, float], dtype: torch.dtype
) -> None:
    make, shape, loss, label = kind
    target, truth = prepared(make, shape, loss, dtype)
    update = capture(target, truth, torch.tensor([label]))
    assert Recursive()(target, update).status is Status.RANK_DEFICIENT
    found = Closed()(target, update)
    assert found.status is Status.EXACT, found
    [answer] = found.answers
    assert answer.joint is not None
    assert answer.joint.prior is None
    error = score(found, truth).mse[0] ** 0.5
    assert error < 10 * answer.error < (1e-2 if dtype is torch.float32 else 1e-8)


def test_a_layer_that_reaches_all_values_tells_nothing() -> None:
    """The first layer has fewer outputs than inputs: any values behind it have some input."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(1, 2, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2, 2, 3, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2, 24, 3, 1, 1), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(216, 1),
        )  # fmt: skip
        target, truth = Target(model, losses.Logistic(), (1, 12, 12), (0.0, 1.0)), torch.rand(1, 1, 12, 12)
    found = Closed()(target, capture(target, truth, torch.tensor([1.0])))
    assert found.status is not Status.EXACT
    assert all(answer.joint is None or answer.joint.prior is not None for answer in found.answers)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0].__name__)
def test_the_directions_are_those_that_no_input_reaches(
    kind: tuple[Make, tuple[int, ...], losses.Loss, float],
) -> None:
    make, shape, loss, _ = kind
    target, _ = prepared(make, shape, loss, torch.float64)
    op = target.network.nodes[0].op
    assert isinstance(op, Linear)
    layer = op.layer
    units = torch.eye(layer.unknowns, dtype=torch.float64).reshape(-1, layer.channels, layer.pixels)
    matrix = layer.output(units).flatten(1).mT
    missing = len(matrix) - int(torch.linalg.matrix_rank(matrix))
    for most, expected in ((missing + 9, missing), (5, 5)):
        found = null_space.unreached_by(layer, most)
        assert found is not None
        assert found.shape == (len(matrix), expected)
        assert torch.allclose(found.mT @ found, torch.eye(expected, dtype=torch.float64), atol=1e-12)
        assert float((found.mT @ matrix).abs().max()) < 1e-12
