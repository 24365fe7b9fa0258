"""What the attacker knows beforehand: that it is right, refuses nonsense, and stays as it was."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Client, clients
from torch import nn

from rgap import NotAChain, Target, losses
from rgap.target import fingerprint


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, 3, 2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(27, 1)).to(dtype).eval()


def target_of(model: nn.Module, shape: tuple[int, ...] = (2, 4, 4)) -> Target:
    return Target(model, losses.Logistic(), shape)


def sample(count: int = 1) -> torch.Tensor:
    return torch.rand(count, 2, 4, 4, generator=torch.Generator().manual_seed(0))


# Refusals.


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 4), (-1, 4, 4)])
def test_input_shapes_that_make_no_sense_are_refused(shape: tuple[int, ...]) -> None:
    message = f"input_shape is {shape}: expected positive sizes, such as (3, 32, 32)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        target_of(net(), shape)


@pytest.mark.parametrize("value_range", [(1.0, 0.0), (0.5, 0.5), (float("nan"), 1.0), (0.0, float("nan"))])
def test_value_ranges_that_make_no_sense_are_refused(value_range: tuple[float, float]) -> None:
    message = f"value_range is {value_range}: expected (low, high) with low < high, or None"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Target(net(), losses.Logistic(), (2, 4, 4), value_range)


@pytest.mark.parametrize("size", [0, -3])
def test_batch_sizes_that_make_no_sense_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"^batch_size is {size}: expected 1 or more$"):
        Target(net(), losses.Logistic(), (2, 4, 4), batch_size=size)


@pytest.mark.parametrize("model", [net().requires_grad_(False), nn.Flatten()])
def test_a_model_without_trained_parameters_is_refused(model: nn.Module) -> None:
    message = "no parameter of the model is trained, so no gradient leaves the client: nothing to attack"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        target_of(model)


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 5, 4), (32,), (2, 1, 1), (1, 2, 4, 4)])
def test_an_input_shape_that_the_model_does_not_take_is_refused(shape: tuple[int, ...]) -> None:
    start = re.escape(f"the model does not take an input of shape (1, {', '.join(map(str, shape))}): ")
    end = re.escape("input_shape is one sample's shape without the batch: check it against the model.")
    with pytest.raises(ValueError, match=f"^{start}.+\\. {end}$"):
        target_of(net(), shape)


# What is in it.


def test_sizes_are_plain_numbers() -> None:
    target = Target(net(), losses.Logistic(), torch.Size([2, 4, 4]))
    assert target.input_shape == (2, 4, 4)
    assert type(target.input_shape) is tuple


def test_parameters_are_those_that_are_trained() -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    target = target_of(model)
    assert list(target.parameters) == ["0.weight", "3.weight", "3.bias"]
    for name, parameter in target.parameters.items():
        assert torch.equal(parameter, model.get_parameter(name))
        assert not parameter.requires_grad


def test_a_target_cannot_be_reassigned() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        target_of(net()).batch_size = 2  # type: ignore[misc]


def test_a_chain_has_no_obstacles() -> None:
    target = target_of(net())
    assert target.obstacles == ()
    assert [layer.name for layer in target.chain] == ["0", "3"]


def test_what_is_no_chain_lists_every_obstacle() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 2), nn.Softmax(1)
    ).eval()
    target = target_of(model)
    assert [obstacle.where for obstacle in target.obstacles] == ["1", "2", "5", "4"]
    with pytest.raises(NotAChain) as caught:
        _ = target.chain
    assert caught.value.obstacles == target.obstacles
    for obstacle in target.obstacles:
        assert str(obstacle) in str(caught.value)
    assert "4 obstacle(s)" in str(caught.value)


def test_making_a_target_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    model[1].eval()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    target_of(model, (4,))
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


# The fingerprint.


class Renamed(nn.Module):
    """The layers of `net` under other names."""

    def __init__(self, model: nn.Sequential):
        super().__init__()
        self.first, self.last = model[0], model[3]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.leaky_relu(self.first(x), 0.2).flatten(1))


def test_the_fingerprint_is_the_models() -> None:
    model = net()
    found = fingerprint(model)
    assert re.fullmatch("[0-9a-f]{64}", found)
    assert found == target_of(model).fingerprint == fingerprint(net())
    assert fingerprint(net(seed=1)) != found
    assert fingerprint(net(dtype=torch.float64)) != found
    assert fingerprint(Renamed(net())) != found


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["0.weight", "0.bias", "3.weight", "3.bias"]), st.data())
def test_the_fingerprint_changes_with_the_last_bit_of_any_weight(name: str, draw: st.DataObject) -> None:
    model = net()
    values = model.get_parameter(name).data.view(-1)
    at = draw.draw(st.integers(0, len(values) - 1))
    before = fingerprint(model)
    old = values[at].clone()
    values[at] = torch.nextafter(old, torch.tensor(float("inf")))
    assert fingerprint(model) != before
    values[at] = old
    assert fingerprint(model) == before


def test_the_fingerprint_tells_shapes_apart() -> None:
    flat, wide = nn.Linear(6, 1, bias=False), nn.Linear(3, 2, bias=False)
    wide.weight.data = flat.weight.data.reshape(2, 3)
    assert fingerprint(flat) != fingerprint(wide)


def test_the_fingerprint_does_not_change_with_mode_buffers_or_memory_layout() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3))
    before = fingerprint(model)
    model.eval()
    assert fingerprint(model) == before
    model.train()
    model(sample(2))
    assert fingerprint(model) == before
    model.to(memory_format=torch.channels_last)
    model.requires_grad_(False)
    assert fingerprint(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_type_has_a_fingerprint(dtype: torch.dtype) -> None:
    scalar = nn.Module()
    scalar.register_parameter("temperature", nn.Parameter(torch.ones((), dtype=dtype)))
    before = fingerprint(scalar)
    scalar.temperature.data.neg_()
    assert fingerprint(scalar) != before


# Gradients.


def by_autograd(client: Client, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    model, loss = client.target.model, client.target.loss
    value = loss.value(y * model(x[None]).reshape(()))
    return list(torch.autograd.grad(value, list(model.parameters())))


@settings(max_examples=40, deadline=None)
@given(clients(), st.integers(0, 3))
def test_gradients_are_those_of_each_sample_alone(client: Client, count: int) -> None:
    inputs = torch.rand(count + 1, *client.target.input_shape, dtype=torch.float64)
    inputs[0] = client.x[0]
    labels = torch.where(torch.rand(count + 1) < 0.5, 1.0, -1.0).double()
    found = client.target.gradients(inputs, labels)
    assert list(found) == list(client.target.parameters)
    for at in range(len(inputs)):
        for (name, rows), expected in zip(found.items(), by_autograd(client, inputs[at], labels[at]), strict=True):
            assert rows.shape == (len(inputs), *client.target.parameters[name].shape)
            assert torch.allclose(rows[at], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradients_are_in_float64_whatever_the_model_is_in(dtype: torch.dtype) -> None:
    model = net(dtype=dtype)
    found = target_of(model).gradients(sample(), torch.tensor([-1.0]))
    double = net(dtype=dtype).double()
    losses.Logistic()(double(sample().double()), torch.tensor([-1.0])).backward()
    for name, parameter in double.named_parameters():
        assert found[name].dtype is torch.float64
        assert torch.allclose(found[name][0], parameter.grad, rtol=1e-12, atol=0)


class Insists(nn.Module):
    """Code that works in single precision only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.float())


