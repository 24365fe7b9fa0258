"""Several samples whose gradients were added up, from what is known behind their convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rgap import Target, data, losses, models
from rgap.inversion.gauss_newton import gauss_newton
from rgap.inversion.joint import FROM_ROUTES
from rgap.inversion.samples import layer_by_layer
from rgap.inversion.state import Observation, State
from rgap.inversion.system import ConstraintSystem
from rgap.linalg.least_squares import Iterative

EPS = float(torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_a_batch_behind_the_convolutions_of_cnn6_is_recovered(samples: int) -> None:
    """From gradients in float32, value and cotangent of each sample behind the last convolution being given."""
    target = Target(models.cnn6(3, 8), losses.Logistic(), (3, 8, 8), (0.0, 1.0), samples)
    x = data.photographs(samples, 8).inputs.double()
    labels = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)[:samples]
    whole = target.network
    values = whole.forward(x)
    k = target.loss.output_gradient(values[-1], labels) / samples
    front = [segment for segment in whole.segments if segment.exit <= len(whole.nodes) - 3]
    end = front[-1].exit
    cotangent = whole.vjp(values, whole.slopes(values), {len(values) - 1: k})[end]
    assert cotangent is not None
    output = State(values[end], cotangent, None, EPS * values[end].abs())
    gradients = {name: grad.float().double() for name, grad in target.gradient(x, labels).items()}
    system = ConstraintSystem(whole.part(front), output, gradients, EPS)
    observed = Observation({name: grad[None] for name, grad in gradients.items()}, EPS, EPS ** (2 / 3))
    start = layer_by_layer(system.network, output, observed).state
    assert start is not None
    assert float((start.value - x).square().mean((1, 2, 3)).max()) < 1e-8
    found = gauss_newton(system, Iterative(), None, 200 * EPS, system.linearise(start.value))
    assert found.distance < 200 * EPS
    assert float((found.x - x).square().mean((1, 2, 3)).max()) < 1e-8


@pytest.mark.parametrize("seed", [0, 2])
def test_some_units_on_their_wrong_sides_are_told_in_few_steps(seed: int) -> None:
    """From an input that a pool's sides tell, about: those nearest to their kinks are in doubt from the first step on,
    and with as many as seem to change, two and four times as many steps are taken."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            *(nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(216, 10)),
        )
    model[3].bias.data[:20] -= 5.0
    target, x = Target(model, losses.CrossEntropy(10), (1, 12, 12)), data.photographs(1, 12, channels=1).inputs.double()
    whole, generator = target.network, torch.Generator().manual_seed(seed)
    values = whole.forward(x)
    k = torch.randn(values[6].shape, generator=generator, dtype=x.dtype)
    found = whole.gradients(values, whole.vjp(values, whole.slopes(values), {6: k}))
    gradients = {layer.weight_name: g.reshape(target.parameters[layer.weight_name].shape) for layer, g in found}
    system = ConstraintSystem(whole.up_to(6), State(values[6], k, None, torch.full_like(k, 1e-9)), gradients, EPS)
    start = system.linearise(x + 0.02 * torch.randn(x.shape, generator=generator, dtype=x.dtype))
    solution = gauss_newton(system, Iterative(), None, 1e-6, start, FROM_ROUTES)
    assert solution.distance < 1e-9
    assert solution.steps <= 15
