"""Exact is said of no wrong answer: every parameter agrees, as closely as its own rounding lets it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, Update, capture, losses
from rgap.attacks import Attack, Bias, Closed, Reconstruction, Recursive, Status, certify
from rgap.inversion.rounding import stored_precision

EVERY = pytest.mark.parametrize("attack", [Recursive(), Closed(), Bias()], ids=lambda attack: attack.name)


def made(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    """With weights from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in layers:
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.reset_parameters()
    return nn.Sequential(*layers).eval()


def rand(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def dense(act: type[nn.Module] = nn.Tanh, loss: losses.Loss | None = None, width: int = 60) -> Target:
    loss = losses.CrossEntropy(4) if loss is None else loss
    model = made(nn.Flatten(), nn.Linear(48, width), act(), nn.Linear(width, loss.outputs))
    return Target(model, loss, (3, 4, 4), (0.0, 1.0))


def convolutional(loss: losses.Loss, bias: bool = True, scale: float = 1.0) -> Target:
    """Gradients of very different sizes from layer to layer."""
    model = made(
        nn.Conv2d(3, 12, 3, 1, 1, bias=bias), nn.Sigmoid(), nn.Conv2d(12, 12, 3, 1, 1, bias=bias), nn.Sigmoid(),
        nn.Flatten(), nn.Linear(192, 80, bias=bias), nn.Sigmoid(), nn.Linear(80, loss.outputs, bias=bias), seed=3,
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return Target(model, loss, (3, 4, 4), (0.0, 1.0))


def apart(found: Reconstruction, x: Tensor) -> float:
    return float((found.inputs - x).square().mean().sqrt())


# Each parameter on its own.


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("at", range(4))
def test_another_samples_layer_is_seen_however_small_its_gradient(at: int, scale: float) -> None:
    target = convolutional(losses.CrossEntropy(5), bias=False, scale=scale)
    x, z = rand(0, 2, 3, 4, 4).unsqueeze(1)
    gradients = dict(capture(target, x, torch.tensor([2.0])).gradients)
    assert Recursive()(target, Update(gradients)).status is Status.EXACT
    name = list(gradients)[at]
    gradients[name] = capture(target, z, torch.tensor([2.0])).gradients[name]
    found = Recursive()(target, Update(gradients))
    assert found.status is not Status.EXACT, found


@EVERY
@pytest.mark.parametrize("share", [0.5, 0.05])
def test_the_mean_of_two_samples_is_no_samples_gradient(attack: Attack, share: float) -> None:
    target = convolutional(losses.Logistic())
    x, z = rand(0, 2, 3, 4, 4).unsqueeze(1)
    one, other = (capture(target, each, torch.tensor([1.0])).gradients for each in (x, z))
    found = attack(target, Update({name: (1 - share) * g + share * other[name] for name, g in one.items()}))
    assert found.status is not Status.EXACT, found
    assert attack(target, Update(one)).status is Status.EXACT


@pytest.mark.parametrize("name", ["1.weight", "1.bias", "3.weight", "3.bias"])
def test_the_certificate_names_the_parameter_that_agrees_least(name: str) -> None:
    target, x, y = dense(), rand(0, 1, 3, 4, 4), torch.tensor([2.0])
    gradients = dict(capture(target, x, y).gradients)
    clean = certify(target, Update(gradients), x, y)
    assert clean.residual < 1e-6
    assert clean.roundings < 3
    gradients[name] = 1.01 * gradients[name]
    found = certify(target, Update(gradients), x, y)
    assert found.parameter == name
    assert 0.003 < found.residual < 0.01


def test_what_cancels_is_compared_with_what_it_cancels() -> None:
    """In front of a norm a bias has no effect: of its gradient rounding alone is left."""
    model = made(nn.Conv2d(1, 4, 3), nn.GroupNorm(4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    target, y = Target(model, losses.CrossEntropy(3), (1, 6, 6), (0.0, 1.0)), torch.tensor([1.0])
    for seed in range(4):
        x = rand(seed, 1, 1, 6, 6)
        update = capture(target, x, y)
        assert update.gradients["0.bias"].norm() < 1e-5 * update.norm
        found = certify(target, update, x, y)
        assert found.residual < 1e-5
        assert found.roundings < 10


@pytest.mark.parametrize("noise", [1e-5, 1e-4])
def test_what_rounding_does_not_explain_is_not_exact_and_its_error_is_larger(noise: float) -> None:
    target, x = dense(), rand(0, 1, 3, 4, 4)
    clean = capture(target, x, torch.tensor([1.0])).gradients
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: g + noise * g.square().mean().sqrt() * torch.randn(g.shape, generator=generator)
        for name, g in clean.items()
    }
    found = Recursive()(target, Update(noisy))
    assert found.status in (Status.REPRODUCED, Status.NOT_CONVERGED)
    if found.status is Status.REPRODUCED:
        assert "times what rounding explains" in found.reason
        assert 0.1 < apart(found, x) / found.answers[0].error < 10


# A real precision that is less than the type's.


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 2.0**-10, 1024.0])
def test_the_bits_in_use_tell_how_a_tensor_was_rounded(kind: torch.dtype, stored: torch.dtype, scale: float) -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounded = (values.to(kind).double() * scale).to(stored)
    found = stored_precision(rounded)
    precision, certain = found.relative, found.certain
    own = torch.finfo(kind).eps
    assert certain
    # Of the type's own rounding the whole step counts, since it was computed in it.
    assert precision == own or stored is not kind
    moved = float((rounded.double() / scale - values).square().mean().sqrt() / values.square().mean().sqrt())
    assert 0.1 < moved / precision < 2


def test_few_values_and_round_numbers_tell_nothing() -> None:
    for values in (torch.ones(100), torch.tensor([0.5, -0.25]), torch.zeros(9), torch.tensor([1.0, -1.0] * 50)):
        assert not stored_precision(values).certain
    target, x = dense(loss=losses.Hinge()), rand(0, 1, 3, 4, 4)
    update = capture(target, x, torch.tensor([1.0]))  # its last cotangent is -1
    assert update.precision == torch.finfo(torch.float32).eps


def test_small_values_that_underflow_are_rounded_more_coarsely() -> None:
    values = 1e-6 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    precision = stored_precision(values.half().float()).relative
    error = (values.half().float() - values).square().mean().sqrt() / values.square().mean().sqrt()
    assert 0.1 < float(error) / precision < 2


@EVERY
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [losses.CrossEntropy(4), losses.Logistic()], ids=lambda loss: loss.name)
def test_the_stated_error_is_that_of_the_rounding(attack: Attack, kind: torch.dtype, loss: losses.Loss) -> None:
    target = dense(loss=loss)
    for seed in range(4):
        x = rand(seed, 1, 3, 4, 4)
        clean = capture(target, x, torch.tensor([1.0])).gradients
        found = attack(target, Update({name: g.to(kind).float() for name, g in clean.items()}))
        assert found.status in (Status.EXACT, Status.ILL_CONDITIONED), found
        assert 0.1 < apart(found, x) / found.answers[0].error < 10


