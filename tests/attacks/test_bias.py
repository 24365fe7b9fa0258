"""A Linear layer with a bias gives its input away: read off, inverted through what is in front, and never oversold."""

from __future__ import annotations

import math

import pytest
import torch
from certificates import may_be
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from networks import ACTIVATIONS, LOSSES, Client, clients
from torch import Tensor, nn

from rgap import Target, Update, capture, losses, models
from rgap.attacks import Answer, Reconstruction, Status, bias
from rgap.attacks.bias import Bias
from rgap.attacks.verdict import answer
from rgap.inversion.bias import divide
from rgap.inversion.history import Candidate
from rgap.inversion.rounding import stored_precision

DRAWN = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FOUR = losses.CrossEntropy(4)


def target_of(*layers: nn.Module, loss: losses.Loss = FOUR, shape: tuple[int, ...] = (3, 4, 4)) -> Target:
    """In float64, with weights from a fixed seed, whatever the layers were made with."""
    model = nn.Sequential(*layers).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                for p in module.parameters():
                    bound = 1 / math.sqrt(module.weight[0].numel())
                    p.uniform_(-bound, bound, generator=generator)
    return Target(model, loss, shape, (0.0, 1.0))


def rand(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attack(target: Target, label: float = 1.0, seed: int = 0) -> tuple[Reconstruction, Tensor]:
    """The reconstruction of a random sample, and the sample."""
    x = rand(seed, 1, *target.input_shape)
    return Bias()(target, capture(target, x, torch.tensor([label]))), x


def apart(found: Reconstruction, x: Tensor) -> float:
    return float((found.inputs - x).abs().max())


def head(features: int) -> tuple[nn.Module, ...]:
    return nn.Flatten(), nn.Linear(features, 12), nn.ReLU(), nn.Linear(12, 4)


# What the layer reads itself.


@pytest.mark.parametrize("loss", [losses.CrossEntropy(5), *LOSSES], ids=lambda loss: loss.name)
def test_the_input_of_the_first_layer(loss: losses.Loss) -> None:
    target = target_of(nn.Flatten(), nn.Linear(48, 9), nn.Tanh(), nn.Linear(9, loss.outputs), loss=loss)
    for label in loss.labels:
        found, x = attack(target, label)
        assert found.status is Status.EXACT
        assert apart(found, x) <= 1e-12
        assert found.inputs.shape == (1, 3, 4, 4)
        assert found.inputs.dtype == torch.float64
        assert found.labels.tolist() == [label]
        assert found.answers[0].error <= 1e-12
        (layer,) = found.layers
        assert (layer.name, layer.free, layer.unknowns, layer.dead_units) == ("1", 0, 48, 0)
        if loss.outputs == 1:
            assert found.answers[0].margin == pytest.approx(label * float(target.model(x).detach()), rel=1e-9)
        else:
            assert math.isnan(found.answers[0].margin)
        assert any("grad W / grad b" in assumption for assumption in found.assumptions)
        assert any("label" in assumption for assumption in found.assumptions)
        assert str(found).startswith("Bias: exact")


def test_float32() -> None:
    target = target_of(*head(48))
    single = Target(target.model.float(), target.loss, target.input_shape, target.value_range)
    found, x = attack(single)
    assert found.status is Status.EXACT
    assert apart(found, x) <= 1e-6
    assert 1e-9 < found.answers[0].error < 1e-6


def test_whatever_comes_after_the_layer() -> None:
    target = target_of(nn.Flatten(), nn.Linear(48, 20), nn.GELU(), nn.LayerNorm(20), nn.Linear(20, 4))
    assert target.obstacles
    found, x = attack(target, 3.0)
    assert found.status is Status.EXACT
    assert apart(found, x) <= 1e-12
    assert found.labels.tolist() == [3.0]


@DRAWN
@given(st.integers(0, 2**31), st.sampled_from(["relu", "tanh", "selu"]), st.integers(2, 12), st.data())
def test_exact_is_never_said_of_a_wrong_answer(seed: int, activation: str, width: int, data: st.DataObject) -> None:
    """Narrow and wide fronts, trained and frozen, with and without bias, with cross-entropy."""
    front: list[nn.Module] = []
    channels = 2
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(data.draw(st.integers(0, 2))):
            after = data.draw(st.sampled_from([1, 2, width]))
            layer = nn.Conv2d(channels, after, 3, data.draw(st.integers(1, 2)), 1, bias=data.draw(st.booleans()))
            layer.requires_grad_(data.draw(st.booleans()))
            front += [layer, ACTIVATIONS[activation]()]
            channels = after
        pixels = nn.Sequential(*front)(torch.zeros(1, 2, 5, 5)).numel()
        model = nn.Sequential(*front, nn.Flatten(), nn.Linear(pixels, width), nn.GELU(), nn.Linear(width, 3))
        x = torch.rand(1, 2, 5, 5, dtype=torch.float64)
    target = Target(model.double(), losses.CrossEntropy(3), (2, 5, 5), (0.0, 1.0))
    label = float(data.draw(st.integers(0, 2)))
    found = Bias()(target, capture(target, x, torch.tensor([label])))
    assert found.status in (Status.EXACT, Status.RANK_DEFICIENT, Status.GRADIENT_ZERO, Status.ILL_CONDITIONED)
    if found.status is Status.EXACT:
        assert apart(found, x) <= 1e-6
        assert found.labels.tolist() == [label]
    if found.status is Status.RANK_DEFICIENT:
        assert any(layer.free for layer in found.layers)
    if not front:
        assert found.status is Status.EXACT


@DRAWN
@given(clients())
# The second convolution reads one pixel of four.
@example(Client((1, 4, 4), ((1, 2, 1, 2, 0, 1), (1, 2, 1, 2, 0, 1)), (), "elu", True, LOSSES[0], 1.0, 0))
# It reads nothing but padding.
@example(Client((1, 4, 4), ((1, 3, 4, 1, 0, 1), (1, 2, 1, 3, 1, 1)), (), "tanh", True, LOSSES[0], 1.0, 0))
def test_nor_on_a_chain_with_a_margin_loss(client: Client) -> None:
    found = Bias()(client.target, capture(client.target, client.x, client.y))
    if found.status is Status.EXACT:
        assert apart(found, client.x) <= 1e-6
        assert found.labels.tolist() == [float(client.y)]
    if client.target.graph.uses[-1].bias_name is None:
        assert (found.status, found.answers) == (Status.NOT_CONVERGED, ())
    if found.status is Status.GRADIENT_ZERO:
        assert found.answers == ()


# All rows together.


def rounded(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, and gradients of 30 outputs with k of very different sizes, as they come in this type."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(40, generator=generator, dtype=torch.float64)
    k = torch.randn(30, generator=generator, dtype=torch.float64) * 10 ** -torch.linspace(2, 7, 30).double()
    return x, torch.outer(k, x).to(dtype).double(), k.to(dtype).double()


def noisy(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same with noise of one size on all gradients."""
    x, grad, k = rounded(seed, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    scale = 1e-3 * float(grad.abs().max())
    grad = grad + scale * torch.randn(grad.shape, generator=generator, dtype=torch.float64)
    return x, grad, k + scale * torch.randn(k.shape, generator=generator, dtype=torch.float64)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.search
@pytest.mark.parametrize("kind", ["noise", "float16"])
def test_reliability_beats_the_plain_mean_and_the_best_row(kind: str, first_seed: int) -> None:
    ours, plain, single = [], [], []
    for seed in range(first_seed, first_seed + 20):
        x, grad, k = noisy(seed) if kind == "noise" else rounded(seed, torch.float16)
        rows = [grad[i] / k[i] for i in range(len(k)) if k[i] != 0]
        ours.append(rms(divide(grad, k, stored_precision(grad).relative)[0] - x))
        plain.append(rms(sum(rows) / len(rows) - x))
        best = int(k.abs().argmax())
        single.append(rms(grad[best] / k[best] - x))
    assert rms(torch.tensor(ours)) < 0.1 * rms(torch.tensor(plain))
    assert rms(torch.tensor(ours)) < 0.9 * rms(torch.tensor(single))


@pytest.mark.search
@pytest.mark.parametrize("kind", ["noise", torch.float16, torch.bfloat16, torch.float32])
def test_the_estimated_error_covers_rounding_and_noise(kind: str | torch.dtype, first_seed: int) -> None:
    true, said = [], []
    for seed in range(first_seed, first_seed + 20):
        x, grad, k = noisy(seed) if isinstance(kind, str) else rounded(seed, kind)
        found, error = divide(grad, k, stored_precision(grad).relative)
        true.append(rms(found - x))
        said.append(error)
    assert 0.1 < rms(torch.tensor(true)) / rms(torch.tensor(said)) < 2


def test_values_below_the_types_full_precision_are_known_less_well() -> None:
    """In float16 3e-6 is rounded to the nearest 6e-8. One row alone disagrees with nobody."""
    x, _, _ = rounded(0, torch.float64)
    k = torch.tensor([3e-6], dtype=torch.float64)
    grad, k = torch.outer(k, x).half().double(), k.half().double()
    found, error = divide(grad, k, stored_precision(grad).relative)
    assert 0.1 < rms(found - x) / error < 2


@pytest.mark.search
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "softplus", "leaky_relu"])
def test_the_estimated_error_covers_the_way_through_the_front(activation: str, frozen: bool, first_seed: int) -> None:
    true, said = [], []
    target = target_of(nn.Conv2d(3, 8, 3, 1, 1), ACTIVATIONS[activation](), *head(128))
    with torch.no_grad():
        target.model[0].weight.mul_(4)  # slopes of tanh and softplus from 0 to 1
    target.model[0].requires_grad_(not frozen)
    single = Target(target.model.float(), target.loss, target.input_shape, target.value_range)
    for seed in range(first_seed, first_seed + 10):
        found, x = attack(single, seed=seed)
        true.append(rms(found.inputs - x))
        said.append(found.answers[0].error)
    assert 0.1 < rms(torch.tensor(true)) / rms(torch.tensor(said)) < 4


def test_rows_whose_bias_gradient_is_zero_are_left_out() -> None:
    x, grad, k = rounded(0, torch.float64)
    k[::3] = 0
    junk = grad.clone()
    junk[::3] = 0.1 * grad.abs().max()
    assert rms(divide(junk, k, 2.0**-52)[0] - x) < 1e-12
    k[1], junk[1] = 5e-324, 5e-324  # the least number there is
    for scale in (1.0, 1e-200):
        found, error = divide(scale * junk, scale * k, 2.0**-52)
        assert rms(found - x) < 1e-12
        assert 0 < error < 1e-12


def test_dead_units_are_counted() -> None:
    target = target_of(*head(48))
    found, x = attack(target)
    dead = int((target.model[:2](x) <= 0).sum())
    assert 0 < dead < 12
    assert found.layers[0].dead_units == dead
    assert found.layers[0].gradient_rows == (12 - dead) * 48


# Layers in front.


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("activation", ["leaky_relu", "tanh", "softplus", "elu"])
def test_a_front_is_inverted(activation: str, frozen: bool) -> None:
    target = target_of(nn.Conv2d(3, 8, 3, 1, 1), ACTIVATIONS[activation](), nn.Conv2d(8, 9, 3, 1, 1), *head(144))
    if frozen:
        target.model[:3].requires_grad_(False)
        target = Target(target.model, target.loss, target.input_shape, target.value_range)
    found, x = attack(target)
    assert found.status is Status.EXACT
    assert apart(found, x) <= 1e-9
    assert [layer.name for layer in found.layers] == ["0", "2", "4"]
    assert [layer.free for layer in found.layers] == [0, 0, 0]
    assert [layer.gradient_rows for layer in found.layers[:2]] == ([0, 0] if frozen else [216, 648])
    assert any("by weights alone" in each for each in found.assumptions) == frozen


def test_gradient_rows_close_what_a_relu_leaves_open() -> None:
    """It hides half of the values, and half of 8 channels is not 3 channels everywhere; the gradient adds its rows."""
    found, x = attack(target_of(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), *head(128)))
    assert found.status is Status.EXACT
    assert apart(found, x) <= 1e-9


@pytest.mark.parametrize("frozen", [False, True])
def test_a_deficient_layer_is_named(frozen: bool) -> None:
    front = nn.Conv2d(3, 1, 3, 1, 1).requires_grad_(not frozen)
    target = target_of(front, nn.LeakyReLU(0.2), nn.Conv2d(1, 4, 3, 1, 1), *head(64))
    found, x = attack(target)
    # Every constraint on the input as a dense matrix: z by pixel, and the gradient of the weight at fixed k.
    rows = [torch.autograd.functional.jacobian(lambda x: front(x).reshape(-1), x).reshape(-1, 48)]
    if not frozen:
        z = front(x).detach().requires_grad_()
        (k,) = torch.autograd.grad(target.loss(target.model[1:](z), torch.tensor([1.0])), z)
        jacobian = torch.autograd.functional.jacobian(
            lambda x: nn.grad.conv2d_weight(x, front.weight.shape, k, 1, 1).reshape(-1), x
        )
        rows.append(jacobian.reshape(-1, 48) * float(rows[0].norm() / jacobian.norm()))
    free = 48 - int(torch.linalg.matrix_rank(torch.cat(rows), rtol=1e-9))
    assert free > 0
    assert found.status is Status.RANK_DEFICIENT
    assert found.reason.startswith(f"0 leaves {free} of 48 dimensions free")
    assert found.inputs.shape == x.shape
    # The minimum-norm solution satisfies every constraint and is no longer than the truth.
    matrix = torch.cat(rows)
    torch.testing.assert_close(matrix @ found.inputs.reshape(-1), matrix @ x.reshape(-1), rtol=1e-6, atol=1e-8)
    assert float(found.inputs.norm()) <= float(x.norm())


def test_a_layer_that_does_not_know_its_k_is_open_as_well() -> None:
    """The gradient alone would tell the first layer's input, but its k takes slopes at an input that is not known."""
    frozen = nn.Linear(5, 3).requires_grad_(False)
    layers = (nn.Linear(6, 5, bias=False), nn.LeakyReLU(0.2), frozen, nn.LeakyReLU(0.2), nn.Linear(3, 4))
    found, _ = attack(target_of(*layers, shape=(6,)))
    assert found.status is Status.RANK_DEFICIENT
    assert found.reason.startswith("2 leaves 2 of 5 dimensions free")
    assert [layer.open_since for layer in found.layers] == ["2", "2", None]
    assert found.layers[0].free == 0


class Skip(nn.Module):
    """A second way from the convolution to the output: k of the convolution is not that of fc alone."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 5, 3, 1, 1), nn.Linear(80, 12)
        self.out, self.around = nn.Linear(12, 4), nn.Linear(80, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.leaky_relu(self.conv(x), 0.2).flatten(1)
        return self.out(nn.functional.gelu(self.fc(h))) + self.around(h)


def test_a_gradient_that_comes_another_way_too_is_added_if_both_are_told() -> None:
    found, x = attack(target_of(Skip()))
    assert found.status is Status.EXACT
    assert apart(found, x) <= 1e-9
    assert found.layers[0].gradient_rows == 135


class Bent(Skip):
    """What comes the other way has passed an activation, whose slopes nobody told."""

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.leaky_relu(self.conv(x), 0.2).flatten(1)
        return self.out(nn.functional.gelu(self.fc(h))) + nn.functional.softplus(self.around(h))


def test_a_gradient_that_comes_another_way_too_is_not_used_if_that_is_not_told() -> None:
    found, x = attack(target_of(Bent(bias=False)))
    assert found.status is Status.EXACT
    assert apart(found, x) <= 1e-9
    assert found.layers[0].gradient_rows == 0
    assert any("0.conv by weights alone" in each for each in found.assumptions)


class Raw(nn.Module):
    """fc reads the convolution before its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.other = nn.Conv2d(3, 5, 3, 1, 1), nn.Linear(80, 4), nn.Linear(80, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.fc(h.flatten(1)) + self.other(nn.functional.leaky_relu(h, 0.2).flatten(1))


def test_what_the_graph_does_not_tell_is_found_out() -> None:
    found, x = attack(target_of(Raw()))
    assert found.status is Status.EXACT or found.answers == ()
    if found.answers:  # by way of `other`
        assert apart(found, x) <= 1e-9
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(0.3)
    for before in (norm, nn.Sigmoid()):
        found, x = attack(target_of(before, *head(48)))
        assert found.status is Status.EXACT
        assert apart(found, x) <= 1e-9


def test_obstacles_in_front_are_named_and_frozen_layers_are_none() -> None:
    conv = nn.Conv2d(3, 8, 3, 1, 1).requires_grad_(False)
    target = target_of(conv, nn.MaxPool2d(2), *head(32))
    found, _ = attack(target)
    assert (found.status, found.answers) == (Status.NOT_CONVERGED, ())
    assert found.reason == "the input does not reach 3 or 5 through layers alone: 1: max_pool2d"
    assert Bias().obstacle(target, 1) == found.reason


# What tells nothing, and what tells less.


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Flatten(), nn.Linear(48, 9, bias=False), nn.ReLU(), nn.Linear(9, 4, bias=False)),
        (nn.Linear(4, 4), nn.Flatten(), nn.Linear(48, 4, bias=False)),  # on 12 positions
    ],
)
def test_no_such_layer(layers: tuple[nn.Module, ...]) -> None:
    target = target_of(*layers)
    found, _ = attack(target)
    assert (found.status, found.answers) == (Status.NOT_CONVERGED, ())
    assert "no Linear layer with a bias" in found.reason
    assert all(use.name in found.reason for use in target.graph.uses)
    assert Bias().obstacle(target, 1) == found.reason


def test_a_weight_that_is_used_twice_is_not_believed() -> None:
    layer = nn.Linear(4, 4)
    found, _ = attack(target_of(layer, nn.ReLU(), layer, shape=(4,)))
    assert (found.status, found.answers) == (Status.NOT_CONVERGED, ())


def test_a_gradient_of_zero() -> None:
    target = target_of(*head(48))
    update = Update({name: torch.zeros_like(p) for name, p in target.parameters.items()})
    found = Bias()(target, update)
    assert (found.status, found.answers) == (Status.GRADIENT_ZERO, ())
    assert "all gradients are zero" in found.reason


def test_a_bias_gradient_that_is_withheld() -> None:
    target = target_of(*head(48))
    gradients = dict(capture(target, rand(0, 1, 3, 4, 4), torch.tensor([1.0])).gradients)
    zeroed = {name: torch.zeros_like(g) if g.ndim == 1 else g for name, g in gradients.items()}
    found = Bias()(target, Update(zeroed))
    assert (found.status, found.answers) == (Status.NOT_CONVERGED, ())
    assert "withheld" in found.reason
    found = Bias()(target, Update({name: g for name, g in gradients.items() if g.ndim > 1}))
    assert found.status is Status.NOT_CONVERGED
    assert "no Linear layer with a bias" in found.reason


@pytest.mark.parametrize("sent", ["zeros", "nothing"])
def test_a_front_whose_gradient_is_withheld(sent: str) -> None:
    target = target_of(nn.Conv2d(3, 5, 3, 1, 1), nn.LeakyReLU(0.2), *head(80))
    x = rand(0, 1, 3, 4, 4)
    gradients = dict(capture(target, x, torch.tensor([1.0])).gradients)
    for name in ("0.weight", "0.bias"):
        gradients[name] = torch.zeros_like(gradients[name])
        if sent == "nothing":
            del gradients[name]
    found = Bias()(target, Update(gradients))
    assert apart(found, x) <= 1e-9
    # Zeros are an answer too, and the recomputed gradient is not zero.
    assert found.status is (Status.EXACT if sent == "nothing" else Status.NOT_CONVERGED)


def test_a_first_layer_without_a_gradient_is_part_of_the_front() -> None:
    """Zeros in its place leave the next Linear layer, and the weights."""
    target = target_of(nn.Linear(6, 9), nn.LeakyReLU(0.2), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4), shape=(6,))
    x = rand(0, 1, 6)
    gradients = dict(capture(target, x, torch.tensor([1.0])).gradients)
    found = Bias()(target, Update({name: g for name, g in gradients.items() if not name.startswith("0.")}))
    assert found.status is Status.EXACT
    assert apart(found, x) <= 1e-12
    assert [layer.name for layer in found.layers] == ["0", "2"]


