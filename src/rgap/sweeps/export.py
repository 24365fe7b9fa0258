"""The rows of a store as a file for other programs."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rgap.files import write_atomically
from rgap.sweeps.store import ROW, SweepError

KINDS = {"INTEGER": "int64", "REAL": "float64", "TEXT": "string"}
"""Types of columns by pyarrow's names: the same whatever values happen to be in them."""


def export(rows: Iterable[dict[str, Any]], path: str | Path) -> int:
    """Write rows as CSV or Parquet, whole or not at all, and say how many.

    Args:
        rows: as `SweepStore.rows` gives them.
        path: ending in .csv or .parquet.

    Raises:
        SweepError: another ending, or pyarrow is not installed.
    """
    path, kept = Path(path), list(rows)
    writers: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {".csv": _csv, ".parquet": _parquet}
    if path.suffix not in writers:
        raise SweepError(f"{path}: got the ending {path.suffix!r}, expected {' or '.join(writers)}")
    write_atomically(path, writers[path.suffix](kept))
    return len(kept)


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ROW, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _inert(value) for name, value in row.items()} for row in rows)
    return text.getvalue().encode()


def _inert(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    try:
        arrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    except ImportError as error:
        raise SweepError(
            f"Parquet needs pyarrow ({error}): install it with pip install 'rgap[sweep]', or export to .csv"
        ) from error
    kinds = {name: KINDS[kind] for name, kind in ROW.items()} | {"labels_right": "bool_"}
    schema = arrow.schema([(name, getattr(arrow, kind)()) for name, kind in kinds.items()])
    buffer = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows, schema=schema), buffer)
    return buffer.getvalue()
