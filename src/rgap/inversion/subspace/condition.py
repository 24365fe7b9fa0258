"""What an input must satisfy to be one of a batch: equations in its coordinates in the row space.

    (x, 1) = V a      with      a = a0 + N t,      because the last coordinate is 1.

Without a bias a = N t with N = I. Behind the layer, z = W x + c is affine in t.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.inversion.subspace.span import Span
from rgap.linalg.derivative import linearised
from rgap.linalg.svd import svd
from rgap.nn.losses import Loss
from rgap.nn.network import Network
from rgap.nn.ops import Elementwise


@dataclass(frozen=True, eq=False)
class Condition(ABC):
    """A nonlinear least-squares problem in t, whose zeros are the samples that are left in the spaces."""

    first: Span
    """Of the layer whose inputs are looked for, reduced."""

    @cached_property
    def origin(self) -> Float[Tensor, " r"]:
        """a0, the shortest a that gives the last coordinate 1."""
        last = self.first.v[-1]
        return last / last.square().sum() if self.first.biased else torch.zeros_like(last)

    @cached_property
    def basis(self) -> Float[Tensor, "r d"]:
        """N."""
        v = self.first.v
        if not self.first.biased:
            return torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
        _, _, vt = svd(v[-1:], full=True)
        across: Tensor = vt[1:].mT
        return across

    @property
    def unknowns(self) -> int:
        return self.basis.shape[1]

    @cached_property
    def weight(self) -> Float[Tensor, "m d"]:
        """z = weight t + offset."""
        return self._by_row @ self.basis

    @cached_property
    def offset(self) -> Float[Tensor, " m"]:
        return self._by_row @ self.origin + self.first.layer.offset[:, 0]

    @cached_property
    def _by_row(self) -> Float[Tensor, "m r"]:
        v = self.first.v[:-1] if self.first.biased else self.first.v
        return self.first.layer.weight[0] @ v

    def coordinates(self, t: Float[Tensor, "s d"]) -> Float[Tensor, "s r"]:
        """a."""
        return self.origin + t @ self.basis.mT

    def inputs(self, t: Float[Tensor, "s d"]) -> Float[Tensor, "s n"]:
        """x."""
        row = self.coordinates(t) @ self.first.v.mT
        return row[:, :-1] if self.first.biased else row

    def unknowns_of(self, row: Float[Tensor, "s row"]) -> Float[Tensor, "s d"]:
        """The t that comes nearest to rows (x, 1)."""
        return (row @ self.first.v - self.origin) @ self.basis

    def z(self, t: Float[Tensor, "s d"]) -> Float[Tensor, "s m"]:
        return t @ self.weight.mT + self.offset

    def moved(self, t: Float[Tensor, "s d"]) -> Float[Tensor, " s"]:
        """How far rounding of the row space moves z."""
        weight = self.first.layer.weight[0]
        return self.first.uncertainty(self.coordinates(t)) * float(weight.square().sum(1).mean().sqrt())

    def select(self, index: Int[Tensor, " a"]) -> Condition:
        """Of some of the starts."""
        return self

    @abstractmethod
    def cost(self, t: Float[Tensor, "s d"]) -> Float[Tensor, " s"]:
        """|r|^2, relative to the size of what has to lie in a space."""

    @abstractmethod
    def allowed(self, t: Float[Tensor, "s d"]) -> Float[Tensor, " s"]:
        """The cost that rounding explains."""

    @abstractmethod
    def normal(self, t: Float[Tensor, "s d"]) -> tuple[Float[Tensor, "s d"], Float[Tensor, "s d d"]]:
        """J' r and J' J, with |r|^2 a constant times the cost."""

    @abstractmethod
    def noise(self, t: Float[Tensor, "s d"]) -> Float[Tensor, " s"]:
        """The variance of each of r's values, as far as rounding of the spaces explains it."""

    def error(self, t: Float[Tensor, "s d"]) -> Float[Tensor, " s"]:
        """How far rounding may have moved each value of an input (root mean square): along the row space by what it
        does to the condition, and with the row space."""
        along = t.new_zeros(len(t))
        if self.unknowns and len(t):
            _, gram = self.normal(t)
            # Along a scale that is free nothing is told, and rounding of J' J is not taken for something.
            inverse = torch.linalg.pinv(gram, rtol=1e-12, hermitian=True)
            along = self.noise(t) * inverse.diagonal(dim1=1, dim2=2).sum(1).clamp(min=0)
        across = self.first.uncertainty(self.coordinates(t)).square()
        found: Tensor = ((along + across) / self.first.layer.unknowns).sqrt()
        return found


