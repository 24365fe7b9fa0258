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

from rgap import NotAChain, Target, capture, losses
from rgap.attacks import Bias, Closed, Recursive
from rgap.checks import preflight
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
    end = re.escape("input_shape is one sample's shape without the batch: ")
    with pytest.raises(ValueError, match=f"^{start}.+\\. {end}.+\\.$"):
        target_of(net(), shape)


@pytest.mark.parametrize(
    ("model", "shape", "said"),
    [
        (nn.Conv2d(1, 2, 3), (3, 8, 9), "the model takes 1 channels, such as 1,8,9"),
        (nn.Sequential(nn.ReLU(), nn.Conv1d(4, 2, 3)), (2, 7), "the model takes 4 channels, such as 4,7"),
        (nn.Conv3d(2, 2, 2), (1, 3, 4, 5), "the model takes 2 channels, such as 2,3,4,5"),
        (nn.Linear(6, 2), (5,), "a Linear layer of the model takes 6 values, and of this shape it is given 5"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 2)),
            (3, 8, 8),
            "takes 64 values, and of this shape it is given 192",
        ),
        (nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Linear(6, 2)), (7,), "check it against the model"),
    ],
)
def test_what_shape_it_takes_is_said_where_a_layer_tells(model: nn.Module, shape: tuple[int, ...], said: str) -> None:
    for loss in (losses.CrossEntropy(2), "cross-entropy"):
        with pytest.raises(ValueError, match=f"without the batch: .*{said}\\.$"):
            Target(model, loss, shape)


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
    assert [layer.name for layer in target.network.layers] == ["0", "3"]


def test_what_is_no_chain_lists_every_obstacle() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 2), nn.Softmax(1)
    ).eval()
    target = target_of(model)
    assert [obstacle.where for obstacle in target.obstacles] == ["1", "2", "5", "4"]
    error = NotAChain(target.obstacles)
    assert error.obstacles == target.obstacles
    for obstacle in target.obstacles:
        assert str(obstacle) in str(error)
    assert "4 obstacle(s)" in str(error)


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


@settings(max_examples=12, deadline=None)
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


@settings(max_examples=15, deadline=None)
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
    fingerprint_, weights = target.fingerprint, [layer.weight.clone() for layer in target.network.layers]
    parameters = {name: p.clone() for name, p in target.parameters.items()}
    before = target.gradients(x, y)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    losses.Logistic()(model(x), y).backward()
    optimiser.step()
    assert fingerprint(model) != fingerprint_ == target.fingerprint
    after = target.gradients(x, y)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in target.parameters.items())
    assert all(torch.equal(layer.weight, kept) for layer, kept in zip(target.network.layers, weights, strict=True))


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


# The gradient of a batch.