class Gated(nn.Module):
    """x + g b(a(x)): nothing comes back to a and b where g is zero."""

    def __init__(self, gate: float) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(gate))
        self.a, self.b = nn.Linear(48, 60), nn.Linear(60, 48)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("gate", [0.0, 0.5])
@pytest.mark.parametrize("withheld", [(), ("1.b.weight",), ("1.a.weight", "1.b.weight"), ("1.a.bias", "1.gate")])
def test_a_block_in_front_some_of_whose_gradients_are_zero_or_missing(gate: float, withheld: tuple[str, ...]) -> None:
    target = target_of(nn.Flatten(), Gated(gate), nn.Linear(48, 4))
    x = rand(0, 1, 3, 4, 4)
    gradients = capture(target, x, torch.tensor([1.0])).gradients
    found = Bias()(target, Update({name: g for name, g in gradients.items() if name not in withheld}))
    if found.answers:
        assert apart(found, x) <= 1e-9
    assert found.status is Status.EXACT or (gate and withheld), found


def test_a_batch_gives_the_mixture_that_its_rows_tell() -> None:
    target = target_of(nn.Flatten(), nn.Linear(48, 9), nn.Tanh(), nn.Linear(9, 4))
    x, y = rand(0, 3, 3, 4, 4), torch.tensor([0.0, 1.0, 3.0])
    found = Bias()(target, capture(target, x, y))
    assert found.status is Status.NOT_CONVERGED
    assert any("of several it gives a mixture" in each for each in found.assumptions)
    assert Bias().obstacle(target, 1) is None
    assert "3 samples" in str(Bias().obstacle(target, 3))
    # Three times the same sample is that sample, and the labels are none's.
    same = Bias()(target, capture(target, x[:1].expand(3, -1, -1, -1), y))
    assert apart(same, x[:1]) <= 1e-12
    assert same.status is Status.NOT_CONVERGED


