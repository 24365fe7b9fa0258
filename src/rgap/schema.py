"""JSON that someone else wrote, held against a JSON Schema."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from jsonschema import Draft202012Validator, TypeChecker
from jsonschema.validators import extend

KINDS = {"str": "string", "bool": "boolean", "int": "integer", "float": "number"}
"""What a value is in JSON, by the type that a field is declared with."""


def validator(schema: Mapping[str, Any]) -> Any:
    """A validator for which NaN and infinity are no numbers, as in JSON, and 2.0 is no whole one."""
    types = Draft202012Validator.TYPE_CHECKER.redefine_many({"number": _finite, "integer": _whole})
    return extend(Draft202012Validator, type_checker=types)(schema)  # type: ignore[no-untyped-call]


def of_fields(kind: type, nan: bool = False, **limits: Any) -> dict[str, Any]:
    """By name, what the fields of a dataclass are in JSON, by their declared types; those of other types are left out.

    Args:
        nan: whether null stands for NaN where a number belongs.
        limits: of whole numbers.
    """
    found = {}
    for field in fields(kind):
        name, optional = str(field.type).removesuffix(" | None"), str(field.type).endswith(" | None")
        inner = KINDS.get(name.removeprefix("tuple[").removesuffix(", ...]"))
        if inner is not None:
            entry: dict[str, Any] = {"type": [inner, *["null"] * (nan and inner == "number")]}
            entry |= limits if inner == "integer" else {}
            entry = {"type": "array", "items": entry} if name.startswith("tuple[") else entry
            found[field.name] = {"anyOf": [entry, {"type": "null"}]} if optional else entry
    return found


def _finite(_: TypeChecker, value: Any) -> bool:
    # A comparison, since math.isfinite fails on an int that no float can hold.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _whole(_: TypeChecker, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
