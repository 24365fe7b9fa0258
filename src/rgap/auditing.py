"""Attack a client's update for each of a few samples, and say what came out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rgap.attacks import Attack, Reconstruction, Recursive
from rgap.data import Images
from rgap.files import write_atomically
from rgap.metrics import score
from rgap.target import Target
from rgap.update import capture

FORMAT = 1
"""Version of the JSON that `Audit.save` writes."""


@dataclass(frozen=True, eq=False)
class Case:
    """One sample, attacked."""

    name: str
    truth: Tensor
    """(1, *input_shape)"""
    label: float
    found: Reconstruction
    mse: float
    """Of the answer that the attack puts first; NaN if it has none."""
    psnr: float
    ssim: float
    best_mse: float
    """The least among all answers, twins included: only someone who knows the sample can tell."""


@dataclass(frozen=True, eq=False)
class Audit:
    """What the attack read out of each sample's gradient."""

    target: Target
    cases: tuple[Case, ...]

    @property
    def summary(self) -> str:
        """One sentence: how many pictures came back, and how well."""
        exact = [case for case in self.cases if case.found.status.value == "exact"]
        statuses = sorted({case.found.status.value for case in self.cases} - {"exact"})
        others = "".join(
            f", {sum(case.found.status.value == status for case in self.cases)} {status}" for status in statuses
        )
        return f"{len(exact)} of {len(self.cases)} pictures recovered exactly{others}"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, ready for JSON; NaN and infinity become None."""
        return plain(
            {
                "format": FORMAT,
                "kind": "rgap-audit",
                "summary": self.summary,
                "target": {
                    "loss": self.target.loss.name,
                    "input_shape": self.target.input_shape,
                    "value_range": self.target.value_range,
                    "batch_size": self.target.batch_size,
                    "fingerprint": self.target.fingerprint,
                    "layers": [str(layer) for layer in self.target.chain],
                },
                "cases": [
                    {
                        "name": case.name,
                        "label": case.label,
                        "mse": case.mse,
                        "psnr": case.psnr,
                        "ssim": case.ssim,
                        "best_mse": case.best_mse,
                        "reconstruction": describe(case.found),
                    }
                    for case in self.cases
                ],
            }
        )

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON, whole or not at all."""
        write_atomically(path, json.dumps(self.to_dict(), indent=1).encode())


def audit(
    target: Target,
    samples: Images,
    labels: Sequence[float] | None = None,
    attack: Attack | None = None,
    progress: Callable[[Case], None] | None = None,
) -> Audit:
    """Capture the update of a client that holds one sample, attack it, compare; once for every sample.

    The attack sees the update and the target, never the sample; only the comparison does.

    Args:
        labels: one for each sample, in the loss's labels; by default -1 and 1 in turn.
        progress: called after each sample.
    """
    attack = Recursive() if attack is None else attack
    choices = target.loss.labels
    labels = [choices[at % len(choices)] for at in range(len(samples))] if labels is None else labels
    cases = []
    for at, label in zip(range(len(samples)), labels, strict=True):
        sample = samples[at]
        update = capture(target, sample.inputs, torch.tensor([label]))
        cases.append(_case(sample.names[0], sample.inputs, label, attack(target, update)))
        if progress is not None:
            progress(cases[-1])
    return Audit(target, tuple(cases))


def _case(name: str, truth: Tensor, label: float, found: Reconstruction) -> Case:
    if not found.answers:
        return Case(name, truth, label, found, math.nan, math.nan, math.nan, math.nan)
    value_range = found.value_range or (float(truth.min()), float(truth.max()))
    scores = [score(answer, truth, value_range) for answer in found.answers]
    best = min(s.mse[0] for s in scores)
    return Case(name, truth, label, found, scores[0].mse[0], scores[0].psnr[0], scores[0].ssim[0], best)


def describe(found: Reconstruction) -> dict[str, Any]:
    """A reconstruction without its pictures, ready for JSON."""
    return plain(
        {
            "attack": found.attack,
            "status": found.status.value,
            "reason": found.reason,
            "assumptions": found.assumptions,
            "warnings": found.preflight.findings,
            "products": dict(found.preflight.products),
            "tolerance": found.tolerance,
            "seconds": found.seconds,
            "answers": [
                {
                    "labels": answer.labels.tolist(),
                    "margin": answer.margin,
                    "gradient_residual": answer.gradient_residual,
                    "error": answer.error,
                    "layers": [asdict(layer) | {"free": layer.free} for layer in answer.layers],
                    "joint": None if answer.joint is None else asdict(answer.joint) | {"free": answer.joint.free},
                    "note": answer.note,
                }
                for answer in found.answers
            ],
        }
    )


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The same with lists for tuples and None for NaN and infinity, which JSON does not have."""
    return {key: _plain(entry) for key, entry in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return plain(value)
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
