"""What one attack made of one sample, judged by someone who knows the sample."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rgap.attacks import JointReport, LayerReport, Reconstruction, Sample, Status
from rgap.auditing.describe import restored, solved
from rgap.files import plain
from rgap.metrics import score
from rgap.printable import listed

EXACT_PSNR = 50.0
"""In dB: errors below a step of 8-bit pixels."""
RECOGNISABLE_PSNR, RECOGNISABLE_SSIM = 20.0, 0.5
FOUND_FREE, FOUND_ERROR = 0.25, 0.1
"""Where nobody knows the sample: an input with the gradient that was sent counts as recognisable if no larger share of
its dimensions stays free, and its expected error is no larger share of the range of its values (20 dB)."""
COMPARED = ("mse", "psnr", "ssim", "shape_psnr", "best_mse")
"""The numbers that only someone who knows the sample can give."""

UNKNOWN = "not known"
"""In place of a level: something was found, and nobody here can compare it."""


class Level(Enum):
    """How much came back, worst for the client last."""

    NOTHING_SENT = "nothing sent"
    """The update is zero."""
    NOTHING = "not recovered"
    RECOGNISABLE = "recognisable"
    EXACT = "exact"

    @property
    def rank(self) -> int:
        return list(Level).index(self)


@dataclass(frozen=True, eq=False)
class Result:
    """What one attack made of one sample. NaN where there is no number."""

    attack: str
    status: Status
    """Of the sample, where the attack tells those of a batch apart; else of the update."""
    reason: str
    mse: float
    psnr: float
    ssim: float
    shape_psnr: float
    """PSNR after the reconstruction is made as bright as the sample: a dimmed picture is still the picture."""
    best_mse: float
    """The least among all answers, twins included: only someone who knows the sample can tell."""
    gradient_residual: float
    reproduced: bool
    """Whether the recomputed gradient agrees."""
    error: float
    seconds: float
    labels: tuple[float, ...]
    """Of the sample, where the attack tells those of a batch apart; else of all samples of the update."""
    labels_right: bool | None
    """None if nobody knows the labels."""
    twins: int
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]
    layers: tuple[LayerReport, ...] = ()
    joint: JointReport | None = None
    inputs: Tensor | None = None
    """(1, *input_shape): the reconstruction that belongs to this sample; None if there is none."""
    compared: bool = True
    """False: nobody knows the sample, and the certificate alone tells."""
    of: int = 1
    """Samples behind the update."""
    features: str = ""
    """The layer whose reading of this sample is known, although the sample is not; empty if there is none."""
    local_steps: tuple[str, ...] = ()
    """In which of the client's local steps the sample was, and the bound that kept them from being followed."""

    @property
    def level(self) -> Level:
        if not self.compared:
            return Level.EXACT if self.status is Status.EXACT else self._found
        if self.reproduced and self.psnr >= EXACT_PSNR:
            return Level.EXACT
        near = any(psnr >= RECOGNISABLE_PSNR for psnr in (self.psnr, self.shape_psnr)) or self.ssim >= RECOGNISABLE_SSIM
        return Level.RECOGNISABLE if near else Level.NOTHING

    @property
    def _found(self) -> Level:
        """What an answer without the truth and without certainty shows: a picture that was found is a leak."""
        if self.inputs is None or not self.reproduced or self.free_share > FOUND_FREE:
            return Level.NOTHING
        low, high = span(self.inputs)
        return Level.NOTHING if self.error > FOUND_ERROR * (high - low) else Level.RECOGNISABLE

    @property
    def free_share(self) -> float:
        """The share of dimensions that no constraint decides, so that a prior filled them; 0 if none was counted."""
        if self.joint is not None:
            return self.joint.free / max(self.joint.unknowns, 1)
        return max((layer.free / max(layer.unknowns, 1) for layer in self.layers), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """All but the inputs, ready for JSON."""
        row = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "inputs"}
        return plain(row | {"status": self.status.value} | solved(self.layers, self.joint))

    @classmethod
    def from_dict(cls, row: dict[str, Any], inputs: Tensor | None) -> Result:
        """The inverse of `to_dict`: None becomes NaN again."""
        typed = {
            "inputs": inputs,
            "status": Status(row["status"]),
            "layers": tuple(restored(LayerReport, layer) for layer in row["layers"]),
            "joint": None if row["joint"] is None else restored(JointReport, row["joint"]),
        }
        return restored(cls, row | typed)


