"""The directions of each channel that the gradient rows alone determine."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.layer.cost import kernel_rows
from rgap.inversion.layer.rows import LayerRows

DOMINANT = 0.1
"""A direction is dominant if its singular value in K0 is at least this fraction of the largest.

The gradient's noise, its rounding or what a defence adds, enters a direction divided by its singular value. Where that
is small the weight rows know better: with 0.1 in place of 0.001 the error under noise falls a thousandfold."""


class Dominant:
    """Singular vectors of K0 = U S V', of s systems and g groups, split into dominant and trailing.

    They are eigenvectors of the smaller of K0 K0' and K0' K0. That squares the singular values, which does no harm:
    the dominant ones are no less than a tenth of the largest, and of a trailing one only the square is used. Where K0
    has fewer rows than columns V is never formed: V S^-2 V' K0' = K0' C with the small matrix C = U S^-2 U'.
    """

    def __init__(
        self,
        rows: Sequence[LayerRows],
        tolerance: float,
        complete: bool,
        none: bool = False,
        dominant: float = DOMINANT,
    ):
        """
        Args:
            tolerance: singular values below this fraction of the largest are never dominant.
            complete: that all directions are needed and not the dominant ones alone; see `trailing`.
            none: that none is to be looked for.
            dominant: the fraction of the largest from which on a singular value is dominant.
        """
        self._rows = rows
        kernel = None if none else torch.cat([each.layer.kernel_matrix(each.k) for each in rows], dim=2)
        s, groups, n = len(rows[0].k), rows[0].layer.groups, rows[0].layer.pixels
        tall = complete or (kernel is not None and kernel.shape[2] >= n)
        if kernel is not None and bool(kernel.any()):
            value, vector = torch.linalg.eigh(kernel.mT @ kernel if tall else kernel @ kernel.mT)
            value, vector = value.flip(-1), vector.flip(-1)
        else:
            side = n if tall else 1
            value = rows[0].k.new_zeros(s, groups, side)
            vector = torch.eye(side, dtype=value.dtype, device=value.device).expand(s, groups, side, side)
        self.largest: Float[Tensor, "s g"] = value[..., 0].clamp(min=0).sqrt()
        kept = (value >= max(dominant, tolerance) ** 2 * value[..., :1]) & (value[..., :1] > 0)
        self.count: Float[Tensor, "s g"] = kept.sum(-1)
        square = torch.where(kept, value, torch.inf)
        smallest = square.amin(-1)
        self.condition: Float[Tensor, "s g"] = torch.where(
            self.count > 0, self.largest / smallest.sqrt().clamp(min=1e-300), 1.0
        )
        most = int(self.count.max()) if self.count.numel() else 0
        self._all = (vector, value.clamp(min=0)) if tall else None
        self._inverse = (1 / square)[..., :most]
        """S^-2; zero for what a system has less of dominant directions than another."""
        self._vector: Tensor = vector[..., :most]
        self._core: Tensor | None = None if tall else (self._vector * self._inverse[..., None, :]) @ self._vector.mT
        # Taking away what the dominant columns span leaves what the others span: the fewer are multiplied with.
        least = int(self.count.min()) if self.count.numel() else 0
        self._keeps = n - least < most
        self._columns: Tensor | None = None
        if tall:
            part = slice(least, None) if self._keeps else slice(most)
            self._columns = torch.where(kept[..., None, part] != self._keeps, vector[..., part], 0.0)

    @property
    def complete(self) -> bool:
        """Whether the trailing directions are known too."""
        return self._all is not None

    def trailing(self, s: int, g: int) -> tuple[Float[Tensor, "n d"], Float[Tensor, " d"]]:
        """The trailing directions of one system and group, in columns, and the squares of their singular values."""
        assert self._all is not None
        vector, value = self._all
        return vector[s, g, :, int(self.count[s, g]) :], value[s, g, int(self.count[s, g]) :]

    def pinv(self, grads: Sequence[Tensor]) -> Float[Tensor, "s c n"]:
        """The part of the input that the gradient alone tells; of each layer's weight, (s, g, j, i)."""
        if not self._inverse.shape[-1]:
            layer = self._rows[0].layer
            return grads[0].new_zeros(len(grads[0]), layer.channels, layer.pixels)
        if self._core is not None:
            return self._adjoint(self._cored([_stacked(each, g) for each, g in self._pairs(grads)]))
        pulled = torch.stack([each.layer.grad_input(each.k, g) for each, g in self._pairs(grads)]).sum(0)
        x = self._by_group(pulled)
        told: Tensor = ((x @ self._vector * self._inverse[..., None, :]) @ self._vector.mT).reshape(pulled.shape)
        return told

    def deflate(self, x: Float[Tensor, "s c n"]) -> Float[Tensor, "s c n"]:
        """An input without its dominant directions."""
        if not self._inverse.shape[-1]:
            return x
        if self._columns is not None:
            part = ((self._by_group(x) @ self._columns) @ self._columns.mT).reshape(x.shape)
            left: Tensor = part if self._keeps else x - part
            return left
        return x - self._adjoint(
            self._cored([_stacked(each, each.layer.grad_weight(x, each.k)) for each in self._rows])
        )

    def _cored(self, seen: Sequence[Float[Tensor, "s g _ d"]]) -> Float[Tensor, "s g m d"]:
        """C = U S^-2 U' times columns: as rows times C, which is symmetric; few columns take four times as long."""
        assert self._core is not None
        found: Tensor = (torch.cat(list(seen), 2).mT @ self._core).mT
        return found

    def single(self, rows: Sequence[LayerRows], scale: Float[Tensor, "s g"]) -> Dominant:
        """In float32, for `deflate`, with gradient rows whose squares are scaled."""
        other = copy(self)
        other._rows, other._all = rows, None
        other._columns = None if self._columns is None else self._columns.float()
        other._core = None if self._core is None else (self._core / scale[..., None, None]).float()
        return other

    def _pairs(self, grads: Sequence[Tensor]) -> list[tuple[LayerRows, Tensor]]:
        return list(zip(self._rows, grads, strict=True))

    def _by_group(self, x: Tensor) -> Float[Tensor, "s g c n"]:
        return x.reshape(len(x), self._rows[0].layer.groups, -1, x.shape[-1])

    def _adjoint(self, stacked: Float[Tensor, "s g m d"]) -> Float[Tensor, "s c n"]:
        """K0' of every channel."""
        found: Tensor | None = None
        for rows, part in zip(
            self._rows, torch.split(stacked, [kernel_rows(rows.layer) for rows in self._rows], dim=2), strict=True
        ):
            s, g, _, d = part.shape
            grad = part.reshape(s, g, -1, rows.layer.offsets, d).transpose(3, 4).reshape(s, *rows.layer.weight.shape)
            more = rows.layer.grad_input(rows.k, grad)
            found = more if found is None else found + more
        assert found is not None
        return found


def _stacked(rows: LayerRows, grad: Float[Tensor, "s g j i"]) -> Float[Tensor, "s g m d"]:
    """Gradient rows in the order of K0, m = outputs times offsets, one column for each channel."""
    s, g, j, _ = grad.shape
    return grad.reshape(s, g, j, -1, rows.layer.offsets).transpose(3, 4).reshape(s, g, j * rows.layer.offsets, -1)
