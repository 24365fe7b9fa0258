"""Values that a gradient tells behind operations that nothing inverts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, Update, capture, losses, score
from rgap.attacks import Closed, Recursive, Status
from rgap.inversion import recursion
from rgap.inversion.read_ahead import _sized
from rgap.inversion.state import State
from rgap.inversion.subspace.patches import Direction
from rgap.nn.ops import Linear

Make = Callable[[], list[nn.Module]]


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(1) * x


MIDDLES: dict[str, tuple[Make, nn.Module]] = {
    "maximum": (lambda: [nn.MaxPool2d(2)], nn.ReLU()),
    "mean": (lambda: [nn.AvgPool2d(2)], nn.ReLU()),
    "power mean": (lambda: [nn.LPPool2d(2, 2)], nn.LeakyReLU(0.2)),
    "adaptive maximum": (lambda: [nn.AdaptiveMaxPool2d(3)], nn.LeakyReLU(0.2)),
    "layer norm": (lambda: [nn.LayerNorm([96, 6, 6]), nn.MaxPool2d(2)], nn.LeakyReLU(0.2)),
    "group norm": (lambda: [nn.GroupNorm(4, 96), nn.AvgPool2d(2)], nn.Tanh()),
    "gate": (lambda: [Gate(), nn.AvgPool2d(2)], nn.LeakyReLU(0.2)),
}


def of(name: str, seed: int = 0) -> tuple[Target, Update, Tensor]:
    """A network whose second convolution has more outputs than positions."""
    middle, activation = MIDDLES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            *(nn.Conv2d(3, 12, 3, padding=1), activation, nn.Conv2d(12, 96, 3, padding=1), activation, *middle()),
            *(nn.Conv2d(96, 32, 3), activation, nn.Flatten(), nn.Linear(32, 5)),
        )
    target = Target(model, losses.CrossEntropy(5), (3, 6, 6), (0.0, 1.0))
    x = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed + 1))
    return target, capture(target, x, torch.tensor([2.0])), x


@pytest.mark.parametrize("name", MIDDLES)
@pytest.mark.parametrize("attack", [Closed(), Recursive()], ids=["closed", "recursive"])
def test_what_stops_the_recursion_is_passed(name: str, attack: Recursive, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("no routes are looked for")

    monkeypatch.setattr(recursion, "before_pool", refuse)
    target, update, x = of(name)
    found = attack(target, update)
    assert found.status is Status.EXACT, found.reason
    assert score(found, x).mse[0] < 1e-11
    assert "row space" in [layer.method for layer in found.answers[0].layers]


@pytest.mark.parametrize("name", ["power mean", "layer norm", "gate"])
@pytest.mark.parametrize("spoilt", ["0.weight", "2.weight", "5.weight"])
def test_another_pictures_layer_is_not_called_exact(name: str, spoilt: str) -> None:
    target, update, _ = of(name)
    other = capture(target, torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(9)), torch.tensor([2.0]))
    spoilt = spoilt if spoilt in update.gradients else "6.weight"
    mixed = Update({**update.gradients, spoilt: other.gradients[spoilt]}, update.header)
    found = Recursive()(target, mixed)
    assert found.status is not Status.EXACT


def test_the_layers_own_gradient_tells_the_size_where_the_output_tells_it_badly() -> None:
    target, _, x = of("maximum")
    network = target.network
    values = network.forward(x.double())
    k = torch.randn(values[-1].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cotangents = network.vjp(values, network.slopes(values), {len(network.nodes): k})
    tail = network.part([each for each in network.segments if each.entry >= 2])
    op, behind = network.nodes[2].op, cotangents[3]
    assert isinstance(op, Linear)
    assert behind is not None
    read = op.layer.pack_input(values[2])
    grad = op.layer.grad_weight(read, op.layer.pack_output(behind))[0, 0]
    direction = Direction(read / read.norm(), torch.zeros_like(read), 1.0)
    output = State(values[-1] * (1 + 5e-5), k, None, torch.full_like(k, 5e-5))
    found = _sized(tail, 0, op.layer, direction, grad, output, 1e-7)
    assert found is not None
    torch.testing.assert_close(found.value, values[2], rtol=1e-9, atol=0)
