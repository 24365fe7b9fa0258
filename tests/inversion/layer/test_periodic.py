"""The periodic layer, against its dense matrix; and what it is worth to conjugate gradients."""

from __future__ import annotations

import math
from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rgap.inversion.layer import LayerRows, LayerSystem
from rgap.inversion.layer.dominant import Dominant
from rgap.inversion.layer.iterative import Iterative
from rgap.inversion.layer.periodic import Periodic, periodic, relative_shift
from rgap.linalg import cg
from rgap.nn import layers
from rgap.nn.layers import Layer


@st.composite
def convolutions(draw: st.DrawFn) -> Layer:
    """In one to three dimensions, each with its own geometry."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dims = draw(st.integers(1, 3))
    axes = [
        (
            draw(st.integers(3, 9 - 2 * dims)),
            draw(st.integers(1, 3)),
            draw(st.integers(1, 3)),
            (draw(st.integers(0, 2)), draw(st.integers(0, 2))),
            1,
        )
        for _ in range(dims)
    ]
    size, kernel, stride, padding, dilation = zip(*axes, strict=True)
    groups, per_group = draw(st.sampled_from([1, 2])), draw(st.integers(1, 2))
    weight = torch.randn(2 * groups, per_group, *kernel, generator=generator, dtype=torch.float64)
    shape = (groups * per_group, *size)
    return layers.convolution("conv", weight, None, shape, stride, padding, dilation, groups, "weight", None)


def around(layer: Layer) -> Tensor:
    """W of the layer on a grid without border, group by group: (g, outputs * positions, channels * pixels)."""
    grid = layer.grid
    assert grid is not None
    counts = [
        math.ceil((n + sum(padding)) / stride)
        for n, padding, stride in zip(grid.size, grid.padding, grid.stride, strict=True)
    ]
    whole = [count * stride for count, stride in zip(counts, grid.stride, strict=True)]
    g, j, _ = layer.weight.shape
    weight = layer.weight.reshape(g, j, -1, *grid.kernel)
    dense = torch.zeros(g, j, *counts, weight.shape[2], *whole, dtype=torch.float64)
    for position in product(*map(range, counts)):
        for tap in product(*map(range, grid.kernel)):
            at = [
                (p * s + t * d - before) % n
                for p, s, t, d, (before, _), n in zip(
                    position, grid.stride, tap, grid.dilation, grid.padding, whole, strict=True
                )
            ]
            dense[(slice(None), slice(None), *position, slice(None), *at)] += weight[
                (slice(None), slice(None), slice(None), *tap)
            ]
    return dense.reshape(g, j * math.prod(counts), weight.shape[2], *whole)


@settings(max_examples=20, deadline=None)
@given(convolutions(), st.integers(0, 2**31))
def test_it_is_the_inverse_of_the_periodic_layer_cut_off(layer: Layer, seed: int) -> None:
    grid, dense = layer.grid, around(layer)
    assert grid is not None
    rows = dense.flatten(2)
    gram = rows.mT @ rows
    phases = dense.shape[2] * math.prod(grid.stride)
    shift = relative_shift(layer) * float(layer.weight.square().sum()) / (layer.groups * phases)
    gram = gram + shift * torch.eye(gram.shape[-1], dtype=torch.float64)
    x = torch.randn(2, layer.channels, layer.pixels, generator=torch.Generator().manual_seed(seed))
    filled = torch.zeros(2, *dense.shape[:1], *dense.shape[2:], dtype=torch.float64)
    inside = (slice(None), slice(None), slice(None), *(slice(n) for n in grid.size))
    filled[inside] = x.double().reshape(2, layer.groups, -1, *grid.size)
    solved = torch.cholesky_solve(filled.flatten(2)[..., None], torch.linalg.cholesky(gram))
    solved = solved[..., 0].reshape(filled.shape)[inside]
    found = Periodic(layer, grid)(x)
    assert torch.allclose(
        found.double().reshape(solved.shape), solved, rtol=1e-3, atol=1e-3 * float(solved.abs().max())
    )


def test_it_saves_steps_on_a_strided_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 3, 3, 3, generator=generator, dtype=torch.float64)
    layer = layers.convolution("conv", weight, None, (3, 32, 32), (2, 2), ((1, 1),) * 2, (1, 1), 1, "weight", None)
    k = torch.randn(1, 16, layer.positions, generator=generator, dtype=torch.float64)
    rows = [LayerRows(layer, k, None)]
    solver = Iterative(rows, None, Dominant(rows, 1e-9, False), torch.full((1, 1), 1.0, dtype=torch.float64))
    move = solver._fast.deflate(torch.randn(1, 3, 1024, generator=torch.Generator().manual_seed(1)))
    plain, helped = (
        cg.solve(solver._fast, solver._fast(move), 1e-4, 2000, precondition=precondition)
        for precondition in (None, solver._precondition)
    )
    assert helped.steps < 0.7 * plain.steps


def test_what_is_no_convolution_or_too_wide_goes_without() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = layers.linear("fc", torch.randn(4, 8, generator=generator), None, (8,), "weight", None)
    wide = torch.randn(4, 200, 3, 3, generator=generator)
    wide_layer = layers.convolution("c", wide, None, (200, 4, 4), (1, 1), ((1, 1),) * 2, (1, 1), 1, "weight", None)
    assert periodic(linear) is None
    assert periodic(wide_layer) is None


def test_a_layer_of_another_shape_is_solved_all_the_same() -> None:
    """Rows and columns that no position reads, more padding than there is kernel, other steps in each dimension."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 2, 4, 3, generator=generator, dtype=torch.float64)
    layer = layers.convolution("c", weight, None, (2, 5, 7), (3, 2), ((2, 1), (0, 3)), (1, 2), 1, "weight", None)
    k = torch.randn(1, 40, layer.positions, generator=generator, dtype=torch.float64)
    x = torch.randn(1, 2, 35, generator=generator, dtype=torch.float64)
    for solver in ("direct", "iterative"):
        system = LayerSystem(layer, 0 * k, None, 1e-9, solver=solver)  # type: ignore[arg-type]
        found = system.solve(layer.output(x), layer.grad_weight(x, 0 * k))
        assert (system.rank[0] == layer.unknowns) == (layer.seen == layer.unknowns)
        if layer.seen == layer.unknowns:
            assert torch.allclose(found.x, x, atol=1e-8)
