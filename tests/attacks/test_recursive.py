"""The recursion on whole networks: what it recovers, what it says, and that the two agree."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from certificates import may_be
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import ACTIVATIONS, Client, clients
from torch import nn

from rgap import NotAChain, Target, Update, UpdateError, attacks, capture, data, losses, models, score
from rgap.attacks import Recursive, Status, capacity
from rgap.attacks.progress import Tick, watching
from rgap.inversion.layer import LayerSystem, Solver
from rgap.inversion.sides import choose_side, sides_agree
from rgap.inversion.state import Observation, State
from rgap.nn import layers
from rgap.nn.ops import Linear
from tests.auditing.small_audits import seeded

THOROUGH = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def attack(target: Target, x: torch.Tensor, label: float) -> attacks.Reconstruction:
    return Recursive()(target, capture(target, x, torch.tensor([label])))


@THOROUGH
@given(clients())
def test_a_random_chain_is_recovered_or_its_free_dimensions_are_named(client: Client) -> None:
    found = Recursive()(client.target, capture(client.target, client.x, client.y))
    if found.status is Status.GRADIENT_ZERO:
        gradients = client.target.gradients(client.x, client.y)
        assert any(float(g.abs().max()) == 0 for g in gradients.values())
        return
    errors = [score(answer, client.x).mse[0] for answer in found.answers]
    if found.status is Status.EXACT:
        assert errors[0] <= 1e-12
        assert float(found.labels[0]) == float(client.y[0])
    if all(layer.free == 0 for layer in found.layers):
        # A single layer without a bias has no numbers to spare: any gradient is one of some input.
        spare = sum(p.numel() for p in client.target.parameters.values()) > client.x.numel()
        right = (Status.EXACT, Status.AMBIGUOUS, Status.ILL_CONDITIONED)
        assert found.status in (right if spare else (Status.REPRODUCED, Status.ILL_CONDITIONED))
        assert min(errors) <= 1e-12
    if found.status is Status.RANK_DEFICIENT:
        assert any(layer.free for layer in found.layers)


@THOROUGH
@given(clients())
def test_the_certificate_is_the_distance_of_the_recomputed_gradient(client: Client) -> None:
    update = capture(client.target, client.x, client.y)
    found = Recursive()(client.target, update)
    for answer in found.answers:
        model = client.target.model
        output = model(answer.inputs)
        gradients = torch.autograd.grad(
            client.target.loss(output, answer.labels), list(model.parameters()), allow_unused=True
        )
        assert may_be(answer.gradient_residual, gradients, update)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"relu"}))
@pytest.mark.parametrize("label", [-1.0, 1.0])
def test_every_activation_on_a_network_of_full_rank(activation: str, bias: bool, label: float) -> None:
    target = Target(
        models.cnn6(1, 12, activation=ACTIVATIONS[activation], bias=bias, seed=3).double(),
        losses.Logistic(),
        (1, 12, 12),
        (0.0, 1.0),
    )
    x = data.photographs(1, 12, channels=1).inputs.double()
    found = attack(target, x, label)
    assert found.status is Status.EXACT, found
    assert score(found, x).mse[0] <= 1e-12
    assert float(found.labels[0]) == label


@pytest.mark.parametrize("loss", [losses.Logistic(), losses.Exponential(), losses.SquaredHinge()])
def test_the_other_root_is_returned_as_a_twin(loss: losses.Loss) -> None:
    target = Target(models.fcn3(9, (12, 10)).double(), loss, (9,), (0.0, 1.0))
    x = torch.rand(1, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    output = float(target.model(x).detach())
    label = math.copysign(1.0, output)  # a positive margin, so that two inputs have this gradient
    found = attack(target, x, label)
    assert found.status is Status.EXACT
    assert len(found.twins) == 1
    twin = found.twins[0]
    assert score(found, x).mse[0] <= 1e-20
    # The twin is the sample scaled by the ratio of the margins, and it gives the same gradient.
    assert torch.allclose(twin.inputs, x * twin.margin / abs(output), rtol=1e-9)
    gradients, true = (target.gradients(z, twin.labels) for z in (twin.inputs, x))
    for name, gradient in true.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-7, atol=1e-12)


def test_twins_that_both_fit_the_range_are_called_ambiguous() -> None:
    target = Target(models.fcn3(9, (12, 10)).double(), losses.SquaredHinge(), (9,), None)
    x = torch.rand(1, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = math.copysign(1.0, float(target.model(x).detach()))
    found = attack(target, x, label)
    assert found.status is Status.AMBIGUOUS
    assert "2 inputs reproduce the gradient" in found.reason
    assert min(score(answer, x).mse[0] for answer in found.answers) <= 1e-20


@pytest.mark.parametrize("label", [-1.0, 1.0])
def test_photographs_through_cnn6_in_float32(label: float) -> None:
    target = Target(models.cnn6(), losses.Logistic(), (3, 32, 32), (0.0, 1.0))
    x = data.photographs(1).inputs
    found = attack(target, x, label)
    assert found.status is Status.EXACT
    assert score(found, x).mse[0] <= 1e-8
    assert [layer.free for layer in found.layers] == [0] * 7
    # The estimate is of the right order: neither wishful nor useless.
    true = score(found, x).mse[0] ** 0.5
    assert true / 10 < found.answers[0].error < 10 * true


def test_cnn6_d_is_called_rank_deficient_at_its_second_layer() -> None:
    target = Target(models.cnn6_d(), losses.Logistic(), (3, 32, 32), (0.0, 1.0))
    found = attack(target, data.photographs(1).inputs, 1.0)
    assert found.status is Status.RANK_DEFICIENT
    # 280 is the deficit that dense linear algebra gives for this layer.
    assert "conv2 leaves 280 of 3468 dimensions free" in found.reason


def test_no_help_from_outside() -> None:
    """The attack gets the same answer when the sample is gone and the model's labels are unknown to it."""
    target = Target(models.fcn3(6, (8,)), losses.Logistic(), (6,), (0.0, 1.0))
    x = torch.rand(1, 6, generator=torch.Generator().manual_seed(1))
    update = Update(dict(capture(target, x, torch.tensor([1.0])).gradients))
    assert update.header.fingerprint is None
    found = Recursive()(target, update)
    assert score(found, x).mse[0] <= 1e-10
    assert any("both labels are tried" in assumption for assumption in found.assumptions)


