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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.smoother.again import Again
from rgap.inversion.smoother.information import Information
from rgap.inversion.smoother.setting import Setting
from rgap.inversion.smoother.sides import Doubt, Step, doubts, effects, mean_of, pushed, steps_with
from rgap.inversion.smoother.steps import Middle
from rgap.inversion.smoother.trial import Trial
from rgap.inversion.walk import Walk
from rgap.linalg.derivative import linearised
from rgap.linalg.lsmr import lsmr
from rgap.nn.soft import GivenSlopes

SHARP = 1e-6
"""Of values' errors, with which no unit is in doubt."""


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
    """Gauss and Newton's steps with one factor."""
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
    halvings: int = 4
    trials: int = 3
    """Of the sides that are left open, each with a step behind it."""


APPROACH = Approach()


@dataclass(frozen=True, eq=False)
class Near:
    """What is known near the sample."""

    x: Float[Tensor, "1 ..."]
    std: list[Tensor]
    """Of what is in front of each activation, taken for larger."""
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
    """What the steps of an input with slopes in doubt miss, at given weights.

    Those hang on the input too; but tied at both ends to what was sent they move by no more than gradients differ
    between steps, and linearised at given ones the rows are what they are whitened for.
    """

    setting: Setting
    root: Float[Tensor, "v v"]
    """Of the prior's matrix."""
    found: Sequence[Doubt]
    slopes: Sequence[Tensor]
    """Expected, of each activation, (steps, *shape)."""
    units: Mapping[str, Tensor]
    """Of each parameter's rows."""

    def trail(self, u: Tensor) -> list[dict[str, Tensor]]:
        """The weights before each step, and behind the last."""
        steps, gradients = self.setting.steps, list[dict[str, Tensor]]()
        x, slopes = self._parted(u)
        with torch.no_grad():
            for step in range(steps.plan.steps):
                gradients.append(self._gradient(steps.now(gradients), x, slopes, step))
        return steps.trail(gradients)

    def at(self, trail: Sequence[Mapping[str, Tensor]]) -> Callable[[Tensor], Tensor]:
        """What is missed, and what the prior and the doubts say beside."""
        steps, centre = self.setting.steps, self.setting.prior.centre

        def residual(u: Tensor) -> Tensor:
            x, slopes = self._parted(u)
            each = [self._gradient(trail[step], x, slopes, step) for step in range(steps.plan.steps)]
            rows = []
            for name, unit in self.units.items():
                mean = sum((c * g[name] for c, g in zip(steps.shares, each, strict=True)), -steps.gradient[name])
                rows.append((mean / unit).flatten())
            return torch.cat([*rows, self.root @ (x.flatten() - centre), u[x.numel() :]])

        return residual

    def _parted(self, u: Tensor) -> tuple[Tensor, list[Tensor]]:
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
    std: list[Tensor]
    """Of what is in front of each activation, by the rows."""
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
        near = Near(x, std, dict.fromkeys(steps.names, begin))
        for _ in range(self.approach.most):
            for _ in range(self.approach.attempts):
                found = self.step(near)
                if found.explained:
                    break
                noise = {name: 2 * each for name, each in near.noise.items()}
                near = Near(near.x, [2 * each for each in near.std], noise)
            else:
                return
            yield found
            if found.settled:
                lower = _cholesky(found.information.known + self.setting.tie[0])
                trial = Trial(steps, lower)
                for _ in range(self.approach.trials):
                    x, slopes = trial.settled(found.x, found.doubts)
                    found = replace(found, x=x)
                    sharp = self.step(Near(x, [SHARP * each for each in found.std], near.noise), slopes)
                    if not sharp.explained:
                        break
                    yield found
                    found = replace(found, x=sharp.x)
                    yield found
            noise, more = self._cooler(near.noise, found), wider
            if all(each < self.approach.settled * found.rounding[name] for name, each in noise.items()):
                noise, more = found.rounding, 2 * wider
            near = Near(found.x, [more * each for each in found.std], noise)

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
        run = steps_with(steps, near.x, near.std)
        found = doubts(steps, run, near.std)
        if slopes is None:
            slopes = [torch.cat([step.slopes[at] for step in run]) for at in steps.activations]
        else:
            found = [replace(doubt, unit=doubt.unit[:0], pattern=doubt.pattern[:0]) for doubt in found]
        whitened, information, std = self._factored(run, found, variance)
        made = self._made(slopes, found, variance)
        rows = sum(each.numel() for each in variance.values())
        u = torch.cat([near.x.flatten(), near.x.new_zeros(whitened.doubts)])
        for _ in range(self.approach.inner):
            u, missed, expected = self._moved(made, u, whitened)
            if float(missed.norm()) < 1.1 * float(expected.norm()):
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
        return Stepped(x, std, each_of(missed), explained, information, rounding, found, settled)

    def _moved(self, made: Made, u: Tensor, whitened: Whitened) -> tuple[Tensor, Tensor, Tensor]:
        """One step, halved until less is missed: where it ends, what is missed there, and what was expected to be."""
        along, here, back = linearised(made.at(made.trail(u)), u)

        def forth(v: Tensor) -> Tensor:
            return along(whitened.unwhitened(v))

        def pulled(rows: Tensor) -> Tensor:
            return whitened.adjoint(back(rows))

        approach = self.approach
        v = lsmr(forth, pulled, -here, len(u), approach.iterations, tolerance=approach.tolerance)
        move, expected = whitened.unwhitened(v), here + forth(v)
        for halving in range(approach.halvings):
            tried = u + 0.5**halving * move
            there = made.at(made.trail(tried))(tried).detach()
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
    ) -> tuple[Whitened, Information, list[Tensor]]:
        """By the smoother's matrix in the middle of the steps: whitened unknowns, what the rows tell of the input, and
        the errors of what is in front of the activations."""
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
        drawn = setting.drawn(whole)
        outputs = len(order) - number
        beside_drawn, x_drawn = drawn[:, outputs : len(lower)], drawn[:, len(lower) :]
        std = self._spread(middle, run, found, x_drawn, beside_drawn)
        return Whitened(whole[outputs:, outputs:].contiguous(), number), replace(information, known=known), std

    def _spread(
        self,
        middle: Middle,
        run: Sequence[Step],
        found: Sequence[Doubt],
        x: Float[Tensor, "s v"],
        d: Float[Tensor, "s d"],
    ) -> list[Tensor]:
        """The errors of what is in front of the activations, from draws of input and doubts."""
        steps, network = self.setting.steps, self.setting.steps.middle_network
        starts = {0: x.reshape(-1, *network.input_shape)}
        parts = torch.split(d, [len(doubt.unit) for doubt in found], 1)
        for at, doubt, own in zip(steps.activations, found, parts, strict=True):
            z = torch.cat([step.values[steps.reads(at)] for step in run]).flatten(1)
            by = (z[:, doubt.unit] * doubt.pattern.mT).mean(0)
            out = z.new_zeros(len(x), z.shape[1]).index_add_(1, doubt.unit, own * by)
            starts[at + 1] = out.reshape(-1, *network.shapes[at + 1])
        moved = pushed(network, middle.values, middle.slopes, starts)
        spread = [moved[steps.reads(at)] for at in steps.activations]
        return [s.square().mean(0, keepdim=True).sqrt().clamp(min=1e-12) for s in spread if s is not None]


def _cholesky(matrix: Tensor) -> Tensor:
    """The factor of a matrix whose diagonal may have any sizes."""
    size = matrix.diagonal().sqrt()
    scaled = matrix / size / size[:, None]
    scaled.diagonal().add_(1e-12)
    found: Tensor = torch.linalg.cholesky(scaled) * size[:, None]
    return found
