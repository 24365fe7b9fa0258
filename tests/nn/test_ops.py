"""Every kind of operation alone: its vjp is the adjoint of its jvp, and what it inverts it inverts.

A new kind of operation adds one row to OPERATIONS.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rgap.nn import activations, layers
from rgap.nn.ops import Affine, Concat, Elementwise, Gather, Linear, Norm, Op, Other, Sum
from rgap.nn.pools import MaxPool

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def convolution(bias: bool) -> Linear:
    around, shift = ((1, 0), (2, 1)), normal(4) if bias else None
    layer = layers.convolution(
        "conv", normal(4, 1, 2, 3), shift, (2, 4, 5), (1, 2), around, (2, 1), 2, "w", "b"
    )  # fmt: skip
    return Linear(layer)


def moved(function: Callable[[Tensor], Tensor], *shape: int) -> Gather:
    """The move that a function makes of numbered values, where it puts no zeros."""
    numbers = torch.arange(torch.Size(shape).numel()).reshape(1, *shape)
    out = function(numbers)
    return Gather("move", out.flatten(), shape, tuple(out.shape[1:]))


SCALE = normal(1, 3, 1) + 3
WINDOWS = torch.tensor([[0, 1], [1, 2], [3, 4]])
OPERATIONS: dict[str, tuple[Op, tuple[tuple[int, ...], ...], bool, bool]] = {
    # The operation, the shapes of its inputs, whether it is inverted, and whether it scales.
    "convolution": (convolution(False), ((2, 4, 5),), False, True),
    "convolution with a bias": (convolution(True), ((2, 4, 5),), False, False),
    "linear on positions": (
        Linear(layers.linear("fc", normal(3, 4), normal(3), (2, 4), "w", "b")), ((2, 4),), False, False,
    ),
    "matrix product": (
        Linear(layers.linear("fc", normal(4, 3), None, (4,), "w", None, transposed=True)), ((4,),), False, True,
    ),
    "transposed convolution": (
        Linear(
            layers.transposed_convolution("up", normal(2, 3, 3), None, (2, 4), (8,), (2,), (1,), (1,), 1, "w", None)
        ), ((2, 4),), False, True,
    ),
    "relu": (Elementwise("act", activations.ReLU()), ((3, 4),), False, True),
    "gelu": (Elementwise("act", activations.GELU()), ((3, 4),), False, False),
    "reordered": (moved(lambda x: x.transpose(1, 2).flip(1), 3, 4), ((3, 4),), True, True),
    "repeated": (moved(lambda x: x.repeat(1, 2, 3), 3, 4), ((3, 4),), True, True),
    "sliced": (moved(lambda x: x[:, 1:], 3, 4), ((3, 4),), False, True),
    "padded": (Gather("pad", torch.tensor([4, 0, 1, 4, 2, 3]), (2, 2), (6,)), ((2, 2),), True, True),
    "padded and cut": (Gather("pad", torch.tensor([4, 0, 1, 2]), (2, 2), (2, 2)), ((2, 2),), False, True),
    "scaled": (Affine("scale", SCALE, torch.zeros(1, 3, 1).double()), ((3, 4),), True, True),
    "scaled and shifted": (Affine("scale", SCALE, normal(1, 3, 4)), ((3, 4),), True, False),
    "scaled by zero": (Affine("zero", torch.tensor([[[0.0], [1.0], [2.0]]]).double(), SCALE), ((3, 4),), False, False),
    "layer norm": (Norm("norm", "layer_norm", 3, normal(1, 4), normal(1, 4), 1e-5), ((3, 4),), False, False),
    "sum": (Sum("add"), ((3, 4), (3, 4), (3, 4)), False, True),
    "side by side": (Concat("cat", 1), ((3, 1), (3, 4)), False, True),
    "softmax": (Other("softmax", "softmax", lambda x: x.softmax(-1), 12, 12), ((3, 4),), False, False),
    "maxima": (Other("pool", "max_pool1d", lambda x: functional.max_pool1d(x, 2), 12, 6, True), ((3, 4),), False, True),
    "windows": (MaxPool("pool", "max_pool1d", WINDOWS, (3, 4), (3, 3)), ((3, 4),), False, True),
    "product": (Other("mul", "mul", lambda x, y: x * y, 24, 12), ((3, 4), (3, 4)), False, False),
}  # fmt: skip
every_operation = pytest.mark.parametrize("name", OPERATIONS)


def inputs(shapes: tuple[tuple[int, ...], ...], count: int) -> tuple[Tensor, ...]:
    return tuple(normal(count, *shape) for shape in shapes)


@every_operation
def test_pull_is_the_adjoint_of_push(name: str) -> None:
    """With many tangents or gradients at the values of one system, or as many values."""
    op, shapes, *_ = OPERATIONS[name]
    for count in (1, 3):
        xs, tangents = inputs(shapes, count), inputs(shapes, 3)
        tangent = op.jvp(tangents, xs)
        k = normal(*tangent.shape)
        cotangents = op.vjp(k, xs)
        assert [each.shape for each in cotangents] == [each.shape for each in tangents]
        across = sum((move * each).flatten(1).sum(1) for move, each in zip(tangents, cotangents, strict=True))
        torch.testing.assert_close((tangent * k).flatten(1).sum(1), across, rtol=1e-11, atol=1e-11)


@every_operation
def test_push_and_pull_are_autograds(name: str) -> None:
    op, shapes, *_ = OPERATIONS[name]
    xs, tangents = inputs(shapes, 2), inputs(shapes, 2)
    out, expected = torch.func.jvp(op.forward, xs, tangents)
    torch.testing.assert_close(op.jvp(tangents, xs), expected, rtol=1e-11, atol=1e-11)
    k = normal(*out.shape)
    leaves = tuple(x.clone().requires_grad_() for x in xs)
    wanted = torch.autograd.grad((op.forward(*leaves) * k).sum(), leaves)
    for found, want in zip(op.vjp(k, xs), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-11)


@every_operation
def test_only_one_to_one_operations_are_inverted(name: str) -> None:
    op, shapes, inverted, _ = OPERATIONS[name]
    xs = inputs(shapes, 2)
    found = op.invert(op.forward(*xs))
    assert (found is not None) == inverted
    if found is None:
        assert op.loses
    else:
        torch.testing.assert_close(found, xs[0], rtol=1e-12, atol=1e-12)


@every_operation
def test_scalable_means_that_scaled_inputs_scale_the_output(name: str) -> None:
    op, shapes, _, scalable = OPERATIONS[name]
    xs = inputs(shapes, 2)
    scaled = torch.allclose(op.forward(*(3 * x for x in xs)), 3 * op.forward(*xs), rtol=1e-12)
    assert (op.scalable, scaled) == (scalable, scalable)


@every_operation
def test_samples_do_not_see_each_other(name: str) -> None:
    op, shapes, *_ = OPERATIONS[name]
    xs = inputs(shapes, 3)
    alone = torch.cat([op.forward(*(x[s : s + 1] for x in xs)) for s in range(3)])
    torch.testing.assert_close(op.forward(*xs), alone, rtol=1e-13, atol=1e-13)


@every_operation
def test_text(name: str) -> None:
    op, *_ = OPERATIONS[name]
    assert str(op).startswith(op.name)


@every_operation
def test_linear_operations_pull_the_same_everywhere(name: str) -> None:
    op, shapes, *_ = OPERATIONS[name]
    xs = inputs(shapes, 1)
    k = normal(*op.forward(*xs).shape)
    here, there = op.vjp(k, xs), op.vjp(k, tuple(3 * x + 1 for x in xs))
    same = all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert same or not op.linear


def test_a_gradient_that_is_not_let_through_is_zero() -> None:
    op = Other("still", "mul", lambda x: 3 * x, 4, 4, detached=True)
    [cotangents] = op.vjp(normal(2, 4), (normal(1, 4),))
    assert cotangents.shape == (2, 4)
    assert not cotangents.any()


def test_an_operation_without_a_rule_for_several_samples_takes_them_one_by_one() -> None:
    def branching(x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x

    x = normal(4, 3)
    expected = torch.stack([each if float(each.sum()) > 0 else -each for each in x])
    assert torch.equal(Other("odd", "odd", branching, 3, 3).forward(x), expected)


def test_a_norms_pull_times_its_size_is_its_pull() -> None:
    op = OPERATIONS["layer norm"][0]
    assert isinstance(op, Norm)
    [x], k = inputs(((3, 4),), 2), normal(2, 3, 4)
    size = (x.var(2, unbiased=False, keepdim=True) + op.eps).sqrt()
    torch.testing.assert_close(op.vjp_times_size(k, op.forward(x)) / size, op.vjp(k, (x,))[0], rtol=1e-11, atol=1e-11)
