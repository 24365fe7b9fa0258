"""The plots of throughput.py, as SVG: time and memory against pixels, and pictures a second against the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import plotting
from matplotlib.figure import Figure
from plotting import Look

Row = dict[str, Any]

LOOKS = {
    "Recursive": Look("this package", "#0072B2", "o", ours=True),
    "Dense": Look("the paper's procedure, dense", "#D55E00", "s"),
    "DLG": Look("DLG", "#007A5A", "^"),
    "InvertingGradients": Look("Inverting Gradients", "#A8578A", "v"),
}
TIMES = " \N{MULTIPLICATION SIGN} "


def draw(rows: Sequence[Row], ratios: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write all plots; the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    exponents = ratios["exponents against pixels"]
    with matplotlib.rc_context(plotting.STYLE):
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
        plotting.save(figure, folder / f"{name}.svg")
        for name, figure in (("time", time), ("memory", memory), ("batch", batch))
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


def _by_size(rows: Sequence[Row], key: str, growth: str, unit: float = 1.0) -> list[plotting.Line]:
    """One line for each method that was measured at several sizes."""
    lines = []
    for method in LOOKS:
        done = [row for row in _strided(rows, method) if "error" not in row and row[key] > 0]
        if done:
            said = [_reached(done)] if key == "total" else []
            said += [growth] if growth and method == "Recursive" else []
            points = tuple((float(row["size"]) ** 2, unit * row[key]) for row in done)
            lines.append(plotting.Line(method, points, "\n".join((_name(done), *said))))
    return lines


def _against_pixels(lines: Sequence[plotting.Line], title: str, needed: Sequence[tuple[float, float]] = ()) -> Figure:
    """Log-log, a tick at each size that was measured."""
    figure, axes = plotting.figure(title)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plotting.draw_lines(axes, lines, LOOKS)
    done = [x for line in lines if line.method == "Dense" for x, _ in line.points]
    refused = [place for place in needed if place[0] >= max(done, default=0.0)]  # known without trying
    if refused and refused[-1][0] not in done:
        colour = LOOKS["Dense"].colour
        axes.plot(*zip(*refused, strict=True), ":", color=colour, linewidth=1.4, zorder=2)
        axes.plot(*zip(*refused[-1:], strict=True), "s", color=colour, markerfacecolor="white", zorder=3)
        said = f"would need {refused[-1][1]:.0f} GB"
        axes.annotate(said, refused[-1], (8, 0), textcoords="offset points", color=colour, fontsize=9, va="center")
    sizes = sorted({round(x**0.5) for line in lines for x, _ in line.points} | {round(x**0.5) for x, _ in needed})
    plotting.ticks(axes, [float(size) ** 2 for size in sizes], [f"{size}\N{SUPERSCRIPT TWO}" for size in sizes])
    axes.set_xlabel("pixels of the picture; models.strided, three channels")
    plotting.name_lines(axes, lines, LOOKS)
    return figure


def _against_batch(rows: Sequence[Row]) -> Figure:
    """Pictures a second of CNN6."""
    lines = []
    for method in LOOKS:
        done = [row for row in rows if row["before"] and row["method"] == method and "error" not in row]
        if done:
            points = tuple((float(row["pictures"]), row["pictures a second"]) for row in done)
            lines.append(plotting.Line(method, points, f"{_name(done)}\n{_reached(done)}"))
    dense = next((r for r in rows if r["network"] == "cnn6" and r["method"] == "Dense" and "error" not in r), None)
    figure, axes = plotting.figure("Pictures a second")
    axes.set_xscale("log")
    axes.set_yscale("log")
    counts = sorted({x for line in lines for x, _ in line.points})
    if dense is not None and counts:  # it has nothing to share between pictures
        points = tuple((count, dense["pictures a second"]) for count in (counts[0], counts[-1]))
        lines.append(plotting.Line("Dense", points, f"{_name([dense])}\n{_reached([dense])}"))
    plotting.draw_lines(axes, lines, LOOKS)
    plotting.ticks(axes, counts, [f"{count:g}" for count in counts])
    axes.set_xlabel(f"pictures attacked together; CNN6, 32{TIMES}32, three channels")
    plotting.name_lines(axes, lines, LOOKS)
    return figure