def test_noise_is_not_called_exact() -> None:
    target = target_of(*head(48))
    clean = capture(target, rand(0, 1, 3, 4, 4), torch.tensor([1.0]))
    generator = torch.Generator().manual_seed(0)
    noise = {n: torch.randn(g.shape, generator=generator, dtype=g.dtype) for n, g in clean.gradients.items()}
    for scale in (1e-6, 1e-2, 1.0):
        found = Bias()(target, Update({n: g + scale * noise[n] for n, g in clean.gradients.items()}))
        assert found.status is Status.NOT_CONVERGED
        assert "gradient residual" in found.reason


def test_the_certificate_is_the_distance_of_the_recomputed_gradient() -> None:
    target = target_of(*head(48))
    x, y = rand(0, 2, 3, 4, 4), torch.tensor([0.0, 3.0])
    update = capture(target, x, y)
    (answer,) = Bias()(target, update).answers
    labels = []
    for label in range(4):
        loss = nn.functional.cross_entropy(target.model(answer.inputs), torch.tensor([label]))
        found = torch.autograd.grad(loss, list(target.model.parameters()))
        if may_be(answer.gradient_residual, found, update):
            labels.append(float(label))
    assert float(answer.labels) in labels


def test_nothing_is_changed_and_the_answer_is_the_same_again() -> None:
    target = target_of(nn.Conv2d(3, 5, 3, 1, 1), nn.LeakyReLU(0.2), nn.Dropout(0.5), *head(80))
    update = capture(target, rand(0, 1, 3, 4, 4), torch.tensor([1.0]))
    weights = {name: p.clone() for name, p in target.model.named_parameters()}
    state = torch.get_rng_state()
    first, second = Bias()(target, update), Bias()(target, update)
    assert torch.equal(first.inputs, second.inputs)
    assert first.answers[0].error == second.answers[0].error > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], p) for name, p in target.model.named_parameters())
    assert all(p.grad is None for p in target.model.parameters())


