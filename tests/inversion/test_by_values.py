"""Inputs that a large value tells alone, and large blocks that gradient rows alone pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, Update, capture, losses, score
from rgap.attacks import Closed, Recursive, Status
from rgap.inversion import block, block_values, by_values, recursion
from rgap.inversion.by_values import MANY, input_by_values
from rgap.inversion.gauss_newton import determine, settle
from rgap.inversion.state import State
from rgap.inversion.system import ConstraintSystem
from tests.nn.modules import Skip, norm

SIZE, WIDE = 7, 80


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the values from which networks and blocks are large: the same way, in less time."""
    monkeypatch.setattr(by_values, "LARGE", 2_000)
    for module in (block, block_values):
        monkeypatch.setattr(module, "DENSE", 2_000)


def conv(outputs: int, stride: int = 1, kernel: int = 3, inputs: int = WIDE) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)


def skip(own: nn.Module, stride: int = 1) -> nn.Module:
    return Skip(nn.Sequential(conv(WIDE, stride), norm(WIDE), nn.ReLU(), conv(WIDE)), own, nn.ReLU())


FRONTS: dict[str, tuple[int, Callable[[], list[nn.Module]]]] = {
    "residual block": (SIZE, lambda: [conv(WIDE, inputs=3), nn.ReLU(), skip(nn.Identity())]),
    "two blocks": (SIZE, lambda: [conv(WIDE, inputs=3), skip(nn.Identity()), skip(conv(WIDE, kernel=1))]),
    "maximum": (2 * SIZE, lambda: [conv(WIDE, inputs=3), nn.LeakyReLU(0.1), nn.MaxPool2d(2)]),
    "mean": (2 * SIZE, lambda: [conv(WIDE, inputs=3), nn.ELU(), nn.AvgPool2d(2)]),
}


def client(size: int, front: list[nn.Module], seed: int, wide: int = WIDE) -> tuple[Target, Update, Tensor]:
    """A network whose front's output, wide x SIZE x SIZE values, the gradient of the convolution behind it tells."""
    end = conv(2 * wide, inputs=wide)
    head = [end, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * wide, 4)]
    model = nn.Sequential(*front, *head)
    target = Target(model.eval(), losses.CrossEntropy(4), (3, size, size), (0.0, 1.0))
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return target, capture(target, x, torch.tensor([1.0])), x


@pytest.mark.parametrize("name", FRONTS)
@pytest.mark.parametrize("attack", [Closed(), Recursive()], ids=["closed", "recursive"])
def test_values_many_times_the_picture_tell_it(name: str, attack: Recursive) -> None:
    size, front = FRONTS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        target, update, x = client(size, front(), 2)
    found = attack(target, update)
    assert found.status is Status.EXACT, found.reason
    assert score(found, x).mse[0] < 1e-9
    assert "values" in [layer.method for layer in found.answers[0].layers]


