"""A reconstruction in words and numbers, ready for JSON, and what was kept of it read again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import cache
from typing import Any, TypeVar

from jsonschema.exceptions import best_match

from rgap.attacks import JointReport, LayerReport, Reconstruction
from rgap.files import plain
from rgap.schema import of_fields, validator

T = TypeVar("T")


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
                    **solved(answer.layers, answer.joint),
                    "note": answer.note,
                    "samples": [asdict(sample) | {"status": sample.status.value} for sample in answer.samples],
                }
                for answer in found.answers
            ],
            "features": None
            if found.features is None
            else {"layer": found.features.layer, "labels": found.features.labels.tolist()},
        }
    )


def solved(layers: Sequence[LayerReport], joint: JointReport | None) -> dict[str, Any]:
    """What the closed form did layer by layer, and jointly."""
    return {
        "layers": [asdict(layer) | {"free": layer.free} for layer in layers],
        "joint": None if joint is None else asdict(joint) | {"free": joint.free},
    }


def restored(kind: type[T], row: Mapping[str, Any]) -> T:
    """A dataclass of its fields as JSON has them: NaN for None where a number belongs, tuples for lists.

    Raises:
        KeyError, ValueError: a field is missing, or of another type.
    """
    error = best_match(_validator(kind).iter_errors(row))  # type: ignore[arg-type]
    if error is not None:
        raise ValueError(f"{error.json_path}: {error.message}")
    values = {}
    for field in fields(kind):  # type: ignore[arg-type]
        value = row[field.name]
        missing = value is None and field.type == "float"
        values[field.name] = math.nan if missing else tuple(value) if isinstance(value, list) else value
    return kind(**values)


@cache
def _validator(kind: type) -> Any:
    return validator({"properties": of_fields(kind, nan=True)})
