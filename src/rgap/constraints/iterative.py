"""The weak directions by conjugate gradients, which multiply with the rows and form no matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rgap.constraints.rows import Rows
from rgap.constraints.strong import Strong
from rgap.linalg import cg

STEPS = 1000
"""Of conjugate gradients, at the most; a condition of 100 takes about 1,000 to full accuracy."""
COMES_BACK, CLOSE = 1e-4, 1e-6
"""A drawn move that comes back from its rows to this part of itself has no part that they do not see; solved to this
residual, so that rounding and steps left undone are no part of what does not come back."""


class Iterative:
    """P(W'DW + b K'K)P y = P r, where P takes the strong directions away.

    Whether the rows determine y shows in a move that is drawn: it comes back from what the rows say of it, or it does
    not. Of f free dimensions the part that does not come back has a square of f on average, which is how they are
    counted; a factor of the matrix would count exactly.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        direct: Float[Tensor, "s c n"] | None,
        strong: Strong | None,
        scale: Float[Tensor, "s g"],
    ):
        """
        Args:
            direct: how far each value of the input is known by itself.
            strong: None where there are no strong directions.
            scale: b, of the gradient rows.
        """
        self._rows, self._strong, self._scale = rows, strong, scale
        self._square = None if direct is None else direct.square()
        layer = rows[0].layer
        generator = torch.Generator(device=scale.device).manual_seed(0)
        draw = torch.randn(1, layer.channels, layer.pixels, generator=generator, dtype=scale.dtype, device=scale.device)
        move = self._away(draw.expand(len(scale), -1, -1))
        found = cg.solve(self._normal, self._normal(move), CLOSE, STEPS)
        left = (found.x - move).square().sum((1, 2))
        self.comes_back: Bool[Tensor, " s"] = left <= COMES_BACK**2 * move.square().sum((1, 2))
        self._free = torch.where(self.comes_back, 0.0, left.round().clamp(min=1))
        self._condition = found.condition.sqrt()

    def solve(
        self, right: Float[Tensor, "s c n"], tolerance: float, size: Float[Tensor, " s"] | None
    ) -> Float[Tensor, "s c n"]:
        """The weak part of the input, from the right side of the whole normal equations.

        Args:
            tolerance: of the residual, relative to size, or to the right side's norm.
        """
        return cg.solve(self._normal, self._away(right), tolerance, STEPS, size).x

    def free(self, s: int) -> int:
        """About how many dimensions of a system the rows leave open."""
        return int(self._free[s])

    def condition(self, s: int) -> float:
        return float(self._condition[s])

    def _away(self, x: Tensor) -> Tensor:
        if self._strong is None:
            return x
        groups = self._scale.shape[1]
        return self._strong.away(x.reshape(len(x), groups, -1, x.shape[-1])).reshape(x.shape)

    def _normal(self, x: Tensor) -> Tensor:
        found = x.new_zeros(()) if self._square is None else self._square * x
        for rows in self._rows:
            found = found + rows.layer.normal(x, rows.k, rows.square, self._scale)
        return self._away(found)
