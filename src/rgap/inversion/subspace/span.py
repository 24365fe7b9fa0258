"""The row and the column space of a Linear layer's gradient over several samples.

    G = [grad W | grad b] = sum over i of c k_i (x_i, 1)'

So every (x_i, 1) lies in the row space of G and every k_i in its column space, and both have as many dimensions as
there are samples, if those are fewer than the layer has inputs and outputs. Without a bias it is x_i alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.linalg.svd import svd
from rgap.nn.layers import Layer

GAP = 10.0
"""Times the estimated rounding below which a singular value is none. A sum over samples is rounded at each of them:
what is left over was three times the estimate at 64 samples."""


@dataclass(frozen=True, eq=False)
class Span:
    """G = U core V', with orthonormal U and V and a small core, from which samples are taken as they are found."""

    layer: Layer
    u: Float[Tensor, "o r"]
    core: Float[Tensor, "r r"]
    v: Float[Tensor, "n r"]
    """The last row belongs to the bias, where there is one."""
    rank: int
    """Of the core: how many samples are left in it."""
    noise: float
    """Spectral norm of the gradient's rounding."""
    biased: bool

    @classmethod
    def of(
        cls, layer: Layer, grad_weight: Float[Tensor, "o n"], grad_bias: Float[Tensor, " o"] | None, eps: float
    ) -> Span:
        """The spaces of a layer's gradient, as wide as its rounding lets them be told.

        Args:
            grad_bias: None if the layer has no bias, or its gradient was not sent.
            eps: relative rounding of the gradients.
        """
        grad = grad_weight if grad_bias is None else torch.cat([grad_weight, grad_bias[:, None]], 1)
        # By way of R: three times as fast where a layer has many more inputs than outputs.
        q, r = torch.linalg.qr(grad.mT)
        u, sizes, small = svd(r.mT)
        spread = float(grad.square().mean().sqrt())
        (rows, columns), norm = grad.shape, grad.shape[0] ** 0.5 + grad.shape[1] ** 0.5
        noise = eps * spread * norm
        rank = int((sizes > GAP * noise).sum())
        # What is left over is rounding: of a sum it grows with the root of the number of samples.
        over = (rows - rank) * (columns - rank)
        noise = max(noise, norm * float(sizes[rank:].square().sum() / max(1, over)) ** 0.5)
        return cls(layer, u[:, :rank], sizes[:rank].diag(), q @ small[:rank].mT, rank, noise, grad_bias is not None)

    @property
    def full(self) -> bool:
        """Whether the gradient leaves nothing outside its spaces, so that these tell nothing."""
        return self.rank >= min(len(self.u), len(self.v))

    def reduced(self) -> Span:
        """The same, in bases of the spaces that the samples that are left span."""
        u, sizes, vt = svd(self.core, full=True)
        kept = slice(0, self.rank)
        # What samples that were taken leave behind is the error with which they were known.
        noise = max([self.noise, *sizes[self.rank : self.rank + 1].tolist()])
        return replace(self, u=self.u @ u[:, kept], core=sizes[kept].diag(), v=self.v @ vt[kept].mT, noise=noise)

    def row(self, x: Float[Tensor, "s n"]) -> Float[Tensor, "s row"]:
        """An input as it stands in the rows: with a one behind it where there is a bias."""
        return torch.cat([x, x.new_ones(len(x), 1)], 1) if self.biased else x

    def outside(self, k: Float[Tensor, "s o"]) -> Float[Tensor, "s o"]:
        """What of k is outside the column space."""
        return k - (k @ self.u) @ self.u.mT

    def inverse_share(self, x: Float[Tensor, "s n"], k: Float[Tensor, "s o"]) -> tuple[Tensor, Tensor]:
        """(x, 1)' G^+ k, and how far rounding may move it; (s,) each.

        The rank of G - c k (x, 1)' is lower by one exactly if c is the inverse of this (Wedderburn's rank reduction):
        of a sample it is the number of samples, since G is their mean.
        """
        a, e = self.row(x) @ self.v, k @ self.u
        left = torch.linalg.solve(self.core, a, left=False)
        right = torch.linalg.solve(self.core, e.mT).mT
        return (left * e).sum(1), self.noise * left.norm(dim=1) * right.norm(dim=1)

    def uncertainty(self, a: Float[Tensor, "s r"]) -> Float[Tensor, " s"]:
        """How far rounding of the row space moves V a, for coordinates of one input."""
        moved: Tensor = self.noise * torch.linalg.solve(self.core, a, left=False).norm(dim=1)
        return moved

    def cotangent_uncertainty(self, k: Float[Tensor, "s o"]) -> Float[Tensor, " s"]:
        """How far rounding of the column space moves cotangents in it."""
        moved: Tensor = self.noise * torch.linalg.solve(self.core, (k @ self.u).mT).norm(dim=0)
        return moved

    def error(self, k: Float[Tensor, "b o"]) -> Float[Tensor, " b"]:
        """How far rounding of G moves each value of the b inputs that solve G = sum over i of k_i (x_i, 1)'."""
        each = self.noise / (len(self.u) ** 0.5 + len(self.v) ** 0.5)
        moved: Tensor = each * torch.linalg.pinv(k.mT).norm(dim=1)
        return moved

    def without(self, x: Float[Tensor, "s n"], k: Float[Tensor, "s o"], share: Tensor) -> Span:
        """Less the s samples with these inputs and cotangents, each times its share."""
        a, e = self.row(x) @ self.v, k @ self.u
        return replace(self, core=self.core - (share[:, None] * e).mT @ a, rank=self.rank - len(x))
