"""The two kinds of constraints on one layer's input, and the input that satisfies them.

    W x = z - b      weight constraints, one row per output value   (Eq. 16)
    K x = grad W     gradient constraints, one row per weight       (Eq. 15)

K is block diagonal: one matrix K0 for every input channel (`Layer.kernel_matrix`). Its singular vectors split each
channel into *strong* directions, which the gradient alone determines, and *weak* ones. k is small but nearly exact,
while z carries the errors of all layers after this one; so the strong directions come from the gradient alone, and
only the weak ones are solved for jointly, from the weight rows and what is left of the gradient rows, scaled to the
same size. Where no direction is weak the layer passes no error on at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rgap.linalg import psd
from rgap.nn.layers import Layer

STRONG = 0.1
"""A direction is strong if its singular value in K0 is at least this fraction of the largest.

The gradient's noise, its rounding or what a defence adds, enters a direction divided by its singular value. Where that
is small the weight rows know better: with 0.1 in place of 0.001 the error under noise falls a thousandfold."""
LARGEST = 2**33
"""Bytes of the largest dense matrix that is formed."""
REFINEMENTS = 2
"""Steps of iterative refinement; a step on matrices is cheap beside their factors."""


@dataclass(frozen=True)
class Solved:
    """The least-squares input of s systems, and how well it is determined."""

    x: Float[Tensor, "s c n"]
    rank: tuple[int, ...]
    condition: tuple[float, ...]
    """How much the system magnifies a relative error: of the strong gradient rows or of the joint rows, the worse."""
    weight_residual: Float[Tensor, " s"]
    """|W x + b - z| / |z| over the rows in use."""
    gradient_residual: Float[Tensor, " s"]
    """|K x - grad W| / |grad W|."""
    weight_misfit: Float[Tensor, " s"]
    """Root mean square of W x + b - z over the rows in use: if z were right it would be rounding."""
    method: str


@dataclass(frozen=True)
class Rows:
    """What one layer says of its input, in s systems."""

    layer: Layer
    k: Float[Tensor, "s o p"]
    """Gradient of the loss with respect to the layer's output; zero where it, or that of the weight, is not known."""
    row_weight: Float[Tensor, "s o p"] | None = None
    """How far each value of z is known, 0 where its row is dropped; None means 1 everywhere."""


Side = tuple[Tensor, Tensor]
"""Of one layer, z without the bias (s, o, p) and the weight's gradient (s, g, j, i)."""


