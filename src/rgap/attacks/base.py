"""What every attack has in common: what it is given, and what is added to its outcome."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.attacks.result import Outcome, Reconstruction, Status
from rgap.attacks.threads import threads
from rgap.checks import Preflight, preflight
from rgap.linalg.deadline import OutOfTime
from rgap.printable import listed
from rgap.target import Target
from rgap.update import Update, UpdateError

MIXTURE = "of {} samples in one update it gives a mixture; Closed tells them apart where it can"
LATE = Outcome(Status.CUT_OFF, "the time was up before there was an answer")
OWN_ROUNDINGS = 5.0
"""So many times what the outputs' rounding does to k may it miss that of the loss."""
AS_ONE = "the update is attacked as if it came from one sample; of several it gives a mixture"


class Attack(ABC):
    """``(Target, Update) -> Reconstruction``. Authors write `run`; nothing but the two reaches the attack."""

    partial: ClassVar[bool] = False
    """Whether the attack works on updates in which some parameters' gradients are missing."""
    anytime: ClassVar[bool] = False
    """Whether it has an answer whenever it is cut off. Where time is short, updates are attacked one after the other by
    an attack that has none before its end."""

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

        What was not done when the time was up (`rgap.linalg.deadline`) is cut off, and says so.

        The seconds of attacks that ran at once are shared out evenly. Errors are those of a single attack.
        """
        for update in updates:
            if not isinstance(update, Update):
                raise TypeError(f"got a {type(update).__name__}, expected an update: rgap.Update(gradients by name)")
            update.check(target, partial=True)
            missing = [name for name in target.parameters if name not in update.gradients]
            if missing and not self.partial:
                raise UpdateError(
                    f"{self.name} needs the gradients of all parameters, and the update is missing {listed(missing)}; "
                    "expected all, or an attack that takes a part of them: bias, or one by optimisation"
                )
        with threads(target):
            return self._many(target, updates)

    def _many(self, target: Target, updates: Sequence[Update]) -> tuple[Reconstruction, ...]:
        """The same, of updates that are this target's."""
        followed = [self._followed(target, update) for update in updates]
        start = time.perf_counter()
        plain = [update.to_gradient(target) for update in updates]
        checks = [preflight(target, update) for update, _ in plain]
        before = (time.perf_counter() - start) / max(1, len(updates))
        left = [at for at, (outcome, _) in enumerate(followed) if outcome is None or not outcome.told]
        timed = dict(zip(left, self._timed(target, [plain[at][0] for at in left]), strict=True))
        found, aid = [], [target.loss.aid] if target.loss.aid else []
        for at, (update, assumptions) in enumerate(plain):
            steps, own = followed[at]
            outcome, seconds = timed.get(at, (steps, 0.0))
            assert outcome is not None
            sent = updates[at]
            if at in timed and len(sent.header.protocol.minibatches(sent.samples_of_one(target))) > 1:
                outcome = none_certified_alone(outcome)
            found.append(
                Reconstruction(
                    attack=self.name,
                    status=outcome.status,
                    reason=outcome.reason,
                    answers=outcome.answers,
                    assumptions=tuple(
                        dict.fromkeys((*aid, *(assumptions if at in timed else ()), *outcome.assumptions))
                    ),
                    # Where the steps were followed, that they moved the weights is no news.
                    preflight=checks[at] if at in timed else Preflight((), ()),
                    tolerance=update.tolerance,
                    value_range=target.value_range,
                    seconds=before + own + seconds,
                    features=outcome.features,
                    steps=outcome.steps,
                    bound=outcome.bound if steps is None else steps.bound,
                )
            )
        return tuple(found)

    def follow_steps(self, target: Target, update: Update) -> Outcome | None:
        """What the attack finds in an update as it was sent, by following the client's local steps one by one. Where
        that has no answer, and says why, or does not apply, `run` takes them for so many times the first."""
        return None

    def _followed(self, target: Target, update: Update) -> tuple[Outcome | None, float]:
        """The same, and how long it took."""
        if not update.header.protocol.local:
            return None, 0.0
        start = time.perf_counter()
        try:
            outcome = self.follow_steps(target, update)
        except OutOfTime:
            outcome = LATE
        return outcome, time.perf_counter() - start

    def _timed(self, target: Target, updates: Sequence[Update]) -> list[tuple[Outcome, float]]:
        """Every update's outcome, and how long it took."""
        found = []
        for update in updates:  # one that is cut off takes nothing from those before it
            start = time.perf_counter()
            try:
                outcome = self.run(update.with_batch(target), update)
            except OutOfTime:
                outcome = LATE
            found.append((outcome, time.perf_counter() - start))
        return found

    @abstractmethod
    def run(self, target: Target, update: Update) -> Outcome:
        """The attack itself, on a gradient that is known to fit the target."""


