"""Gauss and Newton's steps through the local steps themselves, near the sample.

The residual is that of all parameters after all steps, as a function of the input and of the slopes in doubt
(`sides`), which with slopes and weights given is smooth; the weights of all steps are simulated again behind each move.
Its derivative is had by products, and the smoother's matrix, of the mean over the steps, whitens the unknowns for LSMR;
with its factor are the errors of all values drawn. A step counts where what is left of the rows is their noise, and so
much noise as the residual was is taken for granted at first. The more sides are settled, the fewer are in doubt, until
none is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.smoother.again import Again
from rgap.inversion.smoother.effects import effects
from rgap.inversion.smoother.information import Information
from rgap.inversion.smoother.setting import Setting
from rgap.inversion.smoother.sides import (
    Doubt,
    Step,
    doubts,
    expected_slopes,
    expecting,
    given,
    in_front,
    mean_of,
    steps_with,
)
from rgap.inversion.smoother.trial import Trial
from rgap.inversion.walk import Walk
from rgap.linalg.derivative import linearised
from rgap.linalg.lsmr import lsmr
from rgap.nn.soft import GivenSlopes


@dataclass(frozen=True)
class Approach:
    """How it goes on from step to step."""

    wider: float = 3.0
    """By so much values' errors are taken for larger than the rows say."""
    most: int = 16
    """Linearisations."""
    begin: tuple[float, float] = (1e-3, 1e-2)
    """Between these, of a parameter's gradient is taken for noise at first, and of what is in front of activations for
    their errors, but wider: as much as rows missed before."""
    attempts: int = 4
    """Each with noise and errors twice as large, where rows miss more than they may."""
    inner: int = 3
    """Gauss and Newton's steps with one factor,"""
    quiet: float = 0.4
    """until rows miss less than this part of their noise, or hardly more than was expected."""
    iterations: int = 250
    """Of LSMR: some directions are whitened badly, where slopes and weights change together."""
    tolerance: float = 1e-6
    amiss: float = 1.5
    """Root mean square of a parameter's rows, in units of their noise, that is too much."""
    cooling: tuple[float, float] = (0.3, 0.6)
    """The noise falls to this part of what it was: where rows miss less than 0.7 of it, or less than `amiss`; else it
    rises."""
    settled: float = 0.3
    """Noise, in units of the rounding, below which it begins again with the rounding, and errors twice as large: some
    unit stands on its wrong side, and no other is in doubt."""
    draws: int = 16
    """Of input and doubts, with which the steps are simulated."""
    halvings: int = 4
    trials: int = 3
    """Of the sides that are left open, each with a step behind it."""


APPROACH = Approach()


@dataclass(frozen=True, eq=False)
class Near:
    """What is known near the sample."""

    x: Float[Tensor, "1 ..."]
    z: list[Tensor]
    """In front of each activation, (steps, *shape): with slopes in doubt as they were found, and not as the input by
    itself has them, since a unit on its wrong side moves the weights of all later steps."""
    std: list[Tensor]
    """Of these, taken for larger."""
    noise: dict[str, float]
    """Of each parameter's gradient, beside the rounding, relative to its size."""


@dataclass(frozen=True, eq=False)
class Whitened:
    """Input and doubts, by the factor of what the rows tell of both in the middle of the steps."""

    lower: Float[Tensor, "u u"]
    """The doubts are first."""
    doubts: int

    @cached_property
    def _upper(self) -> Tensor:
        return self.lower.mT.contiguous()

    def unwhitened(self, v: Float[Tensor, " u"]) -> Float[Tensor, " u"]:
        """Input first, and then doubts."""
        found = torch.linalg.solve_triangular(self._upper, v[:, None], upper=True)[:, 0]
        return torch.cat([found[self.doubts :], found[: self.doubts]])

    def adjoint(self, u: Float[Tensor, " u"]) -> Float[Tensor, " u"]:
        inputs = len(u) - self.doubts
        found = torch.cat([u[inputs:], u[:inputs]])
        white: Tensor = torch.linalg.solve_triangular(self.lower, found[:, None], upper=False)[:, 0]
        return white


