"""Constraints against unknowns, as a picture."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rgap.files import write_atomically
from rgap.rank.analysis import RankAnalysis

_UNKNOWNS, _FREE = "#4a4a4a", "#d1495b"
_ROWS = (
    ("gradient |W|", "gradient_rows", "#00798c"),
    ("weight |z|", "weight_rows", "#66a5ad"),
    ("virtual |V|", "virtual_rows", "#c4dfe6"),
)
MOST = 3.0
"""Constraints beyond this multiple of the unknowns are cut off: they say nothing new."""
CROWDED = 14
"""Layers above which labels are turned and bars narrow."""


def plot(analysis: RankAnalysis, path: str | Path) -> None:
    """Write a PNG: for each layer its constraints, stacked, beside its unknowns, in multiples of the unknowns.

    The measured free dimensions, where there are any, are the red part of the unknowns.
    """
    layers = analysis.layers
    many = len(layers) > CROWDED
    width = max(6.0, (0.35 if many else 1.05) * len(layers) + 2.4)
    figure = Figure(figsize=(width, 5.0 if many else 4.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    for at, layer in enumerate(layers):
        unit = max(layer.unknowns, 1)
        bottom = 0.0
        for _, name, colour in _ROWS:
            height = min(getattr(layer, name) / unit, MOST - bottom)
            axes.bar(at + 0.2, height, 0.36, bottom=bottom, color=colour)
            bottom += height
        over = sum(getattr(layer, name) for _, name, _ in _ROWS) / unit
        if over > MOST:
            axes.annotate(f"{over:.0f}x", (at + 0.2, MOST), (0, 3), textcoords="offset points", ha="center", fontsize=7)
        free = (layer.free or 0) / unit
        axes.bar(at - 0.2, 1 - free, 0.36, color=_UNKNOWNS)
        axes.bar(at - 0.2, free, 0.36, bottom=1 - free, color=_FREE)
        if layer.free:
            axes.annotate(
                f"{layer.free}\nfree", (at - 0.2, 1), (0, 3), textcoords="offset points", ha="center", fontsize=7
            )
    axes.axhline(1, color=_UNKNOWNS, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xticks(range(len(layers)), [f"{_short(layer.name)}\n{layer.index:+d}" for layer in layers], fontsize=8)
    axes.tick_params(axis="x", rotation=90 if many else 0)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_xlabel("layer, with its index |x| - |W| - |z| - |V|", fontsize=9)
    axes.set_ylabel("in multiples of the unknowns |x|", fontsize=9)
    axes.set_ylim(0, MOST + 0.25)
    axes.spines[["top", "right"]].set_visible(False)
    patches = [Patch(color=_UNKNOWNS, label="unknowns |x|")]
    if any(layer.free for layer in layers):
        patches.append(Patch(color=_FREE, label="free by measurement"))
    patches += [Patch(color=colour, label=label) for label, _, colour in _ROWS]
    figure.legend(
        handles=patches, loc="outside upper center", ncols=len(patches) if width > 8 else 3, fontsize=8, frameon=False
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _short(name: str) -> str:
    return name if len(name) <= 12 else "..." + name[-10:]