class System:
    """The constraints on one layer's input, factored, for s systems with their own k.

    Where a skip connection begins several layers read the same input, and it may itself be told by a sum.
    """

    def __init__(
        self,
        layer: Layer,
        k: Float[Tensor, "s o p"],
        row_weight: Float[Tensor, "s o p"] | None,
        tolerance: float,
        beside: Sequence[Rows] = (),
        direct: Float[Tensor, "s c n"] | None = None,
    ):
        """
        Args:
            k: gradient of the loss with respect to the layer's output.
            row_weight: how far each value of z is known, 0 where its row is dropped; None means 1 everywhere.
            tolerance: singular values below this fraction of the largest count as zero.
            beside: other layers that read the same input, with as many groups.
            direct: how far each value of the input is known by itself.

        Raises:
            ValueError: the layer is too large for dense matrices.
        """
        self.layer, self.k, self.row_weight = layer, k, row_weight
        self.rows = (Rows(layer, k, row_weight), *beside)
        self.direct = direct
        self._squares = [None if rows.row_weight is None else rows.row_weight**2 for rows in self.rows]
        _check_size(layer, len(k) * layer.groups * layer.pixels**2)
        kernel = torch.cat([rows.layer.kernel_matrix(rows.k) for rows in self.rows], dim=2)
        self._kernel_rows = kernel.shape[2]
        _, sigma, basis = torch.linalg.svd(kernel, full_matrices=True)
        self._basis: Float[Tensor, "s g n n"] = basis.mT
        self._sigma = torch.nn.functional.pad(sigma, (0, basis.shape[-1] - sigma.shape[-1]))
        largest = self._sigma[..., :1]
        self._strong: Bool[Tensor, "s g n"] = (self._sigma >= max(STRONG, tolerance) * largest) & (largest > 0)
        self._joint: dict[tuple[int, int], tuple[Tensor, float, psd.Factor]] = {}
        if not bool(self._strong.all()):
            self._factor_weak(tolerance)

    def _factor_weak(self, tolerance: float) -> None:
        layer, s_all = self.layer, len(self.k)
        per_group = layer.channels // layer.groups
        _check_size(layer, layer.groups * (per_group * layer.pixels) ** 2)
        gram = sum(
            (rows.layer.weight_gram(square) for rows, square in zip(self.rows, self._squares, strict=True)),
            start=self.k.new_zeros(()),
        )
        if self.direct is not None:
            gram = gram + torch.diag_embed(self.direct.square().reshape(s_all, layer.groups, -1))
        gradient_row = self._sigma.square().sum(-1) / self._kernel_rows
        used = self._used(s_all)
        for s, g in (~self._strong).any(-1).nonzero().tolist():
            matrix = gram[s % len(gram), g]
            weak = ~self._strong[s, g]
            basis, sigma = self._basis[s, g][:, weak], self._sigma[s, g][weak]
            n = len(basis)
            reduced = psd.congruent(matrix.reshape(per_group, n, per_group * n), basis)
            weight_row = float(matrix.trace()) / max(float(used[s, g]), 1)
            row = float(gradient_row[s, g])
            scale = (weight_row or 1.0) / row if row else 1.0
            reduced.diagonal().add_((scale * sigma.square()).repeat(per_group))
            size = max(float(matrix.diagonal().max()), scale * float(self._sigma[s, g, 0]) ** 2)
            self._joint[s, g] = basis, scale, psd.factor(reduced, tolerance, size)

    def _used(self, count: int) -> Float[Tensor, "s g"]:
        """The number of weight rows in use."""
        groups = self.layer.groups
        used = self.k.new_zeros(count, groups)
        for rows in self.rows:
            if rows.row_weight is None:
                used += rows.layer.weight_rows / groups
            else:
                used += (rows.row_weight.reshape(count, groups, -1) > 0).sum(-1)
        if self.direct is not None:
            used += (self.direct.reshape(count, groups, -1) > 0).sum(-1)
        return used

    @property
    def method(self) -> str:
        return "channel" if not self._joint else next(iter(self._joint.values()))[2].method

    @property
    def by_gradient_alone(self) -> list[bool]:
        """Per system, whether the gradient rows determine the input, so that no error of z reaches it."""
        return self._strong.all(-1).all(-1).tolist()

    @property
    def rank(self) -> tuple[int, ...]:
        """The number of independent constraints, per system."""
        per_group = self.layer.channels // self.layer.groups
        ranks = (self._strong.sum((-1, -2)) * per_group).tolist()
        for (s, _), (_, _, factor) in self._joint.items():
            ranks[s] += factor.rank
        return tuple(ranks)

    @property
    def condition(self) -> tuple[float, ...]:
        smallest = torch.where(self._strong, self._sigma, torch.inf).amin(-1)
        ratio = torch.where(smallest.isfinite(), self._sigma[..., 0] / smallest, 1.0).amax(-1).tolist()
        for (s, _), (_, _, factor) in self._joint.items():
            ratio[s] = max(ratio[s], factor.condition)
        return tuple(ratio)

    def solve(
        self,
        z: Float[Tensor, "s o p"],
        grad: Float[Tensor, "s g j i"],
        beside: Sequence[Side] = (),
        direct: Float[Tensor, "s c n"] | None = None,
    ) -> Solved:
        """The least-squares input for z (without the bias) and the weight's gradient; minimum norm where not unique.

        Args:
            beside: z and gradient of the other layers.
            direct: the input's own values, as far as they are known.
        """
        sides = ((z, grad), *beside)
        x = self._inverse(sides, direct)
        for _ in range(REFINEMENTS):
            x = x + self._inverse(self._misses(sides, x), None if direct is None else direct - x)
        misses = self._misses(sides, x)
        weighted = [
            (miss if rows.row_weight is None else miss * rows.row_weight)
            for rows, (miss, _) in zip(self.rows, misses, strict=True)
        ]
        known = [
            (z if rows.row_weight is None else z * rows.row_weight)
            for rows, (z, _) in zip(self.rows, sides, strict=True)
        ]
        if direct is not None and self.direct is not None:
            weighted.append((direct - x) * self.direct)
            known.append(direct * self.direct)
        misfit, told = _flat(weighted), _flat(known)
        count = self._used(len(x)).sum(-1).clamp(min=1)
        return Solved(
            x,
            self.rank,
            self.condition,
            _relative(misfit, told),
            _relative(_flat([miss for _, miss in misses]), _flat([given for _, given in sides])),
            (misfit.square().sum(1) / count).sqrt(),
            self.method,
        )

    def _misses(self, sides: Sequence[Side], x: Tensor) -> list[Side]:
        """What an input leaves of the right-hand sides."""
        return [
            (z - rows.layer.output(x), grad - rows.layer.grad_weight(x, rows.k))
            for rows, (z, grad) in zip(self.rows, sides, strict=True)
        ]

    def apply_inverse(
        self,
        z: Float[Tensor, "s o p"],
        grad: Float[Tensor, "s g j i"],
        beside: Sequence[Side] = (),
        direct: Float[Tensor, "s c n"] | None = None,
    ) -> Float[Tensor, "s c n"]:
        """The linear map from the right-hand sides to the solution, once, without refinement."""
        return self._inverse(((z, grad), *beside), direct)

    def _inverse(self, sides: Sequence[Side], direct: Tensor | None) -> Float[Tensor, "s c n"]:
        layer, count = self.layer, len(sides[0][0])
        shape = (count, layer.groups, layer.channels // layer.groups, layer.pixels)
        # Per channel in the singular basis: sigma^2 a = V' K0' grad.
        pulled = self.k.new_zeros(count, layer.channels, layer.pixels)
        for rows, (_, grad) in zip(self.rows, sides, strict=True):
            pulled = pulled + rows.layer.grad_input(rows.k, grad)
        pulled = pulled.reshape(shape) @ self._basis
        strong, sigma = self._strong[:, :, None], self._sigma[:, :, None]
        x = (torch.where(strong, pulled / sigma.square().clamp(min=1e-300), 0.0) @ self._basis.mT).reshape(
            count, layer.channels, layer.pixels
        )
        if not self._joint:
            return x
        back = torch.zeros_like(x)
        for rows, square, (z, _) in zip(self.rows, self._squares, sides, strict=True):
            rest = z - rows.layer.output(x)
            back = back + rows.layer.grad_input(rest if square is None else rest * square)
        if direct is not None and self.direct is not None:
            back = back + self.direct.square() * (direct - x)
        back, x = back.reshape(shape), x.reshape(shape)
        for (s, g), (basis, scale, factor) in self._joint.items():
            rhs = back[s, g] @ basis + scale * pulled[s, g][:, ~self._strong[s, g]]
            y = factor.solve(rhs.reshape(-1, 1)).reshape(rhs.shape)
            x[s, g] = x[s, g] + y @ basis.mT
        return x.reshape(count, layer.channels, layer.pixels)


def _flat(parts: Sequence[Tensor]) -> Float[Tensor, "s n"]:
    return torch.cat([part.flatten(1) for part in parts], 1)


def _check_size(layer: Layer, entries: int) -> None:
    """Refuse a matrix that would not fit into memory, before it is made."""
    if 8 * entries > LARGEST:
        raise ValueError(
            f"{layer.name} has an input of {layer.channels} x {layer.pixels} values: its constraints take a dense "
            f"matrix of {8 * entries / 2**30:.0f} GiB, more than the {LARGEST / 2**30:.0f} GiB that are solved. Attack "
            "the model with smaller inputs; `rgap.rank_analysis` takes large ones"
        )


def _relative(misfit: Tensor, reference: Tensor) -> Float[Tensor, " s"]:
    size = torch.linalg.vector_norm(reference.flatten(1), dim=1)
    ratio: Tensor = torch.linalg.vector_norm(misfit.flatten(1), dim=1) / size.clamp(min=torch.finfo(size.dtype).tiny)
    return ratio
