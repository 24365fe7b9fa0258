"""Least squares with a linear operator: by a factor of its normal equations, or by its products alone.

The solver and the operator are chosen apart. Each solver takes one step of a regularised problem, and tells of the
plain one how well it is determined.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.linalg import mixed, psd
from rgap.linalg.operator import LinearOperator

FLOOR = 1e-13
"""Added to the diagonal, relative to it, so that the matrix is definite; less than any weight of a prior."""


class Quadratic(ABC):
    """A quadratic form x'P x, by P's products and as a matrix."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """P x."""

    @abstractmethod
    def matrix(self, like: Tensor, samples: int = 1) -> Float[Tensor, "u u"]:
        """P, of the type of like, once for each of several samples."""


@dataclass(frozen=True)
class Regulariser:
    """weight * mean diagonal of J'J * (x - centre)' P (x - centre)."""

    form: Quadratic
    centre: float
    weight: float
    last: bool
    """Whether it is to decide nothing that the constraints tell."""


@dataclass(frozen=True)
class Determined:
    """How well rows determine their unknowns."""

    rank: int
    condition: float
    std: float
    """How far one draw of the rows' noise moves the unknowns, root mean square."""
    noise: float
    """The norm of J'n, of that draw n."""
    move: Tensor | None = None
    """What the pseudoinverse makes of a residual, as precisely as of the noise."""


class Solver(ABC):
    """One step of a least-squares problem, and how well it is determined."""

    @abstractmethod
    def step(
        self, operator: LinearOperator, residual: Float[Tensor, "1 rows"], x: Tensor, by: Regulariser | None
    ) -> Tensor:
        """The x + move that minimises |J move - residual|^2, regularised; of the shape of x."""

    @abstractmethod
    def propagate(self, operator: LinearOperator, noise: Float[Tensor, "1 rows"]) -> float:
        """How far one draw of the rows' noise moves the unknowns, root mean square."""

    @abstractmethod
    def determine(
        self,
        operator: LinearOperator,
        noise: Float[Tensor, "1 rows"],
        residual: Float[Tensor, "1 rows"] | None = None,
    ) -> Determined:
        """Rank and condition of J, and what its pseudoinverse makes of one draw of noise, and of a residual."""

    @abstractmethod
    def move(self, operator: LinearOperator, residual: Float[Tensor, "1 rows"], sure: Determined) -> Tensor:
        """The move that minimises |J move - residual|^2, so precisely that what is left of it is less than noise also
        in directions that the rows hardly show.

        Args:
            sure: what is known of J, or of one much like it.
        """


