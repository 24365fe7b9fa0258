"""What every attack has in common: what it is given, and what it must say about its answer."""

from __future__ import annotations

import html
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.checks import Preflight, preflight
from rgap.inversion.report import JointReport, LayerReport
from rgap.target import Target
from rgap.update import Update

MIXTURE = "of {} samples in one update the closed form gives a mixture"
AS_ONE = "the update is attacked as if it came from one sample; of several it gives a mixture"


class Status(Enum):
    """How an attack ended."""

    EXACT = "exact"
    """One input inside the value range reproduces the gradient, and the constraints determine it."""
    REPRODUCED = "reproduced"
    """An input was found that reproduces the gradient; whether it is the only one is not known."""
    AMBIGUOUS = "ambiguous"
    """Several inputs reproduce the gradient, and the value range does not choose between them."""
    RANK_DEFICIENT = "rank-deficient"
    """A layer's constraints leave dimensions of its input free."""
    ILL_CONDITIONED = "ill-conditioned"
    """The gradient is reproduced, but its rounding could move the input visibly."""
    GRADIENT_ZERO = "gradient zero"
    """The gradient holds nothing: a saturated loss, or a layer whose units are all dead."""
    NOT_CONVERGED = "not converged"
    """No input was found that reproduces the gradient."""


@dataclass(frozen=True, eq=False)
class Answer:
    """One input that the update may have been computed from."""

    inputs: Float[Tensor, "b ..."]
    """(batch, *input_shape)."""
    labels: Float[Tensor, " b"]
    margin: float
    """mu, the label times the network's output; NaN if there is no such number, or the attack does not tell."""
    gradient_residual: float
    """|gradient at this answer - gradient of the update| / |gradient of the update|, over all parameters."""
    error: float
    """Estimated root-mean-square error of the inputs that comes from the rounding of the gradient; NaN if the attack
    does not estimate it."""
    layers: tuple[LayerReport, ...] = ()
    """From the input to the output."""
    joint: JointReport | None = None
    """If layers were solved jointly."""
    note: str = ""
    """Why something was left to_gradient; empty if nothing was."""


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What an attack found, and how far it can be trusted."""

    attack: str
    status: Status
    reason: str
    """The status in a sentence, with the numbers behind it."""
    answers: tuple[Answer, ...]
    """Best first: all that reproduce the gradient, else the nearest one, else empty."""
    assumptions: tuple[str, ...]
    """Everything the attack took for granted or inferred."""
    preflight: Preflight
    tolerance: float
    """The gradient residual up to which an answer counts as reproducing the gradient."""
    value_range: tuple[float, float] | None = None
    """The target's."""
    seconds: float = 0.0

    @property
    def inputs(self) -> Float[Tensor, "b ..."]:
        """The best answer's inputs, (batch, *input_shape).

        Raises:
            LookupError: the attack has no answer; says why.
        """
        return self._best.inputs

    @property
    def labels(self) -> Float[Tensor, " b"]:
        return self._best.labels

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        return self._best.layers

    @property
    def gradient_residual(self) -> float:
        return self._best.gradient_residual

    @property
    def twins(self) -> tuple[Answer, ...]:
        """The other inputs that reproduce the gradient."""
        return self.answers[1:]

    @property
    def _best(self) -> Answer:
        if not self.answers:
            raise LookupError(f"{self.attack} has no answer: {self.status.value}, {self.reason}")
        return self.answers[0]

    def _repr_html_(self) -> str:
        """For notebooks: what `str` says, as a list."""
        first, *rest = (html.escape(line.strip()) for line in str(self).splitlines())
        return f"<p><b>{first}</b></p><ul>{''.join(f'<li>{line}</li>' for line in rest)}</ul>"

    def __str__(self) -> str:
        lines = [f"{self.attack}: {self.status.value}, {self.reason}"]
        lines += [f"  assumed: {assumption}" for assumption in self.assumptions]
        lines += [f"  warning: {finding}" for finding in self.preflight.findings]
        return "\n".join(lines)


class Attack(ABC):
    """``(Target, Update) -> Reconstruction``. Authors write `run` or `run_many`; nothing else reaches the attack."""

    partial: ClassVar[bool] = False
    """Whether the attack works on updates in which some parameters' gradients are missing."""

    @property
    def name(self) -> str:
        return type(self).__name__

    def obstacle(self, target: Target, samples: int) -> str | None:
        """Why this attack has nothing to offer on an update of so many samples; None if it is worth running."""
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

        The seconds of attacks that ran together are shared out evenly. Errors are those of a single attack.
        """
        for update in updates:
            update.check(target, partial=self.partial)
        start = time.perf_counter()
        to_gradient = [update.to_gradient(target) for update in updates]
        plain = [update for update, _ in to_gradient]
        found = self.run_many(target, plain, [preflight(target, update) for update in plain])
        together = (time.perf_counter() - start) / max(1, len(updates))
        return tuple(
            replace(each, seconds=each.seconds or together, assumptions=(*said, *each.assumptions))
            for each, (_, said) in zip(found, to_gradient, strict=True)
        )

    def run_many(self, target: Target, updates: Sequence[Update], checks: Sequence[Preflight]) -> list[Reconstruction]:
        """The attack on updates that are known to fit the target, one after another unless a subclass can do better."""
        found = []
        for update, check in zip(updates, checks, strict=True):
            start = time.perf_counter()
            one = self.run(target, update, check)
            found.append(replace(one, seconds=time.perf_counter() - start))
        return found

    @abstractmethod
    def run(self, target: Target, update: Update, checks: Preflight) -> Reconstruction:
        """The attack itself, on an update that is known to fit the target."""


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


def judge(
    answer: Answer, tolerance: float, value_range: tuple[float, float] | None, visible: float
) -> tuple[Status, str]:
    """The status of one answer in closed form, and why.

    Args:
        visible: an estimated error above this fraction of the value range, or of the input's own spread, is no answer.
    """
    residual = f"gradient residual {answer.gradient_residual:.1e}"
    opened = answer.layers[0].open_since if answer.joint is None else None
    if opened is not None:
        layer = next(layer for layer in answer.layers if layer.name == opened)
        note = f"; {answer.note}" if answer.note else ""
        left = f"{layer.name} leaves {layer.free} of {layer.unknowns} dimensions free"
        return Status.RANK_DEFICIENT, f"{left}; {residual}{note}"
    if not answer.gradient_residual <= tolerance:
        return Status.NOT_CONVERGED, f"{residual}, tolerance {tolerance:.1e}"
    low, high = value_range or (float(answer.inputs.min()), float(answer.inputs.max()))
    if not answer.error <= visible * (high - low):
        return Status.ILL_CONDITIONED, f"{residual}, but rounding may have moved each value by {answer.error:.1e}"
    return Status.EXACT, f"{residual}, estimated error {answer.error:.1e}"
