"""The plots of throughput.py, as SVG: time and memory against pixels, and pictures a second against the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

Row = dict[str, Any]


@dataclass(frozen=True)
class Look:
    """How one method is drawn; colours from Okabe and Ito, which colour-blind readers tell apart, and a marker."""

    label: str
    colour: str
    marker: str


LOOKS = {
    "Recursive": Look("this package", "#0072B2", "o"),
    "Dense": Look("the paper's procedure, dense", "#D55E00", "s"),
    "DLG": Look("DLG", "#007A5A", "^"),
    "InvertingGradients": Look("Inverting Gradients", "#A8578A", "v"),
}
TIMES = " \N{MULTIPLICATION SIGN} "
INK, FAINT = "#222222", "#D8D8D8"
STYLE = {
    "svg.hashsalt": "rgap",  # the same figures, the same file
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#888888",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    # Its own white ground, so that dark pages do not swallow the letters.
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Line:
    """Points of one method, and what is written at their end."""

    method: str
    points: tuple[tuple[float, float], ...]
    label: str


def draw(rows: Sequence[Row], ratios: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write all plots; the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    exponents = ratios["exponents against pixels"]
    with matplotlib.rc_context(STYLE):
        time = _against_pixels(_by_size(rows, "total", _growth(exponents, "total")), "Seconds for one picture")
        # Further on it would only squeeze what was measured.
        small = [row for row in _strided(rows, "Recursive") if row["size"] <= 32]
        needed = [(float(row["size"]) ** 2, row["dense bytes"] / 1e9) for row in small]
        memory = _against_pixels(
            _by_size(rows, "peak bytes", _growth(exponents, "peak bytes"), 1e-9),
            "Peak memory of the attack, GB",
            needed,
        )
        batch = _against_batch(rows)
    return [
        _save(figure, folder / f"{name}.svg") for name, figure in (("time", time), ("memory", memory), ("batch", batch))
    ]


def _strided(rows: Sequence[Row], method: str) -> list[Row]:
    return [row for row in rows if row["network"] == "strided" and row["method"] == method]


def _growth(exponents: Mapping[str, float | None], key: str) -> str:
    """What is written beside the sweep of sizes."""
    found = next((value for name, value in exponents.items() if name.startswith(f"{key},")), None)
    return "" if found is None else f"grows as pixels$^{{{found:.2f}}}$"


def _name(rows: Sequence[Row]) -> str:
    """The method, and how long it may go on."""
    look, iterations = LOOKS[rows[0]["method"]], rows[0]["iterations"]
    return look.label + (f", {iterations} iterations" if iterations else "")


def _reached(rows: Sequence[Row]) -> str:
    """How near the pictures came: seconds mean nothing without it."""
    errors = [row["worst MSE"] for row in rows if row["worst MSE"] is not None]
    return f"MSE up to {max(errors):.1g}" if errors else "no answer"


def _by_size(rows: Sequence[Row], key: str, growth: str, unit: float = 1.0) -> list[Line]:
    """One line for each method that was measured at several sizes."""
    lines = []
    for method in LOOKS:
        done = [row for row in _strided(rows, method) if "error" not in row and row[key] > 0]
        if done:
            said = [_reached(done)] if key == "total" else []
            said += [growth] if growth and method == "Recursive" else []
            points = tuple((float(row["size"]) ** 2, unit * row[key]) for row in done)
            lines.append(Line(method, points, "\n".join((_name(done), *said))))
    return lines


def _against_pixels(lines: Sequence[Line], title: str, needed: Sequence[tuple[float, float]] = ()) -> Figure:
    """Log-log, a tick at each size that was measured."""
    figure, axes = _figure(title)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _draw(axes, lines)
    done = [x for line in lines if line.method == "Dense" for x, _ in line.points]
    refused = [place for place in needed if place[0] >= max(done, default=0.0)]  # known without trying
    if refused and refused[-1][0] not in done:
        colour = LOOKS["Dense"].colour
        axes.plot(*zip(*refused, strict=True), ":", color=colour, linewidth=1.4, zorder=2)
        axes.plot(*zip(*refused[-1:], strict=True), "s", color=colour, markerfacecolor="white", zorder=3)
        said = f"would need {refused[-1][1]:.0f} GB"
        axes.annotate(said, refused[-1], (8, 0), textcoords="offset points", color=colour, fontsize=9, va="center")
    sizes = sorted({round(x**0.5) for line in lines for x, _ in line.points} | {round(x**0.5) for x, _ in needed})
    _ticks(axes, [float(size) ** 2 for size in sizes], [f"{size}\N{SUPERSCRIPT TWO}" for size in sizes])
    axes.set_xlabel("pixels of the picture; models.strided, three channels")
    _name_lines(axes, lines)
    return figure


def _against_batch(rows: Sequence[Row]) -> Figure:
    """Pictures a second of CNN6."""
    lines = []
    for method in LOOKS:
        done = [row for row in rows if row["before"] and row["method"] == method and "error" not in row]
        if done:
            points = tuple((float(row["pictures"]), row["pictures a second"]) for row in done)
            lines.append(Line(method, points, f"{_name(done)}\n{_reached(done)}"))
    dense = next((r for r in rows if r["network"] == "cnn6" and r["method"] == "Dense" and "error" not in r), None)
    figure, axes = _figure("Pictures a second")
    axes.set_xscale("log")
    axes.set_yscale("log")
    counts = sorted({x for line in lines for x, _ in line.points})
    if dense is not None and counts:  # it has nothing to share between pictures
        points = tuple((count, dense["pictures a second"]) for count in (counts[0], counts[-1]))
        lines.append(Line("Dense", points, f"{_name([dense])}\n{_reached([dense])}"))
    _draw(axes, lines)
    _ticks(axes, counts, [f"{count:g}" for count in counts])
    axes.set_xlabel(f"pictures attacked together; CNN6, 32{TIMES}32, three channels")
    _name_lines(axes, lines)
    return figure


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.6, 4.0))
    axes = figure.add_axes((0.08, 0.13, 0.64, 0.77))  # beside them is room for the labels
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    return figure, axes


def _ticks(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(list(places)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(places), list(names))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw(axes: Axes, lines: Sequence[Line]) -> None:
    """Lines, and each one's label in its own colour beside the plot, so that no legend is looked up."""
    for line in lines:
        look = LOOKS[line.method]
        width = 2.2 if line.method == "Recursive" else 1.5
        xs, ys = zip(*line.points, strict=True)
        axes.plot(xs, ys, color=look.colour, marker=look.marker, markersize=5, linewidth=width, zorder=4)


def _name_lines(axes: Axes, lines: Sequence[Line]) -> None:
    """Once the axes are as they stay: labels at the height where their lines end, moved up where they would collide."""
    axes.figure.draw_without_rendering()  # only then is the scale known
    points = 72 / axes.figure.dpi
    frame = axes.get_window_extent()
    free = -float("inf")
    for line in sorted(lines, key=lambda line: line.points[-1][1]):
        end = axes.transData.transform(line.points[-1])
        half = 6.5 * (1 + line.label.count("\n"))
        height = max((end[1] - frame.y0) * points, free + half)
        free = height + half + 3
        colour = LOOKS[line.method].colour
        shown = axes.annotate(
            line.label,
            line.points[-1],
            (frame.width * points + 8, height),
            textcoords="axes points",
            color=colour,
            fontsize=9,
            va="center",
            # Lines that end early, or whose label had to move, are led to it.
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "relpos": (0, 0.5)},
        )
        shown.set_zorder(3)


def _save(figure: Figure, file: Path) -> Path:
    figure.savefig(file, metadata={"Date": None}, bbox_inches="tight", pad_inches=0.15)
    return file
