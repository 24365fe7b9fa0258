"""The joint constraints solved for the network's input, with a prior that fades.

The slopes of the activations depend on the input that is sought: solve, linearise again, repeat. A prior stands in for
what the constraints do not yet tell, with a weight that falls to nothing as the units settle on their sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.attacks import joint, products
from rgap.inversion.rounding import rounding
from rgap.linalg import cg, psd
from rgap.nn.layers import Layer

DOUBTED, MARGIN = (4, 6), 8
"""For each unit that changed its side in the last step so many are in doubt, those nearest to their kinks, and a few
more. Where one number leads nowhere another may, with a prior that fades half as fast."""
MOST = 256
"""With more units in doubt than this, and than half the gradient rows in front, the rows are not worth their while."""
FEW = 12
"""With at most so many changes of sides the prior's weight falls twice as fast."""
REFINEMENTS, WITHOUT_PRIOR = 3, 30
FLOOR = 1e-13
"""Added to the diagonal, relative to it, so that the matrix is definite; less than any weight of the prior."""
SUMS = 3
"""A gradient is a sum over positions, each of them rounded: it is off by up to about so many roundings."""
AGREES = 0.05
"""Below this part of the tolerance a misfit is the gradient's rounding and nothing else."""
PATIENCE = 15
"""Linearisations without any progress after which a solve ends."""


@dataclass(frozen=True)
class Fading:
    """How the prior's weight, relative to the constraints, falls from step to step."""

    strongest: float = 0.1
    weakest: float = 1e-11
    by: float = 5.0
    steps: int = 40
    """Linearisations at the most."""


