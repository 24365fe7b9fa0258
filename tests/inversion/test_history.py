"""What the recursion keeps of a candidate: every value that it passed, the last certain one, and where it stopped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, capture, data, losses, models
from rgap.inversion.history import Candidate, Paths
from rgap.inversion.recursion import recurse
from rgap.inversion.state import Cause, Observation, State

EPS = torch.finfo(torch.float64).eps


def inverted(model: nn.Module, x: Tensor) -> tuple[Candidate, list[Tensor], Target]:
    """A candidate that begins with the true output, and the true values."""
    target = Target(model.double().eval(), losses.Logistic(), tuple(x.shape[1:]), (0.0, 1.0))
    label = torch.tensor([1.0], dtype=torch.float64)
    update = capture(target, x, label)
    values = target.network.forward(x)
    k = target.loss.output_gradient(values[-1].flatten(1), label).reshape(values[-1].shape)
    observed = Observation({name: g.double()[None] for name, g in update.gradients.items()}, EPS, EPS ** (2 / 3))
    state = State(values[-1], k, None, torch.zeros_like(values[-1]))
    paths = Paths.begin(state, torch.zeros(1, dtype=torch.long), torch.full((1,), EPS, dtype=torch.float64))
    [found] = recurse(target.network, observed, paths)
    return found, values, target


def test_every_value_on_the_way_is_kept() -> None:
    x = data.photographs(1, 12, channels=1).inputs.double()
    found, values, _ = inverted(models.cnn6(1, 12), x)
    assert found.stop is None
    assert set(found.values) == set(range(len(values)))
    for value_id, value in enumerate(values):
        torch.testing.assert_close(found.values[value_id], value, rtol=1e-6, atol=1e-6)
    assert (found.root, found.certain_id) == (0, 0)
    assert torch.equal(found.certain.value, found.value)
    assert torch.equal(found.values[0], found.value)


def test_behind_an_open_layer_values_are_certain_and_before_it_least_squares() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        narrow = [nn.Conv2d(1, 6, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(6, 1, 3, 2, 1), nn.LeakyReLU(0.2)]
        model = nn.Sequential(*narrow, nn.Flatten(), nn.Linear(9, 1))
    x = data.photographs(1, 6, channels=1).inputs.double()
    found, values, target = inverted(model, x)
    opened = [layer.name for layer in found.layers if layer.open_since == layer.name]
    assert opened
    assert found.stop is None
    node = target.network.nodes[found.certain_id - 1]
    assert node.op.name == opened[-1]
    assert set(found.values) == set(range(len(values)))
    for value_id in range(found.certain_id, len(values)):
        torch.testing.assert_close(found.values[value_id], values[value_id], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.certain.value, values[found.certain_id], rtol=1e-6, atol=1e-6)
    assert float((found.value - x).abs().max()) > 1e-3


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)], ids=["average", "adaptive"])
def test_a_stop_says_where_and_why_as_a_type(pool: nn.Module) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), pool, nn.Flatten(), nn.Linear(12, 1))
    x = data.photographs(1, 4, channels=1).inputs.double()
    found, values, target = inverted(model, x)
    stop = found.stop
    assert stop is not None
    assert stop.cause is Cause.LOSSY
    at = next(value for value, node in enumerate(target.network.nodes, 1) if node.op is stop.op)
    assert found.certain_id == at
    assert str(stop).startswith(f"stops at {stop.node}: ")
    assert "makes 12 values of 48" in stop.what
    assert set(found.values) == set(range(at, len(values)))
    torch.testing.assert_close(found.value, values[at], rtol=1e-9, atol=1e-9)
