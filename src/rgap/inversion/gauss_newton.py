"""Gauss and Newton's steps on a constraint system, with a prior that fades.

The slopes of the activations depend on the inputs that are sought: solve, linearise again, repeat. A prior stands in
for what the constraints do not yet tell, with a weight that falls to nothing as the units settle on their sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.jacobian import Jacobian
from rgap.inversion.pattern import Pattern, changed_sides, least_certain
from rgap.inversion.prior import Prior
from rgap.inversion.system import ConstraintSystem, Linearisation
from rgap.linalg import deadline
from rgap.linalg.least_squares import Determined, Regulariser, Solver


@dataclass(frozen=True)
class Continuation:
    """How the prior's weight, relative to the constraints, falls from step to step, and which units are in doubt."""

    initial: float = 0.1
    final: float = 1e-11
    factor: float = 5.0
    max_steps: int = 40
    """Linearisations."""
    doubt: tuple[int, ...] = (4, 6)
    """For each unit that changed its side in the last step so many are in doubt, those nearest to their kinks. Where
    one number leads nowhere the next may, with a prior that fades half as fast."""
    margin: int = 8
    """And a few more."""
    most: tuple[int, int] = (256, 512)
    """With more units in doubt than half the gradient rows that they may move, those rows are left out; but not with
    fewer than the first, and in any case with more than the second."""
    few: int = 12
    """With at most so many changes of sides the prior's weight falls twice as fast."""
    agrees: float = 0.05
    """Below this part of the tolerance a distance is the gradient's rounding and nothing else."""
    patience: int = 15
    """Linearisations without any progress after which a try ends."""
    gain: float = 1.0
    """It is progress if the distance is below this part of what it was at the last."""
    always: int = 0
    """Units in doubt at every step, from a start that nearly agrees."""


@dataclass(frozen=True)
class Solution:
    """The inputs at which the gradients agree, or the nearest that was found."""

    x: Float[Tensor, "b ..."]
    distance: float
    """As `ConstraintSystem.distance`."""
    steps: int
    """Linearisations."""


CONTINUATION = Continuation()
COARSE = 0.1
"""A distance above which a start tells next to nothing of the slopes."""
SETTLING, SLOW = 30, 0.9
"""Solves at the most, once the gradients agree, and how much of a move is left in the next one, at first. One or two
solves will do but where slopes move much with the inputs: steps that take them for fixed then converge slowly."""
HALVINGS = 6
"""Of a step without a prior, at the most."""


def gauss_newton(
    system: ConstraintSystem,
    solver: Solver,
    prior: Prior | None,
    tolerance: float,
    start: Linearisation | None = None,
    schedule: Continuation = CONTINUATION,
    report: Callable[[int, float], None] = lambda step, distance: None,
) -> Solution:
    """The inputs at which the layers' gradients agree, or the nearest that was found.

    Args:
        prior: None where the constraints are to determine the inputs alone; steps are then halved where they lead
            astray.
        tolerance: distance of the gradients at which they agree.
        start: where to linearise first; the middle of the prior if None.
        report: is called with the number of steps and the least distance.
    """
    if start is None:
        centre = 0.0 if prior is None else prior.centre
        start = system.linearise(system.output.value.new_full(system.in_shape, centre))
    tries: list[Solution] = []
    for doubt in schedule.doubt:
        tries.append(_Descent(system, solver, prior, tolerance, schedule, doubt, report).run(start))
        if tries[-1].distance <= tolerance or not system.kinked:
            break
        schedule = replace(schedule, factor=schedule.factor**0.5)
    best = min(tries, key=lambda found: found.distance)
    return Solution(best.x, best.distance, sum(found.steps for found in tries))