@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish])
@pytest.mark.parametrize("bias", [True, False])
def test_a_coarse_gradient_tells_which_of_two_values_an_output_had(act: type[nn.Module], bias: bool) -> None:
    """Of a layer whose weights alone tell nothing of it, because it reads more than it gives."""
    model = made(nn.Flatten(), nn.Linear(48, 30, bias=bias), act(), nn.Linear(30, 10, bias=bias))
    with torch.no_grad():
        model[1].weight.mul_(4)
    target = Target(model, losses.CrossEntropy(10), (3, 4, 4), (0.0, 1.0))
    for seed in range(4):
        x = rand(seed, 1, 3, 4, 4)
        clean = capture(target, x, torch.tensor([1.0])).gradients
        for kind in (torch.float16, torch.bfloat16):
            found = Recursive()(target, Update({name: g.to(kind).float() for name, g in clean.items()}))
            assert found.status is Status.EXACT, found
            assert 0.1 < apart(found, x) / found.answers[0].error < 10
            assert found.layers[0].weight_residual < 0.02


# The value range.


@pytest.mark.parametrize("factor", [-7.0, 3.0, 30.0])
@pytest.mark.parametrize("attack", [Closed(), Bias()], ids=lambda attack: attack.name)
def test_an_answer_outside_the_value_range_is_never_exact(attack: Attack, factor: float) -> None:
    target = Target(made(nn.Flatten(), nn.Linear(48, 1)), losses.MeanSquaredError(1), (3, 4, 4), (0.0, 1.0))
    gradients = dict(capture(target, rand(0, 1, 3, 4, 4), torch.tensor([1.0])).gradients)
    gradients["1.weight"] = factor * gradients["1.weight"]
    found = attack(target, Update(gradients))
    assert found.status is Status.REPRODUCED
    assert "outside the value range (0.0, 1.0)" in found.reason


