"""Rows of a benchmark: measured one after the other, printed as they come, kept in a file, and a table at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = tuple[str, Callable[[], dict[str, Any]]]
"""Its name, and what measures it."""


def measure(rows: Iterable[Row], only: str, first: str, columns: tuple[str, ...], out: Path | None) -> None:
    """Measure the rows whose name contains a text.

    Args:
        first: the heading of the names.
        columns: which of the figures the table shows.
        out: a file for all of them, written anew after each row.
    """
    table, results = Table(first, *columns), []
    for name, run in rows:
        if only not in name:
            continue
        found = run()
        results.append(found)
        print(json.dumps(found), flush=True)
        shown = (found[each] for each in columns)
        table.add_row(name, *(f"{each:.2g}" if isinstance(each, float) else str(each) for each in shown))
        if out:
            out.write_text(json.dumps(results, indent=2))
    Console().print(table)
