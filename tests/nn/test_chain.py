"""A chain against the module it stands for, and the list of what stands in the way of one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import Client, clients
from torch import Tensor, nn

from rgap.nn.chain import Chain, Kind, NotAChain, Obstacle
from rgap.nn.trace import trace

MANY = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def chain_of(*modules: nn.Module, shape: tuple[int, ...]) -> tuple[Chain, nn.Module]:
    model = nn.Sequential(*modules).double().eval()
    return trace(model, shape), model


def weighted(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def watch(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Every weighted module's input and output, and the model's output."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def note(_: nn.Module, given_inputs: tuple[Tensor], output: Tensor) -> None:
        inputs.append(given_inputs[0])
        outputs.append(output)

    handles = [module.register_forward_hook(note) for module in weighted(model)]
    result = model(x)
    for handle in handles:
        handle.remove()
    return inputs, outputs, result


def samples(client: Client, s: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(s, *client.target.input_shape, generator=generator, dtype=torch.float64)


def slopes(chain: Chain, z: list[Tensor]) -> list[Tensor]:
    return [layer.activation.slope(value) for layer, value in zip(chain, z, strict=True)][:-1]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@MANY
@given(client=clients(), s=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_forward_passes_the_modules_inputs_and_outputs(client: Client, s: int, seed: int) -> None:
    chain, x = client.target.chain, samples(client, s, seed)
    inputs, outputs, _ = watch(client.target.model, x)
    found_inputs, found_outputs = chain.forward(chain[0].pack_input(x))
    assert len(chain) == len(found_inputs) == len(found_outputs) == len(inputs)
    for layer, a, b, z, expected in zip(chain, found_inputs, inputs, found_outputs, outputs, strict=True):
        close(layer.unpack_input(a), b.detach())
        close(layer.unpack_output(z), expected.detach())


@MANY
@given(client=clients(), s=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_backward_passes_the_gradients_of_all_outputs(client: Client, s: int, seed: int) -> None:
    chain, x = client.target.chain, samples(client, s, seed)
    _, outputs, result = watch(client.target.model, x)
    last = torch.randn(s, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = torch.autograd.grad(result, outputs, last.reshape(result.shape))
    slopes = [
        layer.activation.slope(z) for layer, z in zip(chain, chain.forward(chain[0].pack_input(x))[1], strict=True)
    ]
    found = chain.backward(last, slopes[:-1])
    for layer, k, gradient in zip(chain, found, expected, strict=True):
        close(layer.unpack_output(k), gradient)


@MANY
@given(client=clients(), seed=st.integers(0, 2**16))
def test_forward_and_backward_together_give_the_gradient_of_every_parameter(client: Client, seed: int) -> None:
    chain, model, x = client.target.chain, client.target.model, samples(client, 2, seed)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(model(x).sum(), parameters), strict=True))
    inputs, outputs = chain.forward(chain[0].pack_input(x))
    k = chain.backward(
        torch.ones(2, 1, 1, dtype=torch.float64), [n.activation.slope(z) for n, z in zip(chain, outputs, strict=True)]
    )
    for layer, a, b in zip(chain, inputs, k, strict=True):
        close(layer.grad_weight(a, b).sum(0).flatten(), expected.pop(layer.weight_name).flatten())
        if layer.bias_name is not None:
            close(b.sum((0, 2)), expected.pop(layer.bias_name))
    assert not expected


# Flags, by their definitions.


@MANY
@given(client=clients(), seed=st.integers(0, 2**16))
def test_flags_hold_what_they_promise(client: Client, seed: int) -> None:
    chain, model, x = client.target.chain, client.target.model, samples(client, 1, seed)
    if chain.homogeneous:
        output = model(x).sum()
        gradients = torch.autograd.grad(output, list(model.parameters()))
        weights: dict[str, float] = {}
        biases: dict[str, float] = {}
        for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
            module, kind = name.rsplit(".", 1)
            (weights if kind == "weight" else biases)[module] = float((parameter * gradient).sum().detach())
        # Eq. 10: what a layer's weight and bias give together is what the next layer's weight gives.
        products = [weights[layer.name] for layer in chain] + [float(output.detach())]
        for layer, product, after in zip(chain, products, products[1:], strict=False):
            assert product + biases.get(layer.name, 0.0) == pytest.approx(after, rel=1e-9, abs=1e-11)
    if chain.scalable:
        close(model(3 * x), 3 * model(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "homogeneous"),
    [(nn.Identity(), True), (nn.LeakyReLU(0.2), True), (nn.ReLU(), True), (nn.Tanh(), False), (nn.ELU(), False)],
)
def test_flags(activation: nn.Module, homogeneous: bool, bias: bool) -> None:
    torch.manual_seed(0)
    chain, model = chain_of(
        nn.Linear(5, 8, bias), nn.LeakyReLU(0.3), nn.Linear(8, 8, bias), activation, nn.Linear(8, 1, bias), shape=(5,)
    )
    x = torch.randn(4, 5, dtype=torch.float64)
    assert chain.homogeneous == homogeneous
    assert chain.scalable == torch.allclose(model(2 * x), 2 * model(x), rtol=1e-9)
    assert chain.scalable == (homogeneous and not bias)


def test_one_bias_is_enough_to_spoil_scaling() -> None:
    chain, _ = chain_of(nn.Linear(5, 3, False), nn.ReLU(), nn.Linear(3, 1), shape=(5,))
    assert chain.homogeneous
    assert not chain.scalable


# A chain as a sequence.


def test_a_chain_is_a_sequence_of_layers() -> None:
    chain, _ = chain_of(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1), shape=(1, 4, 4))
    assert len(chain) == 2
    assert list(chain) == [chain[0], chain[1]]
    assert chain[-1] is chain[1]
    assert [layer.name for layer in chain] == ["0", "3"]
    assert str(chain).splitlines() == ["0: [1, 4, 4] -> [2, 2, 2], tanh", "3: [8] -> [1], identity"]


# What stands in the way.


def test_the_message_lists_every_obstacle() -> None:
    obstacles = [
        Obstacle("features.3", "max_pool2d", Kind.NOT_YET, "Replace it."),
        Obstacle("head", "softmax", Kind.SETTING, "Remove it."),
        Obstacle("forward", "sign", Kind.NEVER, "Nothing to be done."),
    ]
    error = NotAChain(obstacles)
    assert isinstance(error, ValueError)
    assert error.obstacles == tuple(obstacles)
    assert str(error).splitlines() == [
        "the model is no plain chain of layers, 3 obstacle(s):",
        "  - features.3: max_pool2d (not supported yet). Replace it.",
        "  - head: softmax (wrong setting). Remove it.",
        "  - forward: sign (never invertible). Nothing to be done.",
    ]