@EVERY
@pytest.mark.parametrize("width", [255.0, 20.0])
def test_inputs_of_another_range_are_not_exact(attack: Attack, width: float) -> None:
    model = made(nn.Flatten(), nn.Linear(48, 60), nn.LeakyReLU(0.2), nn.Linear(60, 4))
    told, right = (Target(model, losses.CrossEntropy(4), (3, 4, 4), (0.0, high)) for high in (1.0, width))
    x = width * rand(1, 1, 3, 4, 4)
    with torch.no_grad():
        model[1].weight.mul_(1 / width)
    update = capture(Target(model, told.loss, (3, 4, 4)), x, torch.tensor([1.0]))
    told, right = (Target(model, told.loss, (3, 4, 4), each.value_range) for each in (told, right))
    assert attack(told, update).status is Status.REPRODUCED
    assert attack(right, update).status is Status.EXACT


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_input_that_uses_nothing_of_the_range_is_not_preferred_in_silence(seed: int) -> None:
    model = made(
        nn.Conv2d(3, 12, 3, 1, 1, bias=False), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(192, 1, bias=False), seed=seed
    )
    target = Target(model, losses.Logistic(), (3, 4, 4), (0.0, 1.0))
    x = 255 * rand(seed, 1, 3, 4, 4)
    found = Closed()(target, capture(target, x, torch.tensor([1.0])))
    assert found.status is not Status.EXACT, found
    if len(found.answers) > 1:
        assert "uses none of it" in found.reason or "0 inside" in found.reason


# What comes before the first layer.


