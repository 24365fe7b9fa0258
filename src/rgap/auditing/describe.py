"""A reconstruction in words and numbers, ready for JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rgap.attacks import Answer, Reconstruction
from rgap.files import plain


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
                    **solved(answer),
                    "note": answer.note,
                }
                for answer in found.answers
            ],
        }
    )


def solved(answer: Answer) -> dict[str, Any]:
    """What the closed form did layer by layer, and jointly."""
    return {
        "layers": [asdict(layer) | {"free": layer.free} for layer in answer.layers],
        "joint": None if answer.joint is None else asdict(answer.joint) | {"free": answer.joint.free},
    }
