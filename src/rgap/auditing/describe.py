"""A reconstruction in words and numbers, ready for JSON, and what was kept of it read again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, TypeVar

from rgap.attacks import JointReport, LayerReport, Reconstruction
from rgap.files import plain

T = TypeVar("T")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _several(value: Any, kind: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and all(map(kind, value))


KINDS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: value is None or isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "bool | None": lambda value: value is None or isinstance(value, bool),
    "int": lambda value: _number(value) and isinstance(value, int),
    "float": _number,
    "tuple[float, ...]": lambda value: _several(value, lambda each: each is None or _number(each)),
    "tuple[str, ...]": lambda value: _several(value, lambda each: isinstance(each, str)),
}
"""What a field may be, by the type that it is declared with."""


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
    values = {}
    for field in fields(kind):  # type: ignore[arg-type]
        value = row[field.name]
        missing = value is None and field.type == "float"
        values[field.name] = math.nan if missing else tuple(value) if isinstance(value, list) else value
        fits = KINDS.get(str(field.type))
        if fits is not None and not fits(values[field.name]):
            raise ValueError(f"{field.name}: got a {type(value).__name__}, expected {field.type}")
    return kind(**values)
