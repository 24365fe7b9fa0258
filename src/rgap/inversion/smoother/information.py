"""What rows tell of a value of a chain and of a few numbers beside it, as a normal distribution in information form.

    minus twice the log likelihood of (x, d) is  x'H x + 2 x'C d + d'S d - 2 b'x - 2 e'd

x is one value of the network, d what disturbs the rows of several layers alike: slopes that are in doubt, and the
change of the output's cotangent. It goes from the output to the input, a layer or an activation at a time: pulled back
through a linear operation, with the layer's own gradient rows added, and blurred by what a straight line leaves of an
activation. Nothing is formed but matrices of the size of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from rgap.linalg import deadline
from rgap.linalg.psd import cholesky_solve
from rgap.nn.layers import Layer

CHUNK = 256
"""Columns that are pulled back at once."""
LEAST = 1e-3
"""Noise that is less than this part of what is known of a value changes nothing."""


@dataclass(frozen=True, eq=False)
class Blurred:
    """Values that an activation's line leaves a noise n on, and what tells it once x is known without: of the u of them
    n = (1/q + H)^-1 (b - H x - C d)."""

    index: Int[Tensor, " u"]
    known: Float[Tensor, "v u"]
    cross: Float[Tensor, "u m"]
    right: Float[Tensor, " u"]
    lower: Float[Tensor, "u u"]

    def noise(
        self,
        x: Float[Tensor, "s v"],
        d: Float[Tensor, "s m"],
        draw: torch.Generator | None = None,
        homogeneous: bool = False,
    ) -> Float[Tensor, "s u"]:
        """The noise that fits, or one draw of it beside each x and d; homogeneous: of what is left of b."""
        right = -(x @ self.known) - d[:, d.shape[1] - self.cross.shape[1] :] @ self.cross.mT
        found = cholesky_solve((right if homogeneous else right + self.right).mT, self.lower)
        if draw is not None:
            drawn = torch.randn(found.shape, generator=draw, dtype=x.dtype, device=x.device)
            found = found + torch.linalg.solve_triangular(self.lower.mT, drawn, upper=True)
        return found.mT


@dataclass(frozen=True, eq=False)
class Information:
    """H, C, b, S and e of the rows behind one value."""

    known: Float[Tensor, "v v"]
    cross: Float[Tensor, "v m"]
    right: Float[Tensor, " v"]
    beside: Float[Tensor, "m m"]
    beside_right: Float[Tensor, " m"]

    @classmethod
    def nothing(cls, values: int, beside: int, like: Tensor) -> Information:
        zeros = like.new_zeros
        return cls(zeros(values, values), zeros(values, beside), zeros(values), zeros(beside, beside), zeros(beside))

    def pulled(self, back: Callable[[Tensor], Tensor]) -> Information:
        """Of the value that a linear operation reads; back is its adjoint, (v, columns) to (u, columns)."""

        def each(matrix: Tensor) -> Tensor:
            deadline.check()
            return torch.cat([back(part) for part in torch.split(matrix, CHUNK, 1)], 1)

        known = each(each(self.known).mT)
        columns = each(torch.cat([self.cross, self.right[:, None]], 1))
        return Information((known + known.mT) / 2, columns[:, :-1], columns[:, -1], self.beside, self.beside_right)

    def shifted(self, by: Float[Tensor, " v"]) -> Information:
        """Of x where the rows are of x + by."""
        return Information(
            self.known,
            self.cross,
            self.right - self.known @ by,
            self.beside,
            self.beside_right - self.cross.mT @ by,
        )

    def scaled(self, slope: Float[Tensor, " v"]) -> Information:
        """Of z where x = slope z."""
        known = slope[:, None] * self.known * slope
        return Information(known, slope[:, None] * self.cross, slope * self.right, self.beside, self.beside_right)

    def blurred(self, variance: Float[Tensor, " v"]) -> tuple[Information, Blurred | None]:
        """Of x where the rows are of x plus a noise of these variances."""
        index = (variance * self.known.diagonal() > LEAST).nonzero().flatten()
        if not len(index):
            return self, None
        part = self.known[:, index]
        inner = part[index].clone()
        inner.diagonal().add_(1 / variance[index])
        lower = torch.linalg.cholesky(inner)
        mine = torch.cat([part.mT, self.cross[index], self.right[index, None]], 1)
        half = torch.linalg.solve_triangular(lower, mine, upper=False)
        values = len(self.known)
        x, d, b = half[:, :values], half[:, values:-1], half[:, -1]
        found = Information(
            self.known - x.mT @ x,
            self.cross - x.mT @ d,
            self.right - x.mT @ b,
            self.beside - d.mT @ d,
            self.beside_right - d.mT @ b,
        )
        return found, Blurred(index, part, self.cross[index], self.right[index], lower)

    def with_rows(
        self,
        layer: Layer,
        k: Float[Tensor, "o p"],
        weight: Float[Tensor, "g j i"],
        missed: Float[Tensor, "g j i"],
        effects: Float[Tensor, "m g j i"],
    ) -> Information:
        """And the layer's gradient rows, K x + E d = missed, each by its weight.

        Args:
            k: cotangent of the layer's output.
            weight: one over each row's variance.
            effects: E, what the numbers beside do to the rows, in float32 too. There may be more of them than so far:
                then the first ones do nothing to the rows behind.
        """
        more = len(effects) - len(self.beside)
        known = self.known.clone()
        for at, block in _blocks(layer, k, weight):
            known[at : at + len(block), at : at + len(block)] += block
        pulled, right = list[Tensor](), list[Tensor]()
        for part in torch.split(effects, CHUNK):
            heavy = part.to(weight) * weight
            pulled.append(_pulled(layer, k, heavy))
            right.append(heavy.flatten(1) @ missed.flatten())
        own = _pulled(layer, k, (weight * missed)[None])[0]
        return Information(
            known,
            pad(self.cross, (more, 0)) + torch.cat(pulled).mT,
            self.right + own,
            pad(self.beside, (more, 0, more, 0)) + _gram(effects.flatten(1), weight.flatten()),
            pad(self.beside_right, (more, 0)) + torch.cat(right),
        )

    def with_sums(
        self, weight: Float[Tensor, " r"], missed: Float[Tensor, " r"], effects: Float[Tensor, "m r"]
    ) -> Information:
        """And rows that x is not in, E d = missed: of a bias's gradient."""
        effects = effects.to(weight)
        heavy = effects * weight
        beside, right = self.beside + heavy @ effects.mT, self.beside_right + heavy @ missed
        return Information(self.known, self.cross, self.right, beside, right)


