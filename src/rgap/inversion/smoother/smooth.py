"""One sample behind several steps through a chain with kinks: an iterated smoother.

From the output to the input each value of the chain is a normal distribution, with what the rows of all layers behind
it tell (`information`). A unit whose side is in doubt makes the slope behind it a number of its own, with a variance,
that disturbs the gradient rows of all layers in front; so they are used as far as they are good from the first pass on.
From the input to the output all values, their errors and the slopes in doubt follow. Kinks are then rounded off as far
as values are in doubt, and all is linearised once more. What the rows miss without a reason is noise of theirs. Near
the sample the steps themselves are linearised, and not their middle (`through`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.smoother.again import Again, Solved
from rgap.inversion.smoother.first import First
from rgap.inversion.smoother.information import Information
from rgap.inversion.smoother.setting import Setting
from rgap.inversion.smoother.steps import Guess, Made
from rgap.inversion.smoother.through import Through
from rgap.inversion.walk import Walk
from rgap.linalg.deadline import OutOfTime

AGREES = 5.0
"""Roundings up to which no units stand on wrong sides."""


@dataclass(frozen=True, eq=False)
class Reached:
    """The sample whose steps come nearest."""

    x: Float[Tensor, "1 ..."]
    walk: Walk
    misfit: float
    """Of its steps (`Difference.misfit`), each value in units of its own rounding."""
    std: float
    """How far the rounding moves its values, root mean square, by the rows alone; infinite where some are free."""
    cut_off: bool
    """Whether the time was up before the end."""
    left: float
    """What the rows miss, root mean square in units of their noise, with sides that are open as unknowns."""
    through: bool = False
    """Whether all rows agree but for units that stand at their kinks, whose sides are left open."""

    @property
    def error(self) -> float:
        """Of its values, root mean square. Not by the misfit, of which a wrong side makes hundreds: the rows allow for
        sides that are open."""
        return self.std * max(1.0, self.left)

    def nearer(self, other: Reached) -> bool:
        """Whether it is to be preferred. One wrong side misses more than a sample that is far away; so where only sides
        are open it is how well the rows tell the sample that counts, and not the misfit, unless that is small: a
        trial of sides that rounding leaves open explains the rounding by them, and is further away."""
        if min(self.misfit, other.misfit) <= AGREES or not (self.through or other.through):
            return self.misfit < other.misfit
        if self.through and other.through:
            return self.std < other.std
        return self.through


def mismatch(setting: Setting, k: Tensor) -> float:
    """How little the last two layers' gradients fit each other with this cotangent of the output; 0 if they do."""
    return First(setting).mismatch(k)