def drawn_batch(client: Client, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(count, *client.target.input_shape, generator=generator, dtype=torch.float64)
    return inputs, torch.where(torch.rand(count, generator=generator) < 0.5, 1.0, -1.0).double()


@settings(max_examples=15, deadline=None)
@given(clients(), st.integers(1, 4), st.integers(0, 2**31))
def test_the_gradient_of_a_batch_is_that_of_the_mean_loss(client: Client, count: int, seed: int) -> None:
    inputs, labels = drawn_batch(client, count, seed)
    found = client.target.gradient(inputs, labels)
    model, loss = client.target.model, client.target.loss
    total = sum(loss.value(y * model(x[None]).reshape(())) for x, y in zip(inputs, labels, strict=True)) / count
    expected = torch.autograd.grad(total, list(model.parameters()))
    alone = client.target.gradients(inputs, labels)
    assert list(found) == list(client.target.parameters) == [name for name, _ in model.named_parameters()]
    for name, slope in zip(found, expected, strict=True):
        torch.testing.assert_close(found[name], slope, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[name], alone[name].mean(0), rtol=1e-9, atol=1e-12)


def several(dtype: torch.dtype = torch.float32, classes: int = 3) -> nn.Sequential:
    """A network without kinks, for several classes."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, classes)
        ).to(dtype).eval()  # fmt: skip


SMOOTH = [
    (net(), losses.Logistic()),
    (net(dtype=torch.float64), losses.SquaredHinge()),
    (several(), losses.CrossEntropy(3)),
]
smooth = pytest.mark.parametrize(("model", "loss"), SMOOTH, ids=lambda value: getattr(value, "name", None))


@smooth
def test_the_function_gives_the_gradient_at_certain_labels(model: nn.Module, loss: losses.Loss) -> None:
    target = Target(model, loss, (2, 4, 4))
    inputs = sample(4).double()
    which = torch.tensor([0, len(loss.labels) - 1, 1, 0])
    expected = target.gradient(inputs, torch.tensor(loss.labels)[which])
    weights = torch.eye(len(loss.labels), dtype=torch.float64)[which]
    found = target.gradient_function(torch.float64)(inputs, weights)
    assert list(found) == list(expected)
    for name in expected:
        assert found[name].dtype is torch.float64
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-14)
    coarse = target.gradient_function(torch.float32)(inputs, weights)
    for name in expected:
        assert coarse[name].dtype is torch.float32
        torch.testing.assert_close(coarse[name], expected[name].float(), rtol=1e-3, atol=1e-5)


# torch's forward mode compiles formulas of its own when first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@smooth
def test_the_function_can_be_differentiated(model: nn.Module, loss: losses.Loss) -> None:
    """Against finite differences, in the inputs and in the label weights."""
    gradient = Target(model, loss, (2, 4, 4)).gradient_function(torch.float64)
    generator = torch.Generator().manual_seed(4)
    inputs, labels = sample(2).double(), len(loss.labels)
    weights = torch.rand(2, labels, generator=generator, dtype=torch.float64)
    turned, shifted = (torch.randn(like.shape, generator=generator, dtype=torch.float64) for like in (inputs, weights))

    def size(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.stack([(g * g).sum() + g.sum() for g in gradient(x, w).values()]).sum()

    step = 1e-5
    ahead, behind = (size(inputs + s * turned, weights + s * shifted) for s in (step, -step))
    of_inputs, of_weights = torch.func.grad(size, argnums=(0, 1))(inputs, weights)
    slope = float((of_inputs * turned).sum() + (of_weights * shifted).sum())
    assert slope == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-6)
    direction = (turned, shifted)
    assert float(torch.func.jvp(size, (inputs, weights), direction)[1]) == pytest.approx(slope, rel=1e-10)


@smooth
def test_the_function_can_be_batched(model: nn.Module, loss: losses.Loss) -> None:
    gradient = Target(model, loss, (2, 4, 4)).gradient_function(torch.float64)
    generator = torch.Generator().manual_seed(5)
    inputs = torch.rand(5, 2, 2, 4, 4, generator=generator, dtype=torch.float64)
    weights = torch.rand(5, 2, len(loss.labels), generator=generator, dtype=torch.float64)
    together = torch.func.vmap(gradient)(inputs, weights)
    for at in range(5):
        for name, alone in gradient(inputs[at], weights[at]).items():
            torch.testing.assert_close(together[name][at], alone, rtol=1e-10, atol=1e-14)


def test_the_function_leaves_no_trace_and_keeps_the_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 60), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(60, 1)).eval()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    target = target_of(model, (4,))
    gradient, x, w = target.gradient_function(torch.float64), sample()[0, 0, :1].double(), torch.tensor([[0.0, 1.0]])
    before = gradient(x, w)
    model.train()
    random = torch.get_rng_state()
    after = gradient(x, w)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in target.parameters.values())


def test_the_function_gives_zero_for_an_unused_parameter_and_leaves_frozen_ones_out() -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    model.register_parameter("idle", nn.Parameter(torch.ones(2, 3)))
    found = target_of(model).gradient_function(torch.float64)(sample().double(), torch.tensor([[1.0, 0.0]]))
    assert set(found) == {"idle", "0.weight", "3.weight", "3.bias"}
    assert torch.equal(found["idle"], torch.zeros(2, 3, dtype=torch.float64))


def test_the_function_of_a_model_that_insists_on_its_type_keeps_it() -> None:
    target = target_of(Insists(), (4,))
    x, w = torch.ones(1, 4, dtype=torch.float64), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    expected = target.gradient(x, torch.tensor([1.0]))["linear.weight"]
    for dtype in (torch.float64, torch.float32):
        found = target.gradient_function(dtype)(x, w)["linear.weight"]
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, expected)


class InsistsOnDouble(nn.Module):
    """Code that works in double precision only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.double())


