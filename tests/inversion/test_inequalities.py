"""What a maximum's other values and the value range tell of directions that no equation does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, losses
from rgap.inversion import inequalities
from rgap.inversion.inequalities import narrowed, upper_limits
from rgap.inversion.jacobian import Jacobian
from rgap.inversion.state import State
from rgap.inversion.system import ConstraintSystem, Linearisation
from rgap.linalg import psd
from rgap.nn.network import Network

SIZE = 6


def network(signs: tuple[float, ...], between: list[nn.Module], biases: tuple[float, ...] = ()) -> Network:
    """Each channel reads single pixels; a maximum over windows of 2 x 2."""
    layer = nn.Conv2d(1, len(signs), 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(signs).reshape(-1, 1, 1, 1))
        layer.bias.copy_(torch.tensor(biases or [0.1] * len(signs)))
    head = [nn.Flatten(), nn.Linear(len(signs) * 9, 3)]
    model = nn.Sequential(layer, *between, nn.MaxPool2d(2), *head)
    return Target(model, losses.CrossEntropy(3), (1, SIZE, SIZE), (0.0, 1.0)).network


def found(net: Network, x: Tensor, value_range: tuple[float, float]) -> tuple[Tensor, float] | None:
    """From what the pool puts out, and how many directions that leaves."""
    pool = next(at for at, value in enumerate(net.forward(x)) if value.shape[-1] == SIZE // 2)
    value = net.forward(x)[pool]
    state = State(value, torch.zeros_like(value), None, torch.full_like(value, 1e-9))
    system = ConstraintSystem(net.up_to(pool), state, {}, 1e-9)
    at = system.linearise(x)
    null = psd.factor(Jacobian(system, at, {}).gram(), 1e-6).null
    assert null.shape[1] >= 18  # of four values of a window no equation tells more than two
    limits = upper_limits(net, pool, state)
    assert limits is not None
    told = narrowed(
        system, at, lambda there: psd.factor(Jacobian(system, there, {}).gram(), 1e-6).null, 1e-9, limits, value_range
    )
    return None if told is None else told[:2]


def windows(seed: int = 0) -> Tensor:
    """A picture of windows of one value each."""
    coarse = torch.rand(1, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize("between", [[], [nn.LeakyReLU(0.1)], [nn.Tanh()]], ids=str)
def test_values_between_two_maxima_are_told(between: list[nn.Module]) -> None:
    """The largest of x and of -x are the same: nothing lies apart."""
    x = windows()
    told = found(network((1.0, -1.0), between), x, (-9.0, 9.0))
    assert told is not None
    assert float((told[0] - x).abs().max()) < 1e-6
    assert told[1] < 1e-6


def test_an_empty_background_is_told_by_the_value_range() -> None:
    net, x = network((1.0,), [nn.ReLU()]), torch.zeros(1, 1, SIZE, SIZE, dtype=torch.float64)
    told = found(net, x, (0.0, 1.0))
    assert told is not None
    assert told[1] < 1e-6
    assert found(net, x, (-1.0, 1.0)) is None  # it may be darker anywhere but at one place


def test_what_inequalities_leave_open_is_not_told() -> None:
    x = windows()
    x[0, 0, 0, 1] -= 0.05  # between the largest and the least of its window, as the place beside it
    x[0, 0, 1, :2] -= torch.tensor([0.02, 0.07], dtype=x.dtype)
    assert found(network((1.0, -1.0), []), x, (0.0, 1.0)) is None


def test_limits_are_those_of_the_windows() -> None:
    """In front of the pool as well: what ReLU made zero is not above it."""
    net = network((1.0,), [nn.ReLU()])
    x = torch.rand(1, 1, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    x[0, 0, :2, :2] = -1.0
    z = net.forward(x)[1]
    pooled, reach = nn.functional.max_pool2d(z.relu(), 2), nn.Upsample(scale_factor=2)
    known = (z == reach(pooled)) & (z > 0)
    state = State(z, torch.zeros_like(z), known.double(), torch.zeros_like(z))
    there = upper_limits(net, 1, state)
    assert there is not None
    value_id, limits = there
    assert value_id == 1
    torch.testing.assert_close(limits, reach(pooled))
    assert upper_limits(net, len(net.nodes), State(*[net.forward(x)[-1]] * 2, None, net.forward(x)[-1])) is None


@pytest.mark.parametrize(("bias", "crossed"), [(-1e-3, 2), (-8e-3, 0)])
def test_units_that_change_sides_are_taken_to_stand_on_either(
    bias: float, crossed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two dark places may be as bright as the third of their window; a second channel is zero but for a little."""
    net = network((1.0, 1.0), [nn.ReLU()], (0.1, bias))
    x = torch.rand(1, 1, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    x[0, 0, :2, :2] = torch.tensor([[0.006, 0.0], [0.0, 0.0]], dtype=x.dtype)
    pool = next(at for at, value in enumerate(net.forward(x)) if value.shape[-1] == SIZE // 2)
    value = net.forward(x)[pool]
    system = ConstraintSystem(net.up_to(pool), State(value, torch.zeros_like(value), None, value * 1e-9), {}, 1e-9)
    at, limits = system.linearise(x), upper_limits(net, pool, system.output)
    assert limits is not None
    dark, bright = torch.zeros(x.numel(), 2, dtype=x.dtype), torch.zeros(x.numel(), 1, dtype=x.dtype)
    dark[1, 0] = dark[SIZE, 1] = 1.0
    bright[int(x.argmax()) - 1] = 1.0  # below the brightest: it may be darker by far
    seen: list[Linearisation] = []

    def null_of(there: Linearisation) -> Tensor:
        seen.append(there)
        return dark

    told = narrowed(system, at, null_of, 1e-9, limits, (0.0, 1.0))
    assert told is not None
    assert told[1] == pytest.approx(0.003 * (2 / x.numel()) ** 0.5, rel=1e-4)
    node = net.activations[0][0]

    def flips(there: Linearisation) -> int:
        return int((there.slopes[node] != at.slopes[node]).sum())

    assert sorted(map(flips, seen)) == ([0, 1, 1, 2] if crossed else [0])
    for count in (1, 2):  # one alone, and both at once
        beyond = narrowed(
            system, at, lambda there, n=count: bright if flips(there) == n else dark, 1e-9, limits, (0.0, 1.0)
        )
        assert (beyond is None) == (crossed > 0)
    monkeypatch.setattr(inequalities, "PATTERNS", 3)
    assert (narrowed(system, at, lambda there: dark, 1e-9, limits, (0.0, 1.0)) is None) == (crossed > 0)
