"""One layer's constraints, factored, and the input that satisfies them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.layer.cost import (
    LARGEST,
    PRODUCTS,
    Solver,
    factor_is_cheaper,
    fits,
    kernel_rows,
    splits,
    worth_a_factor,
)
from rgap.inversion.layer.dominant import Dominant
from rgap.inversion.layer.factorisation import Factorisation
from rgap.inversion.layer.iterative import Iterative
from rgap.inversion.layer.rows import LayerRows, Rhs, flat
from rgap.nn.layers import Layer

COUNTED = 8192
"""Unknowns up to which free dimensions are counted by a factor."""
REFINEMENTS = 2
"""Steps of iterative refinement; a step on matrices is cheap beside their factors. Conjugate gradients refine by
themselves."""
ALONE = 1e-3
"""The fraction of the largest singular value of gradient rows that a direction needs where no weight rows are used."""
FINEST, COARSE = 1e-14, 1e-3
"""Relative residuals of an iterative solve: at the best, and for a draw of noise, of which the size alone matters."""


@dataclass(frozen=True)
class LayerSolution:
    """The least-squares input of s systems, and how well it is determined."""

    x: Float[Tensor, "s c n"]
    rank: tuple[int, ...]
    condition: tuple[float, ...]
    """How much the system magnifies a relative error: of the dominant gradient rows or of the joint rows, the worse."""
    weight_residual: Float[Tensor, " s"]
    """|W x + b - z| / |z| over the rows in use."""
    gradient_residual: Float[Tensor, " s"]
    """|K x - grad W| / |grad W|."""
    weight_misfit: Float[Tensor, " s"]
    """Root mean square of W x + b - z over the rows in use: if z were right it would be rounding."""
    method: tuple[str, ...]
    """How each was solved: ``channel``, ``cholesky``, ``pivoted``, ``eigen`` or ``iterative``."""


class LayerSystem:
    """The constraints on one layer's input, factored, for s systems with their own k.

    Where a skip connection begins several layers read the same input, and its own values may be known from a sum.
    """

    def __init__(
        self,
        layer: Layer,
        k: Float[Tensor, "s o p"],
        row_weight: Float[Tensor, "s o p"] | None,
        tolerance: float,
        others: Sequence[LayerRows] = (),
        observed_weight: Float[Tensor, "s c n"] | None = None,
        solver: Solver = "auto",
        counted: int = COUNTED,
        alone: bool = False,
        probed: bool = True,
    ):
        """
        Args:
            k: gradient of the loss with respect to the layer's output.
            row_weight: how far each value of z is known, 0 where its row is dropped; None means 1 everywhere.
            tolerance: singular values below this fraction of the largest count as zero.
            others: other layers that read the same input, with as many groups.
            observed_weight: how far each value of the input is known by itself.
            solver: for the trailing directions.
            counted: unknowns up to which free dimensions are counted by a factor.
            alone: gradient rows alone are solved, and what they do not determine stays open.
            probed: whether a null space is looked for where no factor shows it; else there is none by assumption.

        Raises:
            ValueError: the layer is too large for the dense matrices of a direct solver.
        """
        self.layer, self.k = layer, k
        self.rows = (LayerRows(layer, k, row_weight), *others)
        self.observed_weight, self._tolerance = observed_weight, tolerance
        self._factorisation: Factorisation | None = None
        self._iterative: Iterative | None = None
        if alone:
            self._dominant, self._trailing = Dominant(self.rows, tolerance, False, dominant=ALONE), []
            return
        if solver == "direct":
            _fitting(layer)
        count = sum(kernel_rows(rows.layer) for rows in self.rows)
        self._splits = splits(layer, count, spare=bool((self._used.sum(-1) > layer.unknowns).all()))
        self._dominant = self._split(self._dense(solver, layer.pixels - count, count, self._splits))
        self._trailing = [(s, g) for s, g in (self._dominant.count < layer.pixels).nonzero().tolist()]
        if not self._trailing:
            return
        trailing = layer.pixels - int(self._dominant.count.min())
        factored = solver == "auto" and layer.unknowns <= counted and fits(layer)
        if not self._dense(solver, trailing, count, self._dominant.complete) and not (factored and self._too_few):
            patience = _patience(layer, trailing, len(k), count) if factored else None
            self._iterative = Iterative(self.rows, observed_weight, self._dominant, self._scale, patience, probed)
            full = self._iterative.full_rank.tolist()
            if solver == "iterative" or all(full) or layer.unknowns > counted:
                return
            # A factor counts the free dimensions exactly.
            self._trailing = [(s, g) for s, g in self._trailing if not full[s]]
            self._iterative = self._iterative if any(full) else None
        if not self._dominant.complete:
            self._dominant = self._split(True)
        self._factorisation = Factorisation(
            self.rows, observed_weight, self._dominant, self._scale, self._trailing, tolerance
        )

    def _dense(self, solver: Solver, trailing: int, rows: int, may_be: bool) -> bool:
        worth = solver == "auto" and may_be and factor_is_cheaper(self.layer, trailing, len(self.k), rows)
        return solver == "direct" or worth

    def _split(self, complete: bool) -> Dominant:
        no_gradient = not any(bool(each.k.any()) for each in self.rows)
        none = not complete and (no_gradient or not self._splits)
        return Dominant(self.rows, self._tolerance, complete, none)

    @cached_property
    def _scale(self) -> Float[Tensor, "s g"]:
        """Of the gradient rows, squared: it makes both kinds of rows the same size."""
        size, used = self.k.new_zeros(()), self._used
        for rows in self.rows:
            size = size + rows.size
        if self.observed_weight is not None:
            size = size + self.observed_weight.square().reshape(*used.shape, -1).sum(-1)
        row = size / used.clamp(min=1)
        kernel = torch.stack([rows.kernel_size for rows in self.rows]).sum(0)
        gradient_row = kernel / sum(kernel_rows(rows.layer) for rows in self.rows)
        return torch.where(gradient_row > 0, torch.where(row > 0, row, 1.0) / gradient_row.clamp(min=1e-300), 1.0)

    @cached_property
    def _used(self) -> Float[Tensor, "s g"]:
        """The number of weight rows in use."""
        used = torch.stack([rows.used for rows in self.rows]).sum(0)
        if self.observed_weight is not None:
            used = used + (self.observed_weight.reshape(*used.shape, -1) > 0).sum(-1)
        return used

    @property
    def _too_few(self) -> bool:
        """Whether every system has fewer constraints than unknowns, so that a factor has to count what is open."""
        most = self._used.sum(-1)
        for rows in self.rows:
            # Where every weight row is in use it repeats some of the gradient rows.
            own = rows.layer.spare_rows if rows.row_weight is None else rows.layer.gradient_rows
            most = most + own * rows.k.flatten(1).any(1)
        return bool((most < self.layer.unknowns).all())

    @property
    def method(self) -> tuple[str, ...]:
        """How each system is solved."""
        factored = {s for s, _ in self._trailing} if self._factorisation is not None else set()
        return tuple(
            self._factorisation.method(s)
            if self._factorisation is not None and s in factored
            else "channel"
            if determined or self._iterative is None
            else "iterative"
            for s, determined in enumerate(self.determined_by_gradient)
        )

    @property
    def direct(self) -> bool:
        """Whether no conjugate gradients are left to solve by, so that another right side takes little."""
        return self._iterative is None

    @property
    def determined_by_gradient(self) -> list[bool]:
        """Per system, whether the gradient rows determine the input, so that no error of z reaches it."""
        return (self._dominant.count == self.layer.pixels).all(-1).tolist()

    @property
    def rank(self) -> tuple[int, ...]:
        """The number of independent constraints, per system; where conjugate gradients find it too small, about."""
        per_group = self.layer.channels // self.layer.groups
        ranks = (self._dominant.count.sum(-1) * per_group).tolist()
        for s, method in enumerate(self.method):
            if method == "iterative" and self._iterative is not None:
                ranks[s] = self.layer.unknowns - self._iterative.free(s)
            elif method != "channel" and self._factorisation is not None:
                ranks[s] += self._factorisation.rank(s)
        return tuple(ranks)

    def null(self, s: int) -> Float[Tensor, "u free"] | None:
        """An orthonormal basis of what the constraints of one system leave open; None where no factor tells it."""
        return None if self._factorisation is None else self._factorisation.null(s)

    def covariance(self, s: int, right: Float[Tensor, "c n m"]) -> Float[Tensor, "c n m"]:
        """What the inverse normal equations of one system of one group, without what is open, make of m inputs."""
        assert self._factorisation is not None
        return self._factorisation.columns(s, right)

    @property
    def condition(self) -> tuple[float, ...]:
        ratio = self._dominant.condition.amax(-1).tolist()
        for s, method in enumerate(self.method):
            if method == "iterative" and self._iterative is not None:
                ratio[s] = max(ratio[s], self._iterative.condition(s))
            elif method != "channel" and self._factorisation is not None:
                ratio[s] = max(ratio[s], self._factorisation.condition(s))
        return tuple(ratio)

    def solve(
        self,
        z: Float[Tensor, "s o p"],
        grad: Float[Tensor, "s g j i"],
        others: Sequence[Rhs] = (),
        observed_input: Float[Tensor, "s c n"] | None = None,
        tolerance: float = FINEST,
    ) -> LayerSolution:
        """The least-squares input for z (without the bias) and the weight's gradient; minimum norm where not unique.

        Args:
            others: z and gradient of the other layers.
            observed_input: the input's own values, as far as they are known.
            tolerance: relative residual at which an iterative solve may end.
        """
        rhs = ((z, grad), *others)
        fine = max(self._tolerance**2 / 2, tolerance)
        x, size = self._inverse(rhs, observed_input, fine)
        for _ in range(REFINEMENTS if self._factorisation is not None or self._iterative is None else 0):
            more, _ = self._inverse(
                self._misses(rhs, x), None if observed_input is None else observed_input - x, fine, size
            )
            x = x + more
        misses = self._misses(rhs, x)
        weighted = [rows.weighted(miss) for rows, (miss, _) in zip(self.rows, misses, strict=True)]
        known = [rows.weighted(z) for rows, (z, _) in zip(self.rows, rhs, strict=True)]
        if observed_input is not None and self.observed_weight is not None:
            weighted.append((observed_input - x) * self.observed_weight)
            known.append(observed_input * self.observed_weight)
        misfit, reference = flat(weighted), flat(known)
        return LayerSolution(
            x,
            self.rank,
            self.condition,
            _relative(misfit, reference),
            _relative(flat([miss for _, miss in misses]), flat([given for _, given in rhs])),
            (misfit.square().sum(1) / self._used.sum(-1).clamp(min=1)).sqrt(),
            self.method,
        )

    def _misses(self, rhs: Sequence[Rhs], x: Tensor) -> list[Rhs]:
        """What an input leaves of the right-hand sides."""
        return [
            (z - rows.layer.output(x), grad - rows.layer.grad_weight(x, rows.k))
            for rows, (z, grad) in zip(self.rows, rhs, strict=True)
        ]

    def apply_inverse(
        self,
        z: Float[Tensor, "s o p"],
        grad: Float[Tensor, "s g j i"],
        others: Sequence[Rhs] = (),
        observed_input: Float[Tensor, "s c n"] | None = None,
    ) -> Float[Tensor, "s c n"]:
        """The linear map from the right-hand sides to the solution, as exactly as the size of noise needs."""
        return self._inverse(((z, grad), *others), observed_input, COARSE)[0]

    def _inverse(
        self, rhs: Sequence[Rhs], observed_input: Tensor | None, tolerance: float, size: Tensor | None = None
    ) -> tuple[Float[Tensor, "s c n"], Float[Tensor, " s"]]:
        """The solution once, without refinement, and the norm of the right side of its normal equations.

        Args:
            tolerance: of an iterative solve, relative to size.
        """
        layer, count = self.layer, len(rhs[0][0])
        shape = (count, layer.groups, layer.channels // layer.groups, layer.pixels)
        x = self._dominant.pinv([grad for _, grad in rhs])
        if self._factorisation is None and self._iterative is None:
            return x, x.new_zeros(count)
        right = torch.zeros_like(x)
        for rows, (z, grad) in zip(self.rows, rhs, strict=True):
            rest = z - rows.layer.output(x)
            right = right + rows.layer.grad_input(rest if rows.square is None else rest * rows.square)
            right = right + rows.layer.grad_input(rows.k, self._scale[..., None, None] * grad)
        if observed_input is not None and self.observed_weight is not None:
            right = right + self.observed_weight.square() * (observed_input - x)
        size = right.flatten(1).norm(dim=1) if size is None else size
        own = (
            torch.zeros_like(x)
            if self._factorisation is None
            else self._factorisation.solve(right.reshape(shape)).reshape(x.shape)
        )
        if self._iterative is not None:
            more = self._iterative.solve(right, tolerance, size)
            factored = {s for s, _ in self._trailing} if self._factorisation is not None else set()
            keep = torch.tensor([s not in factored for s in range(count)], device=x.device)
            own = torch.where(keep[:, None, None], more, own)
        return x + own, size


def _relative(misfit: Tensor, reference: Tensor) -> Float[Tensor, " s"]:
    size = torch.linalg.vector_norm(reference.flatten(1), dim=1)
    ratio: Tensor = torch.linalg.vector_norm(misfit.flatten(1), dim=1) / size.clamp(min=torch.finfo(size.dtype).tiny)
    return ratio


def _patience(layer: Layer, trailing: int, samples: int, rows: int) -> int:
    """A factor follows where the rows have a null space, and takes no longer than so many products."""
    return math.ceil(max(PRODUCTS, worth_a_factor(layer, trailing, samples, rows)))


def _fitting(layer: Layer) -> None:
    """Raise a ValueError where a direct solver's matrices would be too large."""
    if not fits(layer):
        size = 8 * layer.groups * (layer.channels // layer.groups * layer.pixels) ** 2
        raise ValueError(
            f"{layer.name} has an input of {layer.channels} x {layer.pixels} values: its constraints take a dense "
            f"matrix of {size / 2**30:.0f} GiB, more than the {LARGEST / 2**30:.0f} GiB that are factored: "
            "expected solver 'auto' or 'iterative'"
        )