@dataclass(frozen=True)
class Direct(Solver):
    """A dense factor of J'J."""

    rank_tolerance: float = 0.0
    """Singular values below this fraction of the largest count as zero."""
    refinements: int = 3
    """Solves for what the floor and rounding changed."""
    without: int = 30
    """Solves for what the constraints still miss, at the last step: each takes away a part of the regulariser's pull,
    but only in directions that the constraints determine (iterated Tikhonov)."""

    def step(
        self, operator: LinearOperator, residual: Float[Tensor, "1 rows"], x: Tensor, by: Regulariser | None
    ) -> Tensor:
        gram, flat = operator.gram(), x.flatten()
        right = gram @ flat + operator.rmv(residual).flatten()
        if not bool(gram.isfinite().all() and right.isfinite().all()):
            return torch.full_like(x, torch.nan)
        if by is None:
            return psd.factor(gram, self.rank_tolerance).solve(right[:, None]).reshape(x.shape)
        prior = by.weight * operator.mean_diagonal * by.form.matrix(x, len(x))
        return self._regularised(gram, right, prior, torch.full_like(flat, by.centre), by.last).reshape(x.shape)

    def _regularised(
        self, gram: Tensor, right: Tensor, prior: Tensor, centre: Float[Tensor, " u"], last: bool
    ) -> Float[Tensor, " u"]:
        lower = _definite(gram + prior)
        x = centre  # where what neither constraints nor regulariser determine stays
        for _ in range(self.refinements):
            x = x + psd.cholesky_solve((right - gram @ x - prior @ (x - centre))[:, None], lower)[:, 0]
        for _ in range(self.without if last else 0):
            x = x + psd.cholesky_solve((right - gram @ x)[:, None], lower)[:, 0]
        return x

    def propagate(self, operator: LinearOperator, noise: Float[Tensor, "1 rows"]) -> float:
        return self.determine(operator, noise).std

    def determine(
        self,
        operator: LinearOperator,
        noise: Float[Tensor, "1 rows"],
        residual: Float[Tensor, "1 rows"] | None = None,
    ) -> Determined:
        factored = psd.factor(operator.gram(), self.rank_tolerance)
        right = operator.rmv(noise)
        moved = factored.solve(right.reshape(-1, 1))
        move = (
            None if residual is None else factored.solve(operator.rmv(residual).reshape(-1, 1)).reshape(right[0].shape)
        )
        std = float(moved.square().mean().sqrt())
        return Determined(factored.rank, factored.condition, std, float(right.norm()), move)

    def move(self, operator: LinearOperator, residual: Float[Tensor, "1 rows"], sure: Determined) -> Tensor:
        return self.step(operator, residual, operator.like.new_zeros(operator.in_shape), None)


def _definite(matrix: Float[Tensor, "u u"]) -> Float[Tensor, "u u"]:
    """A Cholesky factor, with as little on the diagonal as that takes."""
    floor = FLOOR * float(matrix.diagonal().mean())
    matrix.diagonal().add_(floor)
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(matrix)
    while int(info) != 0:  # rounding made it indefinite: at the latest a floor of its own size mends that
        floor = max(10 * floor, torch.finfo(matrix.dtype).tiny)
        matrix.diagonal().add_(floor)
        lower, info = torch.linalg.cholesky_ex(matrix)
    return lower


@dataclass(frozen=True)
class Iterative(Solver):
    """Conjugate gradients on J'J, from where the step begins. What nothing tells stays as it is there."""

    rtol: float = 1e-3
    """Relative residual at which a step ends: what it leaves the next step takes up."""
    max_steps: int = 600
    max_steps_last: int = 1500
    max_steps_refine: int = 1000
    probe_rtol: float = 1e-6
    probe_steps: int = 6000
    probes: int = 3
    precise: float = 0.1
    """What a precise step leaves of J'r, relative to J'n for a draw of noise n: this over J's condition, so that it is
    so much less than noise in the direction that the rows show least."""
    returns: float = 5e-3
    """A drawn direction that comes back from its rows to this part of itself has no part that they do not see: of a
    single free dimension among 3,000 one would keep less in one draw of five."""

    def step(
        self, operator: LinearOperator, residual: Float[Tensor, "1 rows"], x: Tensor, by: Regulariser | None
    ) -> Tensor:
        right = operator.rmv(residual)
        if by is None or by.last:
            steps = self.max_steps if by is None else self.max_steps_last
            return x + _solve(operator, right, self.rtol, steps).x[0]
        pull, form = by.weight * operator.mean_diagonal, by.form
        right = right - pull * form(x - by.centre)
        return x + _solve(operator, right, self.rtol, self.max_steps, lambda v: pull * form(v)).x[0]

    def propagate(self, operator: LinearOperator, noise: Float[Tensor, "1 rows"]) -> float:
        # Of noise the size alone matters.
        moved = _solve(operator, operator.rmv(noise), max(self.rtol, 1e-3), self.max_steps).x
        return float(moved.square().mean().sqrt())

    def refine(
        self, operator: LinearOperator, residual: Float[Tensor, "1 rows"], noise: Float[Tensor, "1 rows"], x: Tensor
    ) -> tuple[Tensor, float]:
        """An x that is nearly right, moved towards least squares; and how far one draw of the rows' noise moves it."""
        right = torch.cat([operator.rmv(residual), operator.rmv(noise)])
        move, moved = _solve(operator, right, self.rtol, self.max_steps_refine).x
        return x + move, float(moved.square().mean().sqrt())

    def determine(
        self,
        operator: LinearOperator,
        noise: Float[Tensor, "1 rows"],
        residual: Float[Tensor, "1 rows"] | None = None,
    ) -> Determined:
        drawn = probes(operator, self.probes)
        right = operator.normal(drawn)
        size = self.probe_rtol * right.flatten(1).norm(dim=1)
        seen = _solve(operator, right, size, self.probe_steps, enough=partial(_came_back, drawn, self.returns / 2))
        back = seen.x
        free = null_space_probe(drawn, back, self.returns)
        if free:  # what is hardly seen is told from what is not by solving for what is left
            left = right - operator.normal(back)
            back = back + _solve(operator, left, 1e-3 * size, self.probe_steps).x
            free = null_space_probe(drawn, back, self.returns)
        right = torch.cat([operator.rmv(each) for each in (noise, residual) if each is not None])
        # Noise as well: it moves most what the rows hardly tell, which comes last.
        size = right.flatten(1).norm(dim=1)
        noise_norm = float(size[0])
        found = _solve(operator, right, self.probe_rtol * size.clamp(min=noise_norm), self.probe_steps)
        condition = max(float(seen.condition.max()), float(found.condition[0])) ** 0.5
        std = float(found.x[0].square().mean().sqrt())
        move = None if residual is None else found.x[1]
        return Determined(operator.unknowns - free, condition, std, noise_norm, move)

    def move(self, operator: LinearOperator, residual: Float[Tensor, "1 rows"], sure: Determined) -> Tensor:
        right = operator.rmv(residual)
        left = max(self.probe_rtol, self.precise / sure.condition) * sure.noise
        return _solve(operator, right, right.new_full((1,), left), self.probe_steps).x[0]


