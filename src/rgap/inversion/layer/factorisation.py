"""The trailing directions by a dense factor of their normal equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.layer.dominant import Dominant
from rgap.linalg import psd


class Factorisation:
    """B'(W'DW + b K'K)B, factored, for some of the systems; B holds the trailing directions of each channel."""

    def __init__(
        self,
        gram: Callable[[int], Float[Tensor, "g u u"]],
        dominant: Dominant,
        scale: Float[Tensor, "s g"],
        which: Sequence[tuple[int, int]],
        tolerance: float,
    ):
        """
        Args:
            gram: W'DW of a system.
            scale: b, of the gradient rows.
            which: systems and groups.
            tolerance: singular values below this fraction of the largest count as zero.
        """
        self._factors: dict[tuple[int, int], tuple[Tensor, psd.Factor]] = {}
        grams = {s: gram(s) for s in dict.fromkeys(s for s, _ in which)}
        for s, g in which:
            matrix = grams[s][g]
            basis, square = dominant.trailing(s, g)
            n, times = len(basis), float(scale[s, g])
            channels = len(matrix) // n
            reduced = psd.congruent(matrix.reshape(channels, n, channels * n), basis)
            reduced.diagonal().add_((times * square).repeat(channels))
            size = max(float(matrix.diagonal().max()), times * float(dominant.largest[s, g]) ** 2)
            self._factors[s, g] = basis, psd.factor(reduced, tolerance, size)

    def solve(self, right: Float[Tensor, "s g c n"]) -> Float[Tensor, "s g c n"]:
        """The trailing part of the input, from the right side of the whole normal equations; zero for other systems."""
        x = torch.zeros_like(right)
        for (s, g), (basis, factor) in self._factors.items():
            rhs = right[s, g] @ basis
            x[s, g] = factor.solve(rhs.reshape(-1, 1)).reshape(rhs.shape) @ basis.mT
        return x

    def rank(self, s: int) -> int:
        """Of all groups of a system."""
        return sum(factor.rank for (at, _), (_, factor) in self._factors.items() if at == s)

    def condition(self, s: int) -> float:
        return max(factor.condition for (at, _), (_, factor) in self._factors.items() if at == s)

    def method(self, s: int) -> str:
        return next(factor.method for (at, _), (_, factor) in self._factors.items() if at == s)

    def null(self, s: int) -> Float[Tensor, "u free"]:
        """An orthonormal basis of what a system leaves open, its groups one after another."""
        found = []
        for (at, _), (basis, factor) in self._factors.items():
            if at == s:
                own = factor.null.reshape(-1, basis.shape[1], factor.null.shape[1])
                found.append((basis @ own).flatten(0, 1))
        return psd.block_diagonal(found)

    def columns(self, s: int, right: Float[Tensor, "c n m"]) -> Float[Tensor, "c n m"]:
        """As `solve` for many right sides of one system of one group."""
        basis, factor = self._factors[s, 0]
        rhs = basis.mT @ right
        return basis @ factor.solve(rhs.flatten(0, 1)).reshape(rhs.shape)
