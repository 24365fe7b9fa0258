"""Through a maximum over windows: which place of its window each value came from, its route, and the input with it.

In front of the pool stands a layer z = W x + b; of every window the largest z is known, m, and the cotangent k of it.
For given routes all constraints are linear in x (Eqs. 15 and 16):

    z at the route's place = m,  z elsewhere in the window <= m,       K x = grad W  with k at the routes' places.

Routes are found with the input. They begin as weights p of the places, softmax(z / T), and harden as the constraints
come to be met: T follows what is still missed. While a window is undecided it is told apart from its mean by a random
vector whose covariance is known: sum over its places of p k^2 (u - mean u)(u - mean u)', u being what a place reads.
So each output's gradient rows are weighed by the inverse of the covariance of all its undecided windows: what these
may have done to them is left out, and the rest counts from the first step on. The value rows of an undecided window
ask for its mean, as far as the variance of z within the window allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rgap.inversion.prior import Prior
from rgap.linalg import cg, deadline
from rgap.nn.layers import Layer
from rgap.nn.network import Network
from rgap.nn.pools import MaxPool

# b samples, o outputs, m windows of an output, w places of a window, i what a place reads, g groups, j outputs of one.


@dataclass(frozen=True)
class Annealing:
    """How routes harden and the prior fades."""

    temperature: float = 3.0
    """At the first step, in units of z's spread times what the constraints miss, relatively."""
    cooling: float = 0.98
    prior: float = 0.1
    """Weight of the prior at the first step, relative to the value rows."""
    fading: float = 0.95
    quick: float = 4.0
    """A step that halves what is missed cools and fades so many times as fast."""
    max_steps: int = 300
    patience: int = 80
    """Steps without any progress after which a try ends."""
    solve_rtol: float = 1e-3
    solve_steps: int = 150
    decided: float = 1e-3
    """A route is decided where all other places together have less weight."""
    gradient_share: float = 0.3
    """What the gradient rows miss counts so much of what the value rows do: undecided windows are in it."""
    gradient: bool = True
    """Whether gradient rows count before all routes are decided."""
    promising: float = 0.05
    """Below this part missed, decided routes are tried as they are, every so many steps."""
    every: int = 3


@dataclass(frozen=True)
class Pooled:
    """A layer behind other operations, and the pool that reads it."""

    front: Network
    """From the unknown input to what the layer reads; it may be empty."""
    layer: Layer
    pool: MaxPool


@dataclass(frozen=True)
class Maxima:
    """What is known behind the pool, of b samples."""

    value: Float[Tensor, "b o m"]
    """The largest z of each window; of those that are not known, what it does not exceed."""
    known: Bool[Tensor, "b o m"]
    cotangent: Float[Tensor, "b o m"]
    grad: Float[Tensor, "g j i"]
    """Of the layer's weight, summed over the samples."""


@dataclass(frozen=True)
class Unpooled:
    """The input at which the constraints are met, or the nearest that was found."""

    x: Float[Tensor, "b ..."]
    routes: Float[Tensor, "b o m w"]
    missed: float
    """Of maxima and gradient rows, relatively, with the routes decided."""
    steps: int


ANNEALING = Annealing()
COLDER = Annealing(temperature=1.0)
"""Fewer steps, from a start that is decided sooner."""
VALUES_ONLY = Annealing(temperature=0.0, fading=0.6, max_steps=60, gradient=False)
"""Where the maxima alone determine the input: the routes of the present input, and a prior that fades fast."""
LEAST = 1e-7
"""What is missed is never taken to be less, relatively."""


