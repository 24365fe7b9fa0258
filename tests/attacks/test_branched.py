"""The joint constraints of networks that are no plain chain: against dense rows made of finite steps and autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, capture, losses
from rgap.attacks import Closed, Recursive, Status
from rgap.attacks.branched import At, Branched
from rgap.inversion.state import State
from tests.nn.modules import Skip, norm

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "a skip": lambda: Skip(
        nn.Sequential(nn.Conv2d(3, 2, 3, 1, 1), nn.ELU(), nn.Conv2d(2, 3, 1)), act=nn.LeakyReLU(0.2)
    ),
    "a pool": lambda: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 1), nn.Tanh()),
    "norms": lambda: nn.Sequential(norm(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.GELU()),
    "side by side": lambda: Skip(nn.Conv2d(3, 2, 3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.Softplus(), cat=True),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def problem(name: str) -> tuple[Branched, Tensor]:
    """All that is in front of the last layer, whose input is known, and the network's input."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = NETWORKS[name]()
        count = inner(torch.zeros(1, 3, 4, 4)).numel()
        stem = nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), nn.LeakyReLU(0.2))
        model = nn.Sequential(stem, inner, nn.Flatten(), nn.Linear(count, 3)).double().eval()
    x = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = Target(model, losses.CrossEntropy(3), (2, 4, 4), (0.0, 1.0))
    update = capture(target, x, torch.tensor([1.0]))
    whole = target.network
    front = whole.part(whole.segments[:-1])
    values = whole.forward(x)
    k = target.loss.output_gradient(values[-1], torch.tensor([1.0], dtype=torch.float64))
    ks = whole.vjp(values, whole.slopes(values), {len(values) - 1: k})
    at = whole.segments[-1].entry
    own = ks[at]
    assert own is not None
    known = State(values[at], own, None, torch.zeros_like(values[at]))
    return Branched(front, known, {name: grad.double() for name, grad in update.gradients.items()}), x


def held(of: Branched, point: At, x: Tensor) -> Tensor:
    """Outputs and gradients at an input near by, with all k of the point, each kind scaled as `normal` has it."""
    ks, values = of.ks(point), of.network.forward(x)
    parts = [values[-1].flatten()]
    for (place, layer, value), scale in zip(of.heard, of._scales, strict=True):
        k = ks[place + 1]
        assert k is not None
        parts.append(scale**0.5 * layer.grad_weight(layer.pack_input(values[value]), layer.pack_output(k)).flatten())
    return torch.cat(parts)


@every_network
def test_normal_equations_are_those_of_the_dense_rows(name: str) -> None:
    of, x = problem(name)
    generator = torch.Generator().manual_seed(2)
    at = x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    point = of.forward(at)
    nothing = [torch.zeros_like(slope, dtype=torch.bool) for slope in point.slopes]
    gram, right = of.normal(point, nothing)
    step = 1e-6
    units = torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape)
    columns = [(held(of, point, at + step * unit) - held(of, point, at - step * unit)) / (2 * step) for unit in units]
    dense = torch.stack(columns, 1)
    size = float(gram.abs().max())
    torch.testing.assert_close(gram, dense.T @ dense, rtol=1e-6, atol=1e-7 * size)
    wanted = [of.known.value.flatten()]
    wanted += [scale**0.5 * grad.flatten() for scale, grad in zip(of._scales, of.grads, strict=True)]
    misses = torch.cat(wanted) - held(of, point, at)
    expected = dense.T @ misses + gram @ at.flatten()
    torch.testing.assert_close(right, expected, rtol=1e-6, atol=1e-7 * float(right.abs().max()))


@every_network
def test_at_the_true_input_nothing_is_missed(name: str) -> None:
    of, x = problem(name)
    assert of.misfit(of.forward(x)) < 1e-12
    assert of.misfit(of.forward(x + 0.1)) > 1e-4
    nothing = [torch.zeros_like(slope, dtype=torch.bool) for slope in of.forward(x).slopes]
    gram, right = of.normal(of.forward(x), nothing)
    torch.testing.assert_close(gram @ x.flatten(), right, rtol=1e-8, atol=1e-10 * float(right.abs().max()))


@every_network
def test_a_unit_in_doubt_does_not_move_the_rows(name: str) -> None:
    """What its slope puts into the gradients is projected out: whatever it is, the same right-hand side comes of it."""
    of, x = problem(name)
    point = of.forward(x)
    doubtful = [torch.zeros_like(slope, dtype=torch.bool) for slope in point.slopes]
    place = next(iter(point.by_place))
    after = of.ks(point)[place + 1]
    assert after is not None
    unit = int(after.abs().argmax())  # one that is not dead
    doubtful[0].view(-1)[unit] = True
    slope = point.by_place[place].clone()
    slope.view(-1)[unit] *= -3.0
    _, right = of.normal(point, doubtful)
    ks = of.network.vjp(point.values, {**point.by_place, place: slope}, {len(point.values) - 1: of.known.cotangent})
    moved = [torch.zeros_like(of.known.value)]
    for (at, layer, value), grad in zip(of.heard, of.grads, strict=True):
        k = ks[at + 1]
        assert k is not None
        moved.append(layer.grad_weight(layer.pack_input(point.values[value]), layer.pack_output(k)) - grad)
    assert sum(float(each.norm()) for each in moved) > 1e-3
    told = of.noise(point, moved[0], moved[1:])
    assert float(told.norm()) < 1e-9 * float(right.norm())


def test_without_gradient_rows_only_those_of_the_last_layers_count() -> None:
    """Those that a kink after them could have changed are kept out."""
    of, x = problem("norms")
    of.normal(of.forward(x), None)
    kinked = [of._kinked_after(place) for place, _, _ in of.heard]
    assert kinked == [True, False]
    assert [scale == 0 for scale in of._scales] == kinked


def test_counts() -> None:
    of, x = problem("a skip")
    assert (of.unknowns, of.shape) == (32, (1, 2, 4, 4))
    assert of.rows_in_front == sum(layer.gradient_rows for layer in of.layers)
    assert of.rows == 48 + of.rows_in_front
    assert of.kinked
    point = of.forward(x)
    masks = of.nearest_to_kink(point, 4)
    assert [mask.shape for mask in masks] == [slope.flatten().shape for slope in point.slopes]
    assert sum(int(mask.sum()) for mask in masks) == 4
    assert of.changed(point, point) == 0


@pytest.mark.parametrize(
    "pool",
    [nn.AvgPool2d(2), nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ELU(), nn.AvgPool2d(2)), nn.AvgPool2d(3, 2, 1)],
)
def test_a_smooth_picture_behind_a_pool_is_recovered(pool: nn.Module) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stem = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.ELU(), pool)
        model = nn.Sequential(stem, nn.Flatten(), nn.Linear(8 * 16, 4)).double()
    across = torch.linspace(0, 3, 8, dtype=torch.float64)
    x = (0.5 + 0.4 * torch.sin(across)[:, None] * torch.cos(across))[None, None]
    target = Target(model, losses.CrossEntropy(4), (1, 8, 8), (0.0, 1.0))
    update = capture(target, x, torch.tensor([2.0]))
    assert Recursive()(target, update).answers == ()
    found = Closed()(target, update)
    assert found.status is Status.EXACT, found
    assert float((found.inputs - x).abs().max()) <= 1e-6
    [answer] = found.answers
    assert answer.joint is not None
    assert answer.joint.free == 0