def test_lenet() -> None:
    """Its biased Linear layer is the last, behind three convolutions with sigmoids."""
    target = Target(models.lenet(1, 12, 5).double(), losses.CrossEntropy(5), (1, 12, 12), (0.0, 1.0))
    found, x = attack(target, 2.0)
    assert found.status is Status.EXACT
    assert apart(found, x) <= 1e-6
    assert found.labels.tolist() == [2.0]


# Other parameters whose gradient is k.


def test_a_convolution_that_is_read_at_one_position() -> None:
    found, x = attack(target_of(nn.Conv2d(3, 4, 4), nn.Flatten()))
    assert found.status is Status.EXACT
    assert apart(found, x) <= 1e-9


def test_batch_norm_behind_a_layer_tells_its_k() -> None:
    """The gradient of beta is k of the normalised values; the layer needs no bias."""
    norm = nn.BatchNorm1d(12)
    with torch.no_grad():
        norm.running_mean.normal_(generator=torch.Generator().manual_seed(0))
        norm.running_var.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
    target = target_of(nn.Flatten(), nn.Linear(48, 12, bias=False), norm, nn.ReLU(), nn.Linear(12, 4, bias=False))
    found, x = attack(target)
    assert found.status is Status.EXACT
    assert apart(found, x) <= 1e-9
    assert any("the gradient of 2.bias" in each for each in found.assumptions)


