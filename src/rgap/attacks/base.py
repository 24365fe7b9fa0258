"""What every attack has in common: what it is given, and what is added to its outcome."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.attacks.result import Outcome, Reconstruction
from rgap.checks import preflight
from rgap.target import Target
from rgap.update import Update

MIXTURE = "of {} samples in one update the closed form gives a mixture"
AS_ONE = "the update is attacked as if it came from one sample; of several it gives a mixture"


class Attack(ABC):
    """``(Target, Update) -> Reconstruction``. Authors write `run`; nothing but the two reaches the attack."""

    partial: ClassVar[bool] = False
    """Whether the attack works on updates in which some parameters' gradients are missing."""

    @property
    def name(self) -> str:
        return type(self).__name__

    def obstacle(self, target: Target, samples: int) -> str | None:
        """Why this attack has nothing to offer on an update of so many samples; None if it is worth running."""
        return None

    def estimate(self, target: Target, updates: int) -> float | None:
        """About how many seconds so many updates take on this machine, measured on one step; None if it depends."""
        return None

    @final
    def __call__(self, target: Target, update: Update) -> Reconstruction:
        """Attack one update.

        Raises:
            UpdateError: the update is not one of this target's model.
            NotAChain: the attack needs a chain of layers and the model is none.
        """
        return self.many(target, [update])[0]

    @final
    def many(self, target: Target, updates: Sequence[Update]) -> tuple[Reconstruction, ...]:
        """Attack several updates of one model, all at once where the attack can.

        The seconds of attacks that ran at once are shared out evenly. Errors are those of a single attack.
        """
        for update in updates:
            update.check(target, partial=self.partial)
        start = time.perf_counter()
        plain = [update.to_gradient(target) for update in updates]
        checks = [preflight(target, update) for update, _ in plain]
        before = (time.perf_counter() - start) / max(1, len(updates))
        outcomes = self._timed(target, [update for update, _ in plain])
        return tuple(
            Reconstruction(
                attack=self.name,
                status=outcome.status,
                reason=outcome.reason,
                answers=outcome.answers,
                assumptions=tuple(dict.fromkeys((*assumptions, *outcome.assumptions))),
                preflight=check,
                tolerance=update.tolerance,
                value_range=target.value_range,
                seconds=before + seconds,
            )
            for (outcome, seconds), (update, assumptions), check in zip(outcomes, plain, checks, strict=True)
        )

    def _timed(self, target: Target, updates: Sequence[Update]) -> list[tuple[Outcome, float]]:
        """Every update's outcome, and how long it took."""
        found = []
        for update in updates:
            start = time.perf_counter()
            outcome = self.run(target, update)
            found.append((outcome, time.perf_counter() - start))
        return found

    @abstractmethod
    def run(self, target: Target, update: Update) -> Outcome:
        """The attack itself, on a gradient that is known to fit the target."""


class BatchAttack(Attack):
    """An attack that does better on several updates at once than on one after another: authors write `run_many`."""

    @abstractmethod
    def run_many(self, target: Target, updates: Sequence[Update]) -> list[Outcome]:
        """The attack itself, on gradients that are known to fit the target."""

    @final
    def run(self, target: Target, update: Update) -> Outcome:
        return self.run_many(target, [update])[0]

    def _timed(self, target: Target, updates: Sequence[Update]) -> list[tuple[Outcome, float]]:
        start = time.perf_counter()
        found = self.run_many(target, updates) if updates else []
        each = (time.perf_counter() - start) / max(1, len(updates))
        return [(outcome, each) for outcome in found]


def residual_tolerance(dtype: torch.dtype) -> float:
    """How well a recomputed gradient must agree with one of this type: the square root of its rounding."""
    return float(torch.finfo(dtype).eps ** 0.5)


def gradient_residual(
    target: Target, update: Update, inputs: Float[Tensor, "b ..."], labels: Float[Tensor, " b"]
) -> float:
    """The certificate: relative distance between the update and the gradient recomputed at one answer."""
    found = target.gradient(inputs, labels)
    total = sum(
        float((found[name].double() - g.double().to(target.device)).square().sum())
        for name, g in update.gradients.items()
    )
    return math.sqrt(total) / update.norm if update.norm else math.sqrt(total)