def gave_away(result: Result) -> tuple[int, float, float]:
    """How much a result gives away, to be compared; where nobody knows the sample, by how well its gradient agrees."""
    return result.level.rank, or_least(result.psnr), or_least(-result.gradient_residual)


def or_least(figure: float) -> float:
    """NaN, where there was no answer, counts as the least."""
    return -math.inf if math.isnan(figure) else figure


@dataclass(frozen=True, eq=False)
class Case:
    """One sample, and what each attack made of it."""

    name: str
    truth: Tensor | None
    """(1, *input_shape); None if nobody knows it."""
    label: float | None
    results: tuple[Result, ...]

    @property
    def best(self) -> Result | None:
        """The result that gives the most away; None if no attack ran."""
        return max(self.results, key=gave_away, default=None)

    @property
    def level(self) -> Level:
        return Level.NOTHING if self.best is None else self.best.level

    @property
    def told(self) -> str:
        """The level, for people: what was found of a sample that nobody knows may be anything."""
        found = self.truth is None and self.best is not None and self.best.inputs is not None
        return UNKNOWN if found and self.level is Level.NOTHING else self.level.value


@dataclass(frozen=True)
class AttackRun:
    """One attack, over all samples."""

    name: str
    obstacle: str | None
    """Why it does not apply; None if it does."""
    results: tuple[Result, ...] = ()

    def at_least(self, level: Level) -> int:
        """How many samples came back so well or better."""
        return sum(result.level.rank >= level.rank for result in self.results)

    @property
    def certified(self) -> int:
        """Of how many samples the attack itself says that they are exact."""
        return sum(result.status is Status.EXACT for result in self.results)

    @property
    def median_psnr(self) -> float:
        return statistics.median(or_least(result.psnr) for result in self.results)

    @property
    def median_seconds(self) -> float:
        return statistics.median(result.seconds for result in self.results)


def judge(
    found: Reconstruction, truth: Tensor, labels: Sequence[float], value_range: tuple[float, float]
) -> list[Result]:
    """One result for each sample of the update.

    A gradient does not tell the order of its samples: reconstructions are matched to the samples so that the errors
    are least altogether. Where there are fewer of them, samples stay without.

    Args:
        truth: (b, *input_shape).
    """
    answer = found.answers[0] if found.answers else None
    places = _match(answer.inputs, truth) if answer is not None else _of_features(found, labels)
    right = answer is not None and sorted(answer.labels.tolist()) == sorted(labels)
    results = []
    for at in range(len(truth)):
        own, place = truth[at : at + 1], places.get(at)
        inputs = None if answer is None or place is None else answer.inputs[place][None]
        quality = _compared(found, inputs, own, value_range)
        own_right = place is not None and _labels(found)[place] == labels[at] if _apart(found) else right
        results.append(_result(found, place, len(truth), inputs, own_right, True, **quality))
    return results


def _apart(found: Reconstruction) -> bool:
    """Whether the attack told the samples of a batch apart: each one then has a label and a status of its own."""
    return bool(found.samples) or (not found.answers and found.features is not None)


def _labels(found: Reconstruction) -> list[float]:
    """One for each sample that was told apart."""
    if found.samples or found.features is None:
        return [sample.label for sample in found.samples]
    return [float(label) for label in found.features.labels]


def _of_features(found: Reconstruction, labels: Sequence[float]) -> dict[int, int]:
    """By sample, the features that have its label: of those that share one nobody can tell which is whose."""
    left = dict(enumerate(_labels(found)))
    places = {}
    for at, label in enumerate(labels):
        place = next((place for place, own in left.items() if own == label), None)
        if place is not None:
            places[at] = place
            del left[place]
    return places


def span(*samples: Tensor) -> tuple[float, float]:
    """The least and the greatest value of samples of which no range is known; never the same."""
    low, high = min(float(x.min()) for x in samples), max(float(x.max()) for x in samples)
    return (low, high) if low < high else (low, low + max(1.0, abs(low)))


def from_certificate(found: Reconstruction, samples: int) -> list[Result]:
    """One result for each of so many samples that nobody knows: what the certificate says, and no comparison."""
    inputs = [x[None] for x in found.inputs] if found.answers else []
    if len(inputs) == 1 < samples and not found.answers[0].samples:
        inputs = []  # one input that stands for all of them is none of them
    told = len(inputs) or len(_labels(found))
    unknown = dict.fromkeys(COMPARED, math.nan)
    return [
        _result(
            found, at if at < told else None, samples, inputs[at] if at < len(inputs) else None, None, False, **unknown
        )
        for at in range(samples)
    ]