@dataclass(frozen=True, eq=False)
class RowCondition(Condition):
    """Two consecutive Linear layers: f(W x + c) lies in the row space of the second one's gradient."""

    between: Network
    """From the first layer's output to the second one's input."""
    second: Span

    @cached_property
    def _space(self) -> tuple[Float[Tensor, "n r"], Float[Tensor, " r"]]:
        """The second row space: its part that belongs to the inputs, and the one that belongs to the bias."""
        v = self.second.v
        return (v[:-1], v[-1]) if self.second.biased else (v, v.new_zeros(v.shape[1]))

    def _behind(self, z: Float[Tensor, "s m"]) -> list[Tensor]:
        return self.between.forward(z.reshape(-1, *self.between.input_shape))

    def _coordinates(self, h: Float[Tensor, "s n"]) -> Float[Tensor, "s r"]:
        """Of (h, 1) in the second row space."""
        space, one = self._space
        return h @ space + one

    def cost(self, t: Float[Tensor, "s d"]) -> Float[Tensor, " s"]:
        h = self._behind(self.z(t))[-1].flatten(1)
        inside = self._coordinates(h).square().sum(1)
        missed = (h.square().sum(1) + float(self.second.biased) - inside).clamp(min=0)
        return missed / self._size(t, h)

    def allowed(self, t: Float[Tensor, "s d"]) -> Float[Tensor, " s"]:
        z = self.z(t)
        h = self._behind(z)[-1].flatten(1)
        moved = (self._behind(z + self.moved(t)[:, None])[-1].flatten(1) - h).square().sum(1)
        wide = self.second.uncertainty(self._coordinates(h)).square()
        # Sizes cancel in the cost: float64 leaves so much.
        cancelled = 1e-14 * (h.square().sum(1) + 1)
        return (moved + wide + cancelled) / self._size(t, h)

    def noise(self, t: Float[Tensor, "s d"]) -> Float[Tensor, " s"]:
        h = self._behind(self.z(t))[-1].flatten(1)
        size = self._size(t, h) if self.first.biased else torch.ones_like(h[:, 0])
        return self.allowed(t) * size / h.shape[1]

    def normal(self, t: Float[Tensor, "s d"]) -> tuple[Float[Tensor, "s d"], Float[Tensor, "s d d"]]:
        space, _ = self._space
        values = self._behind(self.z(t))
        h = values[-1].flatten(1)
        r = h - self._coordinates(h) @ space.mT
        j = self._slopes(values)
        inside = space.mT @ j
        gradient, gram = (r[:, None] @ j)[:, 0], j.mT @ j - inside.mT @ inside
        if self.first.biased:
            return gradient, gram
        # The same of r / s, with s the size below.
        curved = self._curved(t, h)
        size = curved.norm(dim=1).clamp(min=torch.finfo(h.dtype).tiny)[:, None]
        slope = (curved[:, None] @ (j - self._at_zero[1]))[:, 0] / size
        missed = r.square().sum(1, keepdim=True)
        crossed = gradient[:, :, None] * slope[:, None] / size[..., None]
        gram = gram - crossed - crossed.mT + (missed / size**2)[..., None] * slope[:, :, None] * slope[:, None]
        return (gradient - missed * slope / size) / size**2, gram / size[..., None] ** 2

    def left_by(self, t: Float[Tensor, "s d"], by: Float[Tensor, "c s m"]) -> Float[Tensor, "c s n"]:
        """What h misses the second row space by where z were moved, less what t could make up for."""
        z = self.z(t)
        values, (space, one) = self._behind(z), self._space
        j = self._slopes(values)
        basis: Tensor = torch.linalg.qr(j - space @ (space.mT @ j))[0]
        h = self._behind((z + by).flatten(0, 1))[-1].reshape(*by.shape[:2], -1)
        r = (h - (h @ space + one) @ space.mT).transpose(0, 1)
        return (r - (r @ basis) @ basis.mT).transpose(0, 1)

    def _size(self, t: Float[Tensor, "s d"], h: Float[Tensor, "s n"]) -> Float[Tensor, " s"]:
        """The square of what r is compared with: (h, 1).

        Without a last coordinate in the first space the scale is free, and zero satisfies most conditions. r is then
        taken in units of what the operations between the layers bend, which falls faster than r does.
        """
        if self.first.biased:
            return h.square().sum(1) + float(self.second.biased)
        return self._curved(t, h).square().sum(1).clamp(min=torch.finfo(h.dtype).tiny)

    def _curved(self, t: Float[Tensor, "s d"], h: Float[Tensor, "s n"]) -> Float[Tensor, "s n"]:
        """h less its tangent at t = 0."""
        value, slope = self._at_zero
        return h - value - t @ slope.mT

    @cached_property
    def _at_zero(self) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d"]]:
        values = self._behind(self.offset[None])
        return values[-1].flatten(), self._slopes(values)[0]

    def _slopes(self, values: list[Tensor]) -> Float[Tensor, "s n d"]:
        """dh/dt."""
        s, d = len(values[0]), self.unknowns
        tangent = self.weight.mT.expand(s, d, -1)
        for node, read in zip(self.between.nodes, values, strict=False):
            if isinstance(node.op, Elementwise):
                tangent = tangent * node.op.activation.slope(read).reshape(s, 1, -1)
            else:
                wide = read[:, None].expand(s, d, *read.shape[1:]).flatten(0, 1)
                out = node.op.jvp((tangent.reshape(s * d, *read.shape[1:]),), (wide,))
                tangent = out.reshape(s, d, prod(node.shape))
        return tangent.mT


