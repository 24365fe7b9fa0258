"""The directions of each channel that the gradient rows alone determine."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

STRONG = 0.1
"""A direction is strong if its singular value in K0 is at least this fraction of the largest.

The gradient's noise, its rounding or what a defence adds, enters a direction divided by its singular value. Where that
is small the weight rows know better: with 0.1 in place of 0.001 the error under noise falls a thousandfold."""


class Strong:
    """Singular vectors of K0, of s systems and g groups, split into strong and weak.

    They are eigenvectors of the smaller of K0 K0' and K0' K0. That squares the singular values, which does no harm:
    the strong ones are no less than a tenth of the largest, and of a weak one only the square is used.
    """

    basis: Float[Tensor, "s g n r"]
    """The strong directions, in columns; those of systems that have fewer are filled up with zeros."""
    square: Float[Tensor, "s g r"]
    """Squares of their singular values; 1 in columns of zeros."""
    count: Float[Tensor, "s g"]

    def __init__(self, kernel: Float[Tensor, "s g m n"], tolerance: float, whole: bool):
        """
        Args:
            tolerance: singular values below this fraction of the largest are never strong.
            whole: that all directions are needed and not the strong ones alone; see `weak`.
        """
        tall = whole or kernel.shape[2] >= kernel.shape[3]
        if bool(kernel.any()):
            value, vector = torch.linalg.eigh(kernel.mT @ kernel if tall else kernel @ kernel.mT)
            value, vector = value.flip(-1), vector.flip(-1)
        else:
            side = kernel.shape[3] if tall else 1
            value = kernel.new_zeros(*kernel.shape[:2], side)
            vector = torch.eye(side, dtype=kernel.dtype, device=kernel.device).expand(*value.shape, side)
        self.largest: Float[Tensor, "s g"] = value[..., 0].clamp(min=0).sqrt()
        strong = (value >= max(STRONG, tolerance) ** 2 * value[..., :1]) & (value[..., :1] > 0)
        self.count = strong.sum(-1)
        most = int(self.count.max()) if self.count.numel() else 0
        keep: Bool[Tensor, "s g r"] = strong[..., :most]
        self.square = torch.where(keep, value[..., :most], 1.0)
        basis = vector[..., :most] if tall else kernel.mT @ vector[..., :most] / self.square.sqrt()[..., None, :]
        self.basis = torch.where(keep[..., None, :], basis, 0.0)
        self._all = (vector, value.clamp(min=0)) if tall else None
        smallest = torch.where(keep, self.square, torch.inf).amin(-1) if most else torch.full_like(self.largest, 0.0)
        self.condition: Float[Tensor, "s g"] = torch.where(
            self.count > 0, self.largest / smallest.sqrt().clamp(min=1e-300), 1.0
        )

    @classmethod
    def none(cls, like: Tensor, groups: int, pixels: int) -> Strong:
        """No strong directions, where finding them would take too long."""
        return cls(like.new_zeros(len(like), groups, 1, pixels), 1.0, False)

    @property
    def whole(self) -> bool:
        """Whether the weak directions are known too."""
        return self._all is not None

    def weak(self, s: int, g: int) -> tuple[Float[Tensor, "n d"], Float[Tensor, " d"]]:
        """The weak directions of one system and group, in columns, and the squares of their singular values."""
        assert self._all is not None
        vector, value = self._all
        return vector[s, g, :, int(self.count[s, g]) :], value[s, g, int(self.count[s, g]) :]

    def alone(self, pulled: Float[Tensor, "s g c n"]) -> Float[Tensor, "s g c n"]:
        """The part of the input that the gradient alone tells, from K' grad W."""
        found: Tensor = (pulled @ self.basis / self.square[..., None, :]) @ self.basis.mT
        return found

    def away(self, x: Float[Tensor, "s g c n"]) -> Float[Tensor, "s g c n"]:
        """An input without its strong directions."""
        return x - (x @ self.basis) @ self.basis.mT if self.basis.shape[-1] else x