def test_a_model_that_insists_on_its_type_keeps_it() -> None:
    target = target_of(Insists(), (4,))
    found = target.gradients(torch.ones(1, 4, dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64))
    assert found["linear.weight"].dtype is torch.float32
    assert float(found["linear.weight"].abs().min()) > 0


def test_an_unused_parameter_has_gradient_zero() -> None:
    model = net()
    model.register_parameter("idle", nn.Parameter(torch.ones(2, 3)))
    found = target_of(model).gradients(sample(2), torch.tensor([1.0, -1.0]))
    assert torch.equal(found["idle"], torch.zeros(2, 2, 3, dtype=torch.float64))


def test_gradients_leave_no_trace_on_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 1))
    target = target_of(model)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = target.gradients(sample(2), torch.tensor([1.0, -1.0]))
    again = target.gradients(sample(2), torch.tensor([1.0, -1.0]))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(first[name], again[name]) for name in first)


class Counts(nn.Module):
    """Its output depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.linear(x) * self.calls


def test_a_model_that_writes_to_its_buffers_gives_the_same_gradients_again() -> None:
    target = target_of(Counts(), (4,))
    x, y = torch.ones(2, 4), torch.ones(2)
    first, again = (target.gradients(x, y)["linear.weight"] for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first[0], first[1])
    assert float(target.model.calls) == 0
    assert not any(parameter.requires_grad for parameter in target.parameters.values())


def test_training_the_model_further_does_not_change_the_target() -> None:
    model = net()
    target = target_of(model)
    x, y = sample(), torch.tensor([1.0])
    fingerprint_, chain = target.fingerprint, [layer.weight.clone() for layer in target.chain]
    parameters = {name: p.clone() for name, p in target.parameters.items()}
    before = target.gradients(x, y)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    losses.Logistic()(model(x), y).backward()
    optimiser.step()
    assert fingerprint(model) != fingerprint_ == target.fingerprint
    after = target.gradients(x, y)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in target.parameters.items())
    assert all(torch.equal(layer.weight, kept) for layer, kept in zip(target.chain, chain, strict=True))


def test_the_targets_gradients_keep_the_mode_it_was_made_in() -> None:
    """A training loop puts the model back into training mode: the certificate may not become random by that."""
    model = nn.Sequential(nn.Linear(4, 60), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(60, 1)).eval()
    target = target_of(model, (4,))
    assert target.obstacles == ()
    x, y = torch.rand(1, 4), torch.tensor([1.0])
    before = target.gradients(x, y)
    model.train()
    after = target.gradients(x, y)
    assert model.training
    assert all(torch.equal(before[name], after[name]) for name in before)
