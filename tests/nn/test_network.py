"""Any traced model as a network: its values, its gradients and its segments, against the module and autograd."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Client, clients
from torch import Tensor, nn

from rgap import Target, losses
from rgap.nn.network import Network
from rgap.nn.ops import Affine, Concat, Elementwise, Gather, Linear, Op, Other, Sum
from rgap.nn.pools import MaxPool
from tests.nn.modules import MODULES, SHAPE, Call, Skip, made

WRITTEN = ("written by halves", "written within a frame", "one row overwritten", "added in place")
every_module = pytest.mark.parametrize("name", MODULES)


def headed(*names: str) -> tuple[nn.Module, Network]:
    """Two layers around the modules, so that gradients go in and out, and the network."""
    inner = made(*names)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        count = inner(torch.rand(1, *SHAPE, dtype=torch.float64)).numel()
        model = nn.Sequential(nn.Conv2d(4, 4, 1), inner, nn.Flatten(), nn.Linear(count, 3)).double().eval()
    return model, Target(model, losses.CrossEntropy(3), SHAPE).network


def samples(count: int) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@every_module
def test_values_are_the_modules(name: str) -> None:
    model, network = headed(name)
    x = samples(3)
    values = network.forward(x)
    torch.testing.assert_close(values[-1], model(x), rtol=1e-12, atol=1e-12)
    assert [tuple(value.shape[1:]) for value in values] == list(network.shapes)


@every_module
def test_gradients_are_autograds(name: str) -> None:
    model, network = headed(name)
    x = samples(1).requires_grad_()
    k = torch.randn(1, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    parameters = dict(model.named_parameters())
    wanted = torch.autograd.grad((model(x) * k).sum(), [x, *parameters.values()], allow_unused=True)
    values = network.forward(x.detach())
    ks = network.vjp(values, network.slopes(values), {len(values) - 1: k})
    torch.testing.assert_close(ks[0], wanted[0], rtol=1e-9, atol=1e-12)
    by_name = dict(zip(parameters, wanted[1:], strict=True))
    told = {layer.weight_name: (layer, found) for layer, found in network.gradients(values, ks)}
    assert {"0.weight", "3.weight"} <= set(told)
    for weight, (layer, found) in told.items():
        expected = layer.pack_weight(by_name[weight][None])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@every_module
def test_pushed_moves_are_forward_modes(name: str) -> None:
    model, network = headed(name)
    x, moves = samples(1), samples(2) - samples(1)
    values = network.forward(x)
    tangents = network.jvp(values, network.slopes(values), moves)[-1]
    for move, found in zip(moves, tangents, strict=True):
        _, expected = torch.func.jvp(lambda value: model(value), (x,), (move[None],))
        torch.testing.assert_close(found[None], expected, rtol=1e-9, atol=1e-11)


@every_module
def test_in_float32_derivatives_are_the_same_but_for_its_rounding(name: str) -> None:
    """Of every operation but those whose tensors cannot be told."""
    _, network = headed(name)
    single, x = network.single, samples(1)
    if any(isinstance(node.op, Other) for node in network.nodes):
        assert single is None
        return
    assert single is not None
    values = network.forward(x)
    slopes, moves = network.slopes(values), samples(2)
    low = [value.float() for value in values], {node: slope.float() for node, slope in slopes.items()}
    k = torch.ones(1, 3, dtype=torch.float64)
    for found, expected in (
        (single.jvp(*low, moves.float())[-1], network.jvp(values, slopes, moves)[-1]),
        (single.vjp(*low, {len(values) - 1: k.float()})[0], network.vjp(values, slopes, {len(values) - 1: k})[0]),
    ):
        assert found is not None
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        assert found.dtype == torch.float32


def test_an_operation_of_ones_own_is_had_in_float32_where_its_tensors_are_fields() -> None:
    @dataclass(frozen=True, eq=False)
    class Scaled(Op):
        name: str
        by: object

        def forward(self, *xs: Tensor) -> Tensor:
            return xs[0] * self.by

    own = Scaled("own", torch.ones(1, dtype=torch.float64)).single
    assert isinstance(own, Scaled)
    assert own.by.dtype == torch.float32
    assert Scaled("own", 2.0).single is not None
    for within in ({"by": torch.ones(1)}, (torch.ones(1),), torch.ones(1).mul):
        assert Scaled("own", within).single is None


@every_module
def test_segments_cut_the_network_where_all_ways_meet(name: str) -> None:
    _, network = headed(name, "gelu") if name != "linear" else headed(name)
    places = [place for segment in network.segments for place in segment.nodes]
    assert places == list(range(len(network.nodes)))
    for segment in network.segments:
        for place in segment.nodes:
            assert min(network.nodes[place].reads) >= segment.entry
        part = network.part([segment])
        x = torch.randn(2, *network.shapes[segment.entry], dtype=torch.float64)
        assert part.shapes[-1] == network.shapes[segment.exit]
        values = part.forward(x)
        assert tuple(values[-1].shape) == (2, *network.shapes[segment.exit])


def test_blocks_are_what_branches() -> None:
    blocks = {name for name in MODULES if any(segment.block for segment in headed(name)[1].segments)}
    branching = {"gate", "skip", "strided skip", "side by side", "nested"}
    assert blocks == branching | {*WRITTEN} - {"written within a frame"}


@every_module
def test_what_can_be_inverted_is(name: str) -> None:
    _, network = headed(name)
    values = network.forward(samples(2))
    for node, y in zip(network.nodes, values[1:], strict=True):
        if isinstance(node.op, (Gather, Affine)):
            found = node.op.invert(y)
            if found is not None:
                torch.testing.assert_close(found, values[node.reads[0]], rtol=1e-12, atol=1e-12)
            else:
                assert name in ("sliced", "split", "circular", *WRITTEN)
        elif isinstance(node.op, Other):
            assert node.op.invert(y) is None
            assert node.op.loses


EXPECTED = {
    "reflected": [Linear], "upsampled, convolution": [Linear], "transposed": [Linear], "by hand": [Gather, Linear],
    "batch norm": [Affine], "scaled and shifted": [Affine] * 4, "padded with ones": [Gather, Affine],
    "rolled and flipped": [Gather, Gather], "twice": [Sum], "dropout": [], "relu6": [Elementwise], "maximum": [MaxPool],
    "side by side": [Elementwise, Linear, Concat], "shifted": [Affine],
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_operations_are_recognised(name: str) -> None:
    _, network = headed(name)
    kinds = [type(node.op) for node in network.nodes][1:-1]
    if kinds and kinds[-1] is Gather and network.nodes[-2].shape == (network.nodes[-2].op.index.numel(),):  # type: ignore[attr-defined]
        kinds = kinds[:-1]  # the flattening before the last layer
    assert kinds == EXPECTED[name]


def test_weights_that_are_used_twice_or_frozen_have_no_gradient() -> None:
    shared = nn.Conv2d(4, 4, 1)
    frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
    model = nn.Sequential(shared, nn.ReLU(), shared, frozen, nn.Flatten(), nn.Linear(144, 2))
    network = Target(model, losses.CrossEntropy(2), SHAPE).network
    has_gradient = {
        node.op.layer.weight_name: node.op.has_gradient for node in network.nodes if isinstance(node.op, Linear)
    }
    assert has_gradient == {"0.weight": False, "3.weight": False, "5.weight": True}


def test_what_is_computed_without_gradient_passes_none_on() -> None:
    def part(x: Tensor) -> Tensor:
        with torch.no_grad():
            still = x * 3
        return x + still

    model = nn.Sequential(nn.Conv2d(4, 4, 1), Call(part), nn.Flatten(), nn.Linear(144, 2)).double()
    network = Target(model, losses.CrossEntropy(2), SHAPE).network
    x = samples(1).requires_grad_()
    (wanted,) = torch.autograd.grad(model(x)[0, 0], x)
    values = network.forward(x.detach())
    torch.testing.assert_close(values[-1], model(x), rtol=1e-12, atol=1e-12)
    k = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(network.vjp(values, {}, {len(values) - 1: k})[0], wanted, rtol=1e-12, atol=1e-12)


def test_values_changed_in_place_are_read_as_they_are_then() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            z = y.relu_()
            return y + z

    model = nn.Sequential(nn.Conv2d(4, 4, 1), InPlace(), nn.Flatten(), nn.Linear(144, 2)).double()
    network = Target(model, losses.CrossEntropy(2), SHAPE).network
    torch.testing.assert_close(network.forward(samples(2))[-1], model(samples(2)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("bias", "act", "scalable"), [(False, nn.ReLU(), True), (True, nn.ReLU(), False), (False, nn.Tanh(), False)]
)
def test_scalable_networks_scale(bias: bool, act: nn.Module, scalable: bool) -> None:
    inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=bias), act, nn.Conv2d(4, 4, 1, bias=bias))
    model = nn.Sequential(Skip(inner), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2, bias=False)).double()
    network = Target(model, losses.CrossEntropy(2), SHAPE).network
    assert network.scalable == scalable
    scaled = torch.allclose(network.forward(3 * samples(2))[-1], 3 * network.forward(samples(2))[-1])
    assert scaled == scalable


def test_writes_through_views_are_followed() -> None:
    """y changes with its view."""

    def through(x: Tensor) -> Tensor:
        y = x * 2
        y.flatten(1).relu_()
        return y + 1

    model = nn.Sequential(nn.Conv2d(4, 4, 1), Call(through), nn.Flatten(), nn.Linear(144, 2)).double()
    network = Target(model, losses.CrossEntropy(2), SHAPE).network
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(network.forward(x)[-1], model(x))


# Flags, by their definitions.


@settings(max_examples=10, deadline=None)
@given(client=clients(), seed=st.integers(0, 2**16))
def test_flags_hold_what_they_promise(client: Client, seed: int) -> None:
    network, model = client.target.network, client.target.model
    x = torch.rand(1, *network.input_shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if network.homogeneous:
        output = model(x).sum()
        gradients = torch.autograd.grad(output, list(model.parameters()))
        products: dict[str, float] = {}
        for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
            products[name] = float((parameter * gradient).sum().detach())
        # Eq. 10: what a layer's weight and bias give together is what the next layer's weight gives.
        weights = [products[layer.weight_name] for layer in network.layers] + [float(output.detach())]
        for layer, product, after in zip(network.layers, weights, weights[1:], strict=False):
            assert product + products.get(layer.bias_name or "", 0.0) == pytest.approx(after, rel=1e-9, abs=1e-11)
    if network.scalable:
        torch.testing.assert_close(model(3 * x), 3 * model(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "homogeneous"),
    [(nn.Identity(), True), (nn.LeakyReLU(0.2), True), (nn.ReLU(), True), (nn.Tanh(), False), (nn.ELU(), False)],
)
def test_flags(activation: nn.Module, homogeneous: bool, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8, bias), nn.LeakyReLU(0.3), nn.Linear(8, 8, bias), activation, nn.Linear(8, 1, bias)
    ).double()
    network = Target(model, losses.Logistic(), (5,)).network
    x = torch.randn(4, 5, dtype=torch.float64)
    assert network.homogeneous == homogeneous
    assert network.scalable == torch.allclose(model(2 * x), 2 * model(x), rtol=1e-9)
    assert network.scalable == (homogeneous and not bias)


def test_one_bias_is_enough_to_spoil_scaling() -> None:
    model = nn.Sequential(nn.Linear(5, 3, False), nn.ReLU(), nn.Linear(3, 1))
    network = Target(model, losses.Logistic(), (5,)).network
    assert network.homogeneous
    assert not network.scalable