def smooth(
    setting: Setting,
    k: Tensor,
    enough: float,
    report: Callable[[int, float], None] = lambda step, misfit: None,
) -> Reached | None:
    """The sample that all parameters agree with after all steps, or the nearest that was found; None if the time was up
    before there was one.

    Args:
        k: of the output, as the last layer's gradient has it, (1, *shape).
        enough: a misfit at which it has converged.
    """
    smoothing, best, since = setting.smoothing, None, 0
    try:
        for number, found in enumerate(_Smoother(setting).passes(k)):
            report(number + 1, found.misfit)
            since = 0 if found.through else since + 1
            if best is None or found.nearer(best):
                best, since = found, 0
            if best.misfit <= enough or (since >= smoothing.patience and number >= smoothing.most // 2):
                break
    except OutOfTime:
        return None if best is None else replace(best, cut_off=True)
    except (RuntimeError, ArithmeticError):  # it ran away: what is known is no normal distribution any more
        return best
    return best


@dataclass(frozen=True, eq=False)
class _Smoother:
    setting: Setting

    def passes(self, k: Tensor) -> Iterator[Reached]:
        """Guess after guess; those through the steps themselves as soon as values are known well enough, or no better
        after some."""
        smoothing, steps = self.setting.smoothing, self.setting.steps
        guess = First(self.setting).guess(k)
        made: Made | None = None
        missed, before, begun = 1.0, 1.0, False
        tau = dict.fromkeys(steps.names, smoothing.begin)
        through = Through(self.setting)
        for number in range(smoothing.most):
            made, residual, now = self._run(guess, made)
            before, missed = missed, now
            places = [z - own for z, own in zip(made.z, guess.z, strict=True)]
            own = self.setting.noise(made.trail)
            # Where units stand in the steps is as uncertain as the gradients that move them.
            off = [0.5 * max(missed, min(before, 0.1)) * float(place.square().mean().sqrt()) for place in places]
            std = [(s.square() + each**2).sqrt() for s, each in zip(guess.std, off, strict=True)]
            guess = replace(guess, places=places, std=std)
            solved = self._settled(guess, residual, own, tau)
            for name, excess in solved.excess.items():
                fast, slow = smoothing.cooling
                tau[name] *= fast if excess < 0.5 else slow if excess < smoothing.amiss else 1.0
            guess = solved.guess
            # Passes take the places of units in the steps for known, and are off by more than the rows say.
            left = through.approach.wider * max(1.0, *solved.excess.values())
            reached = self.reached(guess.x, solved.information, left)
            yield reached
            low, high = self.setting.value_range
            if not begun and (reached.std <= smoothing.near * (high - low) or number + 1 == smoothing.far):
                begun = True
                for found in through.passes(guess.x, max(tau.values())):
                    reached = self.reached(found.x, found.information, max(found.left.values()))
                    yield replace(reached, through=True)

    def _run(self, guess: Guess, before: Made | None) -> tuple[Made, dict[str, Tensor], float]:
        """The steps, what they miss of the mean gradient, and how much that is.

        The weights of later steps come of the gradients of those before, or of how they differ from the mean that was
        sent, whichever misses less: far from the sample the latter is known better.
        """
        steps, found = self.setting.steps, []
        apart = steps.middle(guess).apart
        for tied in (True, False):
            made = steps.run(guess, apart, before, tied)
            residual = {name: steps.gradient[name] - made.gradient[name] for name in steps.names}
            each = sorted(float(r.square().mean().sqrt()) / steps.size[name] for name, r in residual.items())
            found.append((made, residual, each[len(each) // 2]))
        return min(found, key=lambda each: each[2])

    def _settled(
        self, guess: Guess, residual: dict[str, Tensor], own: dict[str, Tensor], tau: dict[str, float]
    ) -> Solved:
        """One pass, again where rows miss more than they may: first with larger errors of the values, so that more
        slopes are in doubt, then with more noise; tau is raised."""
        size = self.setting.steps.size
        for attempt in range(3):
            variance = {name: own[name] + (tau[name] * size[name]) ** 2 for name in tau}
            weight = {name: 1 / each for name, each in variance.items()}
            solved = Again(self.setting).solve(guess, self.setting.steps.middle(guess), residual, weight)
            amiss = [name for name in tau if solved.excess[name] > self.setting.smoothing.amiss]
            if not amiss:
                break
            if attempt == 0:
                wider = min(max(solved.excess.values()), self.setting.smoothing.wider)
                guess = replace(guess, std=[each * wider for each in guess.std])
                continue
            for name in amiss:
                tau[name] = max(tau[name], float(solved.left[name].square().mean().sqrt()) / size[name])
        return solved

    def reached(self, x: Tensor, information: Information, left: float) -> Reached:
        """An input as the certificate sees it."""
        steps = self.setting.steps
        walk = Walk(steps.client, steps.plan).all(x, steps.labels, ((0,),) * steps.plan.steps)
        lower, info = torch.linalg.cholesky_ex(information.known)
        std = float(torch.cholesky_inverse(lower).diagonal().mean().sqrt()) if int(info) == 0 else torch.inf
        return Reached(x, walk, steps.difference.along(walk).misfit(walk), std, False, left)
