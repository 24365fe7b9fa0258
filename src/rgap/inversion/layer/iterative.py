"""The trailing directions by conjugate gradients, which multiply with the rows and form no matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rgap.inversion.layer.dominant import Dominant
from rgap.inversion.layer.periodic import periodic
from rgap.inversion.layer.rows import LayerRows
from rgap.linalg import mixed
from rgap.nn.layers import Layer

CYCLE, STEPS = 1000, 4000
"""Of conjugate gradients in float32 between two residuals, and in each precision, at the most; a condition of 100 takes
about 1,000 to full accuracy."""
PROBED = 2
"""Solves by which a random input is to come back from its rows."""
NULL_SPACE, CLOSE = 1e-4, 1e-6
"""Where a random input is recovered from its rows to this relative error the rows have no null space; solved to this
residual, so that rounding and steps left out are no part of what is not recovered."""


class Iterative:
    """P(W'DW + b K'K)P y = P r, where P takes the dominant directions away.

    Whether the rows determine y a probe of their null space tells: a random input is recovered from its rows, or it is
    not. Of f free dimensions the part that is lost has a square of f on average, which is how they are counted; a
    factor of the matrix would count exactly.
    """

    def __init__(
        self,
        rows: Sequence[LayerRows],
        observed_weight: Float[Tensor, "s c n"] | None,
        dominant: Dominant,
        scale: Float[Tensor, "s g"],
        patience: int | None = None,
        probed: bool = True,
    ):
        """
        Args:
            observed_weight: how far each value of the input is known by itself.
            scale: b, of the gradient rows.
            patience: products after which a probe of the null space is given up, and the rows are said to have one;
                None: it goes on to its end.
            probed: else the rows are taken to determine the input.
        """
        layer = rows[0].layer
        around = periodic(layer) if len(rows) == 1 and observed_weight is None else None
        self._fine = _Normal(rows, observed_weight, dominant, scale)
        self._fast = self._fine.single()
        self._precondition: Callable[[Tensor], Tensor] = self._fast.deflate
        if around is not None:
            self._precondition = lambda rest: self._fast.deflate(around(rest))
        self._condition, self._counting, self._fully = torch.ones_like(scale[:, 0]), True, True
        all_dominant = (dominant.count == layer.pixels).all(1)
        self._left = math.inf if patience is None else patience
        self.full_rank, self._free = torch.ones_like(all_dominant), torch.zeros_like(scale[:, 0])
        if probed:
            self.full_rank, self._free = self._null_space_probe(layer, all_dominant)
        self._left = math.inf
        self._counting, self._fully = False, bool(self.full_rank.all())
        self._condition = (self._condition * (1.0 if around is None else around.condition)).sqrt()

    def _null_space_probe(
        self, layer: Layer, all_dominant: Bool[Tensor, " s"]
    ) -> tuple[Bool[Tensor, " s"], Float[Tensor, " s"]]:
        """Whether the rows determine the trailing part, and about how many dimensions they leave free.

        Args:
            all_dominant: systems without a trailing part; what is left of their draw is rounding.
        """
        like = self._condition
        generator = torch.Generator(device=like.device).manual_seed(0)
        draw = torch.randn(1, layer.channels, layer.pixels, generator=generator, dtype=like.dtype, device=like.device)
        x = self._fine.deflate(draw.expand(len(like), -1, -1))
        found = torch.zeros_like(x)
        for _ in range(PROBED):  # what is hardly seen is told from what is not by solving for what is left
            found = found + self.solve(self._fine(x - found), CLOSE, None, partial(_recovered, x - found, x))
            lost = (found - x).square().sum((1, 2))
            full_rank = all_dominant | (lost <= NULL_SPACE**2 * x.square().sum((1, 2)))
            if bool(full_rank.all()) or self._left <= 0:
                break
        return full_rank, torch.where(full_rank, 0.0, lost.round().clamp(min=1))

    def solve(
        self,
        right: Float[Tensor, "s c n"],
        tolerance: float,
        size: Float[Tensor, " s"] | None,
        enough: Callable[[Tensor], bool] | None = None,
    ) -> Float[Tensor, "s c n"]:
        """The trailing part of the input, from the right side of the whole normal equations.

        Args:
            tolerance: of the residual, relative to size, or to the right side's norm.
            enough: is shown what was found so far, and ends the solve by saying so.
        """
        rest = self._fine.deflate(right)
        size = rest.flatten(1).norm(dim=1) if size is None else size
        # What rounding and the preconditioner put into free dimensions no later cycle would take out again.
        found = mixed.solve(
            self._fine,
            self._fast if self._fully else None,
            rest,
            tolerance * size,
            STEPS,
            cycle=CYCLE,
            patience=self._left,
            precondition=self._precondition,
            project=self._fine.deflate,
            enough=enough,
        )
        self._left -= found.steps
        if self._counting:
            self._condition = self._condition.maximum(found.condition)
        return found.x

    def free(self, s: int) -> int:
        """About how many dimensions of a system the rows leave open."""
        return int(self._free[s])

    def condition(self, s: int) -> float:
        """At the most: of the preconditioned rows, times that of the preconditioner."""
        return float(self._condition[s])


def _recovered(drawn: Tensor, of: Tensor, found: Tensor) -> bool:
    """Whether what was drawn came back so nearly that the rows have no null space."""
    lost = (found - drawn).square().sum((1, 2))
    return bool((lost <= (NULL_SPACE / 2) ** 2 * of.square().sum((1, 2))).all())


class _Normal:
    """The matrix of the normal equations, as a product."""

    def __init__(
        self,
        rows: Sequence[LayerRows],
        observed_weight: Float[Tensor, "s c n"] | None,
        dominant: Dominant,
        scale: Float[Tensor, "s g"],
    ):
        self._rows, self._dominant, self._scale, self._observed_weight = rows, dominant, scale, observed_weight

    def single(self) -> _Normal:
        """In float32, gradient rows scaled beforehand: their squares might not have a place in its range."""
        scale = self._scale.sqrt()
        rows = []
        for each in self._rows:
            k = each.k.reshape(*scale.shape, -1) * scale[..., None]
            weight = None if each.row_weight is None else each.row_weight.float()
            rows.append(LayerRows(each.layer.single, k.reshape(each.k.shape).float(), weight))
        observed_weight = None if self._observed_weight is None else self._observed_weight.float()
        dominant = self._dominant.single(rows, self._scale)
        return _Normal(rows, observed_weight, dominant, torch.ones_like(self._scale, dtype=torch.float32))

    def deflate(self, x: Float[Tensor, "s c n"]) -> Float[Tensor, "s c n"]:
        """Without the dominant directions."""
        return self._dominant.deflate(x)

    def __call__(self, x: Float[Tensor, "s c n"]) -> Float[Tensor, "s c n"]:
        found = x.new_zeros(()) if self._observed_weight is None else self._observed_weight.square() * x
        for rows in self._rows:
            found = found + rows.layer.normal(x, rows.k, rows.square, self._scale)
        return self.deflate(found)
