"""The joint solve: its normal equations, what it recovers, and what it says of what it cannot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rgap import Target, capture, data, losses, models, score
from rgap.attacks import Recursive, Status, Virtual
from rgap.attacks.fading import smoothness
from rgap.attacks.joint import Known, Point, Problem

LOSS = losses.Logistic()


def narrow(activation: nn.Module, bias: bool = False, seed: int = 0, size: int = 12) -> Target:
    """A network whose second convolution leaves its input open, while the image behind it is determined."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 4, 2, 2, bias=bias), activation,
            nn.Conv2d(6, 4, 3, 2, 1, bias=bias), activation,
            nn.Conv2d(4, 24, 3, 1, 1, bias=bias), activation,
            nn.Flatten(), nn.LazyLinear(1, bias=bias),
        )  # fmt: skip
        model(torch.zeros(1, 1, size, size))
    return Target(model.double(), LOSS, (1, size, size), (0.0, 1.0))


def test_a_joint_solve_goes_on_until_only_rounding_is_left() -> None:
    """The first photograph has a unit that changes its side at the last step: the gradient agrees to 2e-5 there, which
    is near enough to stop and a hundred times the rounding. The estimated error must be the true one, about."""
    target = Target(models.cnn6_d(), LOSS, (3, 32, 32), (0.0, 1.0))
    pictures = data.photographs(2)
    for x, label in zip(pictures.inputs, (-1.0, 1.0), strict=True):
        found = Virtual()(target, capture(target, x[None], torch.tensor([label])))
        (answer, *_) = found.answers
        assert found.status is Status.EXACT
        assert answer.joint is not None
        error = float((answer.inputs.double() - x.double()).square().mean().sqrt())
        assert error / 3 < answer.error < 10 * error


def problem(target: Target, x: torch.Tensor, depth: int) -> tuple[Problem, torch.Tensor]:
    """The constraints of the first layers at a known sample."""
    chain, label = target.chain, torch.tensor([1.0], dtype=torch.float64)
    gradients = {name: g.double() for name, g in capture(target, x, label).gradients.items()}
    packed = chain[0].pack_input(x)
    outputs = chain.forward(packed)[1]
    slopes = [layer.activation.slope(z) for layer, z in zip(chain, outputs, strict=True)]
    k = label * LOSS.slope(label * outputs[-1].reshape(1))
    ks = chain.backward(k.reshape(1, 1, 1), slopes)
    return Problem(chain, depth, Known(ks[depth], outputs[depth], None), gradients), packed


def masks(made: Problem, point: Point, *units: int) -> list[torch.Tensor]:
    """The given units of the first layer, in doubt."""
    found = [torch.zeros(slope.numel(), dtype=torch.bool) for slope in point.slopes]
    found[0][list(units)] = True
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["leaky", "tanh", "elu", "identity"]), st.booleans(), st.booleans())
def test_normal_equations_are_those_of_the_dense_jacobian(seed: int, kind: str, bias: bool, in_front: bool) -> None:
    activation = {"leaky": nn.LeakyReLU(0.2), "tanh": nn.Tanh(), "elu": nn.ELU(), "identity": nn.Identity()}[kind]
    target = narrow(activation, bias, seed, size=8)
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made, packed = problem(target, x, 1)
    point = made.forward(packed)
    gram, rhs = made.normal(point, masks(made, point) if in_front else None)
    first, second = made.layers
    back = first.pack_output(second.unpack_input(second.grad_input(made.known.k)))

    def rows(flat: torch.Tensor) -> torch.Tensor:
        """Every constraint as a function of the input, slopes fixed, each kind scaled as the problem scales it."""
        z = first.output(flat.reshape(1, first.channels, first.pixels))
        z = z if first.bias is None else z + first.bias[:, None]
        after = first.activation(point.outputs[0]) + point.slopes[0] * (z - point.outputs[0])
        inner = second.pack_input(first.unpack_output(after))
        found = [second.output(inner), made._scale[1] ** 0.5 * second.grad_weight(inner, made.known.k)]
        if in_front:
            outer = flat.reshape(1, first.channels, first.pixels)
            found.append(made._scale[0] ** 0.5 * first.grad_weight(outer, back * point.slopes[0]))
        return torch.cat([each.flatten() for each in found])

    jacobian = torch.autograd.functional.jacobian(rows, packed.flatten())
    assert torch.allclose(gram, jacobian.T @ jacobian, rtol=1e-9, atol=1e-12 * float(gram.abs().max()))
    # At the sample itself all constraints hold, so that it solves the normal equations.
    assert torch.allclose(gram @ packed.flatten(), rhs, rtol=1e-8, atol=1e-10 * float(rhs.abs().max()))
    assert made.misfit(point) < 1e-12


@pytest.mark.parametrize("bias", [False, True])
def test_a_unit_in_doubt_may_be_wrong_and_the_sample_still_solves(bias: bool) -> None:
    target = narrow(nn.LeakyReLU(0.2), bias)
    x = data.photographs(1, 12, channels=1).inputs.double()
    made, packed = problem(target, x, 1)
    right = made.forward(packed)
    wrong = [5, 60, 200]
    slopes = right.slopes[0].clone()
    slopes.view(-1)[wrong] = made.layers[0].activation.other_side(slopes).view(-1)[wrong]
    z = right.outputs[0] - (0.0 if made.layers[0].bias is None else made.layers[0].bias[:, None])
    offsets = made.layers[0].activation(right.outputs[0]) - slopes * z
    point = Point(right.inputs, right.outputs, [slopes], [offsets])

    def misses(*doubtful: int) -> float:
        gram, rhs = made.normal(point, masks(made, point, *doubtful))
        return float((gram @ packed.flatten() - rhs).norm() / rhs.norm())

    assert misses(*wrong) < 1e-12
    assert misses(*wrong, 7, 90) < 1e-12
    assert misses() > 1e-4
    assert misses(*wrong[:2]) > 1e-5


