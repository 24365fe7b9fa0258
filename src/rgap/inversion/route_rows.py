"""The linear rows of a layer and the pool behind it, at one input: routes as weights or decided.

While a window is undecided it is told apart from its mean by a random vector whose covariance is known: sum over its
places of p k^2 (u - mean u)(u - mean u)', u being what a place reads. So each output's gradient rows are weighed by the
inverse of the covariance of all its undecided windows.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rgap.inversion.prior import Prior
from rgap.inversion.routed import MOST, ByOutput, GradientWeight, RoutedRows
from rgap.inversion.windows import Windows, windows
from rgap.linalg import cg, mixed
from rgap.nn.activation import Activation
from rgap.nn.layers import Layer
from rgap.nn.network import Network
from rgap.nn.pools import MeanPool, Pool

# b samples, o outputs, m windows of an output, w places of a window, i what a place reads, g groups, j outputs of one.

ASTRAY = 1e6
"""A try that misses so much leads nowhere."""
LEAST = 1e-7
"""What is missed is never taken to be less, relatively."""
ROOM = 1 << 24
"""Numbers that are held at once to weigh gradient rows."""
LARGE, PLENTY = 1 << 26, 5
"""Above so many numbers in all, no more outputs are weighed than give so many rows for each unknown."""
CLOSE = 1e-3
"""Rows that miss less are weighed too differently for products in float32: by the inverse of its square."""
FEW = 64
"""So many unknowns of one sample and fewer: products with all unit moves at once take less time than one after another
with those of conjugate gradients."""


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
    progress: float = 0.98
    """A step that misses less than this part of the least so far makes progress: what decided routes miss hardly falls
    until nearly all of them are right."""
    last: int = 4
    """The same once the constraints agree: a place or two may still be wrong where it hardly matters."""
    solve_rtol: float = 1e-3
    solve_steps: int = 150
    gradient_share: float = 0.3
    """What the gradient rows miss counts so much of what the value rows do: undecided windows are in it."""
    gradient: bool = True
    """Whether gradient rows count before all routes are decided."""
    promising: float = 0.05
    """Below this part missed, decided routes are tried as they are, every so many steps."""
    every: int = 3
    diverges: float = math.inf
    """A step that misses so many times the least so far ends a try."""
    single: bool = True
    """Whether products are taken in float32 while rows miss much."""


@dataclass(frozen=True)
class Pooled:
    """A layer behind other operations, and the pool that reads it."""

    front: Network
    """From the unknown input to what the layer reads; it may be empty."""
    layer: Layer
    activation: Activation
    """Between the layer and the pool; the identity in front of a maximum, whose value is then that of the layer."""
    pool: Pool


@dataclass(frozen=True)
class Observed:
    """What is known behind the pool, of b samples."""

    value: Float[Tensor, "b o m"]
    """Of each window, the largest z or the mean of f(z); of those that are not known, what it does not exceed."""
    known: Bool[Tensor, "b o m"]
    cotangent: Float[Tensor, "b o m"]
    idle: Float[Tensor, "b o m"]
    """The cotangent of those that are taken for zeros of ReLU if they were a little above."""
    grad: Float[Tensor, "g j i"]
    """Of the layer's weight, summed over the samples."""


