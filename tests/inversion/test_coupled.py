"""Rows whose cotangents depend on the inputs, differentiated by what each layer reads and its cotangent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, losses
from rgap.inversion.coupled import LayerRows
from rgap.inversion.doubted import Effects
from rgap.inversion.jacobian import Jacobian
from rgap.inversion.pattern import least_certain
from rgap.inversion.state import State
from rgap.inversion.system import ConstraintSystem, Linearisation
from rgap.nn.ops import Linear

SAMPLES = 3
BODIES: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "wide tables": (lambda: [nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Tanh(), nn.Linear(30, 25), nn.Tanh()], (20,)),
    "narrow ones": (lambda: [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh()], (4,)),
    "convolutions": (
        lambda: [nn.Conv2d(2, 4, 3, 2, 1, groups=2), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.Tanh()],
        (2, 5, 5),
    ),
    "few positions": (lambda: [nn.Conv2d(8, 12, 3, 2), nn.BatchNorm2d(12), nn.Tanh(), nn.Conv2d(12, 9, 1)], (8, 3, 3)),
}
THIN = {
    "wide tables": [True, True],
    "narrow ones": [False] * 2,
    "convolutions": [False] * 2,
    "few positions": [True] * 2,
}


def system_of(name: str, activation: type[nn.Module] = nn.Tanh) -> tuple[ConstraintSystem, Tensor]:
    body, shape = BODIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [activation() if isinstance(each, nn.Tanh) else each for each in body()]
        x = torch.randn(SAMPLES, *shape)
        width = nn.Sequential(*layers, nn.Flatten())(x).shape[1]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 2)).double().train()
        x = x.double()
        grads = dict(zip(dict(model.named_parameters()), map(torch.randn_like, model.parameters()), strict=True))
    grads = {each: grad.detach() for each, grad in grads.items()}
    target = Target(model, losses.CrossEntropy(2), shape, batch_size=SAMPLES)
    z = layers[0](x).detach()
    axes = (0, *range(2, z.dim()))
    after = {"1.running_mean": 0.1 * z.mean(axes), "1.running_var": 0.9 + 0.1 * z.var(axes)}
    network = target.of_batch(after, grads, SAMPLES).network.own.up_to(len(layers))
    out = network.forward(x)[-1]
    weight = (torch.arange(out.numel()).reshape(out.shape) % 3 > 0).double()
    state = State(
        out, torch.cos(torch.arange(out.numel()).double()).reshape(out.shape), weight, torch.full_like(out, 0.1)
    )
    return ConstraintSystem(network, state, grads, 1e-7), x


def rows_at(system: ConstraintSystem, x: Tensor) -> Tensor:
    """The output and all gradients, one after the other, from the definition."""
    at = system.linearise(x)
    found = [at.values[-1].flatten()]
    for node, layer in zip(system.nodes, system.layers, strict=True):
        read = layer.pack_input(at.values[system.network.nodes[node].reads[0]])
        found.append(layer.grad_weight(read, system.k(at, node)).sum(0).flatten())
    return torch.cat(found)


@pytest.mark.parametrize("name", BODIES)
def test_products_are_those_of_the_derivative(name: str) -> None:
    system, x = system_of(name)
    jacobian = Jacobian(system, system.linearise(x), {})
    plain = torch.autograd.functional.jacobian(lambda x: rows_at(system, x), x, vectorize=True).flatten(1)
    weights = [system.row_weight.flatten()]
    weights += [
        torch.full_like(grad.flatten(), s**0.5) for grad, s in zip(system.gradients, jacobian.scale, strict=True)
    ]
    expected = torch.cat(weights)[:, None] * plain
    size = float(expected.abs().max())
    torch.testing.assert_close(jacobian.to_dense(), expected, rtol=1e-9, atol=1e-9 * size)
    rows = torch.randn(2, len(expected), generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(jacobian.rmv(rows).flatten(1), rows @ expected, rtol=1e-9, atol=1e-9 * size)
    torch.testing.assert_close(jacobian.gram(), expected.mT @ expected, rtol=1e-8, atol=1e-9 * size**2)


@pytest.mark.parametrize("name", BODIES)
def test_layers_with_few_columns_go_by_small_matrices(name: str) -> None:
    system, x = system_of(name)
    at: Linearisation = system.linearise(x)
    generator = torch.Generator().manual_seed(0)
    thin = []
    for node in system.nodes:
        op, k = system.network.nodes[node].op, at.cotangents[node + 1]
        assert isinstance(op, Linear)
        assert k is not None
        rows = LayerRows(op.layer, at.values[system.network.nodes[node].reads[0]], k)
        thin.append(rows.thin)
        if rows.thin:
            nothing = Effects(k.new_zeros(0, 1), None)
            moves = tuple(torch.randn(2, *shape, generator=generator).double() for shape in rows.shapes)
            for found, expected in zip(rows.normal(*moves, nothing), rows.back(rows.rows(*moves)), strict=True):
                torch.testing.assert_close(found, expected)
    assert thin == THIN[name]


@pytest.mark.parametrize("name", BODIES)
def test_what_units_in_doubt_do_is_left_out(name: str) -> None:
    system, x = system_of(name, nn.LeakyReLU)
    at = system.linearise(x)
    doubt = least_certain(system, at, 5)
    plain, blind = (Jacobian(system, at, each) for each in ({}, doubt))
    effects = []
    for node, mask in doubt.items():
        for unit in mask.flatten().nonzero().flatten().tolist():
            slopes = dict(at.slopes)
            slopes[node] = slopes[node].clone()
            slopes[node].view(-1)[unit] += 1.0
            there = system.residual(system.with_slopes(at, slopes)).gradient
            here = system.residual(at).gradient
            effects.append([(b - a).flatten() for a, b in zip(here, there, strict=True)])
    expected = [plain.to_dense()[: at.values[-1].numel()]]
    start = len(expected[0])
    for which, (grad, ratio) in enumerate(
        zip(system.gradients, zip(blind.scale, plain.scale, strict=True), strict=True)
    ):
        rows = plain.to_dense()[start : start + grad.numel()] * (ratio[0] / ratio[1]) ** 0.5
        start += grad.numel()
        left, sigma, _ = torch.linalg.svd(torch.stack([each[which] for each in effects]).mT, full_matrices=False)
        left = left[:, sigma > 1e-9 * sigma.max().clamp(min=1e-300)]
        expected.append(rows - left @ (left.mT @ rows))
    matrix = torch.cat(expected)
    size = float(matrix.abs().max())
    torch.testing.assert_close(blind.to_dense(), matrix, rtol=1e-7, atol=1e-8 * size)
    torch.testing.assert_close(blind.gram(), matrix.mT @ matrix, rtol=1e-7, atol=1e-8 * size**2)


@pytest.mark.parametrize("name", BODIES)
def test_rows_of_each_output_have_their_weight(name: str) -> None:
    system, x = system_of(name)
    at = system.linearise(x)
    weights = tuple(torch.linspace(0.1, 1, layer.outputs, dtype=torch.float64) for layer in system.layers)
    plain, found = (Jacobian(system, at, {}, outputs=each) for each in (None, weights))
    each = [torch.ones(at.values[-1].numel(), dtype=torch.float64)]
    each += [own.repeat_interleave(grad.shape[-1]) for own, grad in zip(weights, system.gradients, strict=True)]
    matrix = torch.cat(each)[:, None] * plain.to_dense()
    torch.testing.assert_close(found.to_dense(), matrix)
    torch.testing.assert_close(found.gram(), matrix.mT @ matrix)
    rows = torch.randn(1, len(matrix), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(found.rmv(rows).flatten(), matrix.mT @ rows[0])
    missed = system.residual(system.linearise(x + 0.1))
    torch.testing.assert_close(found.weighted(missed), torch.cat(each) * plain.weighted(missed))
