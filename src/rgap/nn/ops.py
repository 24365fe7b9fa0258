"""The operations of a network as an attack sees them: run, differentiated, and inverted where they can be.

Values and their gradients have the shapes of the module, (s, *shape), with s independent systems in front.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.nn.activation import Activation
from rgap.nn.kernels import differentiable
from rgap.nn.layers import Layer

torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]  # thousands of lines


class Op(ABC):
    """One operation. Authors write `forward`, and more where more is known."""

    name: str
    """Where it stands in the module."""
    scalable: bool = False
    """Whether a factor a > 0 on all inputs comes out as the same factor."""
    linear: bool = False
    """Whether `vjp` does not depend on the inputs, which then only give their shapes."""
    cotangent_parameter: str | None = None
    """The parameter that is added to every value of the output on its own, so that its gradient is k there."""

    @abstractmethod
    def forward(self, *xs: Tensor) -> Tensor: ...

    def vjp(self, k: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The cotangents of the inputs from that of the output, k, at inputs xs; k may be many where xs are one."""
        wide = tuple(x.expand(len(k), *x.shape[1:]) for x in xs)
        back: Callable[[Tensor], tuple[Tensor, ...]] = torch.func.vjp(self.forward, *wide)[1]
        return back(k)

    def jvp(self, tangents: tuple[Tensor, ...], xs: tuple[Tensor, ...]) -> Tensor:
        """The tangent of the output from those of the inputs, at inputs xs; tangents may be many where xs are one."""
        if self.linear:  # and without a constant, unless its class says otherwise
            return self.forward(*tangents)
        wide = tuple(x.expand(len(tangents[0]), *x.shape[1:]).contiguous() for x in xs)
        tangent: Tensor = torch.func.jvp(self.forward, wide, tangents)[1]
        return tangent

    def source(self, x: Tensor) -> Tensor | None:
        """What the cotangent of its input x has beside what `vjp` brings there; None: nothing."""
        return None

    def cotangent(self, k: Tensor, x: Tensor) -> Tensor:
        """The cotangent of its only input x from that of the output, k."""
        found, more = self.vjp(k, (x,))[0], self.source(x)
        return found if more is None else found + more

    def invert(self, y: Tensor) -> Tensor | None:
        """The only input for this output; None if the operation does not have one."""
        return None

    @property
    def loses(self) -> str:
        """Why `invert` gives nothing, in a few words."""
        return "is not inverted"

    @property
    def single(self) -> Op | None:
        """The same with its tensors in float32, for derivatives that need no more; None where what it holds may have
        others within."""
        if not is_dataclass(self):
            return None
        held = {each.name: getattr(self, each.name) for each in fields(self)}
        if not all(map(_plain, held.values())):
            return None
        tensors = {name: each for name, each in held.items() if isinstance(each, Tensor)}
        return replace(self, **{name: each.float() for name, each in tensors.items() if each.is_floating_point()})

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Linear(Op):
    """z = W x + b, whose weight sends a gradient if it has one of its own."""

    layer: Layer
    has_gradient: bool = True
    """Whether the gradient of its weight is that of this operation alone; else it has weight constraints only."""
    linear = True

    @property
    def cotangent_parameter(self) -> str | None:  # type: ignore[override]
        return self.layer.bias_name if self.layer.positions == 1 else None

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.layer.name

    @property
    def scalable(self) -> bool:  # type: ignore[override]
        return self.layer.bias is None

    @property
    def single(self) -> Op:
        return replace(self, layer=self.layer.single)

    def forward(self, *xs: Tensor) -> Tensor:
        layer = self.layer
        return layer.unpack_output(layer.output(layer.pack_input(xs[0])) + layer.offset)

    def vjp(self, k: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        layer = self.layer
        return (layer.unpack_input(layer.grad_input(layer.pack_output(k))).reshape(len(k), *xs[0].shape[1:]),)

    def jvp(self, tangents: tuple[Tensor, ...], xs: tuple[Tensor, ...]) -> Tensor:
        return self.layer.unpack_output(self.layer.output(self.layer.pack_input(tangents[0])))

    def __str__(self) -> str:
        return str(self.layer)


@dataclass(frozen=True)
class Elementwise(Op):
    """x = f(z) for every value."""

    name: str
    activation: Activation

    @property
    def scalable(self) -> bool:  # type: ignore[override]
        return self.activation.homogeneous

    def forward(self, *xs: Tensor) -> Tensor:
        return self.activation(xs[0])

    def vjp(self, k: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (k * self.activation.slope(xs[0]),)

    def jvp(self, tangents: tuple[Tensor, ...], xs: tuple[Tensor, ...]) -> Tensor:
        return tangents[0] * self.activation.slope(xs[0])

    def __str__(self) -> str:
        return f"{self.name}: {self.activation}"


@dataclass(frozen=True, eq=False)
class Gather(Op):
    """Every output value is an input value, or zero: reshaping, reordering, slices, padding, nearest upsampling."""

    name: str
    index: Int[Tensor, " m"]
    """Of each output value the index among the input's; n, the number of input values, where it is zero."""
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    scalable = True
    linear = True

    @property
    def size(self) -> int:
        return math.prod(self.input_shape)

    def forward(self, *xs: Tensor) -> Tensor:
        x = xs[0].reshape(len(xs[0]), self.size)
        padded = torch.cat([x, x.new_zeros(len(x), 1)], 1)
        return padded[:, self.index].reshape(len(x), *self.output_shape)

    def vjp(self, k: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._scatter_add(k).reshape(len(k), *self.input_shape),)

    def _scatter_add(self, y: Tensor) -> Tensor:
        flat = y.reshape(len(y), self.index.numel())
        total = flat.new_zeros(len(y), self.size + 1).scatter_add_(1, self.index.expand_as(flat), flat)
        return total[:, :-1]

    def invert(self, y: Tensor) -> Tensor | None:
        counts = torch.bincount(self.index, minlength=self.size + 1)[:-1]
        if not bool((counts > 0).all()):
            return None
        return (self._scatter_add(y) / counts).reshape(len(y), *self.input_shape)

    @property
    def loses(self) -> str:
        kept = len(torch.unique(self.index[self.index < self.size]))
        return f"keeps {kept} of {self.size} values"

    def __str__(self) -> str:
        return f"{self.name}: {list(self.input_shape)} -> {list(self.output_shape)}"


@dataclass(frozen=True, eq=False)
class Affine(Op):
    """y = scale * x + shift, both known: batch norm with fixed statistics, added constants."""

    name: str
    scale: Tensor
    """(1, ...), broadcast over the value."""
    shift: Tensor
    """Likewise."""
    cotangent_parameter: str | None = None
    linear = True

    @property
    def scalable(self) -> bool:  # type: ignore[override]
        return not bool(self.shift.any())

    def forward(self, *xs: Tensor) -> Tensor:
        return self.scale * xs[0] + self.shift

    def vjp(self, k: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (k * self.scale,)

    def jvp(self, tangents: tuple[Tensor, ...], xs: tuple[Tensor, ...]) -> Tensor:
        return tangents[0] * self.scale

    def invert(self, y: Tensor) -> Tensor | None:
        return (y - self.shift) / self.scale if bool((self.scale != 0).all()) else None

    @property
    def loses(self) -> str:
        return f"multiplies {int((self.scale == 0).sum())} values by zero"


@dataclass(frozen=True, eq=False)
class Norm(Op):
    """Layer norm, group norm and instance norm: each group of values less its mean, divided by its size.

    y = scale * u + shift with u = (z - mean z) / size, where size = sqrt(var z + eps). Mean and size are lost; but the
    size is the only thing that keeps k of z from being known, and the gradient of a bias tells it.
    """

    name: str
    what: str
    groups: int
    """The values of one sample are as many groups, one after another."""
    scale: Tensor
    """(1, ...), broadcast over the value."""
    shift: Tensor
    eps: float

    def forward(self, *xs: Tensor) -> Tensor:
        grouped = xs[0].reshape(len(xs[0]), self.groups, -1)
        apart = grouped - grouped.mean(2, keepdim=True)
        size = (apart.square().mean(2, keepdim=True) + self.eps).sqrt()
        return self.scale * (apart / size).reshape(xs[0].shape) + self.shift

    def vjp_times_size(self, k: Tensor, y: Tensor) -> Tensor:
        """The gradient of z, each group's times its size, from that of the output y."""
        unit = ((y - self.shift) / self.scale).reshape(len(y), self.groups, -1)
        slope = (k * self.scale).reshape(len(k), self.groups, -1)
        along = (slope * unit).mean(2, keepdim=True)
        return (slope - slope.mean(2, keepdim=True) - unit * along).reshape(k.shape)

    @property
    def loses(self) -> str:
        return f"{self.what} loses mean and size of {self.groups} group{'s' * (self.groups > 1)} of values"


@dataclass(frozen=True)
class Sum(Op):
    """y = x_1 + x_2 + ...: where a skip connection ends."""

    name: str
    scalable = True
    linear = True

    def forward(self, *xs: Tensor) -> Tensor:
        total = xs[0]
        for x in xs[1:]:
            total = total + x
        return total

    def vjp(self, k: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (k,) * len(xs)


@dataclass(frozen=True)
class Concat(Op):
    """The values side by side along one dimension."""

    name: str
    dim: int
    """Of a sample, without the batch."""
    scalable = True
    linear = True

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, self.dim + 1)

    def vjp(self, k: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.split(k, [x.shape[self.dim + 1] for x in xs], self.dim + 1)


@dataclass(frozen=True, eq=False)
class Other(Op):
    """Anything else that torch can differentiate: pooling, layer norm, attention. No closed form passes it."""

    name: str
    what: str
    """The operation, such as ``avg_pool2d``."""
    function: Callable[..., Tensor]
    """One sample with its batch dimension, (1, *shape), to one of the output."""
    inputs: int
    """Values that one sample's inputs hold."""
    outputs: int
    scalable: bool = False
    detached: bool = False
    """Whether it lets no gradient through, as under no_grad."""
    lost: str = ""
    """What of its input is not in its output, where that is known."""

    def forward(self, *xs: Float[Tensor, "s ..."]) -> Tensor:
        # The traced operation may have a batch of one in its arguments.
        def one(*x: Tensor) -> Tensor:
            return self.function(*(each[None] for each in x))[0]

        run: Callable[..., Tensor] = torch.func.vmap(one, randomness="different")
        with differentiable():
            try:
                return run(*xs)
            except RuntimeError:  # no rule to run several samples at once
                return torch.stack([one(*sample) for sample in zip(*xs, strict=True)])

    def vjp(self, k: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.detached:
            return tuple(k.new_zeros(len(k), *x.shape[1:]) for x in xs)
        return super().vjp(k, xs)

    @property
    def loses(self) -> str:
        if self.lost:
            return f"{self.what} {self.lost}"
        if self.outputs < self.inputs:
            return f"{self.what} makes {self.outputs} values of {self.inputs}"
        return f"{self.what} is not inverted"

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def _plain(value: object) -> bool:
    """Whether it is a tensor, or holds none that derivatives need; those of an activation are its slopes."""
    if isinstance(value, tuple):
        return all(map(_plain, value)) and not any(isinstance(each, Tensor) for each in value)
    return value is None or isinstance(value, (Tensor, int, float, str, Activation))
