"""One suite for every kind of layer. A new kind adds one row to LAYERS: a strategy that draws its `Case`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from rgap.nn import layers
from rgap.nn.layers import Layer

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@dataclass(frozen=True)
class Case:
    """A layer with random weights, and what torch computes in its place."""

    layer: Layer
    weight: Tensor
    """As the module has it."""
    oracle: Callable[[Tensor, Tensor], Tensor]
    """The layer without bias, from an input (s, *input_shape) and a weight, both as the module has them."""
    input_shape: tuple[int, ...]
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def inputs(self, s: int) -> Tensor:
        return self.normal(s, *self.input_shape)

    def signals(self, s: int) -> Tensor:
        """Gradients of the output, in the module's shape."""
        return self.normal(*self.oracle(self.inputs(s), self.weight).shape)

    def gradients(self, x: Tensor, weight: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """From autograd, of the input and of the weight."""
        x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        found = torch.autograd.grad(self.oracle(x, weight), (x, weight), k)
        return found[0], found[1]


def generators() -> st.SearchStrategy[torch.Generator]:
    return st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))


@st.composite
def linears(draw: st.DrawFn) -> Case:
    """On one position or on several."""
    generator = draw(generators())
    leading = draw(st.sampled_from([(), (), (1,), (3,), (2, 3), (2, 1, 2)]))
    shape = (*leading, draw(st.integers(1, 6)))
    weight = torch.randn(draw(st.integers(1, 5)), shape[-1], generator=generator, dtype=torch.float64)
    layer = layers.linear("fc", weight, None, shape, "fc.weight", None)
    return Case(layer, weight, functional.linear, shape, generator)