class Before(nn.Module):
    """One of the functions that are not one to one."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        by_name: Mapping[str, Tensor] = {
            "silu": nn.functional.silu(6 * x - 4),
            "gelu": nn.functional.gelu(4 * x - 2),
            "relu": nn.functional.relu(x - 0.5),
            "hardtanh": nn.functional.hardtanh(x, 0.2, 0.8),
            "relu6": nn.functional.relu6(20 * x - 8),
        }
        return by_name[self.name]


@EVERY
@pytest.mark.parametrize("name", ["silu", "gelu", "relu", "hardtanh", "relu6"])
def test_what_is_undecided_at_the_input_is_said(attack: Attack, name: str) -> None:
    model = made(Before(name), nn.Flatten(), nn.Linear(48, 60), nn.LeakyReLU(0.2), nn.Linear(60, 4))
    target, x = Target(model, losses.CrossEntropy(4), (3, 4, 4), (0.0, 1.0)), rand(0, 1, 3, 4, 4)
    found = attack(target, capture(target, x, torch.tensor([1.0])))
    hidden = name in ("relu", "hardtanh", "relu6")
    assert found.status is (Status.RANK_DEFICIENT if hidden else Status.AMBIGUOUS), found
    assert "hides" in found.reason if hidden else "another one" in found.reason


@EVERY
def test_the_value_range_decides_where_one_of_two_values_is_outside(attack: Attack) -> None:
    class Rising(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.silu(6 * x - 1.2)

    model = made(Rising(), nn.Flatten(), nn.Linear(48, 60), nn.LeakyReLU(0.2), nn.Linear(60, 4))
    target, x = Target(model, losses.CrossEntropy(4), (3, 4, 4), (0.0, 1.0)), rand(0, 1, 3, 4, 4)
    found = attack(target, capture(target, x, torch.tensor([1.0])))
    assert found.status is Status.EXACT
    assert apart(found, x) < 1e-5


# Several samples, black and constant pictures, zeros.


@EVERY
@pytest.mark.parametrize("count", [2, 3])
def test_several_samples_that_are_told_are_never_exact(attack: Attack, count: int) -> None:
    target = Target(made(nn.Flatten(), nn.Linear(48, 1)), losses.MeanSquaredError(1), (3, 4, 4), (0.0, 1.0))
    for seed in range(3):
        x = rand(seed, 1, 3, 4, 4).expand(count, -1, -1, -1)  # all the same: nothing else gives it away
        found = attack(target, capture(target, x, torch.ones(count)))
        assert found.status is not Status.EXACT, found


@EVERY
def test_a_gradient_without_numbers_to_spare_is_not_exact(attack: Attack) -> None:
    target = Target(made(nn.Flatten(), nn.Linear(48, 1)), losses.MeanSquaredError(1), (3, 4, 4), (0.0, 1.0))
    found = attack(target, capture(target, rand(0, 1, 3, 4, 4), torch.tensor([0.3])))
    assert found.status is Status.REPRODUCED
    assert "so would any other gradient" in found.reason


@EVERY
@pytest.mark.parametrize("act", [nn.Sigmoid, nn.ReLU, nn.LeakyReLU])
@pytest.mark.parametrize("loss", [losses.CrossEntropy(4), losses.Logistic()], ids=lambda loss: loss.name)
@pytest.mark.parametrize("width", [60, 30])
def test_a_black_picture_is_found(attack: Attack, act: type[nn.Module], loss: losses.Loss, width: int) -> None:
    """Its gradient is zero in the first weights, and tells it all the same."""
    target, x = dense(act, loss, width), torch.zeros(1, 3, 4, 4)
    found = attack(target, capture(target, x, torch.tensor([1.0])))
    assert found.status is Status.EXACT, found
    assert apart(found, x) < 1e-6


@EVERY
@pytest.mark.parametrize("value", [0.5, -3.0, 1e-3])
def test_a_constant_picture_needs_no_range(attack: Attack, value: float) -> None:
    model = made(nn.Flatten(), nn.Linear(48, 60), nn.Tanh(), nn.Linear(60, 4))
    target, x = Target(model, losses.CrossEntropy(4), (3, 4, 4)), torch.full((1, 3, 4, 4), value)
    found = attack(target, capture(target, x, torch.tensor([1.0])))
    assert found.status is Status.EXACT, found
    assert apart(found, x) < 1e-5


@pytest.mark.parametrize("attack", [Recursive(), Closed()], ids=lambda attack: attack.name)
@pytest.mark.parametrize("how", ["zero head", "equal rows", "zero head, no bias", "equal rows, no bias"])
def test_a_last_layer_that_sends_nothing_back_still_tells_what_it_reads(attack: Attack, how: str) -> None:
    bias = "no bias" not in how
    model = made(nn.Flatten(), nn.Linear(48, 60, bias=bias), nn.LeakyReLU(0.2), nn.Linear(60, 4, bias=bias))
    with torch.no_grad():
        model[3].weight.copy_(torch.zeros(4, 60) if "zero" in how else model[3].weight[:1].expand(4, -1))
    target, x = Target(model, losses.CrossEntropy(4), (3, 4, 4), (0.0, 1.0)), rand(0, 1, 3, 4, 4)
    found = attack(target, capture(target, x, torch.tensor([1.0])))
    assert found.status is Status.EXACT, found
    assert apart(found, x) < 1e-5


# A factor.


@EVERY
@pytest.mark.parametrize("factor", [8.0, 65536.0, 0.1, -1.0, 1.9])
def test_a_factor_is_said_and_the_picture_certified_apart_from_it(attack: Attack, factor: float) -> None:
    target, x = dense(), rand(0, 1, 3, 4, 4)
    clean = capture(target, x, torch.tensor([1.0])).gradients
    found = attack(target, Update({name: factor * g for name, g in clean.items()}))
    assert apart(found, x) < 1e-5
    assert found.status is Status.EXACT, found
    assert f"{factor:.4g} times the gradient at this input" in found.reason
    assert float(found.labels) == 1.0


def test_no_factor_is_allowed_for_where_the_network_scales() -> None:
    """There the gradient of a brighter input is the same, scaled."""
    model = made(nn.Flatten(), nn.Linear(48, 60, bias=False), nn.LeakyReLU(0.2), nn.Linear(60, 4, bias=False))
    target, x, y = Target(model, losses.CrossEntropy(4), (3, 4, 4), (0.0, 1.0)), rand(0, 1, 3, 4, 4), torch.ones(1)
    update = capture(target, x, y)
    scaled = Update({name: 3 * g for name, g in update.gradients.items()})
    assert certify(target, scaled, x, y).factor == 1.0
    assert certify(target, scaled, x, y).residual > scaled.tolerance


# Labels that cannot be listed.


@pytest.mark.parametrize("label", [0.3, -5.0, 40.0])
@pytest.mark.parametrize("act", [nn.LeakyReLU, nn.Tanh])
def test_bias_finds_the_label_that_nothing_lists(label: float, act: type[nn.Module]) -> None:
    model = made(nn.Flatten(), nn.Linear(48, 60), act(), nn.Linear(60, 1, bias=False))
    target, x = Target(model, losses.MeanSquaredError(1), (3, 4, 4), (0.0, 1.0)), rand(0, 1, 3, 4, 4)
    found = Bias()(target, capture(target, x, torch.tensor([label])))
    assert found.status is Status.EXACT, found
    assert float(found.labels) == pytest.approx(label, rel=1e-4)
    assert apart(found, x) < 1e-5


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_what_is_undecided_behind_a_joint_solve_is_said_too(name: str) -> None:
    """A first layer that is rank-deficient alone, and determined with the next."""
    model = made(
        Before(name), nn.Conv2d(3, 1, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(1, 8, 3, 1, 1), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip
    target, x = Target(model, losses.CrossEntropy(4), (3, 4, 4), (0.0, 1.0)), rand(0, 1, 3, 4, 4)
    found = Closed()(target, capture(target, x, torch.tensor([1.0])))
    assert found.answers[0].joint is not None
    assert found.status is not Status.EXACT, found
    assert found.answers[0].undecided > 0


def nearly_certain(*ending: nn.Module) -> tuple[nn.Sequential, Tensor, int]:
    """A model, a sample and its label, of which it is certain but for a millionth."""
    model, x = made(nn.Flatten(), nn.Linear(48, 60), nn.Tanh(), nn.Linear(60, 4), *ending), rand(0, 1, 3, 4, 4)
    with torch.no_grad():
        outputs = model[:4](x)[0].sort().values
        for p in model[3].parameters():
            p.mul_(14 / float(outputs[-1] - outputs[-2]))
    return model, x, int(model(x).argmax())


def of_torch(model: nn.Module, x: Tensor, label: int) -> Update:
    """As a client computes it that has never heard of rgap, in float32."""
    loss = nn.functional.nll_loss if isinstance(model[-1], nn.LogSoftmax) else nn.functional.cross_entropy
    gradients = torch.autograd.grad(loss(model(x), torch.tensor([label])), list(model.parameters()))
    return Update(dict(zip([name for name, _ in model.named_parameters()], gradients, strict=True)))


CERTAIN = pytest.mark.parametrize("ending", [(), (nn.LogSoftmax(1),)], ids=["cross-entropy", "nll"])


@CERTAIN
def test_the_rounding_of_a_loss_that_is_nearly_certain_is_not_held_against_an_answer(
    ending: tuple[nn.Module, ...],
) -> None:
    """Of 1 - p float32 leaves a digit or two, which all gradients share, and the picture is none the worse for it."""
    model, x, label = nearly_certain(*ending)
    loss = losses.NegativeLogLikelihood(4) if ending else losses.CrossEntropy(4)
    target, update = Target(model, loss, (3, 4, 4), (0.0, 1.0)), of_torch(model, x, label)
    assert certify(target, update, x, torch.tensor([float(label)])).residual > update.tolerance
    found = Recursive()(target, update)
    assert found.status is Status.EXACT, found
    assert found.answers[0].k_off > update.tolerance
    assert "with the k that was sent" in found.reason
    assert 0.1 < apart(found, x) / found.answers[0].error < 10


@CERTAIN
@pytest.mark.parametrize("name", ["1.weight", "1.bias", "3.weight"])
def test_what_that_rounding_does_not_explain_is(ending: tuple[nn.Module, ...], name: str) -> None:
    """k itself wrong where nothing cancels, or a gradient that is another one with any k."""
    model, x, label = nearly_certain(*ending)
    loss = losses.NegativeLogLikelihood(4) if ending else losses.CrossEntropy(4)
    target, gradients = Target(model, loss, (3, 4, 4), (0.0, 1.0)), dict(of_torch(model, x, label).gradients)
    k, y = gradients["3.bias"], torch.tensor([float(label)])
    certified = certify(target, Update(gradients), x, y, k=k[None])
    assert certified.residual <= Update(gradients).tolerance
    wrong = k.clone()
    others = [at for at in range(4) if at != label]
    wrong[others] = k[others[::-1]]
    assert certify(target, Update(gradients), x, y, k=wrong[None]).k_off == 0
    gradients[name] = 1.003 * gradients[name]
    spoilt = Update(gradients)
    assert certify(target, spoilt, x, y, k=k[None]).residual > spoilt.tolerance


def test_few_values_that_underflow_are_as_coarse_as_the_others_last_bit() -> None:
    """A gradient of ten magnitudes may be one of round numbers, but not where others end with the same bit."""
    generator = torch.Generator().manual_seed(0)
    fine = torch.randn(40, 40, generator=generator) * 1e-5
    small = torch.randn(20, 20, generator=generator) * 2e-7
    rounded = {"fine": fine.half().float(), "small": small.half().float()}
    assert not stored_precision(rounded["small"]).certain
    wrong = float((rounded["small"] - small).norm() / small.norm())
    assert wrong / 2 < Update(rounded).precisions["small"] < 2 * wrong
    # A hinge's cotangents are exact, however few they are.
    exact = {"fine": fine.half().float(), "signs": small.sign()}
    assert Update(exact).precisions["signs"] <= Update(exact).precisions["fine"]


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_little_of_another_sample_is_not_taken_for_the_rounding_of_k(factor: float) -> None:
    """Where the label is nearly certain k is off by much, in one direction; other differences are none of its doing."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 4))
    generator = torch.Generator().manual_seed(0)
    x, other = torch.rand(2, 1, 3, 2, 2, generator=generator)
    other = (x + other) / 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        outputs = model(x)[0].sort().values
        label = torch.tensor([float(model(x).argmax())])
        model[-1].weight *= 8.5 / (outputs[-1] - outputs[-2])
        model[-1].bias *= 8.5 / (outputs[-1] - outputs[-2])
    target = Target(model, losses.CrossEntropy(4), (3, 2, 2), (0.0, 1.0))
    clean, more = (capture(target, each, label).gradients for each in (x, other))
    assert Closed()(target, Update(clean)).status is Status.EXACT
    share = 4e-4 * Update(clean).norm / Update(more).norm
    mixed = Update({name: factor * (g + share * more[name]) for name, g in clean.items()})
    assert Closed()(target, mixed).status is not Status.EXACT
