"""Optimisation attacks: look for the input whose gradient matches the update. One loop, three settings.

- DLG: L. Zhu, Z. Liu and S. Han, *Deep Leakage from Gradients*, NeurIPS 2019.
- iDLG: B. Zhao, K. R. Mopuri and H. Bilen, *iDLG: Improved Deep Leakage from Gradients*, arXiv:2001.02610, 2020.
- Inverting Gradients: J. Geiping, H. Bauermeister, H. Droege and M. Moeller, NeurIPS 2020, arXiv:2003.14053.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rgap.attacks.base import BatchAttack, gradient_residual
from rgap.attacks.distance import Distance, cosine, squared
from rgap.attacks.lbfgs import LBFGS
from rgap.attacks.minimise import Adam, Minimiser
from rgap.attacks.result import Answer, Outcome, Status
from rgap.attacks.search import Found, Search
from rgap.attacks.slopes import slopes
from rgap.attacks.start import Normal, Start, Uniform
from rgap.target import GradientFunction, Target
from rgap.update import Update

UNIFORM, NORMAL = Uniform(), Normal()
QUASI_NEWTON = LBFGS()
AT_ONCE = 1.0
"""Seconds of one step above which what several systems take together is not tried but multiplied."""
SIGNED_ADAM = Adam(rate=0.025, signed=True, decay=(3 / 8, 5 / 8, 7 / 8))


MANY = 256
"""Samples of one update that an audit still has sought together; the largest batches that were published are of 100."""


@dataclass(frozen=True)
class Matching(BatchAttack):
    """Minimise the distance between the update and the gradient at a guess, over the guess.

    All restarts, all candidate labels and all updates of one model are systems that are minimised at once.

    Args:
        distance: between two gradients; `squared` or `cosine`, or any function of two mappings of tensors.
        minimiser: `LBFGS` or `Adam`.
        variation: weight of the total variation of the guess, a prior for pictures; without effect on other inputs.
        boxed: keep every guess in the value range, where it is known; for Adam alone.
        optimise_label: optimise a distribution over labels with the input; else the label is inferred beforehand, and
            where several are possible each is tried (see `rgap.attacks.labels`).
        start: where the search begins.
        restarts: how many starts; the one with the least loss is the answer.
        scout: after so many iterations only the start with the least loss goes on, for `iterations` more; 0:
            all go on to the end.
        iterations: at the most, for each start.
        tolerance: the relative gradient residual at which a start has arrived.
        patience: end a start whose loss fell by less than a tenth in so many iterations.
        dtype: to compute in; float32 is faster, and loses the last digits of small losses.
        at_once: how many systems are evaluated at a time; it bounds the memory.
        seed: of the starts.
    """

    partial: ClassVar[bool] = True

    distance: Distance = squared
    minimiser: Minimiser = QUASI_NEWTON
    variation: float = 0.0
    boxed: bool = False
    optimise_label: bool = True
    start: Start = UNIFORM
    restarts: int = 1
    scout: int = 0
    iterations: int = 300
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
        start = time.perf_counter()
        step(like.new_zeros(systems, target.batch_size * math.prod(target.input_shape)))
        return time.perf_counter() - start

    def estimate(self, target: Target, updates: int) -> float | None:
        """As if no start ended early, each update with one candidate label; a line search takes a little longer."""
        systems = max(1, updates) * self.restarts
        together = min(systems, self.at_once)
        one = min(self._step(target, 1) for _ in range(2))
        if one * together <= AT_ONCE:
            one = min(self._step(target, together) for _ in range(2)) / together
        return (self.iterations + self.scout) * systems * one

    def run_many(self, target: Target, updates: Sequence[Update]) -> list[Outcome]:
        """All updates whose batches have the same size, and that hold the same parameters, are attacked at once."""
        kinds = [(update.samples(target), tuple(update.gradients)) for update in updates]
        outcomes = [Outcome(Status.GRADIENT_ZERO, "all gradients are zero")] * len(updates)
        for kind in dict.fromkeys(kinds):
            alive = [at for at, each in enumerate(kinds) if each == kind and updates[at].norm > 0]
            if alive:
                search = Search(self, target, [updates[at] for at in alive], kind[0])
                for at, found in zip(alive, search.run(), strict=True):
                    outcomes[at] = _outcome(target, updates[at], found)
        return outcomes


def _outcome(target: Target, update: Update, found: Found) -> Outcome:
    """Certificates of the best start, and of every other one that reproduces the gradient at another input."""
    tolerance = update.tolerance
    low, high = target.value_range or (0.0, 1.0)
    answers: list[Answer] = []
    for x, y, loss in zip(found.inputs, found.labels, found.losses, strict=True):
        if math.isinf(loss):
            continue
        residual = gradient_residual(target, update, x, y)
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


@dataclass(frozen=True)
class DLG(Matching):
    """Deep Leakage from Gradients: squared distance, L-BFGS, the label optimised with the input."""


@dataclass(frozen=True)
class IDLG(Matching):
    """Improved Deep Leakage from Gradients: DLG, with the label inferred beforehand."""

    optimise_label: bool = False

    @property
    def name(self) -> str:
        return "iDLG"


@dataclass(frozen=True)
class InvertingGradients(Matching):
    """Inverting Gradients: cosine distance, total variation, and the signs of the gradient in Adam.

    The label is inferred beforehand. Every guess is kept in the value range, where it is known. The rate falls to a
    tenth at 3/8, 5/8 and 7/8 of the iterations. Rate and variation are meant for values from 0 to 1: the authors divide
    pictures by a standard deviation of about a quarter, and their rate of 0.1 is 0.025 here.
    """

    distance: Distance = cosine
    minimiser: Minimiser = SIGNED_ADAM
    variation: float = 1e-2
    boxed: bool = True
    optimise_label: bool = False
    start: Start = NORMAL
    iterations: int = 4800
    dtype: torch.dtype = torch.float32
