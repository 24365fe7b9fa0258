"""Taking in an audit that someone else wrote: checked against the schema, and its text made harmless to show."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema.exceptions import best_match

from rgap.printable import LONGEST, visible
from rgap.schema import validator

FORMAT = 2
"""The format of audit.json that this version reads."""
KIND = "rgap-audit"

LARGEST = 2**28
"""Bytes of an audit.json."""
LONGEST_COMMAND = 20_000
_SHOWN = 200
"""Characters of a wrong value in an error message."""


class ReportError(ValueError):
    """A file that no report can be made from; says what is wrong, and where."""


def load(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ReportError: the file is not JSON.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > LARGEST:
        raise ReportError(f"{path}: {size:,} bytes, expected at most {LARGEST:,}")
    try:
        return json.loads(path.read_bytes(), parse_constant=_refuse, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is not JSON: {error}") from None


def check(audit: Any) -> None:
    """Hold an audit against the schema.

    Raises:
        ReportError: another kind or format, or a value that the schema does not allow.
    """
    if not isinstance(audit, dict) or audit.get("kind") != KIND:
        got = repr(audit.get("kind")) if isinstance(audit, dict) else f"a {type(audit).__name__}"
        raise ReportError(f"not an audit: got kind {_short(got)}, expected {KIND!r}")
    if audit.get("format") != FORMAT:
        raise ReportError(f"got audit format {_short(str(audit.get('format')))}, expected {FORMAT}")
    error = best_match(_validator().iter_errors(audit))
    if error is not None:
        raise ReportError(f"{error.json_path}: {_short(error.message)}")


def clean(value: Any, longest: int = LONGEST) -> Any:
    """A copy in which every text can be shown as it is: see `rgap.printable.visible`."""
    if isinstance(value, str):
        return visible(value, longest)
    if isinstance(value, dict):
        # Pictures are checked by the schema, and are longer than any text may be.
        return {
            key: entry if key == "picture" else clean(entry, LONGEST_COMMAND if key == "command" else longest)
            for key, entry in value.items()
        }
    if isinstance(value, list):
        return [clean(entry, longest) for entry in value]
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _whole(digits: str) -> int:
    """Of what is counted here nothing is larger than the machine's own whole numbers; floats cannot follow."""
    if abs(number := int(digits)) >= 2**63:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return number


def _short(message: str) -> str:
    # ascii() keeps an error readable on any terminal, and one line long.
    message = message if message.isprintable() and message.isascii() else ascii(message)[1:-1]
    return message if len(message) <= _SHOWN else f"{message[:_SHOWN]}…"


@cache
def _validator() -> Any:
    schema = json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))
    return validator(schema)