@dataclass(frozen=True)
class _Descent:
    """One try, with so many units in doubt for each that changed its side."""

    system: ConstraintSystem
    solver: Solver
    prior: Prior | None
    tolerance: float
    schedule: Continuation
    doubt: int
    report: Callable[[int, float], None]

    def run(self, at: Linearisation) -> Solution:
        system, schedule, tolerance = self.system, self.schedule, self.tolerance
        # Where to start from is too coarse for gradient rows that a slope may move, unless it nearly agrees.
        coarse = bool(at.slopes) and system.distance(at) > COARSE
        uncertain = None if coarse else least_certain(system, at, schedule.always)
        weight, last = schedule.final if self.prior is None else schedule.initial, False
        best = Solution(at.x, torch.inf, 0)
        fewest, progress, least, count, step = torch.inf, 0, math.inf, 0, 0
        for step in range(schedule.max_steps):
            deadline.check()
            self.report(step, best.distance)
            again, last = last, weight == schedule.final  # without the prior: the solve before, this one
            before, at = at, self._step(at, uncertain, weight, last)
            if not bool(at.x.isfinite().all()):
                break  # the input ran away, and activations overflowed
            distance, changed = system.distance(at), changed_sides(system, before, at)
            settled = again and best.distance <= tolerance and distance >= best.distance / 2
            if distance < schedule.gain * least or changed < fewest:
                progress, least = step, min(least, distance)
            if distance < best.distance:
                best = Solution(at.x, distance, step + 1)
            if settled:
                break  # rounding lets the constraints be met no better
            if distance <= tolerance:
                # Without the prior from now on. More than rounding then may be a unit on its wrong side: next time
                # without what those nearest to their kinks do to the gradient.
                more = last and not count and distance > schedule.agrees * tolerance
                weight, count = schedule.final, schedule.margin if more else 0
            elif step - progress >= schedule.patience:
                break
            else:
                if changed <= max(schedule.few, 0.95 * fewest):
                    times = 1 if changed > schedule.few else 2
                    weight = max(weight / schedule.factor**times, schedule.final)
                count = self.doubt * changed + schedule.margin if changed else count // 2
                count = schedule.always or count
            fewest = min(fewest, changed)
            most = min(max(schedule.most[0], system.movable_rows // 2), schedule.most[1])
            uncertain = least_certain(system, at, count) if count <= most else None
        return Solution(best.x, best.distance, step + 1)

    def _step(self, at: Linearisation, uncertain: Pattern | None, weight: float, last: bool) -> Linearisation:
        """One linearised solve, and where it leads."""
        jacobian = Jacobian(self.system, at, uncertain)
        residual = jacobian.weighted(self.system.residual(at))
        if self.prior is not None:
            by = Regulariser(self.prior, self.prior.centre, weight, last)
            return self.system.linearise(self.solver.step(jacobian, residual, at.x, by))
        move = self.solver.step(jacobian, residual, at.x, None) - at.x
        size = float(residual.norm())
        for halving in range(HALVINGS):
            new = self.system.linearise(at.x + move * 0.5**halving)
            if float(jacobian.weighted(self.system.residual(new)).norm()) < size:
                return new
        return new


def settle(
    system: ConstraintSystem, at: Linearisation, solver: Solver, sure: Determined
) -> tuple[Linearisation, float]:
    """Where inputs at which the constraints are met stand still: until solves will move them by less than their error.

    The distance does not show it: what moves last hardly changes it, and behind a coarse gradient it allows inputs that
    are wrong by many times what rounding does to them. Nor do solves that end early: what they leave of a direction
    that the rows hardly show may be many times what noise makes of it.

    Args:
        sure: what `determine` found there.

    Returns:
        Where that is, and the inputs' error, root mean square: what is left to go, if it is larger than noise's.
    """
    distance, before, left, error, move = system.distance(at), 0.0, math.inf, sure.std, sure.move
    for _ in range(SETTLING):
        assert move is not None
        moved = system.linearise(at.x + move)
        missed, size = system.distance(moved), float(move.square().mean().sqrt())
        if not missed <= distance:
            return at, max(error, min(left, before or size))
        # Moves go on shrinking as the last one did; of the first it is not known how. But where units change sides a
        # large move may follow a small one: the last one counts as well.
        rate = size / before if before else SLOW
        left = size * max(1.0, rate / (1 - rate)) if rate < 1 else math.inf
        at, distance, before = moved, missed, size
        if left <= error:
            return at, error
        jacobian = Jacobian(system, at, {})
        try:
            move = solver.move(jacobian, jacobian.weighted(system.residual(at)), sure)
        except deadline.OutOfTime:  # they are found already, only not as precisely
            break
    return at, max(error, min(left, before))


def determine(system: ConstraintSystem, at: Linearisation, solver: Solver, generator: torch.Generator) -> Determined:
    """How well the constraints determine inputs, without the prior, how far their noise moves them, and where what is
    missed does."""
    jacobian = Jacobian(system, at, {})
    noise, residual = (jacobian.weighted(rows) for rows in (system.noise(generator), system.residual(at)))
    return solver.determine(jacobian, noise, residual)
