"""JSON that someone else wrote, held against a JSON Schema."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator, TypeChecker
from jsonschema.validators import extend


def validator(schema: Mapping[str, Any]) -> Any:
    """A validator for which NaN and infinity are no numbers, as in JSON, and 2.0 is no whole one."""
    types = Draft202012Validator.TYPE_CHECKER.redefine_many({"number": _finite, "integer": _whole})
    return extend(Draft202012Validator, type_checker=types)(schema)  # type: ignore[no-untyped-call]


def nullable(kind: str, **limits: Any) -> dict[str, Any]:
    """Values of a type, or null."""
    return {"type": [kind, "null"], **limits}


def _finite(_: TypeChecker, value: Any) -> bool:
    # A comparison, since math.isfinite fails on an int that no float can hold.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _whole(_: TypeChecker, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