def test_the_sign_of_the_gradient_gives_the_label_behind_nonnegative_features() -> None:
    target = Target(models.fcn3(6, (8,), activation=nn.Sigmoid).double(), losses.Logistic(), (6,), (0.0, 1.0))
    x = torch.rand(1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for label in (-1.0, 1.0):
        found = attack(target, x, label)
        assert float(found.labels[0]) == label
        assert any("read off the sign" in assumption for assumption in found.assumptions)


@pytest.mark.parametrize("loss", [losses.Hinge(), losses.SquaredHinge()])
def test_a_margin_beyond_the_hinge_has_no_gradient(loss: losses.Loss) -> None:
    model = models.fcn3(4, (6,)).double()
    with torch.no_grad():
        model.fc2.weight.mul_(1000)
    target = Target(model, loss, (4,))
    x = torch.rand(1, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    label = math.copysign(1.0, float(model(x).detach()))
    found = attack(target, x, label)
    assert found.status is Status.GRADIENT_ZERO
    assert found.answers == ()
    with pytest.raises(LookupError, match="gradient zero"):
        _ = found.inputs


def test_dead_units_are_counted_and_dead_layers_named() -> None:
    model = models.fcn3(4, (6,), activation=nn.ReLU, bias=True, seed=1).double()
    x = torch.rand(1, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        model.fc1.bias[:2] = -100.0
    target = Target(model, losses.Logistic(), (4,), (0.0, 1.0))
    dead = int((model.fc1(x) <= 0).sum())
    found = attack(target, x, 1.0)
    assert found.layers[0].dead_units == dead >= 2
    assert found.layers[0].weight_rows == 6 - dead
    with torch.no_grad():
        model.fc1.bias[:] = -100.0
    found = attack(Target(model, losses.Logistic(), (4,)), x, 1.0)
    assert found.status is Status.RANK_DEFICIENT
    assert "fc1 leaves 4 of 4 dimensions free" in found.reason


def test_a_float16_gradient_ends_in_a_stated_limit() -> None:
    target = Target(models.cnn6(1, 12).half(), losses.Logistic(), (1, 12, 12), (0.0, 1.0))
    full = Target(models.cnn6(1, 12), losses.Logistic(), (1, 12, 12), (0.0, 1.0))
    gradients = capture(full, data.photographs(1, 12, channels=1).inputs, torch.tensor([1.0])).gradients
    update = Update({name: g.half() for name, g in gradients.items()})
    assert any(int((g == 0).sum()) for g in update.gradients.values())
    found = Recursive()(target, update)
    assert found.status is not Status.EXACT or found.answers[0].error < 0.01
    assert any("float16" in finding and "are zero" in finding for finding in found.preflight.findings)


def test_an_update_of_a_batch_is_never_called_exact() -> None:
    target = Target(models.cnn6(1, 12).double(), losses.Logistic(), (1, 12, 12), (0.0, 1.0), batch_size=2)
    x = data.photographs(2, 12, channels=1).inputs.double()
    found = Recursive()(target, capture(target, x, torch.tensor([1.0, -1.0])))
    assert found.status is not Status.EXACT
    assert any("mixture" in assumption for assumption in found.assumptions)


def test_what_is_no_chain_or_no_update_of_the_target_is_refused() -> None:
    target = Target(models.fcn3(4, (6,)), losses.Logistic(), (4,))
    with pytest.raises(UpdateError, match=r"missing fc2\.weight"):
        Recursive()(target, Update({"fc1.weight": torch.zeros(6, 4)}))
    pooled = Target(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 1)),
        losses.Logistic(),
        (1, 4, 4),
    )
    found = attack(pooled, torch.rand(1, 1, 4, 4), 1.0)
    assert (found.status, found.answers) == (Status.NOT_CONVERGED, ())
    assert found.reason == "stops at 2: avg_pool2d makes 2 values of 8"
    ended = Target(nn.Sequential(nn.Flatten(), nn.Linear(16, 1), nn.Tanh()), losses.Logistic(), (1, 4, 4))
    with pytest.raises(NotAChain, match="tanh after the last layer"):
        attack(ended, torch.rand(1, 1, 4, 4), 1.0)


def test_an_update_from_other_weights_is_not_converged_and_says_why() -> None:
    target = Target(models.cnn6(1, 12, seed=0), losses.Logistic(), (1, 12, 12), (0.0, 1.0))
    other = Target(models.cnn6(1, 12, seed=1), losses.Logistic(), (1, 12, 12), (0.0, 1.0))
    gradients = capture(other, data.photographs(1, 12, channels=1).inputs, torch.tensor([1.0])).gradients
    found = Recursive()(target, Update(gradients))
    assert found.status in (Status.NOT_CONVERGED, Status.RANK_DEFICIENT)
    assert any("other weights" in finding for finding in found.preflight.findings)


def test_a_nearly_saturated_loss_is_named() -> None:
    """In float32 the client's own 1 - p is rounding: its gradient is that of no sample, and no answer reproduces it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9, bias=False), nn.LeakyReLU(0.2), nn.Linear(9, 3, bias=False))
        x = torch.rand(1, 6)
    label = int(model(x).argmax())
    with torch.no_grad():
        outputs = model(x)[0]
        model[2].weight *= 15 / float(outputs[label] - outputs.sort().values[-2])  # p is 1 - 3e-7
    target = Target(model, losses.CrossEntropy(3), (6,), (0.0, 1.0))
    found = Recursive()(target, capture(target, x, torch.tensor([float(label)])))
    assert found.status is Status.NOT_CONVERGED
    assert "the loss is nearly saturated: k is " in found.reason


@pytest.mark.parametrize("attack_", [Recursive(), attacks.Closed()], ids=str)
@pytest.mark.parametrize("name", ["chain", "skip", "cross-entropy"])
def test_updates_together_give_what_each_gives_alone(name: str, attack_: Recursive) -> None:
    """Whatever is attacked beside it: samples, labels, precisions, and one update that says nothing."""
    shape = (2, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = {
            "chain": lambda: models.cnn6(2, 8),
            "skip": lambda: models.residual(2, 8),
            "cross-entropy": lambda: nn.Sequential(
                nn.Conv2d(2, 8, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(128, 3)
            ),
        }[name]()
    loss = losses.CrossEntropy(3) if name == "cross-entropy" else losses.Logistic()
    target = Target(model, loss, shape, (0.0, 1.0))
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(3))
    labels = [1.0, 2.0, 0.0, 1.0] if name == "cross-entropy" else [1.0, -1.0, -1.0, 1.0]
    updates = [capture(target, x[at : at + 1], torch.tensor([label])) for at, label in enumerate(labels)]
    fine = Target(models.cnn6(2, 8).double(), loss, shape, (0.0, 1.0)) if name == "chain" else None
    if fine is not None:
        gradients = capture(fine, x[:1].double(), torch.tensor([1.0])).gradients
        updates.append(replace(updates[0], gradients=dict(gradients)))
    silent = {key: torch.zeros_like(g) for key, g in updates[0].gradients.items()}
    updates.insert(2, replace(updates[0], gradients=silent))
    together = attack_.many(target, updates)
    for found, update in zip(together, updates, strict=True):
        alone = attack_(target, update)
        assert (found.status, found.labels.tolist() if found.answers else []) == (
            alone.status,
            alone.labels.tolist() if alone.answers else [],
        )
        assert len(found.answers) == len(alone.answers)
        assert found.assumptions == alone.assumptions
        for one, other in zip(found.answers, alone.answers, strict=True):
            assert float((one.inputs - other.inputs).abs().max()) <= 0.1 * max(one.error, 1e-9)
            assert one.error == pytest.approx(other.error, rel=0.2)  # of noise only the size is solved for
            assert [layer.rank for layer in one.layers] == [layer.rank for layer in other.layers]
    assert together[2].status is Status.GRADIENT_ZERO
    assert sum(found.seconds for found in together) > 0


@pytest.mark.parametrize("solver", ["direct", "iterative"])
def test_the_solver_can_be_chosen_and_is_reported(solver: Solver) -> None:
    target = Target(models.cnn6(3, 16), losses.Logistic(), (3, 16, 16), (0.0, 1.0))
    x = data.photographs(1, 16).inputs
    found = Recursive(solver=solver)(target, capture(target, x, torch.tensor([1.0])))
    assert found.status is Status.EXACT
    assert score(found, x).mse[0] <= 1e-8
    methods = {layer.method for layer in found.layers} - {"channel"}
    assert methods == ({"iterative"} if solver == "iterative" else {"cholesky"})


def test_a_picture_of_many_pixels_is_recovered_without_a_matrix() -> None:
    """At 64 x 64 the dense matrices of a layer would take 2 GiB; some of its 16,384 units stand at their kinks."""
    target = Target(models.strided(3, 64), losses.Logistic(), (3, 64, 64), (0.0, 1.0))
    x = data.photographs(1, 64).inputs
    found = attack(target, x, 1.0)
    assert found.status is Status.EXACT, found
    assert score(found, x).mse[0] <= 1e-8
    assert {layer.method for layer in found.layers} == {"iterative", "channel"}
    assert all(layer.free == 0 for layer in found.layers)


@pytest.mark.parametrize("outputs", [30, 10])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_sides_of_kinks_are_told_from_the_gradient(outputs: int, seed: int) -> None:
    """Whether the weight rows are enough by themselves (30 outputs) or those of the sure units are needed (10)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    layer = layers.convolution(
        "conv", normal(outputs, 3, 3, 3), None, (3, 9, 9), (2, 2), ((1, 1),) * 2, (1, 1), 1, "w", None
    )
    x, k = normal(1, 3, 81), normal(1, outputs, 25)
    z, grad = layer.output(x), layer.grad_weight(x, k)
    doubt = torch.zeros(k.shape, dtype=torch.bool)
    doubt.view(-1)[torch.randperm(k.numel(), generator=generator)[:8]] = True
    wrong = doubt & (torch.rand(k.shape, generator=generator) < 0.5)
    there = torch.where(wrong, k, torch.where(doubt, 0.2 * k, k))
    here = torch.where(wrong, 0.2 * k, k)
    error = torch.full_like(z, 1e-9)

    def front(of: torch.Tensor) -> State:
        return State(layer.unpack_output(z), layer.unpack_output(of), None, layer.unpack_output(error))

    given_ = Observation({"w": grad}, 1e-16, 1e-9)
    found = choose_side(Linear(layer), front(here), front(there), grad, given_)
    assert torch.equal(layer.pack_output(found.cotangent), k)
    solved = LayerSystem(layer, here, None, 1e-9).solve(z, grad).x
    assert bool(sides_agree(layer, here, there, solved, grad, 1e-16)) == (not bool(wrong.any()))


@pytest.mark.parametrize(("at", "bias"), [(0, True), (2, True), (4, True), (2, False), (4, False)])
@pytest.mark.parametrize("value", [-1e-6, -1e-7, 1e-8, 1e-7, 1e-6])
def test_a_value_no_larger_than_its_error_is_no_zero_of_a_relu(value: float, at: int, bias: bool) -> None:
    """Nor is noise a value: the gradient of the layer behind, or of its bias, tells which it is."""
    model = seeded(
        *(nn.Conv2d(1, 12, 3, padding=1, bias=bias), nn.ReLU()),
        *(nn.Conv2d(12, 20, 3, padding=1, bias=bias), nn.ReLU()),
        *(nn.Conv2d(20, 24, 3, 2, 1, bias=bias), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(24 * 16, 10, bias=bias)),
    ).double()
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    layer = model[at]
    assert isinstance(layer, nn.Conv2d)
    with torch.no_grad():
        read = model[:at](x.double())
        z = layer(read)[0, 5].flatten()
        unit = int(z.abs().argmin())
        patch = nn.functional.unfold(read, 3, padding=1, stride=layer.stride)[0, :, unit]
        layer.weight[5] += ((value - z[unit]) / patch.square().sum() * patch).reshape(-1, 3, 3)
    target = Target(model.float(), losses.CrossEntropy(10), (1, 8, 8), (0.0, 1.0))
    found = Recursive()(target, capture(target, x, torch.tensor([3.0])))
    assert found.status is Status.EXACT, found
    assert score(found, x).mse[0] <= 1e-10


def test_sides_are_looked_for_only_where_the_gradient_contradicts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flat background puts thousands of values on their kinks, where no side changes the gradient."""
    target = Target(models.cnn6(1, 16), losses.Logistic(), (1, 16, 16), (0.0, 1.0))
    x = torch.zeros(1, 1, 16, 16)
    x[..., 5:10, 6:9] = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("rgap.inversion.recursion.choose_side", None)
    found = Recursive()(target, capture(target, x, torch.tensor([1.0])))
    assert found.status is Status.EXACT, found
    assert score(found, x).mse[0] <= 1e-10


def test_what_would_not_fit_into_memory_is_refused_before_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(models.cnn6(3, 16), losses.Logistic(), (3, 16, 16), (0.0, 1.0))
    update = capture(target, data.photographs(1, 16).inputs, torch.tensor([1.0]))
    monkeypatch.setattr(capacity, "free", lambda device: 2**20)
    with pytest.raises(MemoryError, match=r"would take about \d+ MiB, 1 MiB are free: expected a smaller input"):
        Recursive()(target, update)
    reason = Recursive().obstacle(target, 1)
    assert reason is not None
    assert reason.startswith("the recursion would take about")


def test_the_way_back_reports_how_far_it_is() -> None:
    target = Target(models.cnn6(3, 16), losses.Logistic(), (3, 16, 16), (0.0, 1.0))
    update = capture(target, data.photographs(1, 16).inputs, torch.tensor([1.0]))
    ticks: list[Tick] = []
    with pytest.MonkeyPatch.context() as patched, watching(ticks.append):
        patched.setattr("rgap.attacks.progress.EVERY", 0.0)
        Recursive()(target, update)
    assert [tick.done for tick in ticks] == list(range(len(ticks)))
    assert ticks[-1].total >= len(ticks) > 5
    assert all(math.isnan(tick.loss) and tick.what == "Recursive" for tick in ticks)


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["auto", "direct", "iterative"])
@pytest.mark.parametrize("name", ["cnn6", "cnn6_d"])
def test_on_a_cuda_device_the_answer_is_that_of_the_processor(name: str, solver: Solver) -> None:
    model = getattr(models, name)(1, 20)
    truth = data.photographs(2, 20, channels=1).inputs
    found = []
    for device in ("cpu", "cuda"):
        target = Target(model.to(device), losses.Logistic(), (1, 20, 20), (0.0, 1.0))
        updates = [capture(target, x[None].to(device), torch.tensor([1.0], device=device)) for x in truth]
        found.append(attacks.Closed(solver=solver).many(target, updates))
    for here, there in zip(*found, strict=True):
        assert there.status is here.status
        assert there.inputs.device.type == "cuda"
        assert float((there.inputs.cpu() - here.inputs).abs().max()) <= 1e-4
