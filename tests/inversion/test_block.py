"""Skip connections: random networks with one of them, and each rule by which a block's input becomes known."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rgap import Target, capture, losses
from rgap.attacks import Closed, Recursive, Status
from rgap.nn.ops import Linear
from tests.networks import ACTIVATIONS
from tests.nn.modules import Skip, norm

LOSSES: list[losses.Loss] = [losses.Logistic(), losses.CrossEntropy(3), losses.MeanSquaredError(4)]


@dataclass(frozen=True)
class Client:
    """A network, and the one sample a client has."""

    target: Target
    x: Tensor
    y: Tensor


@st.composite
def clients(draw: st.DrawFn, wide: bool = False) -> Client:
    """A convolution, a block, another convolution and a Linear layer, in float64.

    Args:
        wide: with so many channels everywhere that each layer's gradient alone determines its input.
    """
    seed, bias = draw(st.integers(0, 2**31)), draw(st.booleans())
    kinds = ["leaky_relu", "elu", "softplus", "identity"] if wide else sorted(ACTIVATIONS)
    activation = ACTIVATIONS[draw(st.sampled_from(kinds))]
    size, channels = draw(st.integers(3, 5)), draw(st.integers(1, 2))
    c = draw(st.integers(6, 8)) if wide else draw(st.integers(1, 4))
    shortcut = draw(st.sampled_from(["identity", "convolution", "strided", "side by side"]))
    stride = 2 if shortcut == "strided" else 1
    out = c if shortcut == "identity" else c + draw(st.integers(0, 2))
    inside = c + 3 if wide else draw(st.integers(1, 4))
    loss = draw(st.sampled_from(LOSSES))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inner: list[nn.Module] = [nn.Conv2d(c, inside, 3, 1, 1, bias=bias), activation()]
        if draw(st.booleans()):
            inner.insert(1, norm(inside))
        inner.append(nn.Conv2d(inside, out, 3, stride, 1, bias=bias))
        own: nn.Module = nn.Identity()
        if shortcut in ("convolution", "strided"):
            own = nn.Conv2d(c, out, 1, stride, bias=bias)
        block = Skip(nn.Sequential(*inner), own, activation(), cat=shortcut == "side by side")
        stem = nn.Sequential(nn.Conv2d(channels, c, 3, 1, 1, bias=bias), activation())
        count = block(torch.zeros(1, c, size, size)).numel()
        model = nn.Sequential(stem, block, nn.Flatten(), nn.Linear(count, loss.outputs, bias=bias)).double().eval()
        x = torch.rand(1, channels, size, size, dtype=torch.float64)
    y = torch.tensor([draw(st.sampled_from(loss.labels))], dtype=torch.float64)
    return Client(Target(model, loss, (channels, size, size), (0.0, 1.0)), x, y)


@settings(max_examples=6, deadline=None)
@given(clients(), st.sampled_from([Recursive(), Closed()]))
def test_a_random_network_with_a_skip_is_recovered_or_it_is_said_why(client: Client, attack: Recursive) -> None:
    found = attack(client.target, capture(client.target, client.x, client.y))
    assert found.reason
    if found.status is Status.EXACT:
        apart = float((found.inputs - client.x).abs().max())
        assert apart <= max(1e-6, 100 * found.answers[0].error), found
        assert found.labels.tolist() == client.y.tolist()
    if found.status is Status.NOT_CONVERGED and not found.answers:
        assert found.reason.startswith(("stops at ", "under ", "the last layer")), found.reason
    for answer in found.answers:
        names = {node.op.name for node in client.target.network.nodes if isinstance(node.op, Linear)}
        assert {layer.name for layer in answer.layers} <= names


@settings(max_examples=5, deadline=None)
@given(clients(wide=True))
def test_a_wide_network_with_a_skip_is_recovered(client: Client) -> None:
    found = Recursive()(client.target, capture(client.target, client.x, client.y))
    assert found.status in (Status.EXACT, Status.AMBIGUOUS), found
    nearest = min(float((answer.inputs - client.x).abs().max()) for answer in found.answers)
    assert nearest <= 1e-6


def attacked(model: nn.Module, shape: tuple[int, ...], seed: int = 0) -> tuple[object, Tensor]:
    target = Target(model.double().eval(), losses.Logistic(), shape, (0.0, 1.0))
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Recursive()(target, capture(target, x, torch.tensor([1.0]))), x


def network(block: nn.Module, c: int = 8, size: int = 4) -> nn.Module:
    count = block(torch.zeros(1, c, size, size)).numel()
    return nn.Sequential(nn.Conv2d(2, c, 3, 1, 1), nn.LeakyReLU(0.2), block, nn.Flatten(), nn.Linear(count, 1))


def convolutions(*sizes: int, activation: nn.Module | None = None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Conv2d(before, after, 3, 1, 1), activation or nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


BLOCKS = {
    "identity": lambda: Skip(convolutions(8, 8, 8), act=nn.LeakyReLU(0.2)),
    "three layers inside": lambda: Skip(convolutions(8, 8, 9, 8), act=nn.LeakyReLU(0.2)),
    "one layer inside": lambda: Skip(nn.Conv2d(8, 8, 3, 1, 1), act=nn.Tanh()),
    "narrow inside": lambda: Skip(convolutions(8, 1, 8), act=nn.LeakyReLU(0.2)),
    "batch norm on both ways": lambda: Skip(
        nn.Sequential(convolutions(8, 8, 8), norm(8)), nn.Sequential(nn.Conv2d(8, 8, 1), norm(8)), nn.ELU()
    ),
    "an activation on the way around": lambda: Skip(convolutions(8, 8, 8), nn.Softplus(), nn.LeakyReLU(0.2)),
    "side by side": lambda: Skip(convolutions(8, 8, 5), cat=True),
    "side by side without x": lambda: Skip(convolutions(8, 8, 8), nn.Conv2d(8, 8, 3, 1, 1), cat=True),
    "a block in a block": lambda: Skip(Skip(convolutions(8, 8, 8), act=nn.ELU()), nn.Conv2d(8, 8, 1), nn.ELU()),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_each_kind_of_block(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network(BLOCKS[name]())
    found, x = attacked(model, (2, 4, 4))
    assert found.status is Status.EXACT, found  # type: ignore[attr-defined]
    assert float((found.inputs - x).abs().max()) <= 1e-7  # type: ignore[attr-defined]


def test_a_pool_in_a_block_stops_there() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = nn.Sequential(convolutions(8, 8, 8), nn.AvgPool2d(2))
        model = network(Skip(inner, nn.Conv2d(8, 8, 1, 2)))
    found, _ = attacked(model, (2, 4, 4))
    assert found.answers == ()  # type: ignore[attr-defined]
    assert "avg_pool2d makes 32 values of 128" in found.reason  # type: ignore[attr-defined]