def _result(
    found: Reconstruction,
    place: int | None,
    of: int,
    inputs: Tensor | None,
    right: bool | None,
    compared: bool,
    **quality: Any,
) -> Result:
    """Of the sample at one place of the reconstruction; None: of one that it has not."""
    answer = found.answers[0] if found.answers else None
    labels = () if answer is None else tuple(answer.labels.tolist())
    if _apart(found):
        labels = () if place is None else (_labels(found)[place],)
    own = _sample(found, place)
    error = math.nan if answer is None else answer.error
    return Result(
        attack=found.attack,
        status=found.status if own is None else own.status,
        reason=found.reason if own is None else own.reason,
        gradient_residual=math.nan if answer is None else answer.gradient_residual,
        # A sample that is certified on its own is, whatever the rest of the batch leaves in the gradient.
        reproduced=answer is not None
        and (answer.gradient_residual <= found.tolerance or (own is not None and own.status is Status.EXACT)),
        error=error if own is None else own.error,
        seconds=found.seconds,
        labels=labels,
        labels_right=right,
        twins=len(found.twins),
        assumptions=found.assumptions,
        warnings=found.preflight.findings,
        layers=() if answer is None else answer.layers,
        joint=None if answer is None else answer.joint,
        inputs=inputs,
        compared=compared,
        of=of,
        features=found.features.layer if found.features is not None and place is not None and inputs is None else "",
        local_steps=_local_steps(found, place),
        **quality,
    )


def _local_steps(found: Reconstruction, place: int | None) -> tuple[str, ...]:
    """What the client's local steps tell of the sample at one place of the reconstruction."""
    own = [str(at) for at, members in enumerate(found.steps, 1) if place in members]
    bound = () if found.bound is None else (str(found.bound),)
    return (f"in {listed(own)} of the {len(found.steps)} that were followed", *bound) if own else bound


def _sample(found: Reconstruction, place: int | None) -> Sample | None:
    """The verdict on one sample of a batch that was told apart; None: that on the update holds for all."""
    if not found.samples or place is not None:
        return found.samples[place] if found.samples and place is not None else None
    status = found.status if found.status is Status.CUT_OFF else Status.NOT_CONVERGED
    return Sample(
        status, math.nan, math.nan, f"not among the {len(found.samples)} that were told apart; {found.reason}"
    )


def _compared(
    found: Reconstruction, inputs: Tensor | None, truth: Tensor, value_range: tuple[float, float]
) -> dict[str, float]:
    """How near a reconstruction comes to its sample; NaN where there is none."""
    every = [float((x - truth.to(x)).square().mean()) for answer in found.answers for x in answer.inputs]
    best = min((e for e in every if not math.isnan(e)), default=math.nan)
    if inputs is None:
        return {**dict.fromkeys(COMPARED, math.nan), "best_mse": best}
    quality = score(inputs, truth, value_range)
    shaped = score(_as_bright(inputs, truth), truth, value_range)
    # An exact match is infinitely good, which JSON cannot say.
    psnr, shape_psnr = (min(each.psnr[0], 400.0) for each in (quality, shaped))
    return dict(zip(COMPARED, (quality.mse[0], psnr, quality.ssim[0], shape_psnr, best), strict=True))


def _as_bright(found: Tensor, truth: Tensor) -> Tensor:
    """The reconstruction times the one factor that brings it nearest to the sample."""
    x, y = found.double().cpu().nan_to_num(posinf=1e150, neginf=-1e150), truth.double().cpu()
    scale = x.abs().max().clamp(min=1e-300)
    x = x / scale
    return x * ((x * y).sum() / x.square().sum().clamp(min=1e-300))


def _match(found: Tensor, truth: Tensor) -> dict[int, int]:
    """By sample, the reconstruction that belongs to it."""
    apart = (found.double().cpu()[:, None] - truth.double().cpu()[None]).flatten(2).square().mean(2)
    rows, columns = linear_sum_assignment(torch.nan_to_num(apart, nan=1e300, posinf=1e300).numpy())
    return dict(zip(columns.tolist(), rows.tolist(), strict=True))