@st.composite
def convolutions(draw: st.DrawFn, dims: int) -> Case:
    """Every dimension with its own kernel, stride, dilation and padding on either side."""
    generator = draw(generators())
    size, kernel, stride, dilation, padding = [], [], [], [], []
    for _ in range(dims):
        width, spread = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        reach = spread * (width - 1) + 1
        size.append(draw(st.integers(max(1, reach - before - after), max(1, reach - before - after) + (7 - 2 * dims))))
        kernel.append(width)
        stride.append(draw(st.integers(1, 3)))
        dilation.append(spread)
        padding.append((before, after))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    shape = (groups * draw(st.integers(1, 2)), *size)
    outputs = groups * draw(st.integers(1, 3))
    weight = torch.randn(outputs, shape[0] // groups, *kernel, generator=generator, dtype=torch.float64)
    layer = layers.convolution("conv", weight, None, shape, stride, padding, dilation, groups, "conv.weight", None)

    def oracle(x: Tensor, w: Tensor) -> Tensor:
        around = [pad for pair in reversed(padding) for pad in pair]
        return CONVOLUTIONS[dims](functional.pad(x, around), w, None, stride, 0, dilation, groups)

    return Case(layer, weight, oracle, shape, generator)


@st.composite
def transposed_linears(draw: st.DrawFn) -> Case:
    """x @ W: the weight has its inputs before its outputs."""
    generator = draw(generators())
    leading = draw(st.sampled_from([(), (1,), (3,), (2, 3)]))
    shape = (*leading, draw(st.integers(1, 6)))
    weight = torch.randn(shape[-1], draw(st.integers(1, 5)), generator=generator, dtype=torch.float64)
    layer = layers.linear("fc", weight, None, shape, "fc.weight", None, transposed=True)
    return Case(layer, weight, torch.matmul, shape, generator)


TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


@st.composite
def transposed_convolutions(draw: st.DrawFn, dims: int) -> Case:
    """Every dimension with its own kernel, stride, dilation, padding and output padding."""
    generator = draw(generators())
    size, kernel, stride, dilation, padding, extra = [], [], [], [], [], []
    for _ in range(dims):
        length, width, step, spread = (draw(st.integers(1, most)) for most in (6 - dims, 3, 3, 2))
        more = draw(st.integers(0, max(step, spread) - 1))
        whole = (length - 1) * step + spread * (width - 1) + 1 + more
        size.append(length)
        kernel.append(width)
        stride.append(step)
        dilation.append(spread)
        extra.append(more)
        padding.append(draw(st.integers(0, min(2, (whole - 1) // 2))))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    shape = (groups * draw(st.integers(1, 2)), *size)
    weight = torch.randn(shape[0], draw(st.integers(1, 3)), *kernel, generator=generator, dtype=torch.float64)

    def oracle(x: Tensor, w: Tensor) -> Tensor:
        return TRANSPOSED[dims](x, w, None, stride, padding, extra, groups, dilation)

    out = oracle(torch.zeros(1, *shape, dtype=torch.float64), weight).shape[2:]
    layer = layers.transposed_convolution(
        "up", weight, None, shape, out, stride, padding, dilation, groups, "up.weight", None
    )
    return Case(layer, weight, oracle, shape, generator)


LAYERS = {
    "linear": linears(),
    "transposed linear": transposed_linears(),
    "conv1d": convolutions(1),
    "conv2d": convolutions(2),
    "conv3d": convolutions(3),
    "conv_transpose1d": transposed_convolutions(1),
    "conv_transpose2d": transposed_convolutions(2),
    "conv_transpose3d": transposed_convolutions(3),
}


def every_layer(test: Callable[[Case], None]) -> Callable[..., None]:
    """Run a test on many draws of every row."""

    @pytest.mark.parametrize("kind", LAYERS)
    @settings(max_examples=10, deadline=None)
    @given(data=st.data())
    def run(kind: str, data: st.DataObject) -> None:
        test(data.draw(LAYERS[kind]))

    run.__doc__ = test.__doc__
    return run


def columns(linear: Callable[[Tensor], Tensor], layer: Layer) -> Tensor:
    """The matrix of a linear map of a batch of inputs, one column for each unit input (channel, pixel)."""
    units = torch.eye(layer.unknowns, dtype=torch.float64).reshape(-1, layer.channels, layer.pixels)
    return linear(layer.unpack_input(units)).flatten(1).T


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


# The three contractions.


@every_layer
def test_output_is_the_layer(case: Case) -> None:
    x = case.inputs(3)
    found = case.layer.output(case.layer.pack_input(x))
    assert found.shape == (3, case.layer.outputs, case.layer.positions)
    same(case.layer.unpack_output(found), case.oracle(x, case.weight))


@every_layer
def test_grad_weight_is_the_gradient_of_the_weight(case: Case) -> None:
    x, k = case.inputs(2), case.signals(2)
    found = case.layer.grad_weight(case.layer.pack_input(x), case.layer.pack_output(k))
    for s in range(2):
        expected = case.gradients(x[s : s + 1], case.weight, k[s : s + 1])[1]
        same(found[s], case.layer.pack_weight(expected[None])[0])


@every_layer
def test_the_gradient_of_a_batch_is_the_sum_over_samples(case: Case) -> None:
    x, k = case.inputs(3), case.signals(3)
    expected = case.gradients(x, case.weight, k)[1]
    found = case.layer.batch_gradient(case.layer.pack_input(x), case.layer.pack_output(k))
    same(found, case.layer.pack_weight(expected[None]))


@every_layer
def test_weights_are_packed_and_unpacked(case: Case) -> None:
    packed = case.layer.pack_weight(case.weight[None])
    assert torch.equal(case.layer.unpack_weight(packed, case.weight.shape)[0], case.weight)


@every_layer
def test_grad_input_is_the_gradient_of_the_input(case: Case) -> None:
    x, k = case.inputs(2), case.signals(2)
    found = case.layer.grad_input(case.layer.pack_output(k))
    same(case.layer.unpack_input(found), case.gradients(x, case.weight, k)[0])


@every_layer
def test_independent_systems_may_have_a_weight_each(case: Case) -> None:
    x, k, weights = case.inputs(3), case.signals(3), case.normal(3, *case.weight.shape)
    layer = case.layer
    packed = layer.pack_weight(weights)
    output = layer.unpack_output(layer.output(layer.pack_input(x), packed))
    back = layer.unpack_input(layer.grad_input(layer.pack_output(k), packed))
    for s in range(3):
        one = slice(s, s + 1)
        same(output[one], case.oracle(x[one], weights[s]))
        same(back[one], case.gradients(x[one], weights[s], k[one])[0])


@every_layer
def test_the_form_is_trilinear(case: Case) -> None:
    """<k, W x> = <W' k, x> = <W, K x>, also for a weight that is not the layer's own."""
    layer = case.layer
    x, k = layer.pack_input(case.inputs(2)), layer.pack_output(case.signals(2))
    for weight in (layer.weight.expand(2, *layer.weight.shape), layer.pack_weight(case.normal(2, *case.weight.shape))):
        expected = (k * layer.output(x, weight)).sum((1, 2))
        same((layer.grad_input(k, weight) * x).sum((1, 2)), expected)
        same((weight * layer.grad_weight(x, k)).sum((1, 2, 3)), expected)


@every_layer
def test_scatter_is_the_adjoint_of_patches(case: Case) -> None:
    layer = case.layer
    x = layer.pack_input(case.inputs(2))
    patches = layer.patches(x)
    assert patches.shape == (2, layer.groups, layer.weight.shape[-1], layer.positions)
    other = case.normal(*patches.shape)
    same((patches * other).sum((1, 2, 3)), (x * layer.scatter(other)).sum((1, 2)))


@every_layer
def test_rows_are_both_constraints_and_their_adjoint(case: Case) -> None:
    """Against the three contractions; a k of one system, or one for each of several samples, broadcasts."""
    layer = case.layer
    x = layer.pack_input(case.inputs(6))
    z = layer.pack_output(case.signals(6))
    for lead, wide in (((6,), (6,)), ((6,), (1,)), ((2, 3), (3,)), ((2, 3), (2, 1))):
        k = layer.pack_output(case.signals(math.prod(wide)))
        full = k.reshape(*wide, *k.shape[1:]).expand(*lead, *k.shape[1:]).reshape(6, *k.shape[1:])
        k, grad = k.reshape(*wide, *k.shape[1:]), case.normal(6, *layer.weight.shape)
        outputs, gradients = layer.rows(x.reshape(*lead, *x.shape[1:]), k)
        assert outputs.shape[:-2] == gradients.shape[:-3] == lead
        same(outputs.flatten(0, -3), layer.output(x))
        same(gradients.flatten(0, -4), layer.grad_weight(x, full))
        both = layer.rows_adjoint(z.reshape(*lead, *z.shape[1:]), grad.reshape(*lead, *grad.shape[1:]), k)
        assert both.shape == (*lead, *x.shape[1:])
        same(both.flatten(0, -3), layer.grad_input(z) + layer.grad_input(full, grad))
        same(layer.rows_adjoint(z, None, k[:1]), layer.grad_input(z))


@every_layer
def test_a_gradient_that_several_samples_share_goes_back_to_each(case: Case) -> None:
    layer = case.layer
    z, grad = layer.pack_output(case.signals(3)), case.normal(1, *layer.weight.shape)
    k = layer.pack_output(case.signals(3))
    expected = layer.grad_input(z) + layer.grad_input(k, grad.expand(3, *layer.weight.shape))
    same(layer.rows_adjoint(z, grad, k), expected)


# The matrices behind the form.


@every_layer
def test_kernel_matrix_is_one_block_of_the_gradient_constraints(case: Case) -> None:
    layer, k = case.layer, case.signals(2)
    found = layer.kernel_matrix(layer.pack_output(k))
    for s in range(2):

        def gradient(x: Tensor, one: Tensor = k[s : s + 1]) -> Tensor:
            return torch.func.vjp(lambda weight: case.oracle(x[None], weight), case.weight)[1](one)[0]

        def packed(x: Tensor, gradient: Callable[[Tensor], Tensor] = gradient) -> Tensor:
            return layer.pack_weight(torch.func.vmap(gradient)(x))

        dense = columns(packed, layer)
        # Rows (g, j, i = (channel of the group, t)), columns (g, channel of the group, n).
        g, per = layer.groups, layer.channels // layer.groups
        dense = dense.reshape(g, -1, per, layer.offsets, g, per, layer.pixels)
        for group in range(g):
            for channel in range(per):
                block = dense[group, :, channel, :, group, channel]
                same(found[s, group], block.reshape(-1, layer.pixels))
                dense[group, :, channel, :, group, channel] = 0
        assert not bool(dense.any())


def gram(case: Case, rows: Tensor | None = None) -> Tensor:
    """W' D W of one system from its dense matrix, (g, u, u); everything between groups must be zero."""
    layer = case.layer
    dense = columns(lambda x: layer.pack_output(case.oracle(x, case.weight)), layer)
    weighted = dense if rows is None else dense * rows.flatten()[:, None]
    size = layer.unknowns // layer.groups
    square = (dense.T @ weighted).reshape(layer.groups, size, layer.groups, size)
    for g in range(layer.groups):
        for h in range(layer.groups):
            assert g == h or not bool(square[g, :, h].any())
    return torch.stack([square[g, :, g] for g in range(layer.groups)])


@every_layer
def test_weight_gram_is_that_of_the_dense_matrix(case: Case) -> None:
    same(case.layer.weight_gram(), gram(case)[None])


@every_layer
def test_weight_gram_with_row_weights_is_that_of_the_dense_matrix(case: Case) -> None:
    layer = case.layer
    rows = torch.rand(3, layer.outputs, layer.positions, generator=case.generator, dtype=torch.float64)
    rows[1] = (rows[1] > 0.5).double()  # rows that are dropped
    found = layer.weight_gram(rows)
    for s in range(3):
        same(found[s], gram(case, rows[s]))


@pytest.mark.parametrize("weighted", [False, True])
def test_weight_gram_of_many_positions_is_assembled_in_parts(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 6, 8, 8, generator=generator, dtype=torch.float64)
    layer = layers.convolution(
        "conv", weight, None, (6, 24, 24), (1, 1), ((0, 0), (0, 0)), (1, 1), 1, "conv.weight", None
    )
    # More positions than fit into one part of 2**25 values.
    assert layer.positions * layer.weight.shape[-1] ** 2 > 2**25
    x = torch.randn(1, 6, 24, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = torch.rand(1, 2, 17 * 17, generator=generator, dtype=torch.float64)
    k = functional.conv2d(x, weight) * (rows.reshape(1, 2, 17, 17) if weighted else 1.0)
    expected = torch.autograd.grad(functional.conv2d(x, weight), x, k.detach())[0].flatten()
    found = layer.weight_gram(rows if weighted else None)[0, 0] @ x.detach().flatten()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# Shapes and counts.


@every_layer
def test_packing_is_undone_by_unpacking(case: Case) -> None:
    layer, x, z = case.layer, case.inputs(2), case.signals(2)
    assert layer.input_shape == case.input_shape
    assert layer.output_shape == z.shape[1:]
    assert layer.pack_input(x).shape == (2, layer.channels, layer.pixels)
    assert layer.pack_output(z).shape == (2, layer.outputs, layer.positions)
    assert torch.equal(layer.unpack_input(layer.pack_input(x)), x)
    assert torch.equal(layer.unpack_output(layer.pack_output(z)), z)
    assert torch.equal(layer.pack_input(x.flatten(1)), layer.pack_input(x))
    assert torch.equal(layer.pack_output(z.flatten(1)), layer.pack_output(z))
    assert torch.equal(layer.pack_weight(case.weight[None])[0], layer.weight)


def test_a_linear_layer_on_several_positions_keeps_channels_last() -> None:
    layer = layers.linear("fc", torch.zeros(2, 3), None, (4, 3), "fc.weight", None)
    assert layer.channels_last
    assert (layer.channels, layer.pixels, layer.outputs, layer.positions) == (3, 4, 2, 4)
    x = torch.arange(12.0).reshape(1, 4, 3)
    assert torch.equal(layer.pack_input(x)[0, 1], torch.tensor([1.0, 4.0, 7.0, 10.0]))
    assert not layers.linear("fc", torch.zeros(2, 3), None, (3,), "fc.weight", None).channels_last


@every_layer
def test_counts_are_those_of_the_module(case: Case) -> None:
    layer = case.layer
    assert layer.unknowns == math.prod(case.input_shape)
    assert layer.weight_rows == case.signals(1).numel()
    assert layer.gradient_rows == case.weight.numel()
    assert layer.offsets == math.prod(case.weight.shape[2:])


@every_layer
def test_seen_counts_the_inputs_that_reach_an_output(case: Case) -> None:
    ones = torch.ones_like(case.weight)
    k = torch.ones_like(case.signals(1))
    reached = case.gradients(case.inputs(1), ones, k)[0]
    assert case.layer.seen == int((reached > 0).sum())


# The layer as an object.


@every_layer
def test_a_layer_copies_its_weight_in_float64(case: Case) -> None:
    assert case.layer.weight.dtype == torch.float64
    before = case.layer.weight.clone()
    case.weight.zero_()
    assert torch.equal(case.layer.weight, before)


def test_weights_of_single_precision_and_biases_become_float64_copies() -> None:
    weight, bias = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(2))
    made = [
        layers.linear("fc", weight, bias, (3,), "fc.weight", "fc.bias"),
        layers.convolution(
            "conv", weight[..., None], bias, (3, 4), (1,), ((0, 0),), (1,), 1, "conv.weight", "conv.bias"
        ),
    ]
    with torch.no_grad():
        weight.zero_()
        bias.zero_()
    for layer in made:
        assert layer.bias is not None
        for tensor in (layer.weight, layer.bias):
            assert tensor.dtype == torch.float64
            assert not tensor.requires_grad
            assert bool((tensor == 1).all())
    assert [(layer.weight_name, layer.bias_name) for layer in made] == [
        ("fc.weight", "fc.bias"),
        ("conv.weight", "conv.bias"),
    ]


@every_layer
def test_a_layer_moves_as_a_whole(case: Case) -> None:
    meta = torch.device("meta")
    moved = case.layer.to(meta)
    assert moved.weight.device == moved.table.device == meta
    assert moved.bias is None
    stayed = case.layer.to(torch.device("cpu"))
    assert torch.equal(stayed.weight, case.layer.weight)
    assert torch.equal(stayed.table, case.layer.table)


def test_a_bias_moves_along() -> None:
    layer = layers.linear("fc", torch.zeros(2, 3), torch.zeros(2), (3,), "fc.weight", "fc.bias")
    bias = layer.to(torch.device("meta")).bias
    assert bias is not None
    assert bias.device == torch.device("meta")


def test_a_layer_shows_its_name_and_shapes() -> None:
    layer = layers.linear("fc", torch.zeros(2, 3), None, (4, 3), "fc.weight", None)
    assert str(layer) == "fc: [4, 3] -> [4, 2]"
