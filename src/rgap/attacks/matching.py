"""Optimisation attacks: look for the input whose gradient matches the update. One loop; `rgap.attacks.presets` has
the settings of others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rgap.attacks.base import BatchAttack, gradient_residual
from rgap.attacks.distance import Distance, squared
from rgap.attacks.known import Known, known
from rgap.attacks.lbfgs import LBFGS
from rgap.attacks.minimise import Minimiser
from rgap.attacks.result import Answer, Outcome, Status
from rgap.attacks.search import INNER, Found, Search
from rgap.attacks.simulate import LocalSteps
from rgap.attacks.slopes import slopes, together
from rgap.attacks.start import Start, Uniform
from rgap.attacks.threads import threads
from rgap.linalg import deadline
from rgap.target import GradientFunction, Target
from rgap.update import Update

UNIFORM = Uniform()
QUASI_NEWTON = LBFGS()
AT_ONCE = 1.0
"""Seconds of one step above which what several systems take together is not tried but multiplied."""
ENDING = 0.2
"""Of the time that is left, what is kept for the end."""
MANY = 256
"""Samples of one update that an audit still has sought together; the largest batches that were published are of 100."""


Residual = Callable[[Tensor, Tensor], float]
"""Of inputs and labels, how far what they give misses the update."""


@dataclass(frozen=True)
class Matching(BatchAttack):
    """Minimise the distance between the update and the gradient at a guess, over the guess.

    All restarts, all candidate labels and all updates of one model are systems that are minimised at once.

    Args:
        distance: between two gradients; `squared`, `cosine` or `LayerWise`, or any function of two mappings of tensors.
        features: weight of |features(x) - known|^2 / |known|^2, where the gradient tells exactly what a layer reads of
            each sample; with it each sample's label is fixed.
        statistics: weight of the same distance of what batch norms in training mode read, where the running statistics
            were sent.
        minimiser: `LBFGS` or `Adam`.
        variation: weight of the total variation of the guess, a prior for pictures; without effect on other inputs.
        opponents: weight of the differences of colours in the variation; 0: each colour counts by itself.
        boxed: keep every guess in the value range, where it is known; for Adam alone.
        optimise_label: optimise a distribution over labels with the input; else the label is inferred beforehand, and
            where several are possible each is tried (see `rgap.attacks.labels`).
        start: where the search begins.
        restarts: how many starts; the one with the least loss is the answer.
        scout: after so many iterations only the start with the least loss goes on, for `iterations` more; 0:
            all go on to the end.
        consensus: weight of half the squared distance of a start from the mean of all starts of its update.
        iterations: at the most, for each start.
        finish: Gauss-Newton steps at the most that go on from the best start of each update, in float64 and without
            the prior; a fifth of the time is kept for them, where that is limited.
        local_steps: where a client took several steps, match the difference of its weights through all of them, in
            place of the gradient that they are taken for.
        tolerance: the relative gradient residual at which a start has arrived.
        patience: end a start whose loss fell by less than a tenth in so many iterations.
        dtype: to compute in; float32 is faster, and loses the last digits of small losses.
        at_once: how many systems are evaluated at a time, at the most; of large models fewer are faster.
        seed: of the starts.
    """

    partial: ClassVar[bool] = True
    anytime: ClassVar[bool] = True

    distance: Distance = squared
    features: float = 0.0
    statistics: float = 0.0
    minimiser: Minimiser = QUASI_NEWTON
    variation: float = 0.0
    opponents: float = 0.0
    boxed: bool = False
    optimise_label: bool = True
    start: Start = UNIFORM
    restarts: int = 1
    scout: int = 0
    consensus: float = 0.0
    iterations: int = 300
    finish: int = 0
    local_steps: bool = False
    tolerance: float = 1e-6
    patience: int | None = None
    dtype: torch.dtype = torch.float64
    at_once: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("restarts", self.restarts), ("iterations", self.iterations), ("at_once", self.at_once)):
            if value < 1:
                raise ValueError(f"{name} is {value}: expected 1 or more")

    def obstacle(self, target: Target, samples: int) -> str | None:
        if samples > MANY:
            return f"{samples} samples in one update are not sought together: of more than {MANY} none comes back"
        if not target.loss.labels and (self.optimise_label or samples > 1):
            return f"the labels of the {target.loss.name} loss cannot be listed, so that none can be chosen"
        return self._not_differentiated(target)

    def _not_differentiated(self, target: Target) -> str | None:
        """Why no second derivative of the model's loss can be had; None if it can."""
        try:
            self._step(target, 1)
        except (RuntimeError, NotImplementedError) as error:
            return f"torch cannot differentiate this model twice: {str(error).strip().splitlines()[0]}"
        return None

    def _step(self, target: Target, systems: int) -> float:
        """Seconds of one evaluation of so many systems."""
        like, labels = torch.zeros((), dtype=self.dtype, device=target.device), len(target.loss.labels) or 1
        weights = like.new_full((target.batch_size, labels), 0.5)

        def size_of(gradient: GradientFunction) -> Callable[..., Tensor]:
            def size(point: Tensor) -> Tensor:
                found = gradient(point.reshape(target.batch_size, *target.input_shape), weights)
                return torch.stack([g.square().sum() for g in found.values()]).sum()

            return size

        step = slopes(target, self.dtype, size_of, (), systems)
        with threads(target):
            start = time.perf_counter()
            step(like.new_zeros(systems, target.batch_size * math.prod(target.input_shape)))
            return time.perf_counter() - start

    def estimate(self, target: Target, updates: int) -> float | None:
        """As if nothing ended early, each update with one candidate label; a line search takes a little longer."""
        systems = max(1, updates) * self.restarts
        at_once = min(systems, together(target, self.dtype, self.at_once))
        one = min(self._step(target, 1) for _ in range(2))
        if one * at_once <= AT_ONCE:
            one = min(self._step(target, at_once) for _ in range(2)) / at_once
        ending = max(1, updates) * 2 * INNER * ((1 << self.finish) - 1)
        return ((self.iterations + self.scout) * systems + ending) * one

    def run_many(self, target: Target, updates: Sequence[Update]) -> list[Outcome]:
        """All updates whose batches have the same size, and that hold the same, are attacked at once."""
        aids = [known(target, update, self.features > 0, self.statistics > 0) for update in updates]
        kinds = [
            (update.samples(target), tuple(update.gradients), aid.modules)
            for update, aid in zip(updates, aids, strict=True)
        ]
        outcomes = [Outcome(Status.GRADIENT_ZERO, "all gradients are zero")] * len(updates)
        for kind in dict.fromkeys(kinds):
            alive = [at for at, each in enumerate(kinds) if each == kind and updates[at].norm > 0]
            if alive:
                search = Search(self, target, [updates[at] for at in alive], kind[0], [aids[at] for at in alive])
                residuals = [partial(gradient_residual, target, updates[at]) for at in alive]
                for at, found, residual in zip(alive, self._searched(search, residuals), residuals, strict=True):
                    outcomes[at] = _outcome(target.value_range, updates[at].tolerance, found, residual)
        return outcomes

    def follow_steps(self, target: Target, update: Update) -> Outcome | None:
        client = LocalSteps.of(update.header.protocol, update.samples_of_one(target)) if self.local_steps else None
        if client is None or update.norm == 0:
            return None
        search = Search(self, target, [update], client.samples, (Known(),), client)
        tolerance = update.to_gradient(target)[0].tolerance
        [found] = self._searched(search, [search.residual])
        found = replace(found, assumptions=(client.assumption, *found.assumptions))
        return _outcome(target.value_range, tolerance, found, search.residual)

    def _searched(self, search: Search, residuals: Sequence[Residual]) -> list[Found]:
        """What was found for each update of a search, and its residual."""
        with deadline.within(deadline.share(1 - ENDING) if self.finish else None):
            found = search.run()
        return [self._finished(search, at, found[at], residual) for at, residual in enumerate(residuals)]

    def _finished(self, search: Search, at: int, found: Found, residual: Residual) -> Found:
        """The best start taken on without the prior, if that brings it nearer to the update."""
        if not self.finish or math.isinf(found.losses[0]):
            return found
        x, y = found.inputs[0], found.labels[0]
        moved = search.finish(at, x, y)
        if not residual(moved, y) < residual(x, y):
            return found
        note = "Gauss-Newton steps in float64, without any prior, end the search"
        return replace(found, inputs=[moved, *found.inputs[1:]], assumptions=(*found.assumptions, note))


