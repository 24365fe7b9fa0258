"""Solving with one symmetric positive semidefinite matrix: Cholesky where it is definite, its eigenvalues where not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

ITERATIONS = 12
"""Steps of power and inverse iteration for the condition estimate; more change it by a few per cent."""


@dataclass(frozen=True)
class Factor:
    """A factored matrix M."""

    rank: int
    """Number of eigenvalues above the tolerance."""
    condition: float
    """Square root of the largest over the smallest eigenvalue above the tolerance: that of the rows behind M = R'R."""
    method: str
    _solve: tuple[Tensor, ...]

    def solve(self, rhs: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """The minimum-norm least-squares solution of M y = rhs."""
        if self.method == "cholesky":
            return cholesky_solve(rhs, self._solve[0])
        vectors, inverse = self._solve
        return vectors @ (inverse[:, None] * (vectors.mT @ rhs))

    @property
    def null(self) -> Float[Tensor, "n free"]:
        """An orthonormal basis of the null space."""
        if self.method == "cholesky":
            return self._solve[0].new_zeros(len(self._solve[0]), 0)
        vectors, inverse = self._solve
        return vectors[:, inverse == 0]


def factor(matrix: Float[Tensor, "n n"], tolerance: float, size: float = 0.0) -> Factor:
    """Factor a symmetric positive semidefinite matrix M = R'R, of which only the lower triangle is read.

    Args:
        tolerance: singular values of R below tolerance times the largest count as zero. Because M holds their
            squares, nothing below about 1e-7 can be told from zero, whatever the tolerance.
        size: what the largest eigenvalue is at least compared with. Where M is what remains of a larger matrix, that
            one's size: all of M may be rounding.
    """
    count = len(matrix)
    if count == 0:
        return Factor(0, 1.0, "cholesky", (matrix,))
    tolerance = max(tolerance, (count * torch.finfo(matrix.dtype).eps) ** 0.5)
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        largest, inverse_of_smallest = _extremes(lower)
        condition = (max(largest, size) * inverse_of_smallest) ** 0.5
        # The estimate errs on the low side: leave a margin before a matrix is called definite.
        if condition < 0.3 / tolerance:
            return Factor(count, condition, "cholesky", (lower,))
    values, vectors = torch.linalg.eigh(matrix)
    largest = max(float(values[-1]), size)
    keep = values > tolerance**2 * largest
    inverse = torch.where(keep, 1 / values.clamp(min=torch.finfo(matrix.dtype).tiny), 0.0)
    rank = int(keep.sum())
    condition = (largest * float(inverse.max())) ** 0.5 if rank else 1.0
    return Factor(rank, condition, "eigen", (vectors, inverse))


def cholesky_solve(rhs: Float[Tensor, "n m"], lower: Float[Tensor, "n n"]) -> Float[Tensor, "n m"]:
    """The solution of L L' y = rhs. torch.cholesky_solve copies L at each call, which takes longer than the solve."""
    y: Tensor = torch.linalg.solve_triangular(lower, rhs, upper=False)
    x: Tensor = torch.linalg.solve_triangular(lower.mT, y, upper=True)
    return x


def block_diagonal(blocks: Iterable[Tensor]) -> Tensor:
    """One block-diagonal matrix."""
    whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return whole


def congruent(matrix: Float[Tensor, "c n cn"], basis: Float[Tensor, "n d"]) -> Float[Tensor, "cd cd"]:
    """B' M B for each block of a symmetric matrix, on and below the diagonal alone: nothing above it is set."""
    c, n, d = len(matrix), *basis.shape
    out = matrix.new_zeros(c, d, c, d)
    for row in range(c):
        left = basis.mT @ matrix[row, :, : (row + 1) * n]
        out[row, :, : row + 1] = (left.reshape(-1, n) @ basis).reshape(d, row + 1, d)
    return out.reshape(c * d, c * d)


def _extremes(lower: Tensor) -> tuple[float, float]:
    """The largest eigenvalue of lower lower' and of its inverse, estimated from below."""
    start = torch.ones(len(lower), 1, dtype=lower.dtype, device=lower.device)
    start[1::2] = -0.7  # any fixed vector will do that is not constant: the image's mean is no small direction
    start = start + torch.linspace(0, 1, len(lower), dtype=lower.dtype, device=lower.device)[:, None]
    norms = []
    for apply in (lambda v: lower @ (lower.mT @ v), lambda v: cholesky_solve(v, lower)):
        v = start / start.norm()
        for _ in range(ITERATIONS):
            w = apply(v)
            norm = w.norm()
            v = w / norm
        norms.append(float(norm))
    return norms[0], norms[1]