class Patches(nn.Module):
    """A patch embedding with learned positions, as in a vision transformer, and something that no recursion passes."""

    def __init__(self, token: bool) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 24)) if token else None
        self.positions = nn.Parameter(torch.randn(1, 4 + token, 24))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).mT
        h = h if self.token is None else torch.cat([self.token.expand(len(h), -1, -1), h], 1)
        return self.head(self.norm(h + self.positions).softmax(1).mean(1))


@pytest.mark.parametrize("token", [False, True])
def test_learned_positions_tell_k_of_every_patch(token: bool) -> None:
    """Lu et al., APRIL, CVPR 2022: the gradient of the position embedding is k of the patch embedding."""
    found, x = attack(target_of(Patches(token)))
    assert found.status is Status.EXACT
    assert apart(found, x) <= 1e-9
    assert any("the gradient of 0.positions is k of 0.embed" in each for each in found.assumptions)


@pytest.mark.parametrize(
    ("end", "loss", "factor"),
    [
        (nn.Sigmoid(), "mse", 1.0),
        (nn.Softmax(1), "cross-entropy", 1.0),
        (nn.Softmax(1), "cross-entropy", 3.0),
        (nn.Hardtanh(), "mse", 1.0),
    ],
)
def test_of_many_labels_few_are_certified(
    end: nn.Module, loss: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the last layer does not tell the label, one parameter's gradient does."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 60), end).double()
        x = torch.rand(3, 1, 3, 3, dtype=torch.float64)
    target = Target(model, loss, (1, 3, 3), (0.0, 1.0))
    certified: list[float] = []

    def counted(target: Target, update: Update, end: Candidate, label: Tensor) -> Answer:
        certified.append(float(label))
        return answer(target, update, end, label)

    monkeypatch.setattr(bias, "answer", counted)
    for at, label in enumerate((0.0, 31.0, 59.0)):
        update = capture(target, x[at : at + 1], torch.tensor([label]))
        certified.clear()
        found = Bias()(target, Update({name: factor * g for name, g in update.gradients.items()}))
        assert found.labels.tolist() == [label]
        assert float((found.inputs - x[at]).abs().max()) < 1e-6
        assert len(certified) <= 2 * bias.FEW
