"""Pools: the largest or the mean value of each of many windows, which are the same in all channels."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.nn.ops import Op

# m windows of one channel, w places of a window, n values of a channel.

_STRIDED = re.compile(r"(max|avg)_pool([123])d(_with_indices)?")
_ADAPTIVE = re.compile(r"adaptive_(max|avg)_pool([123])d")


@dataclass(frozen=True, eq=False)
class Pool(Op):
    """One value of every window."""

    name: str
    what: str
    """The operation, such as ``max_pool2d``."""
    windows: Int[Tensor, "m w"]
    """The values of a channel that each window reads; n where it reads padding."""
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    scalable = True

    def to(self, device: torch.device) -> Pool:
        """The same pool with its tables on another device."""
        return replace(self, windows=self.windows.to(device))

    @cached_property
    def channels(self) -> int:
        return math.prod(self.output_shape) // len(self.windows)

    @cached_property
    def positions(self) -> int:
        """Values of one channel, n."""
        return math.prod(self.input_shape) // self.channels

    def read(self, x: Tensor, padding: float = 0.0) -> Float[Tensor, "s c m w"]:
        """The values in every window."""
        flat = x.reshape(len(x), self.channels, self.positions)
        found: Tensor = torch.nn.functional.pad(flat, (0, 1), value=padding)[..., self.windows]
        return found

    def scatter(self, places: Float[Tensor, "s c m w"]) -> Tensor:
        """The adjoint of `read`, of the input's shape."""
        flat = places.flatten(2)
        total = flat.new_zeros(*flat.shape[:2], self.positions + 1)
        total = total.scatter_add_(2, self.windows.flatten().expand_as(flat), flat)
        return total[..., :-1].reshape(len(places), *self.input_shape)

    def along(self, tangent: Tensor, routes: Float[Tensor, "*s m w"]) -> Tensor:
        """The tangent of the output, each place with its weight."""
        return (self.read(tangent) * routes).sum(-1).reshape(len(tangent), *self.output_shape)

    def against(self, k: Tensor, routes: Float[Tensor, "*s m w"]) -> Tensor:
        """The cotangent of the input, each place with its weight."""
        return self.scatter(k.reshape(len(k), self.channels, -1, 1) * routes)

    @property
    def loses(self) -> str:
        return f"{self.what} makes {math.prod(self.output_shape)} values of {math.prod(self.input_shape)}"

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


class MaxPool(Pool):
    """The largest value of every window.

    It is linear once it is known which place of its window each value came from: its route. `routes` are weights of
    the places, (s, channels, m, w); those of the largest value are 1 at its place.
    """

    def forward(self, *xs: Tensor) -> Tensor:
        return self.read(xs[0], -math.inf).amax(-1).reshape(len(xs[0]), *self.output_shape)

    def routes(self, x: Tensor) -> Float[Tensor, "s c m w"]:
        """Where the largest values come from, the first of equal ones."""
        places = self.read(x, -math.inf)
        return torch.zeros_like(places).scatter_(3, places.argmax(3, keepdim=True), 1.0)

    def vjp(self, k: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.against(k, self.routes(xs[0])),)

    def jvp(self, tangents: tuple[Tensor, ...], xs: tuple[Tensor, ...]) -> Tensor:
        return self.along(tangents[0], self.routes(xs[0]))


@dataclass(frozen=True, eq=False)
class MeanPool(Pool):
    """The mean of every window."""

    share: Float[Tensor, "m w"]
    """The weight of each place; 0 where a window reads padding."""
    linear = True

    def to(self, device: torch.device) -> Pool:
        return replace(self, windows=self.windows.to(device), share=self.share.to(device))

    def forward(self, *xs: Tensor) -> Tensor:
        return self.along(xs[0], self.share)

    def vjp(self, k: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.against(k, self.share),)


def pool(
    where: str, operation: str, arguments: dict[str, Any], input_shape: Sequence[int], output_shape: Sequence[int]
) -> Pool | None:
    """A traced maximum or mean over windows; None if it is another operation.

    Args:
        arguments: as torch names them.
        input_shape: of one sample.
        output_shape: likewise.
    """
    name = as_pool(operation, arguments, len(input_shape) + 1)
    strided, adaptive = _STRIDED.fullmatch(name), _ADAPTIVE.fullmatch(name)
    found = strided or adaptive
    if found is None or len(input_shape) != int(found[2]) + 1:
        return None
    spatial, maximum = int(found[2]), found[1] == "max"
    sizes, counts, divisor = input_shape[1:], output_shape[1:], None
    if strided:
        names = ("kernel_size", "padding", "dilation") if maximum else ("kernel_size", "padding")
        kernel, padding, *dilation = (_spread(arguments[each], spatial) for each in names)
        stride = _spread(arguments["stride"] or kernel, spatial)
        walks = zip(sizes, counts, kernel, stride, padding, *dilation or [(1,) * spatial], strict=True)
        reads = [_strided(*each) for each in walks]
        divisor = arguments.get("divisor_override")
        if not maximum and divisor is None and any(padding) and arguments.get("count_include_pad", True):
            if arguments.get("ceil_mode", False):
                return None  # its divisor counts padding up to an edge of its own
            divisor = math.prod(kernel)
    else:
        reads = [_adaptive(size, count) for size, count in zip(sizes, counts or (1,) * spatial, strict=True)]
    table, shapes = _table(reads, sizes), (tuple(input_shape), tuple(output_shape))
    if maximum:
        return MaxPool(where, operation, table, *shapes)
    inside = (table < math.prod(sizes)).double()
    return MeanPool(where, operation, table, *shapes, inside / (divisor or inside.sum(1, keepdim=True)))


def as_pool(operation: str, arguments: dict[str, Any], dims: int) -> str:
    """The name of the pool that an operation is: a mean over all places is one to a single window."""
    over = arguments.get("dim") or ()
    over = over if isinstance(over, Sequence) else (over,)
    every = operation == "mean" and 3 <= dims <= 5 and sorted(each % dims for each in over) == list(range(2, dims))
    return f"adaptive_avg_pool{dims - 2}d" if every else operation


def _spread(value: Any, spatial: int) -> tuple[int, ...]:
    """One number for each dimension, as torch reads one or several."""
    values = [int(each) for each in value] if isinstance(value, Sequence) else [int(value)]
    return tuple(values * spatial if len(values) == 1 else values)


def _strided(size: int, count: int, kernel: int, stride: int, padding: int, dilation: int) -> list[list[int]]:
    """Of each window along one dimension what it reads."""
    starts = (at * stride - padding for at in range(count))
    return [[i for i in range(start, start + kernel * dilation, dilation) if 0 <= i < size] for start in starts]


def _adaptive(size: int, count: int) -> list[list[int]]:
    return [list(range(at * size // count, -(-(at + 1) * size // count))) for at in range(count)]


def _table(reads: Sequence[list[list[int]]], sizes: Sequence[int]) -> Int[Tensor, "m w"]:
    """The windows of a channel, from those along each dimension."""
    total, windows = math.prod(sizes), []
    for window in product(*reads):
        window_places = []
        for place in product(*window):
            at = 0
            for index, size in zip(place, sizes, strict=True):
                at = at * size + index
            window_places.append(at)
        windows.append(window_places)
    width = max(map(len, windows))
    return torch.tensor([each + [total] * (width - len(each)) for each in windows])