class Point:
    """An input, and what the layer and the pool make of it whatever the routes."""

    def __init__(self, part: Pooled, observed: Observed, x: Tensor):
        self.part, self.observed, self.x = part, observed, x
        layer, pool = part.layer, part.pool
        self.values = part.front.forward(x)
        self.slopes = part.front.slopes(self.values)
        self.read = layer.pack_input(self.values[-1])
        self.z = layer.output(self.read) + layer.offset
        self.spread = min(float(self.z.std()), ASTRAY)
        self.hard = self.windows(0.0)
        made, known = self.hard.value, observed.known
        self.exceeds = (made > observed.value) & (~known if isinstance(pool, MeanPool) else torch.ones_like(known))
        wanted = torch.where(known, observed.value, torch.minimum(observed.value, made))
        size = float(observed.value[known].norm())
        self.missed = float((wanted - made).norm()) / size if size else 1.0
        """Of what is known behind the pool, relatively."""

    @cached_property
    def _patches(self) -> Float[Tensor, "b g i n"]:
        """What each place reads, with zeros behind the last for what lies outside of all."""
        return torch.nn.functional.pad(self.part.layer.patches(self.read), (0, 1))

    def reads(self, sample: Tensor, output: Tensor, place: Tensor) -> Float[Tensor, "... i"]:
        """What places of some samples read, in the group of some outputs; of one shape as they are taken together."""
        return self._patches[sample, output // self.part.layer.weight.shape[1], :, place]

    def windows(self, heat: float) -> Windows:
        """What the pool makes of z, which is in doubt by so much."""
        return windows(self.part.pool, self.part.activation, self.z, heat)

    def along(self, routes: Float[Tensor, "b o m w"]) -> Windows:
        """What a maximum makes of z if its values come from there."""
        return replace(self.hard, value=(routes * self.part.pool.read(self.z)).sum(-1), slope=routes)


class Step:
    """All constraints at one input: routes as weights, rows and what they miss."""

    def __init__(
        self, point: Point, temperature: float, floor: float, schedule: Annealing, routes: Tensor | None = None
    ):
        self.point, self.schedule, self.missed = point, schedule, min(point.missed, ASTRAY)
        layer, pool, observed = point.part.layer, point.part.pool, point.observed
        heat = temperature * point.spread * max(self.missed, floor) if temperature else 0.0
        decided = point.hard if routes is None else point.along(routes)
        self.windows = point.windows(heat) if heat > 0 else decided
        self.k = pool.scatter(self.windows.slope * observed.cotangent[..., None]).reshape(point.z.shape)
        self.left = observed.grad - layer.batch_gradient(point.read, self.k)[0]
        total = float(observed.grad.norm())
        self.gradient_missed = float(self.left.norm()) / total if total else 0.0
        # A window that exceeds what it may be does so as it stands.
        hard = point.exceeds | ~observed.known
        self.slope = torch.where(hard[..., None], decided.slope, self.windows.slope)
        value = torch.where(hard, decided.value, self.windows.value)
        within = torch.where(hard, 0.0, self.windows.variance)
        self.variance = (point.spread * max(self.missed, LEAST)) ** 2
        self.weight = self.variance / (self.variance + within) * (observed.known | point.exceeds)
        self.wanted = torch.where(self.weight > 0, observed.value - value, 0.0)

    def weigher(self) -> GradientWeight | None:
        """What weighs gradient rows; None if they do not count."""
        return Whitening(self) if self.schedule.gradient else None

    def decided(self) -> Decided:
        """The same with each route where z is largest."""
        return Decided(self.point, self.schedule)

    def solve(self, prior: Prior | None, weight: float) -> Tensor:
        """The next input: least squares of all rows as they stand."""
        return self.point.x + self.move(self.wanted, self.left, prior, weight)

    def products(self, apart: GradientWeight | None) -> RoutedRows:
        """The rows, gradient rows counting so much."""
        point, part = self.point, self.point.part
        at = (part.front, point.values, point.slopes, part.layer, part.pool)
        return RoutedRows(*at, self.slope, self.k, self.weight, self.variance, apart)

    def rows(self, move: Float[Tensor, "b ..."]) -> tuple[Float[Tensor, "b o m"], Float[Tensor, "g j i"]]:
        """What a move of the input does to value rows and gradient rows."""
        values, grads = self.products(None).each(move)
        return values, grads.sum(0)

    def z_moved(self, move: Float[Tensor, "b ..."]) -> Float[Tensor, "b o n"]:
        """What it does to z."""
        return self.point.part.layer.output(self.products(None).read(move))

    def move(self, wanted: Tensor, left: Tensor, prior: Prior | None = None, weight: float = 0.0) -> Tensor:
        """How far the input moves for what value rows want and gradient rows miss."""
        x, rows, pull = self.point.x, self.products(self.weigher()), 0.0

        def pulled(found: Tensor, move: Tensor) -> Tensor:
            return found if prior is None else found + pull * prior(move)

        right = rows.back(wanted, left[None])[None]
        if prior is not None:
            generator = torch.Generator(device=x.device).manual_seed(0)
            drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            size = float((self.weight.sqrt() * self.rows(drawn)[0]).square().sum()) / drawn.numel()
            pull = weight * size
            right = right - pull * prior(x - prior.centre)[None]
        steps = self.schedule.solve_steps * (1 if prior is not None else 3)
        if len(x) > 1 or x.numel() > FEW:
            target = self.schedule.solve_rtol * right.flatten(1).norm(dim=1)
            fast = rows.single if self.schedule.single and self.missed > CLOSE else None
            return mixed.solve(
                lambda move: pulled(rows.normal(move), move),
                None if fast is None else lambda move: pulled(fast.normal(move), move),
                right,
                target,
                steps,
            ).x[0]
        units = torch.eye(x.numel(), dtype=right.dtype, device=right.device).reshape(-1, *x.shape[1:])
        matrix = pulled(rows.back(*rows.each(units)), units).flatten(1)
        found = cg.solve(lambda move: move @ matrix, right.flatten(1), self.schedule.solve_rtol, steps)
        return found.x.reshape(x.shape)


class Decided(Step):
    """With each route where z is largest, or as given, and nothing undecided.

    A wrong route spoils the gradient rows of one output. So each output's rows are weighed by what they miss, value
    rows by what these do: the outputs that are right soon outweigh the others.
    """

    def __init__(self, point: Point, schedule: Annealing, routes: Tensor | None = None):
        super().__init__(point, 0.0, 0.0, schedule, routes)
        self.missed = max(self.missed, self.gradient_missed)
        wanted = self.wanted[self.weight > 0]
        apart = float(wanted.square().mean()) if len(wanted) else 0.0
        self.variance = apart + (LEAST * point.spread) ** 2

    def weigher(self) -> GradientWeight:
        size = self.point.observed.grad.square().mean(2, keepdim=True)
        variance = self.left.square().mean(2, keepdim=True) + LEAST**2 * size + torch.finfo(size.dtype).tiny
        return ByOutput(1 / variance)


class Whitening(GradientWeight):
    """The inverse covariance of each output's gradient rows: noise I + A A', by the smaller of its two factors; nothing
    of outputs whose rows would take long and are not needed."""

    def __init__(self, step: Step):
        point, layer, pool = step.point, step.point.part.layer, step.point.part.pool
        k = point.observed.cotangent
        reads = layer.weight.shape[2]
        # What the input's own error does to the gradient rows.
        error = float(point.read.square().mean()) * max(step.missed, LEAST) ** 2
        noise = k.square().sum((0, 2)) * error
        noise = noise + (LEAST * point.observed.grad.reshape(-1, reads).norm(dim=1)) ** 2 / reads
        undecided = (step.windows.undecided & (k != 0)).transpose(0, 1).flatten(1)
        most = int(undecided.sum(1).max())
        first = undecided.int().argsort(1, descending=True)[:, :most]
        count = most * pool.windows.shape[1]
        self.by_reads = count >= reads
        size = min(count, reads) * reads
        self.outputs = (k != 0).any(2).any(0).nonzero()[:, 0]  # the rows of all others are zero
        if size * len(self.outputs) > LARGE:
            enough = -(-PLENTY * point.x.numel() // reads)
            largest = point.observed.grad.flatten(0, 1)[self.outputs].norm(dim=1).argsort(descending=True)
            self.outputs = self.outputs[largest[:enough]]
        noise = noise[self.outputs]
        factors, together = [], max(1, ROOM // max(1, count * reads))
        for some in torch.split(self.outputs, together):
            columns = _columns(step, some, first[some], undecided[some].gather(1, first[some]))
            factors.append(columns @ columns.mT if self.by_reads else columns)
        factor = torch.cat(factors)
        square = factor if self.by_reads else factor.mT @ factor
        self.noise = noise + 1e-10 * square.diagonal(dim1=1, dim2=2).sum(1) / reads + torch.finfo(noise.dtype).tiny
        eye = torch.eye(square.shape[1], dtype=noise.dtype, device=noise.device)
        lower = torch.linalg.cholesky(square + self.noise[:, None, None] * eye)
        self.factor, self.inverse = factor, torch.cholesky_inverse(lower)

    def single(self, unit: float) -> Whitening:
        found = copy(self)
        found.noise = (self.noise / unit**2).clamp(min=1 / MOST).float()
        found.factor = (self.factor / (unit**2 if self.by_reads else unit)).float()
        found.inverse = (self.inverse * unit**2).clamp(min=-MOST, max=MOST).float()
        return found

    def __call__(self, grads: Float[Tensor, "s g j i"]) -> Float[Tensor, "s g j i"]:
        # Rows times a matrix for each output: many matrices times a column each take several times as long.
        rows = grads.flatten(1, 2)[:, self.outputs].transpose(0, 1)
        if self.by_reads:
            found = rows @ self.inverse
        else:
            found = (rows - rows @ self.factor @ self.inverse @ self.factor.mT) / self.noise[:, None, None]
        whole = torch.zeros_like(grads.flatten(1, 2))
        whole[:, self.outputs] = found.transpose(0, 1)
        return whole.reshape(grads.shape)


def _columns(step: Step, outputs: Tensor, first: Tensor, undecided: Tensor) -> Float[Tensor, "o i q"]:
    """What the undecided windows of some outputs may do to their gradient rows.

    Args:
        outputs: which, (o,).
        first: of each output so many windows of all samples, (o, n), undecided or not.
    """
    point, pool = step.point, step.point.part.pool
    sample, window = first // pool.windows.shape[0], first % pool.windows.shape[0]
    at = (sample, outputs[:, None], window)
    own = point.reads(sample[..., None], outputs[:, None, None], pool.windows[window])  # (o, n, places, i)
    if not isinstance(pool, MeanPool):
        own = own - (step.windows.slope[at][..., None] * own).sum(2, keepdim=True)
    amount = step.windows.spread[at] * (point.observed.cotangent[at] * undecided)[..., None]
    return (own * amount[..., None]).flatten(1, 2).mT