def test_the_function_computes_in_a_type_that_the_model_allows() -> None:
    target = target_of(InsistsOnDouble(), (4,))
    x = torch.ones(1, 4, dtype=torch.float64)
    expected = target.gradient(x, torch.tensor([1.0]))["linear.weight"]
    found = target.gradient_function(torch.float32)(x, torch.tensor([[0.0, 1.0]]))["linear.weight"]
    torch.testing.assert_close(found, expected, check_dtype=False)


@pytest.mark.parametrize("batched", [False, True])
def test_the_function_of_a_model_that_writes_to_its_buffers_leaves_no_trace(batched: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 1))
    target = target_of(model.double())
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = sample(2).double()
    expected = target.gradient(x, torch.tensor([1.0, -1.0]))
    weights = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    gradient = target.gradient_function(torch.float64)
    for _ in range(2):
        found = gradient(x, weights)
        if batched:
            found = {name: g[0] for name, g in torch.func.vmap(gradient)(x[None], weights[None]).items()}
        for name, slope in expected.items():
            torch.testing.assert_close(found[name], slope, rtol=1e-9, atol=1e-14)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


# Several classes.


def test_cross_entropy_is_no_obstacle_and_has_no_margin() -> None:
    chain = nn.Sequential(nn.Flatten(), nn.Linear(32, 5), nn.Tanh(), nn.Linear(5, 3))
    target = Target(chain, losses.CrossEntropy(3), (2, 4, 4))
    assert target.obstacles == ()
    assert len(target.network.layers) == 2
    with pytest.raises(TypeError, match="cross-entropy loss is no function of a margin"):
        _ = target.margin_loss


def test_all_obstacles_are_listed() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 3)).eval()
    target = Target(model, losses.CrossEntropy(3), (2, 4, 4))
    assert [obstacle.where for obstacle in target.obstacles] == ["1", "2"]
    error = NotAChain(target.obstacles)
    assert "2 obstacle" in str(error)
    assert all(str(obstacle) in str(error) for obstacle in target.obstacles)


def test_outputs_that_are_not_one_for_each_class_are_an_obstacle() -> None:
    target = Target(several(), losses.CrossEntropy(4), (2, 4, 4))
    assert any("3" in obstacle.what and obstacle.where != "loss" for obstacle in target.obstacles), target.obstacles


def test_margin_losses_are_given_as_they_are() -> None:
    assert target_of(net()).margin_loss == losses.Logistic()


@pytest.mark.parametrize("model", [several(), nn.Sequential(nn.Flatten(), nn.Linear(32, 3))])
def test_the_preflight_of_several_classes_finds_nothing_in_a_good_update(model: nn.Module) -> None:
    target = Target(model, losses.CrossEntropy(3), (2, 4, 4))
    found = preflight(target, capture(target, sample(), torch.tensor([2.0])))
    assert found.passed
    assert bool(found.products) == (not target.obstacles)
    other = Target(model, losses.CrossEntropy(3), (2, 4, 4), batch_size=4)
    told = preflight(other, capture(target, sample(2), torch.tensor([2.0, 0.0])))
    assert len(told.findings) == 1
    assert "averaged over 2 sample(s), the target expects 4" in told.findings[0]


class Cast(nn.Module):
    """Changes the type of its values on the way."""

    def __init__(self, first: torch.dtype, then: torch.dtype) -> None:
        super().__init__()
        self.first, self.then = first, then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.first).to(self.then)


@pytest.mark.parametrize("first", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("at", [0, 2])
def test_a_cast_of_its_own_is_no_traceback(first: torch.dtype, at: int) -> None:
    layers = [nn.Flatten(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 3)]
    layers.insert(at, Cast(first, torch.float32))
    target = Target(nn.Sequential(*layers).eval(), losses.CrossEntropy(3), (1, 4, 4), (0.0, 1.0))
    assert target.gradient(torch.rand(1, 1, 4, 4), torch.ones(1))
    kept = first is torch.float32  # which rounds nothing
    for attack in (Closed(), Recursive(), Bias()):
        reason = attack.obstacle(target, 1)
        assert reason is None if kept else isinstance(reason, str)
