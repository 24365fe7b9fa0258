"""Solving with one symmetric positive semidefinite matrix: Cholesky where it is definite, with pivots where its rank is
plain, its eigenvalues where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from scipy.linalg import lapack
from torch import Tensor

ITERATIONS = 12
"""Steps of power and inverse iteration for the condition estimate; more change it by a few per cent."""
PIVOTED = 256
"""Unknowns from which a Cholesky factor with pivots is tried before eigenvalues, which take six times as long."""
GAP = 100.0
"""Singular values that are kept are this far above the tolerance, and those that are not below it, or eigenvalues
decide."""


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
        if self.method == "pivoted":
            lower, kept = self._solve[:2]
            found = torch.zeros_like(rhs)
            found[kept] = cholesky_solve(self._in_range(rhs)[kept], lower)
            return self._in_range(found)
        vectors, inverse = self._solve
        return vectors @ (inverse[:, None] * (vectors.mT @ rhs))

    def _in_range(self, rhs: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """Without what lies in the null space, by a basis of whichever of the two is smaller."""
        basis = self._solve[2]
        part = basis @ (basis.mT @ rhs)
        return part if self._keeps else rhs - part

    @property
    def _keeps(self) -> bool:
        return _range_is_smaller(self.rank, len(self._solve[2]))

    @cached_property
    def null(self) -> Float[Tensor, "n free"]:
        """An orthonormal basis of the null space."""
        if self.method == "cholesky":
            return self._solve[0].new_zeros(len(self._solve[0]), 0)
        if self.method == "pivoted" and not self._keeps:
            return self._solve[2]
        if self.method == "pivoted":
            return complement(self._solve[2])
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
        condition = triangular_condition(lower, size)
        # The estimate errs on the low side: leave a margin before a matrix is called definite.
        if condition < 0.3 / tolerance:
            return Factor(count, condition, "cholesky", (lower,))
    found = _pivoted(matrix, tolerance, size) if count >= PIVOTED else None
    if found is not None:
        return found
    values, vectors = torch.linalg.eigh(matrix)
    largest = max(float(values[-1]), size)
    keep = values > tolerance**2 * largest
    inverse = torch.where(keep, 1 / values.clamp(min=torch.finfo(matrix.dtype).tiny), 0.0)
    rank = int(keep.sum())
    condition = (largest * float(inverse.max())) ** 0.5 if rank else 1.0
    return Factor(rank, condition, "eigen", (vectors, inverse))


def complement(basis: Float[Tensor, "n m"]) -> Float[Tensor, "n _"]:
    """An orthonormal basis of what lies beside independent columns."""
    whole: Tensor = torch.linalg.qr(basis, mode="complete")[0]
    return whole[:, basis.shape[1] :]


def triangular_condition(lower: Float[Tensor, "n n"], size: float = 0.0) -> float:
    """The square root of the condition of L L', which is the condition of L; estimated from below.

    Args:
        size: as that of `factor`.
    """
    largest = _largest(lambda v: lower @ (lower.mT @ v), lower)
    inverse_of_smallest = _largest(lambda v: cholesky_solve(v, lower), lower)
    return float((max(largest, size) * inverse_of_smallest) ** 0.5)


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


def _range_is_smaller(rank: int, count: int) -> bool:
    """Than the null space, so that it is its basis that is kept."""
    return 2 * rank < count


def _pivoted(matrix: Float[Tensor, "n n"], tolerance: float, size: float) -> Factor | None:
    """A factor of as many rows and columns as are independent (Cholesky with pivots); None where the singular values
    do not part clearly at the tolerance."""
    diagonal, count = matrix.diagonal(), len(matrix)
    if matrix.dtype != torch.float64 or not bool(diagonal.isfinite().all()) or not bool(diagonal.any()):
        return None
    least = tolerance**2 * max(float(diagonal.max()), size)
    packed, order, rank, _ = lapack.dpstrf(matrix.cpu().numpy(), tol=least, lower=1)
    if rank == 0:
        return None
    whole = torch.as_tensor(packed, device=matrix.device).tril()[:, :rank]
    pivots = torch.as_tensor(order, device=matrix.device).long() - 1
    lower, rest = whole[:rank].contiguous(), whole[rank:]
    dropped = diagonal[pivots[rank:]] - rest.square().sum(1)
    if _range_is_smaller(rank, count):
        basis = torch.zeros_like(whole).index_copy_(0, pivots, whole)
    else:  # of P [-L^-T R'; 1], which the matrix maps to zero
        basis = matrix.new_zeros(count, count - rank)
        basis[pivots[:rank]] = -torch.linalg.solve_triangular(lower.mT, rest.mT, upper=True)
        basis[pivots[rank:]] = torch.eye(count - rank, dtype=matrix.dtype, device=matrix.device)
    found = Factor(rank, 1.0, "pivoted", (lower, pivots[:rank], torch.linalg.qr(basis)[0]))

    def product(v: Tensor) -> Tensor:
        return whole @ (whole.mT @ v)

    largest = max(_largest(product, matrix), size)
    condition = (largest * _largest(found.solve, matrix)) ** 0.5
    clear = condition * GAP**0.5 < 1 / tolerance and float(dropped.clamp(min=0).sum()) * GAP < largest / condition**2
    return replace(found, condition=condition) if clear else None


def _largest(apply: Callable[[Tensor], Tensor], like: Float[Tensor, "n n"]) -> float:
    """The largest eigenvalue of a positive semidefinite matrix of like's size, estimated from below."""
    start = like.new_ones(len(like), 1)
    start[1::2] = -0.7  # any fixed vector will do that is not constant: the image's mean is no small direction
    v = start + torch.linspace(0, 1, len(like), dtype=like.dtype, device=like.device)[:, None]
    norm = v.norm()
    for _ in range(ITERATIONS):
        w = apply(v / norm)
        norm, v = w.norm(), w
    return float(norm)