@dataclass(frozen=True, eq=False)
class CotangentCondition(Condition):
    """The last layers alone: the cotangent behind the first of them, at some label, lies in its column space.

    What is behind must be differentiable twice: a kink's slope jumps, and between jumps tells nothing.
    """

    behind: Network | None
    """From the layer's output to the network's output; None if the layer is the last one."""
    loss: Loss
    labels: Float[Tensor, " s"]
    """One for each start."""

    def k(self, t: Float[Tensor, "s d"]) -> Float[Tensor, "s m"]:
        return self._k(self.z(t), self.labels)

    def _k(self, z: Float[Tensor, "s m"], labels: Float[Tensor, " s"]) -> Float[Tensor, "s m"]:
        if self.behind is None:
            return self.loss.output_gradient(z, labels)
        values = self.behind.forward(z.reshape(-1, *self.behind.input_shape))
        k = self.loss.output_gradient(values[-1].reshape(len(z), -1), labels).reshape(values[-1].shape)
        found = self.behind.vjp(values, self.behind.slopes(values), {len(values) - 1: k})[0]
        return torch.zeros_like(z) if found is None else found.flatten(1)

    def select(self, index: Int[Tensor, " a"]) -> CotangentCondition:
        return replace(self, labels=self.labels[index])

    def cost(self, t: Float[Tensor, "s d"]) -> Float[Tensor, " s"]:
        k = self._k(self.z(t), self.labels)
        size = k.square().sum(1).clamp(min=torch.finfo(k.dtype).tiny)
        missed: Tensor = self.first.outside(k).square().sum(1) / size
        return missed

    def allowed(self, t: Float[Tensor, "s d"]) -> Float[Tensor, " s"]:
        z = self.z(t)
        k = self._k(z, self.labels)
        moved = (self._k(z + self.moved(t)[:, None], self.labels) - k).norm(dim=1)
        wide = self.first.cotangent_uncertainty(k)
        size = k.square().sum(1).clamp(min=torch.finfo(k.dtype).tiny)
        share: Tensor = (moved.square() + wide.square()) / size + 1e-16
        return share

    def noise(self, t: Float[Tensor, "s d"]) -> Float[Tensor, " s"]:
        k = self._k(self.z(t), self.labels)
        return self.allowed(t) * k.square().sum(1) / k.shape[1]

    def normal(self, t: Float[Tensor, "s d"]) -> tuple[Float[Tensor, "s d"], Float[Tensor, "s d d"]]:
        z, (s, d) = self.z(t), t.shape
        tangent = self.weight.mT.expand(s, d, -1).flatten(0, 1)
        labels = self.labels.repeat_interleave(d)
        wide = z.repeat_interleave(d, 0)
        along, k, _ = linearised(lambda each: self._k(each, labels), wide)
        r = self.first.outside(k[::d])
        j = self.first.outside(along(tangent)).reshape(s, d, -1)
        return (r[:, None] @ j.mT)[:, 0], j @ j.mT