@runtime_checkable
class Joint(Protocol):
    """Constraints that are linear but for the slopes of the activations: `joint.Problem`, `branched.Branched`.

    A point is where they are linearised; only its ``slopes`` are looked at here.
    """

    grads: list[Tensor]

    @property
    def layers(self) -> tuple[Layer, ...]: ...
    @property
    def rows(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def unknowns(self) -> int: ...
    @property
    def kinked(self) -> bool: ...
    @property
    def rows_in_front(self) -> int: ...
    def forward(self, x: Tensor) -> Any: ...
    def normal(self, point: Any, doubtful: list[Tensor] | None) -> tuple[Tensor, Tensor]: ...
    def misfit(self, point: Any) -> float: ...
    def changed(self, before: Any, after: Any) -> int: ...
    def nearest_to_kink(self, point: Any, count: int) -> list[Tensor]: ...
    def noise(self, point: Any, z: Tensor, grads: list[Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Found:
    """The input that a joint solve ended with."""

    x: Tensor
    """In the shape that the constraints take."""
    misfit: float
    """Relative distance of the layers' gradients from the given ones."""
    steps: int
    """Linearisations."""


@dataclass(frozen=True)
class Prior:
    """A quadratic form of an input's deviation from a constant one: the sum of squared differences of neighbours for
    inputs (channels, height, width), of the values themselves for others."""

    shape: tuple[int, ...]
    """Of one input."""
    centre: float
    """The value of the constant input that it likes best."""

    @property
    def smooth(self) -> bool:
        return len(self.shape) == 3 and min(self.shape[1:]) >= 2

    def __call__(self, x: Tensor) -> Tensor:
        """Its matrix, of the size of an identity, times x, which has any shape."""
        if not self.smooth:
            return x
        picture = x.reshape(-1, *self.shape)
        found = torch.zeros_like(picture)
        for dim in (2, 3):
            count = picture.shape[dim] - 1
            apart = picture.narrow(dim, 1, count) - picture.narrow(dim, 0, count)
            found.narrow(dim, 1, count).add_(apart)
            found.narrow(dim, 0, count).sub_(apart)
        return found.reshape(x.shape)

    def matrix(self, like: Tensor) -> Float[Tensor, "u u"]:
        dense = smoothness(self.shape, like)
        return torch.eye(math.prod(self.shape), dtype=like.dtype, device=like.device) if dense is None else dense


def solve(problem: Joint, point: Any, prior: Prior, fading: Fading, tolerance: float, iterative: bool = False) -> Found:
    """The input at which the layers' gradients agree, or the nearest that was found.

    Args:
        point: where to linearise first.
        tolerance: relative misfit of the gradients at which they agree.
        iterative: by products alone, which a `joint.Problem` has.
    """
    chain = problem if iterative and isinstance(problem, joint.Problem) else None
    step: LayerSolve = _Dense(problem, prior) if chain is None else _Products(chain, prior)
    tries: list[Found] = []
    for doubted in DOUBTED:
        tries.append(_descend(problem, step, point, prior, fading, tolerance, doubted))
        if tries[-1].misfit <= tolerance or not problem.kinked:
            break
        fading = replace(fading, by=fading.by**0.5)
    best = min(tries, key=lambda found: found.misfit)
    return Found(best.x, best.misfit, sum(found.steps for found in tries))


def _descend(
    problem: Joint,
    solved: LayerSolve,
    point: Any,
    prior: Prior,
    fading: Fading,
    tolerance: float,
    doubted: int,
) -> Found:
    like = problem.grads[0]
    # The point to start from is too coarse for the gradient rows in front.
    doubtful: list[Tensor] | None = None if point.slopes else []
    most = max(MOST, problem.rows_in_front // 2)
    best = Found(torch.full(problem.shape, prior.centre, dtype=like.dtype, device=like.device), torch.inf, 0)
    x, weight, fewest, progress, count, last = best.x, fading.strongest, torch.inf, 0, 0, False
    for step in range(fading.steps):
        again, last = last, weight == fading.weakest  # without the prior: the solve before, this one
        x = solved(point, doubtful, x, weight, last)
        if not bool(x.isfinite().all()):
            break  # the input ran away, and activations overflowed
        before, point = point, problem.forward(x)
        misfit, changed = problem.misfit(point), problem.changed(before, point)
        settled = again and best.misfit <= tolerance and misfit > best.misfit / 2
        if misfit < best.misfit or changed < fewest:
            progress = step
        if misfit < best.misfit:
            best = Found(x, misfit, step + 1)
        if settled:
            break  # rounding lets the constraints be met no better
        if misfit <= tolerance:
            # Without the prior from now on. More than rounding then may be a unit on its wrong side: next time without
            # what those nearest to their kinks do to the gradient.
            weight, count = fading.weakest, MARGIN if last and not count and misfit > AGREES * tolerance else 0
        elif step - progress >= PATIENCE:
            break
        else:
            if changed <= max(FEW, 0.95 * fewest):
                weight = max(weight / fading.by ** (1 if changed > FEW else 2), fading.weakest)
            count = doubted * changed + MARGIN if changed else count // 2
        fewest = min(fewest, changed)
        doubtful = problem.nearest_to_kink(point, count) if count <= most else None
    return Found(best.x, best.misfit, step + 1)


@runtime_checkable
class LayerSolve(Protocol):
    """One linearised solve: point, units in doubt, the input so far, the prior's weight, and whether it is the last."""

    def __call__(self, point: Any, doubtful: list[Tensor] | None, x: Tensor, weight: float, last: bool) -> Tensor: ...


class _Dense:
    """By a factor of the normal equations."""

    def __init__(self, problem: Joint, prior: Prior):
        self._problem, self._prior = problem, prior.matrix(problem.grads[0])
        self._middle = torch.full_like(self._prior[0], prior.centre)

    def __call__(self, point: Any, doubtful: list[Tensor] | None, x: Tensor, weight: float, last: bool) -> Tensor:
        gram, rhs = self._problem.normal(point, doubtful)
        if not bool(gram.isfinite().all() and rhs.isfinite().all()):
            return torch.full_like(x, torch.nan)
        pull = weight * float(gram.diagonal().mean()) * self._prior
        return _regularised(gram, rhs, pull, self._middle, last).reshape(x.shape)


class _Products:
    """By conjugate gradients from the input so far. What neither constraints nor prior tell stays as it is there."""

    def __init__(self, problem: joint.Problem, prior: Prior):
        self._problem, self._prior = problem, prior

    def __call__(self, point: Any, doubtful: list[Tensor] | None, x: Tensor, weight: float, last: bool) -> Tensor:
        rows = products.Products(self._problem, point, doubtful)
        pull = weight * rows.diagonal
        middle = torch.full_like(x, self._prior.centre)
        left = rows.right() - rows(x) - pull * self._prior(x - middle)
        steps = products.LAST if last else products.STEPS
        return x + cg.solve(lambda move: rows(move) + pull * self._prior(move), left, products.CLOSE, steps).x


@dataclass(frozen=True)
class Determined:
    """How well the joint constraints determine an answer, without the prior."""

    rank: int
    condition: float
    error: float
    """How far one draw of the noise of all rows moves it, root mean square."""


def determined(
    problem: Joint, x: Tensor, z_error: Tensor, eps: float, probe: torch.Generator, rank_tolerance: float
) -> Determined:
    """By a factor of the normal equations at the answer."""
    point = problem.forward(x)
    gram, _ = problem.normal(point, problem.nearest_to_kink(point, 0))
    factored = psd.factor(gram, rank_tolerance)
    rhs = problem.noise(point, *_noise(problem, z_error, eps, probe))
    moved = factored.solve(rhs[:, None])
    return Determined(factored.rank, factored.condition, float(moved.square().mean().sqrt()))


def told_by_a_draw(
    problem: joint.Problem, x: Tensor, z_error: Tensor, eps: float, probe: torch.Generator
) -> Determined:
    """By products alone: whether drawn moves come back from what all rows say of them.

    The rank is less than the unknowns by about as many dimensions as are free.
    """
    point = problem.forward(x)
    rows = products.Products(problem, point, problem.nearest_to_kink(point, 0))
    count = products.MOVES
    right = torch.cat([rows(rows.moves), rows.noise(*_noise(problem, z_error, eps, probe))])
    size = right.flatten(1).norm(dim=1) * right.new_tensor([products.EXACT] * count + [products.CLOSE])
    found = cg.solve(rows, right, 1.0, products.SURE, size)
    left = (found.x[:count] - rows.moves).square().sum((1, 2))
    back = left <= products.COMES_BACK**2 * rows.moves.square().sum((1, 2))
    free = 0 if bool(back.all()) else max(1, round(float(left.mean())))
    condition = float(found.condition[:count].max()) ** 0.5
    return Determined(problem.unknowns - free, condition, float(found.x[-1].square().mean().sqrt()))


def _noise(problem: Joint, z_error: Tensor, eps: float, probe: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    """One draw of the noise of the last layer's rows and of all gradients."""

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=probe, dtype=like.dtype, device=like.device)

    noises = [SUMS * rounding(grad, eps) * draw(grad) for grad in problem.grads]
    return draw(z_error) * z_error, noises


def _regularised(
    gram: Tensor, rhs: Tensor, prior: Tensor, middle: Float[Tensor, " u"], last: bool
) -> Float[Tensor, " u"]:
    """The solution with the prior, or, at the last, that solution moved as little as the constraints ask for.

    Iterated Tikhonov regularisation: each further solve for what the constraints still miss takes away a part of the
    prior's pull, but only in directions that the constraints determine. In the others the prior's choice stays.
    """
    matrix = gram + prior
    # What neither constraints nor prior determine stays at the middle of the range.
    floor = FLOOR * float(matrix.diagonal().mean())
    matrix.diagonal().add_(floor)
    lower, info = torch.linalg.cholesky_ex(matrix)
    while int(info) != 0:  # rounding made it indefinite: at the latest a floor of its own size mends that
        floor = max(10 * floor, torch.finfo(matrix.dtype).tiny)
        matrix.diagonal().add_(floor)
        lower, info = torch.linalg.cholesky_ex(matrix)
    x = middle
    for _ in range(REFINEMENTS):  # what the floor and the rounding changed
        wrong = rhs - gram @ x - prior @ (x - middle)
        x = x + psd.cholesky_solve(wrong[:, None], lower)[:, 0]
    for _ in range(WITHOUT_PRIOR if last else 0):
        x = x + psd.cholesky_solve((rhs - gram @ x)[:, None], lower)[:, 0]
    return x


def smoothness(shape: tuple[int, ...], like: Tensor) -> Float[Tensor, "u u"] | None:
    """The prior that neighbouring values are similar, for inputs (channels, height, width); None for others."""
    if len(shape) != 3 or min(shape[1:]) < 2:
        return None
    index = torch.arange(shape[1] * shape[2], device=like.device).reshape(shape[1:])
    laplacian = torch.zeros(index.numel(), index.numel(), dtype=like.dtype, device=like.device)
    for a, b in ((index[:, 1:], index[:, :-1]), (index[1:], index[:-1])):
        a, b = a.flatten(), b.flatten()
        laplacian.index_put_((torch.cat([a, b]),) * 2, laplacian.new_ones(2 * len(a)), accumulate=True)
        laplacian.index_put_((torch.cat([a, b]), torch.cat([b, a])), -laplacian.new_ones(2 * len(a)), accumulate=True)
    return psd.block_diagonal(laplacian.expand(shape[0], -1, -1))