def test_units_in_doubt_are_those_nearest_to_their_kinks() -> None:
    target = narrow(nn.LeakyReLU(0.2))
    made, packed = problem(target, data.photographs(1, 12, channels=1).inputs.double(), 1)
    point = made.forward(packed)
    chosen = made.nearest_to_kink(point, 9)[0]
    size = point.outputs[0].abs().flatten()
    assert int(chosen.sum()) == 9
    assert float(size[chosen].max()) < float(size[~chosen].min())
    smooth, packed = problem(narrow(nn.Tanh()), data.photographs(1, 12, channels=1).inputs.double(), 1)
    assert not smooth.kinked
    assert not smooth.nearest_to_kink(smooth.forward(packed), 9)[0].any()


def test_normal_equations_are_updated_as_if_made_again() -> None:
    target = narrow(nn.LeakyReLU(0.2))
    x = data.photographs(1, 12, channels=1).inputs.double()
    made, packed = problem(target, x, 1)
    point = made.forward(packed)
    made.normal(point, masks(made, point))
    changed = point.slopes[0].clone()
    flat = changed.view(-1)
    flat[[3, 50, 200]] = torch.where(flat[[3, 50, 200]] == 1, 0.2, 1.0).double()
    moved = Point(point.inputs, point.outputs, [changed], point.offsets)
    updated, _ = made.normal(moved, masks(made, point))
    fresh, _ = problem(target, x, 1)[0].normal(moved, masks(made, point))
    assert torch.allclose(updated, fresh, rtol=1e-10, atol=1e-13 * float(fresh.abs().max()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.2), nn.ELU(), nn.Softplus(), nn.Tanh(), nn.Sigmoid()], ids=str)
def test_what_the_recursion_leaves_open_is_recovered(activation: nn.Module, bias: bool) -> None:
    target = narrow(activation, bias)
    x = data.photographs(1, 12, channels=1).inputs.double()
    update = capture(target, x, torch.tensor([1.0]))
    alone = Recursive()(target, update)
    assert alone.status is Status.RANK_DEFICIENT
    found = Virtual()(target, update)
    assert found.status is Status.EXACT, found
    assert score(found, x).mse[0] < 1e-12 < score(alone, x).mse[0]
    joint = found.answers[0].joint
    assert joint is not None
    assert joint.free == 0
    assert joint.layers == ("0", "2")
    assert any("neighbouring values" in assumption for assumption in found.assumptions)


def test_a_full_rank_network_is_left_to_the_recursion() -> None:
    target = Target(
        nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 1)).double(), LOSS, (1, 3, 3)
    )
    x = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    update = capture(target, x, torch.tensor([1.0]))
    assert torch.equal(Virtual()(target, update).inputs, Recursive()(target, update).inputs)


def test_free_dimensions_are_counted_and_never_called_exact() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3, 2, bias=False), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(50, 1))
    target = Target(model.double(), LOSS, (1, 12, 12), (0.0, 1.0))
    x = data.photographs(1, 12, channels=1).inputs.double()
    found = Virtual()(target, capture(target, x, torch.tensor([1.0])))
    assert found.status is Status.RANK_DEFICIENT
    # [W; K] by brute force, one column for each pixel.
    layer = target.chain[0]
    packed, units = layer.pack_input(x), torch.eye(144, dtype=torch.float64).reshape(144, 1, 144)
    slopes = layer.activation.slope(layer.output(packed))
    k = (
        layer.pack_output(target.chain[1].unpack_input(target.chain[1].grad_input(torch.ones(1, 1, 1).double())))
        * slopes
    )
    rows = torch.cat([layer.output(units).flatten(1), layer.grad_weight(units, k.expand(144, -1, -1)).flatten(1)], 1)
    joint = found.answers[0].joint
    assert joint is not None
    assert joint.free == 144 - int(torch.linalg.matrix_rank(rows)) > 0
    # The prior fills what is free: the answer satisfies every constraint, and looks like the sample.
    assert found.gradient_residual < 1e-6
    assert score(found, x).mse[0] < 0.05


def test_a_solve_too_large_for_memory_is_left_with_its_size() -> None:
    target = narrow(nn.LeakyReLU(0.2))
    x = data.photographs(1, 12, channels=1).inputs.double()
    update = capture(target, x, torch.tensor([1.0]))
    found = Virtual(largest=100)(target, update)
    assert found.status is Status.RANK_DEFICIENT
    assert "dense matrices of 294 unknowns" in found.reason
    assert "more than is solved (largest=100)" in found.reason
    assert torch.equal(found.inputs, Recursive()(target, update).inputs)


def test_smoothness_is_the_sum_of_squared_differences() -> None:
    x = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = smoothness((2, 3, 4), x)
    assert matrix is not None
    slow = sum(
        float((x[c, i, j] - x[c, a, b]) ** 2)
        for c in range(2)
        for i in range(3)
        for j in range(4)
        for a, b in ((i + 1, j), (i, j + 1))
        if a < 3 and b < 4
    )
    assert float(x.flatten() @ matrix @ x.flatten()) == pytest.approx(slow)
    assert smoothness((7,), x) is None
