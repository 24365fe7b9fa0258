"""An audit as audit.json has it, format 2; ``rgap/report/schema.json`` is its schema."""

from __future__ import annotations

import base64
import io
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rgap.auditing.dose_response import DoseResponse, Response
from rgap.auditing.results import AttackRun, Case, Level
from rgap.auditing.verdict import Verdict, rank_sentence
from rgap.files import plain
from rgap.picture import is_picture, scaled
from rgap.rank.summary import summarise
from rgap.target import Target

if TYPE_CHECKING:
    from rgap.auditing.audit import Audit
    from rgap.rank import RankAnalysis

FORMAT = 2
VALUES = 64
"""Of an input that is no picture, how many values stand in audit.json."""


def document(audit: Audit) -> dict[str, Any]:
    target, unread = audit.target, audit.unread
    settings = {name: value for name, value in audit.settings.items() if name not in ("command", "model")}
    return plain(
        {
            "format": FORMAT,
            "kind": "rgap-audit",
            "complete": audit.complete,
            "ended": audit.ended.value,
            "made": {
                "rgap": version("rgap"),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": audit.seconds,
                "command": audit.settings.get("command"),
            },
            "target": {
                "model": audit.settings.get("model") or type(target.model).__name__,
                "loss": target.loss.name,
                "mode": target.mode,
                "input_shape": target.input_shape,
                "value_range": target.value_range,
                "batch_size": target.batch_size,
                "fingerprint": target.fingerprint,
                "parameters": sum(p.numel() for p in target.parameters.values()),
                "layers": [] if target.obstacles else _layers(target),
                "obstacles": [group.sentence for group in summarise(target.obstacles)],
            },
            "protocol": {
                **asdict(audit.protocol),
                "sends": audit.protocol.sends.value,
                "optimiser": audit.protocol.optimiser.value,
            },
            "settings": settings,
            "verdict": _verdict(audit.verdict),
            "rank": None if audit.rank is None else _rank(audit.rank, audit.verdict.level),
            "attacks": [_attack_run(each) for each in audit.attacks],
            "samples": [{**_sample(case, target), "unread": at in unread.cases} for at, case in enumerate(audit.cases)],
            "unread": unread.sentences,
            "defences": [_dose_response(each) for each in audit.sweeps],
            "not_run": audit.not_run,
        }
    )


def _sample(case: Case, target: Target) -> dict[str, Any]:
    return {
        "name": case.name,
        "label": case.label,
        "picture": None if case.truth is None else png(case.truth[0], target.value_range),
        "values": _values(case.truth),
        "best": None if case.best is None else case.best.attack,
        "level": case.level.value,
        "results": [
            {
                **result.to_dict(),
                "picture": None if result.inputs is None else png(result.inputs[0], target.value_range),
                "values": _values(result.inputs),
            }
            for result in case.results
        ],
    }


def png(picture: Tensor, value_range: tuple[float, float] | None) -> str | None:
    """A picture (channels, height, width) as a PNG in base64; None for inputs that are no pictures."""
    if not is_picture(tuple(picture.shape)):
        return None
    array = scaled(picture, value_range).mul(255).round().numpy().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _values(x: Tensor | None) -> list[float] | None:
    """The first values of an input that is no picture, (1, *shape)."""
    return None if x is None or is_picture(tuple(x.shape[1:])) else x.flatten()[:VALUES].tolist()


RANKED = ("name", "unknowns", "gradient_rows", "weight_rows", "virtual_rows", "index", "rank", "free")
"""Of a layer's rank, what stands in audit.json."""


def _layers(target: Target) -> list[str]:
    """Of a plain chain, each with the activation behind it; none where an operation is not known."""
    try:
        pairs = zip(target.network.layers, target.graph.uses, strict=True)
    except NotImplementedError:
        return []
    return [f"{layer}, {use.activation}" for layer, use in pairs]


def _verdict(verdict: Verdict) -> dict[str, Any]:
    def outcome(at: Response) -> dict[str, float]:
        return {"psnr": at.median_psnr, "recovered": at.recovered}

    advice = [
        {
            "what": each.what,
            "why": each.why,
            "tried": True,
            "before": outcome(each.before),
            "after": outcome(each.after),
            "cost": {"gradient_error": each.after.gradient_error, "epsilon": each.after.epsilon},
        }
        for each in verdict.advice
    ]
    return asdict(verdict) | {"level": verdict.level.value, "advice": advice}


def _rank(rank: RankAnalysis, level: Level) -> dict[str, Any]:
    layers = [{name: getattr(layer, name) for name in RANKED} for layer in rank.layers]
    sentence = rank_sentence(rank, level.rank >= Level.RECOGNISABLE.rank)
    return {"index": rank.index, "joint_free": rank.joint_free, "sentence": sentence, "layers": layers}


def _attack_run(run: AttackRun) -> dict[str, Any]:
    numbers: dict[str, float | None] = dict.fromkeys(
        ("exact", "certified", "recognisable", "samples", "median_psnr", "median_seconds")
    )
    if run.results:
        numbers = {
            "exact": run.at_least(Level.EXACT),
            "certified": run.certified,
            "recognisable": run.at_least(Level.RECOGNISABLE),
            "samples": len(run.results),
            "median_psnr": run.median_psnr,
            "median_seconds": run.median_seconds,
        }
    return {"name": run.name, "applies": run.obstacle is None, "reason": run.obstacle or "", **numbers}


def _dose_response(found: DoseResponse) -> dict[str, Any]:
    return {
        "name": found.name,
        "strength": found.strength_name,
        "about": found.about,
        "points": [asdict(point) for point in found.points],
        "closes_at": None if found.closes_at is None else found.closes_at.strength,
        "sentence": found.sentence,
    }
