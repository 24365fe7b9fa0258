"""What one layer leaves open of several samples, and the layer before it tells of all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, capture, losses
from rgap.attacks import Closed, Status
from rgap.inversion.samples import layer_by_layer
from rgap.inversion.shared_null_space import may_be_told, told_together
from rgap.inversion.sides import sides_by_weights
from rgap.inversion.state import Observation, State
from rgap.nn.ops import Linear

CLASSES, SAMPLES, SHAPE = 6, 3, (3, 10, 10)


def convolutional(activation: Callable[[], nn.Module] = lambda: nn.LeakyReLU(0.2), bias: bool = False) -> nn.Module:
    """Of 432 values behind conv1, 300 numbers before, conv2's 180 outputs leave 252 open: of three samples 756, of
    which 560 gradient rows tell a part, and 132 virtual constraints for each sample the rest."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 12, 4, 2, 2, bias=bias), activation(),
            nn.Conv2d(12, 20, 2, 2, 0, bias=bias), activation(),
            nn.Conv2d(20, 20, 3, 1, 1, bias=bias), activation(),
            nn.Flatten(), nn.Linear(180, 60), nn.LeakyReLU(0.2), nn.Linear(60, CLASSES),
        )  # fmt: skip


def prepared(model: nn.Module) -> tuple[Target, Tensor, Tensor]:
    x = torch.rand(SAMPLES, *SHAPE, generator=torch.Generator().manual_seed(2))
    target = Target(model, losses.CrossEntropy(CLASSES), SHAPE, (0.0, 1.0), batch_size=SAMPLES)
    return target, x, torch.tensor([4.0, 0.0, 2.0])


def behind_conv2(target: Target, x: Tensor, labels: Tensor) -> tuple[State, Observation, Tensor]:
    """The true state of conv2's output, the gradients in double precision, and conv2's true inputs."""
    network = target.network
    values = network.forward(x.double())
    k = target.loss.output_gradient(values[-1], labels.double()) / len(x)
    cotangents = network.vjp(values, network.slopes(values), {len(values) - 1: k})
    gradients = {}
    for at in (0, 2):
        op, own = network.nodes[at].op, cotangents[at + 1]
        assert isinstance(op, Linear)
        assert own is not None
        made = op.layer.grad_weight(op.layer.pack_input(values[at]), op.layer.pack_output(own)).sum(0)
        gradients[op.layer.weight_name] = made.reshape(
            1, *dict(target.model.named_parameters())[op.layer.weight_name].shape
        )
    k = cotangents[3]
    assert k is not None
    state = State(values[3], k, None, torch.full_like(k, 1e-12))
    return state, Observation(gradients, 1e-15, 1e-9), values[2]


@pytest.mark.parametrize("activation", [lambda: nn.LeakyReLU(0.2), nn.ELU, nn.Tanh], ids=["leaky", "elu", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_before_tells_what_is_open_of_all_samples(activation: Callable[[], nn.Module], bias: bool) -> None:
    target, x, labels = prepared(convolutional(activation, bias))
    assert may_be_told(target.network, 2, SAMPLES)
    state, observed, truth = behind_conv2(target, x, labels)
    found = told_together(target.network, 2, state, observed)
    assert found is not None
    told, report = found
    assert float((told.value - truth).abs().max()) < 1e-8
    assert report.rank == report.unknowns == SAMPLES * 432
    assert report.gradient_residual < 1e-8


def test_the_error_is_that_of_the_noise() -> None:
    target, x, labels = prepared(convolutional())
    state, observed, truth = behind_conv2(target, x, labels)
    noise = 1e-7 * torch.randn(state.value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = replace(state, value=state.value + noise, std=torch.full_like(noise, 1e-7))
    found = told_together(target.network, 2, noisy, observed)
    assert found is not None
    error = float((found[0].value - truth).square().mean().sqrt())
    assert 0.2 < error / float(found[0].rms_std.square().mean().sqrt()) < 5


def test_what_is_too_much_by_count_is_not_looked_for() -> None:
    network = prepared(convolutional())[0].network
    assert not may_be_told(network, 2, 5), "1,260 dimensions are open, and 560 + 660 rows tell of them"
    assert not may_be_told(network, 0, 3), "nothing stands before it"
    assert not may_be_told(network, 4, 3), "its weight rows alone are as many as its inputs"


def test_a_value_on_the_wrong_side_of_its_kink_shows_in_what_the_weights_make_of_the_gradient() -> None:
    target, x, labels = prepared(convolutional())
    state, observed, _ = behind_conv2(target, x, labels)
    op = target.network.nodes[2].op
    assert isinstance(op, Linear)
    grad = op.layer.pack_weight(observed.gradients[op.layer.weight_name])[0]
    other = state.cotangent * torch.where(state.value > 0, 0.2, 5.0)
    doubtful = state.value.abs() < state.value.abs().flatten().kthvalue(40).values
    wrong = torch.zeros_like(doubtful)
    wrong.view(-1)[doubtful.flatten().nonzero().flatten()[[3, 20, 31]]] = True
    taken = torch.where(wrong, other, state.cotangent)
    there = torch.where(wrong, state.cotangent, torch.where(doubtful, other, state.cotangent))
    given = replace(state, cotangent=taken, alternative=replace(state, cotangent=there))
    found = sides_by_weights(op.layer, given, grad, 1e-15)
    assert torch.equal(found.cotangent, state.cotangent)


def test_a_batch_of_which_a_layer_leaves_more_open_than_its_gradient_tells_is_exact() -> None:
    target, x, labels = prepared(convolutional())
    found = Closed()(target, capture(target, x, labels))
    assert found.status is Status.EXACT, str(found)
    assert next(layer.method for layer in found.layers if layer.name == "2") == "virtual rows"
    apart = torch.cdist(found.inputs.flatten(1), x.double().flatten(1))
    assert sorted(apart.argmin(1).tolist()) == list(range(SAMPLES))
    assert float(apart.min(1).values.max()) / x[0].numel() ** 0.5 < 1e-3


def test_nothing_need_stand_behind_the_activation() -> None:
    target, x, labels = prepared(convolutional())
    state, observed, _ = behind_conv2(target, x, labels)
    network = target.network
    behind = replace(state, value=network.forward(x.double())[4], cotangent=state.cotangent / slope_of(state.value))
    front = network.part([segment for segment in network.segments if segment.exit <= 4])
    passed = layer_by_layer(front, behind, observed)
    assert passed.stop is None
    assert float((passed.state.value - x.double()).abs().max()) < 1e-7


def slope_of(z: Tensor) -> Tensor:
    return torch.where(z > 0, 1.0, 0.2).to(z)
