"""A sweep drawn: a figure against an axis that has an order, or bars where there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rgap.picture import save
from rgap.printable import shown
from rgap.sweeps.summary import MEASURES, NUMERIC, Group, Row, axes_of, grouped

MARKERS = "osv^D"
"""After ten lines colours begin again, with another marker."""
INSIDE = 6
"""With more lines than these the legend stands outside the picture."""
EXACT, SEEN = "#7a1f3d", "#d9a5b3"


def draw(
    rows: Sequence[Row],
    path: str | Path,
    x: str | None = None,
    y: str = "recognisable",
    by: Sequence[str] | None = None,
) -> None:
    """Write a picture of the rows.

    Args:
        path: ending in .png, .svg or .pdf.
        x: an axis of `NUMERIC`; None: the one that varies, or bars if none does.
        y: one of `MEASURES`.
        by: axes; a line or a bar for each combination of them. None: those that vary.

    Raises:
        ValueError: an axis, a figure or an ending that is not known, or there is nothing to draw.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path}: got the ending {path.suffix!r}, expected .png, .svg or .pdf")
    if y not in MEASURES:
        raise ValueError(f"got {y!r}, expected one of {', '.join(MEASURES)}")
    if x is not None and x not in NUMERIC:
        raise ValueError(f"got {x!r}, expected one of {', '.join(NUMERIC)}, which have an order")
    shown = [row for row in rows if row["level"] is not None]
    if not shown:
        raise ValueError("nothing to draw: no job is done whose attack applies")
    x = x or next((name for name in reversed(NUMERIC) if name in axes_of(shown)), None)
    by = axes_of(shown) if by is None else by
    figure = _bars(shown, by) if x is None else _lines(shown, x, y, [name for name in by if name != x])
    save(figure, path)


def _lines(rows: Sequence[Row], x: str, y: str, by: Sequence[str]) -> Figure:
    """A line for each combination of the other axes; what has no value on the axis is drawn across."""
    series: dict[tuple[Any, ...], list[Group]] = {}
    for group in grouped(rows, [*by, x]):
        series.setdefault(group.values[:-1], []).append(group)
    outside = len(series) > INSIDE
    figure = Figure(figsize=(9.6 if outside else 6.4, max(4.0, 0.19 * len(series))), layout="constrained", dpi=150)
    ax = figure.subplots()
    every = [group.values[-1] for groups in series.values() for group in groups if group.values[-1] is not None]
    for number, (values, groups) in enumerate(series.items()):
        label, colour, marker = _named(by, values), f"C{number % 10}", MARKERS[number // 10 % len(MARKERS)]
        points = sorted((g.values[-1], getattr(g, y)) for g in groups if g.values[-1] is not None)
        if points:
            ax.plot(
                [p[0] for p in points], [p[1] for p in points], marker=marker, markersize=4, color=colour, label=label
            )
        for across in (g for g in groups if g.values[-1] is None):
            ax.axhline(getattr(across, y), linestyle="--", linewidth=1, color=colour, label=label)
    if every and min(every) > 0 and max(every) > 30 * min(every):
        ax.set_xscale("log")
    heights = [getattr(group, y) for groups in series.values() for group in groups]
    if y in ("mse", "seconds", "cost") and any(height > 0 for height in heights):
        ax.set_yscale("log")
    elif y in ("exact", "recognisable"):
        ax.set_ylim(-0.03, 1.03)
        ax.yaxis.set_major_formatter(lambda value, place: f"{value:.0%}")
    ax.set_xlabel({"stage": "epochs trained"}.get(x, x))
    ax.set_ylabel(MEASURES[y])
    ax.grid(alpha=0.3)
    if outside:
        figure.legend(fontsize=7, loc="outside right upper")
    else:
        ax.legend(fontsize=7)
    return figure


def _bars(rows: Sequence[Row], by: Sequence[str]) -> Figure:
    """Shares of each group, exact ones dark."""
    groups = grouped(rows, by)
    figure = Figure(figsize=(6.4, 0.9 + 0.34 * len(groups)), layout="constrained", dpi=150)
    ax = figure.subplots()
    places = range(len(groups))
    ax.barh(places, [g.recognisable for g in groups], color=SEEN, label="recognisable")
    ax.barh(places, [g.exact for g in groups], color=EXACT, label="exact")
    ax.set_yticks(places, [_named(by, g.values) for g in groups], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(lambda value, place: f"{value:.0%}")
    ax.set_xlabel("of the samples")
    ax.legend(fontsize=7, loc="lower right")
    return figure


def _named(by: Sequence[str], values: Sequence[Any]) -> str:
    """A group in words, such as ``cnn6, width 20, closed``."""
    words = []
    for name, value in zip(by, values, strict=True):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        text = f"{name} {value:g}" if isinstance(value, (int, float)) else shown(str(value))
        words.append(text.replace("$", r"\$"))  # else what follows is taken for mathematics
    return ", ".join(words) or "all"
