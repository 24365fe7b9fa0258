"""Gauss-Newton on all local steps: what one layer alone leaves is met by all parameters together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rgap import Protocol, Target, capture, losses
from rgap.attacks.local_steps import client_of, plan_of
from rgap.inversion.all_steps import AllSteps
from rgap.inversion.local_steps import Place
from rgap.inversion.subspace.step import layer_of
from rgap.inversion.unrolled import in_their_span, rounding_moves, spanned
from rgap.inversion.walk import Client, Difference, Plan, Walk
from rgap.nn.layers import Layer
from rgap.protocol import Sends
from tests.inversion.subspace.cases import perceptron

CLASSES, SAMPLES = 6, 4
ORDER = [(0, 1), (2, 3), (0, 1), (2, 3)]
EPS = float(torch.finfo(torch.float32).eps)


def sent(
    model: nn.Module, loss: losses.Loss | None = None, **arguments: object
) -> tuple[Client, Plan, Difference, Layer, Tensor, Tensor]:
    """A client's difference, and its samples."""
    target = Target(model, loss or losses.CrossEntropy(CLASSES), (30,), (0.0, 1.0), batch_size=SAMPLES)
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.rand(SAMPLES, 30, generator=generator), torch.arange(SAMPLES).float()
    told = Protocol(Sends.DIFFERENCE, learning_rate=0.1, epochs=2, minibatch=2, shuffled=False, **arguments)  # type: ignore[arg-type]
    server = client_of(target)
    moved = {name: d.double() for name, d in capture(target, x, labels, told).gradients.items()}
    segments = Place.layers(target.network, moved)
    assert segments is not None
    difference = Difference.of(moved, server.weights, EPS, EPS, len(ORDER))
    return (
        server,
        plan_of(told, SAMPLES),
        difference,
        layer_of(target.network, segments[0]),
        x.double(),
        labels.double(),
    )


def mixed(x: Tensor, by: float) -> Tensor:
    """A little of the others in each sample."""
    drawn = torch.randn(len(x), len(x), generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    return x + by * drawn @ x


@pytest.mark.parametrize("activation", ["tanh", "leaky", "gelu"])
@pytest.mark.parametrize(
    "arguments", [{}, {"clip_norm": 0.5, "proximal": 0.3}, {"momentum": 0.9, "weight_decay": 1e-2}], ids=str
)
def test_samples_that_are_a_little_off_are_brought_to_the_rounding(
    activation: str, arguments: dict[str, float]
) -> None:
    server, plan, difference, layer, x, labels = sent(perceptron((30, 24, 20, CLASSES), activation), **arguments)
    start = mixed(x, 1e-4)
    found, same = in_their_span(AllSteps(server, plan, difference, layer, labels), start, ORDER)
    assert same is labels
    assert difference.misfit(Walk(server, plan).all(start, labels, ORDER)) > 20
    assert difference.misfit(Walk(server, plan).all(found, labels, ORDER)) < 2
    assert float((found - x).norm()) < 0.01 * float((start - x).norm())


def test_a_client_of_coordinates_is_brought_there_too() -> None:
    server, plan, difference, layer, x, labels = sent(perceptron((30, 24, 20, CLASSES), "tanh"))
    q = torch.linalg.qr(x.mT)[0]
    inside = spanned(server, difference, layer, q)
    assert inside is not None
    small, there = inside
    segments = Place.layers(small.network(small.weights), there.sent)
    assert segments is not None
    first, start = layer_of(small.network(small.weights), segments[0]), mixed(x, 1e-4) @ q
    found, _ = in_their_span(AllSteps(small, plan, there, first, labels), start, ORDER)
    assert there.misfit(Walk(small, plan).all(found, labels, ORDER)) < 2
    assert float((found @ q.mT - x).norm()) < 0.01 * float((start @ q.mT - x).norm())


def test_how_far_rounding_moves_samples_is_told_by_a_draw() -> None:
    """By about as much as the rounding of weights moves them in truth, since roundings are not quite independent."""
    server, plan, difference, layer, x, labels = sent(perceptron((30, 24, 20, CLASSES), "tanh"))
    found, _ = in_their_span(AllSteps(server, plan, difference, layer, labels), mixed(x, 1e-4), ORDER)
    moved = rounding_moves(AllSteps(server, plan, difference, layer, labels), found, ORDER)
    assert moved is not None
    off = (found - x).square().mean(1).sqrt()
    assert bool((off < 10 * moved).all())
    assert bool((moved < 10 * off).all())


def test_real_labels_are_unknowns_too() -> None:
    model = perceptron((30, 24, 20, 1), "tanh")
    server, plan, difference, layer, x, labels = sent(model, losses.MeanSquaredError(1))
    start, near = mixed(x, 1e-4), labels + 1e-3 * torch.tensor([1.0, -2.0, 0.5, 1.5], dtype=labels.dtype)
    found, told = in_their_span(AllSteps(server, plan, difference, layer, near), start, ORDER)
    assert difference.misfit(Walk(server, plan).all(start, near, ORDER)) > 20
    wanted = difference.misfit(Walk(server, plan).all(x, labels, ORDER))
    assert difference.misfit(Walk(server, plan).all(found, told, ORDER)) < 1.5 * wanted
    assert float((found - x).norm()) < 0.01 * float((start - x).norm())
    assert float((told - labels).norm()) < 0.01 * float((near - labels).norm())


class Shifted(nn.Module):
    """Knows the shape of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(0, 1, 30))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean


@pytest.mark.parametrize("front", [Shifted(), nn.Softsign(), nn.Unflatten(1, (5, 6))])
def test_where_something_stands_in_front_nothing_is_done(front: nn.Module) -> None:
    behind = perceptron((30, 24, 20, CLASSES), "tanh")
    server, plan, difference, layer, x, labels = sent(nn.Sequential(front, nn.Flatten(), behind))
    start = mixed(x, 1e-4)
    found, same = in_their_span(AllSteps(server, plan, difference, layer, labels), start, ORDER)
    assert torch.equal(found, start)
    assert same is labels
