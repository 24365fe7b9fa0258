"""Gauss-Newton on the gradient residual: any reconstruction, made to agree with the update as well as it can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.attacks.base import Attack, gradient_residual
from rgap.attacks.closed import Recursive
from rgap.attacks.labels import one_hot
from rgap.attacks.progress import Reporter
from rgap.attacks.result import Answer, Outcome, Reconstruction, Status
from rgap.inversion.rounding import rounding
from rgap.linalg import deadline
from rgap.linalg.derivative import jacobian, linearised
from rgap.linalg.lsmr import lsmr
from rgap.target import Target
from rgap.update import Update

RECURSIVE = Recursive()
MOST_INNER = 2048
"""Iterations of LSMR in one step. Far away few will do; near by, each new start forgets what the last one built."""
FORMED = 200
"""Unknowns up to which the Jacobian is formed."""


@dataclass(frozen=True)
class Polish(Attack):
    """Levenberg and Marquardt's steps from another attack's answer, its label taken for right.

    The residual is the difference of the two gradients, each entry in units of its own rounding. A step solves
    min |J d + r|^2 + (damping |d|)^2 without forming J: reverse mode gives J' u, and its derivative by u
    gives J v (LSMR, Fong and Saunders 2011). An answer that no step improves is given back as it was.

    Args:
        start: an attack, or what one found for the same update.
        steps: at the most.
        inner: iterations of LSMR in the first step; twice as many in each one after a step that lowers the residual.
    """

    start: Attack | Reconstruction = RECURSIVE
    steps: int = 12
    inner: int = 32

    def run(self, target: Target, update: Update) -> Outcome:
        begin = self.start(target, update) if isinstance(self.start, Attack) else self.start
        if not begin.answers:
            return Outcome(begin.status, f"{begin.attack}: {begin.reason}", (), begin.assumptions, begin.features)
        answer = begin.answers[0]
        if answer.samples and len(answer.inputs) < update.samples(target):
            # The steps would move those that were found until they explained the missing ones too.
            reason = f"not polished, because samples are missing; {begin.attack}: {begin.reason}"
            return Outcome(begin.status, reason, begin.answers, begin.assumptions, begin.features)
        inputs = self._improve(target, update, answer)
        residual = gradient_residual(target, update, inputs, answer.labels)
        assumptions = (*begin.assumptions, f"the label is the one that {begin.attack} gives")
        if not residual < answer.gradient_residual:
            reason = f"no step improves on {begin.attack}: {begin.reason}"
            return Outcome(begin.status, reason, begin.answers, assumptions, begin.features)
        better = replace(answer, inputs=inputs, gradient_residual=residual)
        # Whether an input is the only one is what the start may know; that it reproduces the gradient is seen here.
        status = begin.status
        if status in (Status.NOT_CONVERGED, Status.REPRODUCED):
            status = Status.REPRODUCED if residual <= update.tolerance else Status.NOT_CONVERGED
        reason = f"gradient residual {answer.gradient_residual:.1e} of {begin.attack} lowered to {residual:.1e}"
        return Outcome(status, reason, (better, *begin.answers[1:]), assumptions, begin.features)

    def _improve(self, target: Target, update: Update, answer: Answer) -> Tensor:
        """(b, *input_shape) with the least residual that was met."""
        residual = _residual(target, update, answer)
        x = answer.inputs.detach().double().to(target.device).reshape(-1)
        if not bool(x.isfinite().all()):
            return answer.inputs
        report = Reporter(self.name, self.steps)
        return improve(residual, x, self.steps, self.inner, report)[0].reshape(answer.inputs.shape)


def improve(
    residual: Callable[[Tensor], Tensor], x: Tensor, steps: int, inner: int, report: Callable[[int, float], None]
) -> tuple[Tensor, float]:
    """Damped Gauss-Newton steps from x, and the norm of the residual there; both as they were where none lowers it.

    Args:
        residual: of x, a vector.
        steps, inner: as in `Polish`.
    """
    value, damping = float(residual(x).norm()), 1e-3
    inner = min(inner, MOST_INNER)
    for step in range(1, steps + 1):
        lowered = False
        if deadline.used() >= 1:
            break
        try:
            move, size = _move(residual, x, damping, inner)
        except deadline.OutOfTime:
            break
        new = x + move
        there = float(residual(new).norm())
        if there < value:
            lowered = there > 0.999 * value and size < 1e-12 * float(x.norm())
            x, value, damping, inner = new, there, damping / 10, min(2 * inner, MOST_INNER)
        else:
            damping *= 10
        report(step, value)
        if lowered or damping > 1e6 or value < 1e-12:
            break
    return x, value


def _move(residual: Callable[[Tensor], Tensor], x: Tensor, damping: float, inner: int) -> tuple[Tensor, float]:
    """One damped step, and its length; damping is relative to the size of J, which is formed where it has no more
    columns than `inner` and `FORMED`."""
    along, here, back = linearised(residual, x)
    # |J' r| / |r| tells the size of J where it matters.
    size = float(back(here).norm() / here.norm().clamp(min=1e-300))
    if len(x) <= min(inner, FORMED):
        J = jacobian(residual, x)
        ridge = damping * size * torch.eye(len(x), dtype=x.dtype, device=x.device)
        below = torch.cat([here, torch.zeros_like(x)])
        step: Tensor = -torch.linalg.lstsq(torch.cat([J, ridge]), below[:, None]).solution[:, 0]
        return step, float(step.norm())
    move = lsmr(along, back, -here, len(x), inner, damping * size)
    return move, float(move.norm())


def _residual(target: Target, update: Update, answer: Answer) -> Callable[[Tensor], Tensor]:
    """The gradient's difference at a flattened input, in roundings of each entry, divided by their number's root."""
    gradient = target.gradient_function(torch.float64)
    weights = one_hot(target.loss, answer.labels).to(target.device)
    given = {name: g.double().to(target.device) for name, g in update.gradients.items()}
    units = {name: rounding(g, 1.0).clamp(min=torch.finfo(torch.float64).tiny) for name, g in given.items()}
    count = sum(g.numel() for g in given.values())

    def residual(x: Tensor) -> Tensor:
        found = gradient(x.reshape(answer.inputs.shape), weights)
        apart = torch.cat([((found[name] - g) / units[name]).reshape(-1) for name, g in given.items()])
        return apart.div(count**0.5)

    return residual
