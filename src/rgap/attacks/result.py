"""What an attack found, and how far it can be trusted."""

from __future__ import annotations

import html
from dataclasses import dataclass
from enum import Enum

from jaxtyping import Float
from torch import Tensor

from rgap.checks import Preflight
from rgap.inversion.report import JointReport, LayerReport
from rgap.inversion.step_bounds import Bound


class Status(Enum):
    """How an attack ended."""

    EXACT = "exact"
    """One input inside the value range reproduces the gradient, and the constraints determine it."""
    REPRODUCED = "reproduced"
    """An input was found that reproduces the gradient; whether it is the only one is not known."""
    AMBIGUOUS = "ambiguous"
    """Several inputs reproduce the gradient, and the value range does not choose between them."""
    PARTIAL = "partial"
    """Of several samples some are certified; or their labels and features are, and their inputs are not."""
    RANK_DEFICIENT = "rank-deficient"
    """A layer's constraints leave dimensions of its input free."""
    ILL_CONDITIONED = "ill-conditioned"
    """The gradient is reproduced, but its rounding could move the input visibly."""
    GRADIENT_ZERO = "gradient zero"
    """All gradients are zero: a saturated loss, or a layer whose units are all dead."""
    NOT_CONVERGED = "not converged"
    """No input was found that reproduces the gradient."""
    CUT_OFF = "cut off"
    """The time was up before the attack ended; what it gives is the best that it had by then."""


@dataclass(frozen=True)
class Sample:
    """The verdict on one sample of a batch."""

    status: Status
    label: float
    error: float
    """Estimated root-mean-square error that comes from the rounding of the gradient."""
    reason: str
    """The status in a sentence."""


@dataclass(frozen=True, eq=False)
class BatchFeatures:
    """What one layer reads of the samples of a batch, and their labels: what is known where inputs are not."""

    layer: str
    """The layer that reads them."""
    values: Float[Tensor, "b ..."]
    labels: Float[Tensor, " b"]


@dataclass(frozen=True, eq=False)
class Answer:
    """One input that the update may have been computed from."""

    inputs: Float[Tensor, "b ..."]
    """(batch, *input_shape)."""
    labels: Float[Tensor, " b"]
    margin: float
    """mu, the label times the network's output; NaN if there is no such number, or the attack does not tell."""
    gradient_residual: float
    """|gradient at this answer - gradient of the update| / |gradient of the update|, of the parameter that agrees
    least; see `rgap.attacks.certify`."""
    error: float
    """Estimated root-mean-square error of the inputs that comes from the rounding of the gradient; NaN if the attack
    does not estimate it."""
    layers: tuple[LayerReport, ...] = ()
    """From the input to the output."""
    joint: JointReport | None = None
    """If layers were solved jointly."""
    note: str = ""
    """Why something was left out; empty if nothing was."""
    parameter: str = ""
    """The one that agrees least."""
    unexplained: float = 0.0
    """How many times what its rounding and the answer's error explain a parameter misses the update, at the most."""
    factor: float = 1.0
    """The update's gradient is that of this answer times this."""
    undecided: int = 0
    """Values of the inputs that may as well be another one, because an operation in front of the first layer gives the
    same for both."""
    free: int = 0
    """Values of the inputs that may be anything, because an operation in front of the first layer hides them."""
    k_off: float = 0.0
    """Which part of the last layer's k is the client's own rounding of a loss that is nearly certain, where the
    gradient agrees with k as it was sent and not with the loss's own; else 0."""
    samples: tuple[Sample, ...] = ()
    """Of a batch that was told apart, the verdict on each sample, in the order of the inputs."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an attack itself has to say of one update; `Attack` makes a `Reconstruction` of it."""

    status: Status
    reason: str
    """The status in a sentence, with the numbers behind it."""
    answers: tuple[Answer, ...] = ()
    """Best first: all that reproduce the gradient, else the nearest one, else empty."""
    assumptions: tuple[str, ...] = ()
    """Everything the attack took for granted or inferred."""
    features: BatchFeatures | None = None
    """Of a batch that was told apart."""
    steps: tuple[tuple[int, ...], ...] = ()
    """Of a client that took several local steps, the samples of each of them, by their numbers in the first answer."""
    bound: Bound | None = None
    """Why its steps were not followed to the end."""

    @property
    def told(self) -> bool:
        """Whether it says anything of the samples."""
        return bool(self.answers) or self.features is not None


@dataclass(frozen=True, eq=False, repr=False)
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
    features: BatchFeatures | None = None
    """Of a batch that was told apart: labels and features of every sample that was found, with inputs or without."""
    steps: tuple[tuple[int, ...], ...] = ()
    """Of a client that took several local steps, the samples of each of them: their numbers in `inputs`, which stand in
    the order of the first epoch. Empty where the steps were not followed one by one."""
    bound: Bound | None = None
    """Why the steps were not followed one by one, or not to the end: which limit, and the numbers on both sides."""

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
    def samples(self) -> tuple[Sample, ...]:
        """Of a batch that was told apart, the verdict on each sample of `inputs`."""
        return self.answers[0].samples if self.answers else ()

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

    @property
    def step_notes(self) -> list[str]:
        """Of a client's local steps, which samples each was on, by their numbers, and what ended it."""
        took = "; ".join(f"{at}: {', '.join(map(str, step))}" for at, step in enumerate(self.steps, 1))
        notes = [f"samples of each step, {took}"] if took else []
        return notes + ([str(self.bound)] if self.bound is not None else [])

    def _repr_html_(self) -> str:
        """For notebooks: what `str` says, as a list."""
        first, *rest = (html.escape(line.strip()) for line in str(self).splitlines())
        return f"<p><b>{first}</b></p><ul>{''.join(f'<li>{line}</li>' for line in rest)}</ul>"

    def __str__(self) -> str:
        lines = [f"{self.attack}: {self.status.value}, {self.reason}"]
        lines += [f"  local steps: {each}" for each in self.step_notes]
        lines += [f"  assumed: {assumption}" for assumption in self.assumptions]
        lines += [f"  warning: {finding}" for finding in self.preflight.findings]
        return "\n".join(lines)

    __repr__ = __str__
