"""What came out of a sweep: its rows grouped, and the figures of each group."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rgap.sweeps.job import AXES

NUMERIC = ("seed", "width", "stage", "batch", "clients", "strength")
"""Axes that have an order."""
MEASURES = {
    "exact": "recovered exactly",
    "recognisable": "recognisable",
    "psnr": "median PSNR in dB",
    "mse": "median MSE",
    "cost": "median change of the update",
    "seconds": "median seconds",
}
"""Figures of a group by name, and in words."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """Jobs that agree in some axes."""

    values: tuple[Any, ...]
    """Of these axes."""
    jobs: int
    done: int
    failed: int
    applied: int
    """Done, and the attack applies. The figures are of these; NaN if there are none."""
    exact: float
    """Share of the samples."""
    recognisable: float
    """Likewise, exact ones included."""
    psnr: float
    mse: float
    cost: float
    seconds: float


def axes_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The axes that a table is best grouped by: those that vary. Pictures and seeds are samples of the same."""
    varied = [name for name in AXES if name not in ("image", "seed") and len({row[name] for row in rows}) > 1]
    return tuple(varied) or ("model", "attack")


def grouped(rows: Iterable[Row], by: Sequence[str]) -> list[Group]:
    """One group for each combination of values, in the order in which they are met.

    Raises:
        ValueError: an axis that a sweep does not have.
    """
    unknown = [name for name in by if name not in AXES]
    if unknown:
        raise ValueError(f"got {', '.join(unknown)}, expected some of {', '.join(AXES)}")
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in by), []).append(row)
    return [_group(values, same) for values, same in found.items()]


def _group(values: tuple[Any, ...], same: Sequence[Row]) -> Group:
    applied = [row for row in same if row["state"] == "done" and row["level"] is not None]
    return Group(
        values=values,
        jobs=len(same),
        done=sum(row["state"] == "done" for row in same),
        failed=sum(row["state"] == "failed" for row in same),
        applied=len(applied),
        exact=_share(applied, "exact"),
        recognisable=_share(applied, "recognisable"),
        psnr=_median(applied, "psnr", -math.inf),
        mse=_median(applied, "mse", math.inf),
        cost=_median(applied, "gradient_error", math.inf),
        seconds=_median(applied, "seconds", math.inf),
    )


def _share(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean(row[name] or 0.0 for row in rows) if rows else math.nan


def _median(rows: Sequence[Row], name: str, missing: float) -> float:
    """Where there was no answer, the figure counts as the worst; NaN if the median is one of these."""
    if not rows:
        return math.nan
    found = statistics.median_low(missing if row[name] is None else float(row[name]) for row in rows)
    return found if math.isfinite(found) else math.nan
