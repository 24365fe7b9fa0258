"""Value and gradient rows of a pooled layer as products, at routes that are weights or decided: how rows move with the
input, and J'WJ, W being what each row counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from rgap.nn.layers import Layer
from rgap.nn.network import Network
from rgap.nn.pools import Pool

MOST = 1e30
"""Where a weight is larger nothing is weighed, in float32: of outputs without a gradient."""


class GradientWeight(ABC):
    """What the gradient rows count: a symmetric matrix for each output."""

    @abstractmethod
    def __call__(self, grads: Float[Tensor, "s g j i"]) -> Float[Tensor, "s g j i"]: ...

    @abstractmethod
    def single(self, unit: float) -> GradientWeight:
        """In float32, for gradients in such a unit: their squares might not have a place in its range."""


@dataclass(frozen=True)
class ByOutput(GradientWeight):
    """Each output's rows by one number."""

    weight: Float[Tensor, "g j 1"]

    def __call__(self, grads: Float[Tensor, "s g j i"]) -> Float[Tensor, "s g j i"]:
        return grads * self.weight

    def single(self, unit: float) -> ByOutput:
        return ByOutput((self.weight * unit**2).clamp(max=MOST).float())


@dataclass(frozen=True)
class RoutedRows:
    """The rows of b samples, all of which share the gradient rows.

    Methods take moves of a single sample's input as well, several at once.
    """

    front: Network
    """From the input to what the layer reads."""
    values: list[Tensor]
    slopes: Mapping[int, Tensor]
    """Of the front, at the input."""
    layer: Layer
    pool: Pool
    routes: Float[Tensor, "b o m w"]
    """The slope of each window's value in each of its places."""
    k: Float[Tensor, "b o n"]
    """The cotangent of what the layer puts out."""
    weight: Float[Tensor, "b o m"]
    """What the value rows count."""
    variance: float
    """Of a value row: gradient rows count so many times what `apart` says."""
    apart: GradientWeight | None
    """None: gradient rows do not count."""

    @cached_property
    def single(self) -> RoutedRows | None:
        """In float32, for products that need no more; None where that is not to be had."""
        front = self.front.single
        if front is None:
            return None
        unit = float(self.k.square().mean().sqrt()) or 1.0
        return replace(
            self,
            front=front,
            values=[value.float() for value in self.values],
            slopes={node: slope.float() for node, slope in self.slopes.items()},
            layer=self.layer.single,
            routes=self.routes.float(),
            k=(self.k / unit).float(),
            weight=self.weight.float(),
            apart=None if self.apart is None else self.apart.single(unit),
        )

    def read(self, move: Tensor) -> Float[Tensor, "s c n"]:
        """How what the layer reads moves."""
        return self.layer.pack_input(self.front.jvp(self.values, self.slopes, move)[-1])

    def each(self, move: Tensor) -> tuple[Float[Tensor, "s o m"], Float[Tensor, "s g j i"]]:
        """What moves of the inputs do to value rows, and to gradient rows, each by itself."""
        z, grads = self.layer.rows(self.read(move), self.k)
        return (self.pool.read(z) * self.routes).sum(-1), grads

    def back(self, values: Float[Tensor, "s o m"], grads: Float[Tensor, "r g j i"]) -> Tensor:
        """The adjoint of `each`, or of its sum over samples for one gradient, each row with its weight."""
        k = self.pool.scatter(self.routes * (self.weight * values)[..., None]).reshape(-1, *self.k.shape[1:])
        weighted = None if self.apart is None else self.variance * self.apart(grads)
        cotangent = self.layer.unpack_input(self.layer.rows_adjoint(k, weighted, self.k))
        last = len(self.values) - 1
        found = self.front.vjp(self.values, self.slopes, {last: cotangent.reshape(-1, *self.values[-1].shape[1:])})[0]
        assert found is not None
        return found

    def normal(self, move: Float[Tensor, "1 b ..."]) -> Float[Tensor, "1 b ..."]:
        """J'WJ of a move of all samples."""
        values, grads = self.each(move[0])
        return self.back(values, grads.sum(0, keepdim=True))[None]
