"""Steps on a constraint system that differentiate its cotangents too, with a prior that fades.

Gauss and Newton's steps with slopes taken for fixed (`rgap.inversion.gauss_newton`) ask for nothing but products, and
they get there where activations are nearly straight, as in networks that have not learned. Where they bend, what a
move does to the cotangents is as large as what it does to the values, and such steps leave even an input that is right
to three digits. All rows are a smooth function of the inputs there, and Levenberg and Marquardt's steps on it are what
remains: each takes the whole derivative, as a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.inversion.gauss_newton import Solution
from rgap.inversion.jacobian import Jacobian
from rgap.inversion.prior import Prior
from rgap.inversion.system import ConstraintSystem, Linearisation
from rgap.linalg import deadline

LARGEST = 4_096
"""Unknowns up to which constraints are differentiated with their cotangents."""


@dataclass(frozen=True)
class Fading:
    """How the prior's weight and the damping, relative to the constraints, change from step to step."""

    initial: float = 0.1
    """Of the prior."""
    factor: float = 0.5
    damping: float = 1e-3
    eases: float = 0.2
    """The damping after a step that helps."""
    grows: float = 4.0
    """And after one that does not, which is not taken."""
    most: float = 1e6
    """A damping with which no step leads anywhere."""
    steps: int = 60
    patience: int = 12
    """Steps in which the distance has to halve."""
    settled: float = 0.9
    """What a step leaves of a distance, once the gradients agree, that is the last one."""


FADING = Fading()


def differentiated_steps(
    system: ConstraintSystem,
    prior: Prior,
    tolerance: float,
    schedule: Fading = FADING,
    report: Callable[[int, float], None] = lambda step, distance: None,
) -> Solution:
    """The inputs at which the gradients agree, or the nearest that was found, from the prior's centre on.

    Args:
        system: that differentiates its cotangents (`ConstraintSystem.differentiated`).
        tolerance: distance of the gradients at which they agree.
        report: is called with the number of steps and the least distance.
    """
    at = system.linearise(system.output.value.new_full(system.in_shape, prior.centre))
    form = prior.matrix(at.x, system.samples)
    best, trail, damping, weight = Solution(at.x, torch.inf, 0), [math.inf], schedule.damping, schedule.initial
    for step in range(schedule.steps):
        if deadline.used() >= 1:
            break
        report(step, best.distance)
        try:
            at, damping = _step(system, at, prior.centre, weight * form, damping, schedule)
        except deadline.OutOfTime:
            break
        distance = system.distance(at)
        settled = best.distance <= tolerance and distance > schedule.settled * best.distance
        if distance < best.distance:
            best = Solution(at.x, distance, step + 1)
        trail.append(best.distance)
        before = trail[max(0, len(trail) - 1 - schedule.patience)]
        if settled or damping > schedule.most or best.distance > before / 2:
            break
        # Where the gradients agree it is the prior's pull that they miss.
        weight = 0.0 if distance <= tolerance else weight * schedule.factor
    return Solution(best.x, best.distance, len(trail) - 1)


def _step(
    system: ConstraintSystem, at: Linearisation, centre: float, form: Tensor, damping: float, schedule: Fading
) -> tuple[Linearisation, float]:
    """The next point, and the damping there; the same point where no damping helps.

    Args:
        form: the prior's matrix, to its present weight.
    """
    jacobian = Jacobian(system, at, {})
    size = jacobian.mean_diagonal
    residual, gram = jacobian.weighted(system.residual(at)), jacobian.gram()
    form = size * form

    def cost(there: Linearisation) -> float:
        apart = there.x.flatten() - centre
        return float(jacobian.weighted(system.residual(there)).square().sum() + apart @ form @ apart)

    here = cost(at)
    right = jacobian.rmv(residual).flatten() - form @ (at.x.flatten() - centre)
    while damping <= schedule.most:
        damped = gram + form
        damped.diagonal().add_(damping * size)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            move = torch.cholesky_solve(right[:, None], lower).reshape(at.x.shape)
            there = system.linearise(at.x + move)
            if cost(there) < here:
                return there, damping * schedule.eases
        damping *= schedule.grows
    return at, damping