@dataclass(frozen=True, eq=False)
class Made:
    """What the steps of an input with slopes in doubt miss.

    Weights of later steps hang on the input and the slopes too. With weights given, and simulated again behind each
    move, rows are better whitened, but the moves converge by a tenth each where weights move by a third of their size,
    and not at all where they double.
    """

    setting: Setting
    root: Float[Tensor, "v v"]
    """Of the prior's matrix."""
    found: Sequence[Doubt]
    slopes: Sequence[Tensor]
    """Expected, of each activation, (steps, *shape)."""
    units: Mapping[str, Tensor]
    """Of each parameter's rows."""

    def missed(self, u: Tensor) -> Tensor:
        """Of what was sent, and what the prior and the doubts say beside."""
        steps, gradients = self.setting.steps, list[dict[str, Tensor]]()
        x, slopes = self.parted(u)
        for step in range(steps.plan.steps):
            gradients.append(self._gradient(steps.now(gradients), x, slopes, step))
        rows = []
        for name, unit in self.units.items():
            mean = sum((c * g[name] for c, g in zip(steps.shares, gradients, strict=True)), -steps.gradient[name])
            rows.append((mean / unit).flatten())
        return torch.cat([*rows, self.root @ (x.flatten() - self.setting.prior.centre), u[x.numel() :]])

    def parted(self, u: Tensor) -> tuple[Tensor, list[Tensor]]:
        shape = self.setting.steps.client.input_shape
        x, d = u[: math.prod(shape)], u[math.prod(shape) :]
        parts = torch.split(d, [len(doubt.unit) for doubt in self.found])
        every = zip(self.found, self.slopes, parts, strict=True)
        return x.reshape(1, *shape), [doubt.added(slope, own) for doubt, slope, own in every]

    def _gradient(self, weights: Mapping[str, Tensor], x: Tensor, slopes: list[Tensor], step: int) -> dict[str, Tensor]:
        steps = self.setting.steps
        kinked = [j for j, below in enumerate(steps.below) if bool((below < 1).any())]
        with GivenSlopes([slopes[j][step] for j in kinked]):
            return steps.client.differentiable(weights, x, steps.labels)


@dataclass(frozen=True, eq=False)
class Stepped:
    """Gauss and Newton's steps from a point, with one factor."""

    x: Float[Tensor, "1 ..."]
    z: list[Tensor]
    """In front of each activation, with the slopes that were found."""
    std: list[Tensor]
    """Of these, by the rows."""
    left: dict[str, float]
    """Of each parameter, what the rows miss, root mean square in units of their noise."""
    explained: bool
    """Whether that is their noise, and what was expected."""
    information: Information
    rounding: dict[str, float]
    """Of each parameter's gradient, relative to its size."""
    doubts: list[Doubt]
    settled: bool = False
    """Whether the noise that is left is less than the rounding: all but sides of units is known."""


