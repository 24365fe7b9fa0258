"""Several samples whose gradients were added up, from what is known behind their convolutions."""

from __future__ import annotations

import pytest
import torch

from rgap import Target, data, losses, models
from rgap.inversion.gauss_newton import gauss_newton
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