def none_certified_alone(outcome: Outcome) -> Outcome:
    """What came of several local steps that were taken for one: no sample is certified by its own part of a gradient
    that nothing else agrees with. Parts of rank one are then of several steps, too."""
    if outcome.status is not Status.PARTIAL or not any(each.samples for each in outcome.answers):
        return outcome
    why = "the local steps are taken for one, and the recomputed gradient does not agree"
    answers = tuple(
        replace(
            each,
            samples=tuple(
                replace(sample, status=Status.NOT_CONVERGED, reason=why) if sample.status is Status.EXACT else sample
                for sample in each.samples
            ),
        )
        for each in outcome.answers
    )
    return replace(outcome, status=Status.NOT_CONVERGED, reason=why, answers=answers)


class BatchAttack(Attack):
    """An attack that does better on several updates at once than on one after another: authors write `run_many`."""

    @abstractmethod
    def run_many(self, target: Target, updates: Sequence[Update]) -> list[Outcome]:
        """The attack itself, on gradients that are known to fit the target."""

    @final
    def run(self, target: Target, update: Update) -> Outcome:
        return self.run_many(target, [update])[0]

    def _timed(self, target: Target, updates: Sequence[Update]) -> list[tuple[Outcome, float]]:
        if any(update.buffers for update in updates):  # each was in a network of its own
            return super()._timed(target, updates)
        start = time.perf_counter()
        try:
            found = self.run_many(target, updates) if updates else []
        except OutOfTime:
            found = [LATE] * len(updates)
        each = (time.perf_counter() - start) / max(1, len(updates))
        return [(outcome, each) for outcome in found]


def residual_tolerance(dtype: torch.dtype) -> float:
    """How well a recomputed gradient must agree with one of this type: the square root of its rounding."""
    return float(torch.finfo(dtype).eps ** 0.5)


@dataclass(frozen=True)
class Certificate:
    """How well the gradient recomputed at an answer agrees with the update."""

    residual: float
    """The larger of the distance over all parameters and that of the one parameter that agrees least."""
    parameter: str
    """Its name."""
    roundings: float
    """By how many times its own rounding a parameter misses the update, at the most."""
    factor: float = 1.0
    """The recomputed gradient was multiplied by it, because it agrees so and not otherwise."""
    k_off: float = 0.0
    """The client's own k was taken, and this part of it is the rounding of its loss; 0 where the loss's own agrees."""


def certify(
    target: Target,
    update: Update,
    inputs: Float[Tensor, "b ..."],
    labels: Float[Tensor, " b"],
    factors: bool = True,
    k: Float[Tensor, "b ..."] | None = None,
) -> Certificate:
    """Recompute the gradient at one answer, and judge every parameter on its own: the worst decides.

    Each difference is relative to the size of the parameter's gradient; or, where the sums behind a gradient nearly
    cancel, to the size of what they cancel, in whose units the client's gradient was rounded. How large that is shows
    in single precision: there a gradient is off by eps of it. It is never taken for more than the whole update.

    A gradient that agrees but for a factor (a loss scale, a sum in place of a mean, a sign) is compared without it; but
    not where the network scales, and another factor is another input.

    Args:
        k: the gradient by the outputs that the client went on from, as the last layer's gradient tells it. Of a loss
            that is nearly certain it is a difference of numbers that are nearly equal, and all gradients are off as it
            is. Where that rounding explains it, it is taken in place of the loss's own.
    """
    given = {name: g.double().to(target.device) for name, g in update.gradients.items()}
    plain = _recomputed(target, update, given, inputs, labels, factors, None)
    if k is None:
        return plain
    k_off = _rounded_off(target, update, inputs, labels, k / plain.factor)
    if k_off is None or k_off <= OWN_ROUNDINGS * update.precision:
        return plain
    # Also where the loss's own agrees: what k is off by would hide what the answer is off by.
    sent = replace(_recomputed(target, update, given, inputs, labels, False, k), factor=plain.factor)
    if not sent.residual < plain.residual:
        return replace(plain, roundings=max(plain.roundings, sent.roundings))
    return sent if plain.residual <= update.tolerance else replace(sent, k_off=k_off)


