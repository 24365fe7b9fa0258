"""How benchmarks draw lines: one for each method, named beside the plot in its own colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

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
class Look:
    """How one method is drawn; colours from Okabe and Ito, which colour-blind readers tell apart, and a marker."""

    label: str
    colour: str
    marker: str
    ours: bool = False


@dataclass(frozen=True)
class Line:
    """Points of one method, and what is written at their end."""

    method: str
    points: tuple[tuple[float, float], ...]
    label: str


def figure(title: str) -> tuple[Figure, Axes]:
    """One pair of axes, with room beside them for the labels."""
    made = Figure(figsize=(7.6, 4.0))
    axes = made.add_axes((0.08, 0.13, 0.64, 0.77))
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    return made, axes


def ticks(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(list(places)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(places), list(names))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw_lines(axes: Axes, lines: Sequence[Line], looks: Mapping[str, Look]) -> None:
    """Lines, and each one's label in its own colour beside the plot, so that no legend is looked up."""
    for line in lines:
        look = looks[line.method]
        width = 2.2 if look.ours else 1.5
        xs, ys = zip(*line.points, strict=True)
        axes.plot(xs, ys, color=look.colour, marker=look.marker, markersize=5, linewidth=width, zorder=4)


def name_lines(axes: Axes, lines: Sequence[Line], looks: Mapping[str, Look]) -> None:
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
        colour = looks[line.method].colour
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


def save(figure: Figure, file: Path) -> Path:
    figure.savefig(file, metadata={"Date": None}, bbox_inches="tight", pad_inches=0.15)
    return file