def find_routes(
    part: Pooled,
    maxima: Maxima,
    prior: Prior,
    agrees: float,
    start: Float[Tensor, "b ..."],
    schedule: Annealing = ANNEALING,
    report: Callable[[int, float], None] = lambda step, missed: None,
) -> Unpooled:
    """The input and the routes.

    Args:
        agrees: what may be missed, relatively, for routes to be right.
        report: is called with the number of steps and what the constraints miss.

    Raises:
        OutOfTime: the time was up.
    """
    x, temperature, weight = start, schedule.temperature, schedule.prior
    best: Unpooled | None = None
    before, gradient_missed = math.inf, 1.0
    for step in range(schedule.max_steps):
        deadline.check()
        at = _Step(_Point(part, maxima, x), temperature, gradient_missed * schedule.gradient_share, schedule)
        hard = at.decided()
        if hard.missed <= agrees or (hard.missed < schedule.promising and step % schedule.every == 0):
            hard = _finish(hard)
        if best is None or hard.missed < best.missed:
            best = Unpooled(hard.point.x, hard.routes, hard.missed, step)
        report(step, hard.missed)
        if hard.missed <= agrees:
            break
        if step - best.steps >= schedule.patience:
            break
        x = at.solve(prior, weight)
        gradient_missed = at.gradient_missed
        power = schedule.quick if at.missed < before / 2 else 1.0
        before = at.missed
        temperature, weight = temperature * schedule.cooling**power, weight * schedule.fading**power
    assert best is not None
    return best


def _finish(step: _Decided) -> _Decided:
    """As far as decided routes lead: each solve is exact where they are right."""
    while True:
        tried = _Decided(_Point(step.point.part, step.point.maxima, step.solve(None, 0.0)), step.schedule)
        if not tried.missed < step.missed / 2:
            return step
        step = tried


class _Point:
    """An input, and what the layer and the pool make of it whatever the routes."""

    def __init__(self, part: Pooled, maxima: Maxima, x: Tensor):
        self.part, self.maxima, self.x = part, maxima, x
        layer, pool = part.layer, part.pool
        self.values = part.front.forward(x)
        self.slopes = part.front.slopes(self.values)
        self.read = layer.pack_input(self.values[-1])
        self.patches = layer.patches(self.read)
        self.z = layer.output(self.read) + layer.offset
        self.spread = float(self.z.std())
        self.places = pool.read(self.z, -math.inf)
        self.top = self.places.amax(-1)
        self.largest = pool.routes(self.z)
        wanted = torch.where(maxima.known, maxima.value, torch.minimum(maxima.value, self.top))
        size = float(maxima.value[maxima.known].norm())
        self.missed = float((wanted - self.top).norm()) / size if size else 1.0
        """Of the maxima, relatively."""


class _Step:
    """All constraints at one input: routes as weights, rows and what they miss."""

    def __init__(self, point: _Point, temperature: float, floor: float, schedule: Annealing):
        self.point, self.schedule, self.missed = point, schedule, point.missed
        layer, pool, maxima, places = point.part.layer, point.part.pool, point.maxima, point.places
        heat = temperature * point.spread * max(self.missed, floor) if temperature else 0.0
        self.routes = torch.softmax(places / heat, -1) if heat > 0 else point.largest
        self.k = pool.scatter(self.routes * maxima.cotangent[..., None]).reshape(point.z.shape)
        self.left = maxima.grad - layer.grad_weight(point.read, self.k).sum(0)
        total = float(maxima.grad.norm())
        self.gradient_missed = float(self.left.norm()) / total if total else 0.0
        # Of value rows: a window that exceeds its maximum does so at the place where it is largest.
        exceeds = (point.top > maxima.value) | ~maxima.known
        self.asked = torch.where(exceeds[..., None], point.largest, self.routes)
        finite = places.masked_fill(places == -math.inf, 0.0)
        mean = (self.asked * finite).sum(-1)
        within = (self.asked * (finite - mean[..., None]).square()).sum(-1)
        self.variance = (point.spread * max(self.missed, LEAST)) ** 2
        self.weight = self.variance / (self.variance + within) * (maxima.known | (point.top > maxima.value))
        self.wanted = maxima.value - mean

    @property
    def counts(self) -> bool:
        """Whether gradient rows count."""
        return self.schedule.gradient

    def decided(self) -> _Decided:
        """The same with each route where z is largest."""
        return _Decided(self.point, self.schedule)

    def solve(self, prior: Prior | None, weight: float) -> Tensor:
        """The next input: least squares of all rows as they stand."""
        point, front, layer, pool = self.point, self.point.part.front, self.point.part.layer, self.point.part.pool
        apart = _Whitening(self) if self.counts else None

        def back(rows: Tensor, grad: Tensor) -> Tensor:
            k = pool.scatter(self.asked * (self.weight * rows)[..., None]).reshape(self.k.shape)
            weighted = None if apart is None else self.variance * apart(grad)
            cotangent = layer.unpack_input(layer.rows_adjoint(k, weighted, self.k))
            last = len(point.values) - 1
            found = front.vjp(point.values, point.slopes, {last: cotangent.reshape(point.values[-1].shape)})[0]
            assert found is not None
            return found[None]

        def rows(move: Tensor) -> tuple[Tensor, Tensor]:
            tangent = layer.pack_input(front.jvp(point.values, point.slopes, move[0])[-1])
            z, grad = layer.rows(tangent, self.k)
            return (pool.read(z) * self.asked).sum(-1), grad.sum(0)

        def normal(move: Tensor) -> Tensor:
            found = back(*rows(move))
            return found if prior is None else found + pull * prior(move)

        right = back(self.wanted, self.left)
        if prior is not None:
            generator = torch.Generator(device=point.x.device).manual_seed(0)
            drawn = torch.randn(point.x.shape, generator=generator, dtype=point.x.dtype, device=point.x.device)
            size = float((self.weight.sqrt() * rows(drawn[None])[0]).square().sum()) / drawn.numel()
            pull = weight * size
            right = right - pull * prior(point.x - prior.centre)[None]
        steps = self.schedule.solve_steps * (1 if prior is not None else 3)
        found = cg.solve(normal, right, self.schedule.solve_rtol, steps).x[0]
        return point.x + found