def _recomputed(
    target: Target,
    update: Update,
    given: Mapping[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    factors: bool,
    k: Tensor | None,
) -> Certificate:
    """The same with the loss's own k, or the one that is told."""
    single = torch.finfo(torch.float32).eps
    found = target.gradient(inputs, labels, k=k)
    rounded = target.gradient(_near(inputs, single, target.value_range), labels, torch.float32, k=k)
    here = {name: found[name].double() for name in given}
    cancelled = {name: float((rounded[name].double() - g).norm()) / single for name, g in here.items()}
    plain = _compare(update, given, here, cancelled, 1.0)
    length = sum(float(g.square().sum()) for g in here.values())
    if not factors or plain.residual <= update.tolerance or not 0 < length < math.inf or _scales(target):
        return plain
    factor = sum(float((g * given[name]).sum()) for name, g in here.items()) / length
    scaled = _compare(update, given, here, cancelled, factor)
    return scaled if scaled.residual <= update.tolerance else plain


def _rounded_off(target: Target, update: Update, inputs: Tensor, labels: Tensor, k: Tensor) -> float | None:
    """Which part of k is rounding of the client's loss; None where rounding does not explain it."""
    z = target.network.forward(inputs.double())[-1]
    z = z.reshape(len(z), -1)
    own, k = target.loss.output_gradient(z, labels.to(z)), k.to(z).reshape(z.shape)
    shift = update.precision * z.abs().amax(1)
    allowed = OWN_ROUNDINGS * target.loss.gradient_rounding(z, labels.to(z), shift, update.precision)
    size = k.norm()
    if not bool(((own - k).abs() <= allowed + update.tolerance * size).all()):
        return None
    return float((own - k).norm() / size)


def _near(inputs: Tensor, eps: float, value_range: tuple[float, float] | None) -> Tensor:
    """Inputs rounded anew, so that models that insist on their own precision are too.

    Black pixels are rounded like any others: what was computed from them is, by way of the layers before.
    """
    noise = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = value_range or (0.0, 0.0)
    size = max(high - low, float(inputs.double().square().mean().sqrt()))
    return inputs.double() + eps * size * noise.to(inputs.device)


def _compare(
    update: Update,
    given: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    cancelled: Mapping[str, float],
    factor: float,
) -> Certificate:
    """The distance between the update's gradients and those that were found, times a factor."""
    norm, total = update.norm, 0.0
    worst = Certificate(0.0, "", 0.0, factor)
    for name, gradient in given.items():
        wrong, size = float((factor * found[name] - gradient).norm()), float(gradient.norm())
        total += wrong * wrong
        hidden = abs(factor) * cancelled[name]
        scale = max(size, min(hidden, norm))
        residual = wrong / scale if scale else wrong
        if not residual <= worst.residual:
            worst = replace(worst, residual=residual, parameter=name)
        rounding = update.precisions[name] * (size + hidden)
        worst = replace(worst, roundings=max(worst.roundings, wrong / rounding if rounding else 0.0))
    overall = math.sqrt(total) / norm if norm else math.sqrt(total)
    return replace(worst, residual=max(overall, worst.residual))


def _scales(target: Target) -> bool:
    """Whether a scaled gradient may be that of a brighter or darker input."""
    try:
        return target.network.scalable
    except NotImplementedError:
        return True


def gradient_residual(
    target: Target, update: Update, inputs: Float[Tensor, "b ..."], labels: Float[Tensor, " b"]
) -> float:
    """The certificate's residual, no factor allowed for; see `certify`."""
    return certify(target, update, inputs, labels, factors=False).residual