@dataclass(frozen=True, eq=False)
class Through:
    setting: Setting
    approach: Approach = APPROACH

    def passes(self, x: Tensor, missed: float) -> Iterator[Stepped]:
        """Nearer and nearer to the sample; it ends where rows miss more than can be explained.

        Args:
            missed: by rows so far, of a parameter's gradient.
        """
        wider, steps = self.approach.wider, self.setting.steps
        values, (least, most) = steps.middle_network.forward(x), self.approach.begin
        z, begin = [values[steps.reads(at)] for at in steps.activations], min(max(missed, least), most)
        std = [torch.full_like(each, wider * begin * float(each.square().mean().sqrt())) for each in z]
        z = in_front(steps, steps_with(steps, x, expecting(steps, std)))
        near = Near(
            x, z, [each.expand_as(own) for each, own in zip(std, z, strict=True)], dict.fromkeys(steps.names, begin)
        )
        for _ in range(self.approach.most):
            for _ in range(self.approach.attempts):
                found = self.step(near)
                if found.explained:
                    break
                noise = {name: 2 * each for name, each in near.noise.items()}
                near = Near(near.x, near.z, [2 * each for each in near.std], noise)
            else:
                return
            yield found
            if found.settled:
                lower = _cholesky(found.information.known + self.setting.tie[0])
                trial = Trial(steps, lower)
                for _ in range(self.approach.trials):
                    x, slopes = trial.settled(found.x, found.doubts)
                    found = replace(found, x=x)
                    sharp = self.sharp(replace(near, x=x, z=found.z, std=found.std), slopes)
                    if not sharp.explained:
                        break
                    yield found
                    found = replace(found, x=sharp.x, z=sharp.z)
                    yield found
            noise, more = self._cooler(near.noise, found), wider
            if all(each < self.approach.settled * found.rounding[name] for name, each in noise.items()):
                noise, more = found.rounding, 2 * wider
            near = Near(found.x, found.z, [more * each for each in found.std], noise)

    def sharp(self, near: Near, slopes: list[Tensor]) -> Stepped:
        """A step with sides given: without noise, unless rows miss more than the rounding then."""
        sharp = self.step(replace(near, noise=dict.fromkeys(near.noise, 0.0)), slopes)
        return sharp if sharp.explained else self.step(near, slopes)

    def _cooler(self, noise: dict[str, float], found: Stepped) -> dict[str, float]:
        approach, new = self.approach, dict[str, float]()
        for name, left in found.left.items():
            fast, slow = approach.cooling
            new[name] = noise[name] * (fast if left < 0.7 else slow if left < approach.amiss else min(left, 3.0))
        return new

    def step(self, near: Near, slopes: list[Tensor] | None = None) -> Stepped:
        """A few moves with one factor; with no side in doubt where slopes are given."""
        setting, steps = self.setting, self.setting.steps
        walk = Walk(steps.client, steps.plan).all(near.x, steps.labels, ((0,),) * steps.plan.steps)
        own, size = setting.noise(walk.trail), steps.size
        variance = {name: own[name] + (near.noise[name] * size[name]) ** 2 for name in steps.names}
        found = doubts(steps, near.z, near.std)
        if slopes is None:
            slopes = [expected_slopes(z, s, b) for z, s, b in zip(near.z, near.std, steps.below, strict=True)]
        else:
            found = [replace(doubt, unit=doubt.unit[:0], pattern=doubt.pattern[:0]) for doubt in found]
        run = steps_with(steps, near.x, given(slopes))
        whitened, information, drawn = self._factored(run, found, variance)
        made = self._made(slopes, found, variance)
        rows = sum(each.numel() for each in variance.values())
        u = torch.cat([near.x.flatten(), near.x.new_zeros(whitened.doubts)])
        std = self._spread(made, u, drawn[: self.approach.draws])
        for _ in range(self.approach.inner):
            u, missed, expected = self._moved(made, u, whitened)
            if float(missed.norm()) < max(1.1 * float(expected.norm()), self.approach.quiet * len(missed) ** 0.5):
                break
        sizes = [each.numel() for each in variance.values()]

        def each_of(r: Tensor) -> dict[str, float]:
            parts = torch.split(r[:rows], sizes)
            return {name: float(part.square().mean().sqrt()) for name, part in zip(variance, parts, strict=True)}

        explained = float(missed.norm()) <= 2 * float(expected.norm())
        explained &= max(each_of(expected).values()) <= self.approach.amiss
        x = u[: near.x.numel()].reshape(near.x.shape)
        rounding = {name: float(own[name].mean().sqrt()) / size[name] for name in variance}
        settled = all(near.noise[name] < each for name, each in rounding.items())
        z = self._in_front(made, u)
        return Stepped(x, z, std, each_of(missed), explained, information, rounding, found, settled)

    def _moved(self, made: Made, u: Tensor, whitened: Whitened) -> tuple[Tensor, Tensor, Tensor]:
        """One step, halved until less is missed: where it ends, what is missed there, and what was expected to be."""
        along, here, back = linearised(made.missed, u)

        def forth(v: Tensor) -> Tensor:
            return along(whitened.unwhitened(v))

        def pulled(rows: Tensor) -> Tensor:
            return whitened.adjoint(back(rows))

        approach = self.approach
        v = lsmr(forth, pulled, -here, len(u), approach.iterations, tolerance=approach.tolerance)
        move, expected = whitened.unwhitened(v), here + forth(v)
        for halving in range(approach.halvings):
            tried = u + 0.5**halving * move
            with torch.no_grad():
                there = made.missed(tried)
            if float(there.norm()) < float(here.norm()):
                return tried, there, expected
        return u, here, expected

    def _made(self, slopes: Sequence[Tensor], found: Sequence[Doubt], variance: dict[str, Tensor]) -> Made:
        return Made(self.setting, self._prior, found, slopes, {name: v.sqrt() for name, v in variance.items()})

    @cached_property
    def _prior(self) -> Float[Tensor, "v v"]:
        """The root of the prior's matrix."""
        found: Tensor = torch.linalg.cholesky(self.setting.tie[0]).mT.contiguous()
        return found

    def _factored(
        self, run: Sequence[Step], found: Sequence[Doubt], variance: dict[str, Tensor]
    ) -> tuple[Whitened, Information, Float[Tensor, "s u"]]:
        """By the smoother's matrix in the middle of the steps: whitened unknowns, what the rows tell of the input, and
        draws of input and doubts."""
        setting, steps = self.setting, self.setting.steps
        middle = mean_of(steps, run)
        nothing = {name: torch.zeros_like(each) for name, each in variance.items()}
        weight = {name: 1 / each for name, each in variance.items()}
        information = Again(setting).back(middle, nothing, weight, effects(steps, run, found))[0]
        # The output's cotangent is first, then doubts, then the input.
        number = sum(len(doubt.unit) for doubt in found)
        order = torch.cat([torch.arange(number, len(information.beside)), torch.arange(number)])
        beside = information.beside[order][:, order].clone()
        beside.diagonal()[len(order) - number :].add_(1.0)
        lower = _cholesky(beside)
        half = torch.linalg.solve_triangular(lower, information.cross[:, order].mT, upper=False)
        known = information.known - half.mT @ half
        corner = _cholesky(known + setting.tie[0])
        whole = torch.cat(
            [torch.cat([lower, lower.new_zeros(len(lower), len(corner))], 1), torch.cat([half.mT, corner], 1)]
        )
        outputs = len(order) - number
        drawn = setting.drawn(whole)[:, outputs:]
        drawn = torch.cat([drawn[:, number:], drawn[:, :number]], 1)
        return Whitened(whole[outputs:, outputs:].contiguous(), number), replace(information, known=known), drawn

    def _spread(self, made: Made, u: Float[Tensor, " u"], drawn: Float[Tensor, "s u"]) -> list[Tensor]:
        """The errors of what is in front of the activations in each step, from draws of input and doubts: with these
        the weights of later steps move, and what they read is known less by far."""
        here = self._in_front(made, u)
        found = [torch.zeros_like(z) for z in here]
        for each in drawn:
            for square, z, moved in zip(found, here, self._in_front(made, u + each), strict=True):
                square += (moved - z).square() / len(drawn)
        return [square.sqrt().clamp(min=1e-12) for square in found]

    def _in_front(self, made: Made, u: Float[Tensor, " u"]) -> list[Tensor]:
        """Of each activation in all steps."""
        x, slopes = made.parted(u)
        return in_front(self.setting.steps, steps_with(self.setting.steps, x, given(slopes)))


def _cholesky(matrix: Tensor) -> Tensor:
    """The factor of a matrix whose diagonal may have any sizes."""
    size = matrix.diagonal().sqrt()
    scaled = matrix / size / size[:, None]
    scaled.diagonal().add_(1e-12)
    found: Tensor = torch.linalg.cholesky(scaled) * size[:, None]
    return found
