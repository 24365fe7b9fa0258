"""The weak directions by conjugate gradients, which multiply with the rows and form no matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rgap.constraints.periodic import periodic
from rgap.constraints.rows import Rows
from rgap.constraints.strong import Strong
from rgap.linalg import cg

STEPS = 1000
"""Of conjugate gradients, at the most; a condition of 100 takes about 1,000 to full accuracy."""
CYCLES, INNER = 6, 1e-5
"""Solves in float32, each of what the one before left, and to which part of it. Products in float32 move half the
bytes, and bytes are what most of their time goes to."""
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
        strong: Strong,
        scale: Float[Tensor, "s g"],
    ):
        """
        Args:
            direct: how far each value of the input is known by itself.
            scale: b, of the gradient rows.
        """
        layer = rows[0].layer
        around = periodic(layer) if len(rows) == 1 and direct is None else None
        self._fine = _Normal(rows, direct, strong, scale)
        self._fast = self._fine.single()
        self._precondition: Callable[[Tensor], Tensor] = self._fast.away
        if around is not None:
            self._precondition = lambda rest: self._fast.away(around(rest))
        generator = torch.Generator(device=scale.device).manual_seed(0)
        draw = torch.randn(1, layer.channels, layer.pixels, generator=generator, dtype=scale.dtype, device=scale.device)
        move = self._fine.away(draw.expand(len(scale), -1, -1))
        self._condition, self._counting, self._fully = torch.ones_like(scale[:, 0]), True, True
        found = self.solve(self._fine(move), CLOSE, None)
        self._counting = False
        left = (found - move).square().sum((1, 2))
        nothing = (strong.count == layer.pixels).all(1)  # is weak, and what is left of the move is rounding
        self.comes_back: Bool[Tensor, " s"] = nothing | (left <= COMES_BACK**2 * move.square().sum((1, 2)))
        self._fully = bool(self.comes_back.all())
        self._free = torch.where(self.comes_back, 0.0, left.round().clamp(min=1))
        self._condition = (self._condition * (1.0 if around is None else around.condition)).sqrt()

    def solve(
        self, right: Float[Tensor, "s c n"], tolerance: float, size: Float[Tensor, " s"] | None
    ) -> Float[Tensor, "s c n"]:
        """The weak part of the input, from the right side of the whole normal equations.

        Args:
            tolerance: of the residual, relative to size, or to the right side's norm.
        """
        rest = self._fine.away(right)
        x, norm = torch.zeros_like(rest), rest.flatten(1).norm(dim=1)
        target = tolerance * (norm if size is None else size)
        # What rounding and the preconditioner put into free dimensions no later cycle would take out again.
        for _ in range(CYCLES if self._fully else 0):
            if not bool((norm > target).any()):
                return x
            unit = norm.clamp(min=torch.finfo(norm.dtype).tiny)[:, None, None]
            aim = (target / unit.flatten() / 2).clamp(min=INNER, max=1.0)
            found = cg.solve(self._fast, (rest / unit).float(), 1.0, STEPS, aim.float(), self._precondition)
            if self._counting:
                self._condition = self._condition.maximum(found.condition.to(norm))
            move = unit * self._fine.away(found.x.to(rest))
            new = rest - self._fine(move)
            size_ = new.flatten(1).norm(dim=1)
            better = size_ < norm
            x = torch.where(better[:, None, None], x + move, x)
            rest = torch.where(better[:, None, None], new, rest)
            slow = bool(((size_ > 0.3 * norm) & (norm > target)).any())
            norm = torch.where(better, size_, norm)
            if slow:
                break  # too badly conditioned for float32
        if not bool((norm > target).any()):
            return x
        left = cg.solve(self._fine, rest, 1.0, STEPS, target)
        if self._counting:
            self._condition = self._condition.maximum(left.condition)
        return x + left.x

    def free(self, s: int) -> int:
        """About how many dimensions of a system the rows leave open."""
        return int(self._free[s])

    def condition(self, s: int) -> float:
        """At the most: of the preconditioned rows, times that of the preconditioner."""
        return float(self._condition[s])


class _Normal:
    """The matrix of the normal equations, as a product."""

    def __init__(
        self,
        rows: Sequence[Rows],
        direct: Float[Tensor, "s c n"] | None,
        strong: Strong,
        scale: Float[Tensor, "s g"],
    ):
        self._rows, self._strong, self._scale, self._direct = rows, strong, scale, direct

    def single(self) -> _Normal:
        """In float32, gradient rows scaled beforehand: their squares might not have a place in its range."""
        scale = self._scale.sqrt()
        rows = []
        for each in self._rows:
            k = each.k.reshape(*scale.shape, -1) * scale[..., None]
            weight = None if each.row_weight is None else each.row_weight.float()
            rows.append(Rows(each.layer.single, k.reshape(each.k.shape).float(), weight))
        direct = None if self._direct is None else self._direct.float()
        strong = self._strong.single(rows, self._scale)
        return _Normal(rows, direct, strong, torch.ones_like(self._scale, dtype=torch.float32))

    def away(self, x: Float[Tensor, "s c n"]) -> Float[Tensor, "s c n"]:
        """Without the strong directions."""
        return self._strong.away(x)

    def __call__(self, x: Float[Tensor, "s c n"]) -> Float[Tensor, "s c n"]:
        found = x.new_zeros(()) if self._direct is None else self._direct.square() * x
        for rows in self._rows:
            found = found + rows.layer.normal(x, rows.k, rows.square, self._scale)
        return self.away(found)
