"""Derivatives of rows where a layer's cotangent depends on the inputs as much as what it reads does, so that both are
differentiated: behind batch norms in training mode, and where slopes bend a lot.

A gradient is bilinear, grad W = K X' with one column for each position of each sample. So one pass through the network
differentiates X and K of every layer, and what they make of the rows is

    d(grad W) = dK X' + K dX'

Where a layer has many more weights than columns, as in a table, that is never written down: what J'J asks for are
K dX' X and the like, products with the small matrices X'X, K'K and dX'X.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.doubted import Effects
from rgap.inversion.system import ConstraintSystem, Linearisation, Rows
from rgap.nn.layer import Layer


class LayerRows:
    """The gradient rows of one layer, summed over samples, at what it reads and its cotangent."""

    def __init__(self, layer: Layer, x: Float[Tensor, "b *in"], k: Float[Tensor, "b *out"]):
        j, i = layer.weight.shape[-2:]
        columns = len(x) * layer.positions
        self.shapes = (x.shape, k.shape)
        self.thin = columns * (i + j) < i * j
        """Whether there are so few columns that products with the rows are not worth writing down."""
        # Those of one position would take a product for each sample.
        beside = self.thin or layer.positions == 1
        self.layer = layer.side_by_side(len(x)) if beside else layer
        self._x, self._k = self._columns(x[None], k[None])

    def rows(self, dx: Float[Tensor, "d b *in"], dk: Float[Tensor, "d b *out"]) -> Float[Tensor, "d g j i"]:
        dx, dk = self._columns(dx, dk)
        return (self._k @ dx.mT + dk @ self._x.mT).sum(1)

    def back(self, grad: Float[Tensor, "d g j i"]) -> tuple[Tensor, Tensor]:
        """The adjoint of `rows`."""
        return self._values(grad[:, None].mT @ self._k, grad[:, None] @ self._x)

    def normal(
        self,
        dx: Float[Tensor, "d b *in"],
        dk: Float[Tensor, "d b *out"],
        doubted: Effects,
        weight: Float[Tensor, " o"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`back` of `rows`, by small matrices; of a thin layer.

        Args:
            doubted: what is left out of the rows.
            weight: of the rows of each output.
        """
        x, k = self._x, self._k
        dx, dk = self._columns(dx, dk)
        if weight is not None:
            weight = weight.reshape(*k.shape[2:4], 1)
            k, dk = weight * k, weight * dk
        to_x = dx @ (k.mT @ k) + x @ (dk.mT @ k)
        to_k = dk @ self._gram + k @ (dx.mT @ x)
        if doubted.directions is not None:
            q = doubted.directions
            part = doubted.part((k @ (dx.mT @ q) + dk @ (x.mT @ q))[:, 0])[:, None]
            to_x, to_k = to_x - q @ (part.mT @ k), to_k - part @ (q.mT @ x)
        return self._values(to_x, to_k if weight is None else weight * to_k)

    @cached_property
    def _gram(self) -> Float[Tensor, "1 s g p p"]:
        return self._x.mT @ self._x

    def _columns(self, x: Tensor, k: Tensor) -> tuple[Float[Tensor, "d s g i p"], Float[Tensor, "d s g j p"]]:
        """What each position reads and its cotangent, (d, b, *shape) as they come; all samples are one system where
        they are side by side."""
        layer, (groups, j, i) = self.layer, self.layer.weight.shape
        patches, ks = layer.patches(layer.pack_input(x.flatten(0, 1))), layer.pack_output(k.flatten(0, 1))
        sizes = (len(x), len(patches) // len(x), groups)
        return patches.reshape(*sizes, i, -1), ks.reshape(*sizes, j, -1)

    def _values(self, x: Float[Tensor, "d s g i p"], k: Float[Tensor, "d s g j p"]) -> tuple[Tensor, Tensor]:
        """The adjoint of `_columns`."""
        before = self.layer.unpack_input(self.layer.scatter(x.flatten(0, 1)))
        behind = self.layer.unpack_output(k.reshape(-1, self.layer.outputs, k.shape[-1]))
        return before.reshape(-1, *self.shapes[0]), behind.reshape(-1, *self.shapes[1])


class Coupled:
    """How all rows move with the inputs, and the adjoint."""

    def __init__(self, system: ConstraintSystem, at: Linearisation):
        self.system = system
        with torch.enable_grad():
            self._x = at.x.detach().requires_grad_()
            self._out = self._values(self._x)
            # J'r is linear in r: its derivative is J.
            self._r = tuple(torch.zeros_like(each, requires_grad=True) for each in self._out)
            [self._pulled] = torch.autograd.grad(self._out, self._x, self._r, create_graph=True)
        reads, ks = (tuple(each.detach() for each in self._out[start::2]) for start in (1, 2))
        self.layers = tuple(map(LayerRows, system.layers, reads, ks))

    def _values(self, x: Float[Tensor, "b ..."]) -> tuple[Tensor, ...]:
        """The output, and what each layer reads and its cotangent, at some inputs."""
        nodes = self.system.network.nodes
        at = self.system.linearise(x)
        found = [at.values[-1]]
        for node in self.system.nodes:
            k = at.cotangents[node + 1]
            found += [at.values[nodes[node].reads[0]], torch.zeros_like(at.values[node + 1]) if k is None else k]
        # What does not depend on the inputs is a part of the graph all the same.
        return tuple(each if each.requires_grad else each + 0 * x.sum() for each in found)

    def moves(self, x: Float[Tensor, "d *in_shape"]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Of the output, and of what each layer reads and its cotangent."""
        out, *rest = along(self._pulled, self._r, x)
        return out, list(zip(rest[::2], rest[1::2], strict=True))

    def pull(self, out: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Float[Tensor, "d *in_shape"]:
        """The adjoint of `moves`."""
        found: Tensor = along(self._out, self._x, (out, *(each for pair in pairs for each in pair)))[0]
        return found

    def rows(self, x: Float[Tensor, "d *in_shape"]) -> Rows:
        out, pairs = self.moves(x)
        return Rows(out, tuple(layer.rows(*pair) for layer, pair in zip(self.layers, pairs, strict=True)))

    def back(self, rows: Rows) -> Float[Tensor, "d *in_shape"]:
        pairs = [layer.back(each) for layer, each in zip(self.layers, rows.gradient, strict=True)]
        return self.pull(rows.weight, pairs)


def along(of: Tensor | tuple[Tensor, ...], by: Tensor | tuple[Tensor, ...], directions: Any) -> tuple[Tensor, ...]:
    """Derivatives along d directions at once, or one by one where torch has no rule for several."""
    several = directions if isinstance(directions, tuple) else (directions,)
    try:
        return torch.autograd.grad(of, by, several, retain_graph=True, is_grads_batched=True)
    except RuntimeError:
        each = (torch.autograd.grad(of, by, one, retain_graph=True) for one in zip(*several, strict=True))
        return tuple(map(torch.stack, zip(*each, strict=True)))
