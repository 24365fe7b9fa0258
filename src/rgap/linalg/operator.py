"""A linear map between spaces of tensors, given by its products alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.linalg import deadline

CHUNK_VALUES = 2**24
"""Values that unit vectors pushed at once may take inside an operator."""
WRITTEN_OUT, FEW = 4e8, 16
"""Multiplications that a factor of J may take: more take longer than the products that it saves. And what part of the
unknowns, as one in so many, are products that take as long as it."""


class LinearOperator(ABC):
    """J, applied to d directions at once. Authors write the two products; the matrices are derived from them."""

    in_shape: tuple[int, ...]
    """Of one direction."""
    values: int
    """That one direction takes inside the operator, about."""
    like: Tensor
    """Of the type and device of all that goes through."""
    mean_diagonal: float
    """Of J'J, about."""
    _asked = 0
    """Products by `repeated` so far."""

    single: LinearOperator | None = None
    """The same in float32, if that is to be had and its products take less time."""

    @property
    def unknowns(self) -> int:
        return math.prod(self.in_shape)

    @abstractmethod
    def mv(self, x: Float[Tensor, "d *in_shape"]) -> Float[Tensor, "d rows"]:
        """J x."""

    @abstractmethod
    def rmv(self, rows: Float[Tensor, "d rows"]) -> Float[Tensor, "d *in_shape"]:
        """J' r, the adjoint."""

    def normal(self, x: Float[Tensor, "d *in_shape"]) -> Float[Tensor, "d *in_shape"]:
        """J'J x."""
        return self.rmv(self.mv(x))

    def repeated(self, x: Float[Tensor, "d *in_shape"]) -> Float[Tensor, "d *in_shape"]:
        """J'J x, for many products one after the other: from about where that took as long on, by a factor of J."""
        self._asked += 1
        if self._asked <= self.unknowns // FEW or self.factor is None:
            return self.normal(x)
        return ((x.flatten(1) @ self.factor.mT) @ self.factor).reshape(x.shape)

    @cached_property
    def factor(self) -> Float[Tensor, "m u"] | None:
        """R of J = QR, where it takes little time. R'(R x) is as precise as J'(J x), which J'J as a matrix is not."""
        squared = self.unknowns**2
        if squared > WRITTEN_OUT or squared * self.mv(self.like.new_zeros(1, *self.in_shape)).shape[1] > WRITTEN_OUT:
            return None
        r: Tensor = torch.linalg.qr(self.to_dense(), mode="r")[1]
        return r

    def gram(self) -> Float[Tensor, "u u"]:
        """J'J as a matrix."""
        return torch.cat([self.normal(units).flatten(1) for units in self._units()])

    def to_dense(self) -> Float[Tensor, "rows u"]:
        """J as a matrix."""
        return torch.cat([self.mv(units) for units in self._units()]).mT

    def _units(self) -> Iterator[Tensor]:
        """The unit vectors, in chunks that memory holds."""
        count, chunk = self.unknowns, max(1, min(512, CHUNK_VALUES // max(1, self.values)))
        for start in range(0, count, chunk):
            deadline.check()
            size = min(chunk, count - start)
            units = self.like.new_zeros(size, count)
            units[torch.arange(size), start + torch.arange(size)] = 1.0
            yield units.reshape(size, *self.in_shape)