def _solve(
    operator: LinearOperator,
    right: Float[Tensor, "s *in_shape"],
    target: float | Float[Tensor, " s"],
    steps: int,
    more: Callable[[Tensor], Tensor] | None = None,
    enough: Callable[[Tensor], bool] | None = None,
) -> mixed.Result:
    """Conjugate gradients on J'J.

    Args:
        target: norms of the residuals; a number is relative to those of the right sides.
        steps: at the most, in either precision.
        more: what is added to J'J.
        enough: as of `mixed.solve`.
    """

    def added(product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return product if more is None else lambda v: product(v) + more(v)

    fast = None if operator.single is None else added(operator.single.repeated)
    target = target * right.flatten(1).norm(dim=1) if isinstance(target, float) else target
    return mixed.solve(added(operator.repeated), fast, right, target, steps, enough=enough)


def probes(operator: LinearOperator, count: int) -> Float[Tensor, "d *in_shape"]:
    """Drawn directions, always the same."""
    generator = torch.Generator(device=operator.like.device).manual_seed(0)
    shape = (count, *operator.in_shape)
    return torch.randn(shape, generator=generator, dtype=operator.like.dtype, device=operator.like.device)


def null_space_probe(drawn: Float[Tensor, "d ..."], found: Float[Tensor, "d ..."], returns: float) -> int:
    """About how many dimensions the rows do not see, from drawn directions and the least-norm solutions of their rows.

    A direction comes back but for its part in the null space, whose square is the number of free dimensions on
    average (Hutchinson's estimate of a trace).
    """
    if _came_back(drawn, returns, found):
        return 0
    return max(1, round(float((found - drawn).flatten(1).square().sum(1).mean())))


def _came_back(drawn: Float[Tensor, "d ..."], returns: float, found: Float[Tensor, "d ..."]) -> bool:
    left, size = (each.flatten(1).square().sum(1) for each in (found - drawn, drawn))
    return bool((left <= returns**2 * size).all())