class _Decided(_Step):
    """With each route where z is largest, and nothing undecided."""

    counts = True

    def __init__(self, point: _Point, schedule: Annealing):
        super().__init__(point, 0.0, 0.0, schedule)
        self.missed = max(self.missed, self.gradient_missed)


class _Whitening:
    """The inverse covariance of each output's gradient rows."""

    def __init__(self, step: _Step):
        point, layer, pool = step.point, step.point.part.layer, step.point.part.pool
        k = point.maxima.cotangent
        groups, outputs, reads = layer.weight.shape
        # What the input's own error does to the gradient rows.
        error = float(point.read.square().mean()) * max(step.missed, LEAST) ** 2
        noise = k.square().sum((0, 2)) * error
        noise = noise + (LEAST * point.maxima.grad.reshape(-1, reads).norm(dim=1)) ** 2 / reads
        undecided = (step.routes.amax(-1) < 1 - step.schedule.decided) & (k != 0)
        patches = torch.nn.functional.pad(point.patches, (0, 1))
        self.solves: list[Callable[[Tensor], Tensor]] = []
        for output in range(groups * outputs):
            sample, window = undecided[:, output].nonzero(as_tuple=True)
            floor = float(noise[output])
            if not len(sample):
                self.solves.append(_scaled(1 / max(floor, torch.finfo(noise.dtype).tiny)))
                continue
            share = step.routes[sample, output, window]
            own = patches[sample, output // outputs][
                torch.arange(len(sample))[:, None], :, pool.windows[window]
            ]  # (windows, places, reads)
            apart = own - (share[..., None] * own).sum(1, keepdim=True)
            columns = (apart * (share.sqrt() * k[sample, output, window, None])[..., None]).flatten(0, 1).mT
            self.solves.append(_low_rank(columns, floor))

    def __call__(self, grad: Float[Tensor, "g j i"]) -> Float[Tensor, "g j i"]:
        rows = grad.flatten(0, 1)
        return torch.stack([solve(row) for solve, row in zip(self.solves, rows, strict=True)]).reshape(grad.shape)


def _scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda row: factor * row


def _low_rank(columns: Float[Tensor, "i q"], noise: float) -> Callable[[Tensor], Tensor]:
    """The inverse of noise I + A A', by the smaller of its two factors."""
    reads, count = columns.shape
    diagonal = torch.eye(min(reads, count), dtype=columns.dtype, device=columns.device)
    noise = noise + 1e-10 * float(columns.square().sum()) / reads + torch.finfo(columns.dtype).tiny
    if count >= reads:
        lower = torch.linalg.cholesky(columns @ columns.mT + noise * diagonal)
        inverse = torch.cholesky_inverse(lower)
        return lambda row: inverse @ row
    lower = torch.linalg.cholesky(columns.mT @ columns + noise * diagonal)

    def solve(row: Tensor) -> Tensor:
        inner = torch.cholesky_solve((columns.mT @ row)[:, None], lower)[:, 0]
        found: Tensor = (row - columns @ inner) / noise
        return found

    return solve
