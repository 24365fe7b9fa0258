"""Which operations are layers, and how each is read: its input, its parameters and its geometry."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.fx import Node

from rgap.nn import layers
from rgap.nn.layers import Layer
from rgap.nn.obstacles import Kind


@dataclass(frozen=True)
class LayerCall:
    """One use of a layer in a traced graph."""

    x: Any
    """The node that it reads."""
    weight: Any
    bias: Any
    """None if there is none."""
    seen: int
    """Values of the input that at least one kernel position reads."""
    make: partial[Layer] | None
    """Makes the layer from ``name``, ``weight``, ``bias``, ``weight_name`` and ``bias_name``; None if none can."""
    misuse: tuple[str, Kind, str] | None = None
    """What is wrong with how it is called, of which kind that is, and the remedy."""


Read = Callable[[Node, dict[str, Any]], LayerCall]


def linear(node: Node, arguments: dict[str, Any]) -> LayerCall:
    x = arguments["input"]
    shape = _shape(x)
    misuse = None
    if len(shape) < 2 or shape[0] != 1:
        misuse = ("a Linear layer whose first dimension is not the batch", Kind.SETTING, "keep the batch in front")
    if len(shape) > 2 and shape[0] != 1 == shape[1]:
        what = "a Linear layer that reads the batch as its second dimension, as in torch's attention"
        misuse = (what, Kind.NOT_YET, "attack the part of the model in front of it or behind it")
    make = partial(layers.linear, input_shape=shape[1:])
    return LayerCall(x, arguments["weight"], arguments.get("bias"), math.prod(shape), make, misuse)


def product(node: Node, arguments: dict[str, Any], roles: tuple[str, str, str]) -> LayerCall:
    """A Linear layer written by hand; roles are the names of input, weight and bias."""
    x, weight, bias = (arguments.get(role) for role in roles)
    make = None
    plain = arguments.get("alpha", 1) == 1 and arguments.get("beta", 1) == 1
    if isinstance(weight, Node) and weight.op == "placeholder" and len(_shape(weight)) == 2 and (bias is None or plain):
        make = partial(layers.linear, input_shape=_shape(x)[1:], transposed=True)
    return LayerCall(x, weight, bias, math.prod(_shape(x)), make)


def convolution(node: Node, arguments: dict[str, Any]) -> LayerCall:
    x, weight = arguments["input"], arguments["weight"]
    shape, kernel = _shape(x), _shape(weight)[2:]
    dims = len(kernel)
    misuse = None
    if len(shape) < dims + 2 or shape[0] != 1:
        misuse = ("a convolution across the batch", Kind.SETTING, "keep the dimension of the batch")
    stride, dilation = _each(arguments["stride"], dims), _each(arguments["dilation"], dims)
    padding: list[tuple[int, int]]
    if arguments["padding"] == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = [(t // 2, t - t // 2) for t in total]
    elif arguments["padding"] == "valid":
        padding = [(0, 0)] * dims
    else:
        padding = [(p, p) for p in _each(arguments["padding"], dims)]
    make = partial(
        layers.convolution,
        input_shape=shape[1:],
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=int(arguments["groups"]),
    )
    # Along each dimension a pixel is read or not, whatever the others: no table of all pixels is needed.
    sizes = zip(shape[-dims:], _shape(node)[-dims:], kernel, stride, padding, dilation, strict=True)
    read = [len({pixel for _, pixel in _reads(*size)}) for size in sizes]
    return LayerCall(x, weight, arguments.get("bias"), math.prod(shape[:-dims]) * math.prod(read), make, misuse)


def transposed_convolution(node: Node, arguments: dict[str, Any]) -> LayerCall:
    """Its input takes the place of a convolution's output."""
    x, weight = arguments["input"], arguments["weight"]
    shape, kernel = _shape(x), _shape(weight)[2:]
    dims = len(kernel)
    stride, dilation = _each(arguments["stride"], dims), _each(arguments["dilation"], dims)
    padding = [(p, p) for p in _each(arguments["padding"], dims)]
    out = _shape(node)[-dims:]
    sizes = zip(out, shape[-dims:], kernel, stride, padding, dilation, strict=True)
    used = [len({position for position, _ in _reads(*size)}) for size in sizes]
    make = partial(
        layers.transposed_convolution,
        input_shape=shape[1:],
        output_size=out,
        stride=stride,
        padding=[p for p, _ in padding],
        dilation=dilation,
        groups=int(arguments["groups"]),
    )
    return LayerCall(x, weight, arguments.get("bias"), math.prod(shape[:-dims]) * math.prod(used), make)


LAYERS: dict[str, Read] = {
    "linear": linear,
    "conv1d": convolution,
    "conv2d": convolution,
    "conv3d": convolution,
    "conv_transpose1d": transposed_convolution,
    "conv_transpose2d": transposed_convolution,
    "conv_transpose3d": transposed_convolution,
    "matmul": partial(product, roles=("self", "other", "")),
    "mm": partial(product, roles=("self", "mat2", "")),
    "addmm": partial(product, roles=("mat1", "mat2", "self")),
}
"""By the name of the operation; a layer of one's own is one entry more."""


def _reads(
    length: int, positions: int, width: int, stride: int, padding: tuple[int, int], dilation: int
) -> Iterator[tuple[int, int]]:
    """Along one dimension, every output position with every pixel that it reads."""
    for position in range(positions):
        for offset in range(width):
            pixel = position * stride + offset * dilation - padding[0]
            if 0 <= pixel < length:
                yield position, pixel


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _each(value: Any, dims: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return values * dims if len(values) == 1 else values
