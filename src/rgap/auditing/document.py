"""An audit as audit.json has it, format 2; ``rgap/report/schema.json`` is its schema."""

from __future__ import annotations

import base64
import io
import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rgap.auditing.dose_response import DoseResponse, Response
from rgap.auditing.results import Level, Result
from rgap.auditing.verdict import Verdict
from rgap.files import plain
from rgap.picture import is_picture

if TYPE_CHECKING:
    from rgap.auditing.audit import AttackRun, Audit
    from rgap.rank import RankAnalysis

FORMAT = 2


def document(audit: Audit) -> dict[str, Any]:
    target = audit.target
    settings = {name: value for name, value in audit.settings.items() if name not in ("command", "model")}
    return plain(
        {
            "format": FORMAT,
            "kind": "rgap-audit",
            "complete": audit.complete,
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
                "input_shape": target.input_shape,
                "value_range": target.value_range,
                "batch_size": target.batch_size,
                "fingerprint": target.fingerprint,
                "parameters": sum(p.numel() for p in target.parameters.values()),
                "layers": [] if target.obstacles else [str(layer) for layer in target.chain],
                "obstacles": [str(obstacle) for obstacle in target.obstacles],
            },
            "protocol": _protocol(audit),
            "settings": settings,
            "verdict": _verdict(audit.verdict),
            "rank": None if audit.rank is None else _rank(audit.rank),
            "attacks": [_ran(each) for each in audit.attacks],
            "samples": [
                {
                    "name": case.name,
                    "label": case.label,
                    "picture": None if case.truth is None else png(case.truth[0], target.value_range),
                    "best": None if case.best is None else case.best.attack,
                    "level": case.level.value,
                    "results": [
                        {
                            **result.to_dict(),
                            "picture": None if result.inputs is None else png(result.inputs[0], target.value_range),
                        }
                        for result in case.results
                    ],
                }
                for case in audit.cases
            ],
            "defences": [_sweep(sweep) for sweep in audit.sweeps],
            "not_run": audit.not_run,
        }
    )


def png(picture: Tensor, value_range: tuple[float, float] | None) -> str | None:
    """A picture (channels, height, width) as a PNG in base64; None for inputs that are no pictures."""
    if not is_picture(tuple(picture.shape)):
        return None
    values = picture.detach().cpu().double().nan_to_num(posinf=1e300, neginf=-1e300)
    low, high = value_range or (float(values.min()), float(values.max()))
    scaled = ((values - low) / max(high - low, 1e-300)).clamp(0, 1).mul(255).round()
    array = scaled.permute(1, 2, 0).numpy().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _protocol(audit: Audit) -> dict[str, Any]:
    return {**asdict(audit.protocol), "sends": audit.protocol.sends.value, "optimiser": audit.protocol.optimiser.value}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "level": verdict.level,
        "headline": verdict.headline,
        "sentences": verdict.sentences,
        "layer": None if verdict.layer is None else asdict(verdict.layer),
        "advice": [
            {
                "what": advice.what,
                "why": advice.why,
                "tried": True,
                "before": {"psnr": advice.before.psnr, "recovered": advice.before.recovered},
                "after": {"psnr": advice.after.psnr, "recovered": advice.after.recovered},
                "cost": {"gradient_error": advice.after.gradient_error, "epsilon": advice.after.epsilon},
            }
            for advice in verdict.advice
        ],
        "limits": verdict.limits,
    }


def _rank(rank: RankAnalysis) -> dict[str, Any]:
    layers = [
        {
            "name": layer.name,
            "unknowns": layer.unknowns,
            "gradient_rows": layer.gradient_rows,
            "weight_rows": layer.weight_rows,
            "virtual_rows": layer.virtual_rows,
            "index": layer.index,
            "rank": layer.rank,
            "free": layer.free,
        }
        for layer in rank.layers
    ]
    return {"index": rank.index, "joint_free": rank.joint_free, "sentence": rank.verdict, "layers": layers}


def _ran(ran: AttackRun) -> dict[str, Any]:
    results = ran.results
    return {
        "name": ran.name,
        "applies": ran.obstacle is None,
        "reason": ran.obstacle or "",
        "exact": _count(results, Level.EXACT) if results else None,
        "recognisable": _count(results, Level.RECOGNISABLE) if results else None,
        "samples": len(results) if results else None,
        "median_psnr": median([r.psnr for r in results]) if results else None,
        "median_seconds": median([r.seconds for r in results]) if results else None,
    }


def _count(results: Sequence[Result], least: Level) -> int:
    return sum(result.level.rank >= least.rank for result in results)


def median(values: Sequence[float]) -> float:
    """NaN, where there was no answer, counts as the least."""
    return statistics.median(-math.inf if math.isnan(value) else value for value in values)


def _sweep(sweep: DoseResponse) -> dict[str, Any]:
    at = sweep.closes_at
    return {
        "name": sweep.name,
        "strength": sweep.strength_name,
        "about": sweep.about,
        "points": [_point(point) for point in sweep.points],
        "closes_at": None if at is None else at.strength,
        "sentence": sweep.sentence,
    }


def _point(point: Response) -> dict[str, Any]:
    return {
        "strength": point.strength,
        "median_psnr": point.psnr,
        "median_ssim": point.ssim,
        "recovered": point.recovered,
        "gradient_error": point.gradient_error,
        "epsilon": point.epsilon,
    }