def _blocks(layer: Layer, k: Float[Tensor, "o p"], weight: Float[Tensor, "g j i"]) -> list[tuple[int, Tensor]]:
    """K' weight K, a block for each channel, which K does not mix; with the number of each block's first value."""
    matrix, found = layer.kernel_matrix(k[None])[0], []
    groups, rows, pixels = matrix.shape
    each = weight.reshape(groups, -1, layer.channels // groups, layer.offsets).movedim(2, 1)
    for g in range(groups):
        for channel, own in enumerate(each[g].reshape(-1, rows)):
            at = (g * (layer.channels // groups) + channel) * pixels
            found.append((at, (matrix[g] * own[:, None]).mT @ matrix[g]))
    return found


def _gram(effects: Float[Tensor, "m r"], weight: Float[Tensor, " r"]) -> Float[Tensor, "m m"]:
    """E weight E', a block and the one opposite at once."""
    found, parts = weight.new_empty(len(effects), len(effects)), range(0, len(effects), CHUNK)
    for row in parts:
        deadline.check()
        heavy = effects[row : row + CHUNK].to(weight) * weight
        for column in parts[: row // CHUNK + 1]:
            block = heavy @ effects[column : column + CHUNK].to(weight).mT
            found[row : row + CHUNK, column : column + CHUNK] = block
            found[column : column + CHUNK, row : row + CHUNK] = block.mT
    return found


def _pulled(layer: Layer, k: Float[Tensor, "o p"], rows: Float[Tensor, "m g j i"]) -> Float[Tensor, "m v"]:
    """K' times each of the rows."""
    return layer.grad_input(k.expand(len(rows), *k.shape), rows).flatten(1)


def adjoint(layer: Layer, columns: Float[Tensor, "v m"]) -> Float[Tensor, "u m"]:
    """W' times columns: with them side by side at every position, one product and additions of whole rows."""
    m = columns.shape[1]
    by_group = columns.reshape(layer.groups, -1, layer.positions * m)
    patches = (layer.weight.mT @ by_group).reshape(layer.channels, -1, m)
    out = columns.new_zeros(layer.channels, layer.pixels + 1, m)
    return out.index_add_(1, layer.table.reshape(-1), patches)[:, :-1].reshape(-1, m)