@pytest.mark.parametrize("name", ["residual block", "two blocks", "maximum"])
def test_two_samples_of_one_gradient_are_read_behind_a_mean(name: str) -> None:
    """The gradient of the convolution in front of the mean tells what both span, and features which mixture each is."""
    size, front = FRONTS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = [conv(2 * WIDE), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * WIDE, 10)]
        model = nn.Sequential(*front(), *head)
    target = Target(model.eval(), losses.CrossEntropy(10), (3, size, size), (0.0, 1.0), batch_size=2)
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    found = Closed()(target, capture(target, x, torch.tensor([0.0, 1.0])))
    assert found.status is Status.EXACT, found.reason
    apart = torch.cdist(found.inputs.flatten(1), x.double().flatten(1)) / x[0].numel() ** 0.5
    assert apart.min(1).values.max() < 1e-5
    assert sorted(apart.argmin(1).tolist()) == [0, 1]


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_too_few_values_are_not_asked(kept: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target, _, x = client(SIZE, FRONTS["residual block"][1](), 2)
    network = target.network
    front = network.part(network.segments[:3])
    value = front.forward(x.double())[-1]
    weight = torch.zeros_like(value)
    weight.view(-1)[: kept * x.numel()] = 1.0
    state = State(value, torch.zeros_like(value), weight, torch.full_like(value, 1e-9))
    assert kept < MANY
    assert input_by_values(front, state, 1e-7) is None


def test_values_of_another_front_tell_nothing() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target, _, x = client(SIZE, FRONTS["residual block"][1](), 2)
    network = target.network
    front = network.part(network.segments[:3])
    value = front.forward(x.double())[-1].flip(1)
    state = State(value, torch.zeros_like(value), (value > 0).double(), torch.full_like(value, 1e-9))
    assert input_by_values(front, state, 1e-7) is None


def test_directions_that_values_hardly_show_are_found() -> None:
    """Kernels that are nearly one smooth one, as training leaves them: a condition of thousands."""
    smooth, size, wide = torch.tensor([1.0, 2.0, 1.0]), 10, 32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [conv(wide, inputs=3), nn.ReLU(), conv(wide, inputs=wide)]
        with torch.no_grad():
            weight = layers[0].weight
            weight.copy_(smooth[:, None] * smooth / 16 * weight.mean((2, 3), keepdim=True) + 1e-4 * weight)
        target, _, x = client(size, layers, 2, wide)
    network = target.network
    front = network.part(network.segments[:3])
    value = front.forward(x.double())[-1]
    state = State(value, torch.zeros_like(value), None, torch.full_like(value, 1e-9))
    found = input_by_values(front, state, 1e-7)
    assert found is not None
    assert float((found[1].x - x).square().mean()) < 1e-9


@pytest.mark.parametrize("unit", [None, (0, 3, 4, 4), (0, 50, 0, 6), (0, 79, 6, 3)])
@pytest.mark.parametrize("where", ["inside", "behind"])
def test_large_blocks_are_passed_with_a_unit_at_its_kink(
    unit: tuple[int, ...] | None, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradient rows alone, a matrix of one channel, tell what each layer of the block reads."""
    monkeypatch.setattr(recursion, "told_by_values", lambda *arguments: None)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        block = skip(nn.Identity())
        target, update, x = client(2 * SIZE, [conv(WIDE, 2, inputs=3), nn.LeakyReLU(0.3), block], 2)
        if unit is not None:  # its value is brought to 1e-9 by the bias of the layer before it
            inner = block.inner
            assert isinstance(inner, nn.Sequential)
            front = nn.Sequential(*list(target.model.children())[:2]).double()
            read = front(x.double())
            z = inner.double()[:2](read) if where == "inside" else inner.double()(read) + read
            layer = inner[1] if where == "inside" else inner[3]
            with torch.no_grad():
                layer.bias[unit[1]] -= z[unit] - 1e-9
            target.model.float()
            target, update, x = client(2 * SIZE, list(target.model.children())[:3], 2)
    found = Recursive()(target, update)
    assert found.answers, found.reason
    assert score(found, x).mse[0] < 1e-9
    assert found.status in (Status.EXACT, Status.REPRODUCED), found.reason


def test_inputs_go_on_where_a_small_move_is_followed_by_a_large_one() -> None:
    """Of kernels that are nearly one smooth one and a picture half of which is nearly black: a step that brings a unit
    to its other side shows a direction that the last one did not."""
    size, smooth = 8, torch.tensor([1.0, 2.0, 1.0])
    with torch.random.fork_rng():
        torch.manual_seed(9)
        layers = [conv(8, inputs=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()]
        with torch.no_grad():
            weight = layers[0].weight.normal_()
            weight.copy_(3 * smooth[:, None] * smooth / 16 * weight.mean((2, 3), keepdim=True) + 0.1 * weight)
            layers[0].bias.zero_()
        layers.append(nn.Linear(128, 4))
        network = Target(nn.Sequential(*layers), losses.CrossEntropy(4), (1, size, size), (0.0, 1.0)).network
        x = torch.rand(1, 1, size, size, dtype=torch.float64)
        x[:, :, : size // 2] *= 1e-3
        front = network.part(network.segments[:3])
        value = front.forward(x)[-1]
        noise, start = 1e-8 * torch.randn_like(value), x + 1e-4 * torch.randn_like(x)
    state = State(value + noise, torch.zeros_like(value), None, torch.full_like(value, 1e-8))
    system = ConstraintSystem(front, state, {}, 1e-7)
    at = system.linearise(start)
    sure = determine(system, at, by_values.SOLVER, torch.Generator().manual_seed(0))
    found, stated = settle(system, at, by_values.SOLVER, sure)
    assert sure.rank == system.unknowns
    assert float((found.x - x).square().mean().sqrt()) < 5 * stated < 1e-4
