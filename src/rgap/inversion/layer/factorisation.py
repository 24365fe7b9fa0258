"""The trailing directions by a dense factor of their normal equations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.layer.dominant import Dominant
from rgap.inversion.layer.restricted import restricted_grams
from rgap.inversion.layer.rows import LayerRows
from rgap.linalg import psd


class Factorisation:
    """B'(W'DW + b K'K)B, factored, for some of the systems; B holds the trailing directions of each channel."""

    def __init__(
        self,
        rows: Sequence[LayerRows],
        observed_weight: Float[Tensor, "s c n"] | None,
        dominant: Dominant,
        scale: Float[Tensor, "s g"],
        which: Sequence[tuple[int, int]],
        tolerance: float,
    ):
        """
        Args:
            observed_weight: how far each value of the input is known by itself.
            scale: b, of the gradient rows.
            which: systems and groups.
            tolerance: singular values below this fraction of the largest count as zero.
        """
        self._factors: dict[tuple[int, int], tuple[Tensor, psd.Factor]] = {}
        for s in dict.fromkeys(s for s, _ in which):
            bases = {g: dominant.trailing(s, g) for at, g in which if at == s}
            observed = None if observed_weight is None else observed_weight[s].square()
            grams = _grams(rows, observed, s, {g: basis for g, (basis, _) in bases.items()})
            for g, (basis, square) in bases.items():
                reduced, largest = grams[g]
                times = float(scale[s, g])
                reduced.diagonal().add_((times * square).repeat(len(reduced) // len(square)))
                size = max(largest, times * float(dominant.largest[s, g]) ** 2)
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


def _grams(
    rows: Sequence[LayerRows], observed: Float[Tensor, "c n"] | None, s: int, bases: dict[int, Tensor]
) -> dict[int, tuple[Float[Tensor, "cd cd"], float]]:
    """B'W'DWB of one system, on and below the diagonal, and the largest value on the diagonal of W'DW."""
    layer = rows[0].layer
    diagonal = layer.weight.new_zeros(layer.channels, layer.pixels) if observed is None else observed
    found: dict[int, Tensor] = {}
    for each in rows:
        square = None if each.square is None else each.square[s : s + 1]
        for g, gram in restricted_grams(each.layer, bases, square).items():
            found[g] = found[g] + gram if g in found else gram
        every = each.layer.weight.new_ones(1, each.layer.outputs, each.layer.positions)
        diagonal = diagonal + each.layer.grad_input(every if square is None else square, each.layer.weight.square())[0]
    by_group = diagonal.reshape(layer.groups, -1, layer.pixels)
    if observed is not None:
        for g, basis in bases.items():
            own = observed.reshape(by_group.shape)[g]
            found[g] = found[g] + psd.block_diagonal(basis.mT @ (value[:, None] * basis) for value in own)
    return {g: (gram, float(by_group[g].max())) for g, gram in found.items()}