def _outcome(value_range: tuple[float, float] | None, tolerance: float, found: Found, residual_of: Residual) -> Outcome:
    """Certificates of the best start, and of every other one that reproduces the gradient at another input."""
    low, high = value_range or (0.0, 1.0)
    answers: list[Answer] = []
    for x, y, loss in zip(found.inputs, found.labels, found.losses, strict=True):
        if math.isinf(loss):
            continue
        residual = residual_of(x, y)
        new = all(_apart(x, a.inputs) > 0.01 * (high - low) for a in answers)
        if not answers or (residual <= tolerance and new):
            answers.append(Answer(x, y, math.nan, residual, math.nan))
    answers = [a for a in answers if a.gradient_residual <= tolerance] or answers
    steps = f"after {found.iterations[0]} iterations: {found.ended[0]}"
    failed = Status.CUT_OFF if found.cut_off else Status.NOT_CONVERGED
    if not answers:
        reason = f"the loss was never finite, {steps}"
        return Outcome(failed, reason, assumptions=found.assumptions)
    residual = answers[0].gradient_residual
    reason = f"gradient residual {residual:.1e}, loss {found.losses[0]:.1e} {steps}"
    status = Status.REPRODUCED if residual <= tolerance else failed
    if status is Status.REPRODUCED and len(answers) > 1:
        status, reason = Status.AMBIGUOUS, f"{len(answers)} inputs reproduce the gradient; {reason}"
    return Outcome(status, reason, tuple(answers), found.assumptions)


def _apart(a: Float[Tensor, "b ..."], b: Float[Tensor, "b ..."]) -> float:
    """Root mean square distance of two batches, which have no order."""
    each = (a[:, None] - b[None]).flatten(2).square().mean(2).cpu().nan_to_num(nan=1e300, posinf=1e300)
    rows, columns = linear_sum_assignment(each.numpy())
    return float(each[rows, columns].mean().sqrt())
