"""Constraints against unknowns, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rgap.picture import save
from rgap.rank.counts import LayerRank
from rgap.rank.found import RankAnalysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UNKNOWNS, _FREE = "#4a4a4a", "#d1495b"
_ROWS = (
    ("gradient |W|", "gradient_rows", "#00798c"),
    ("weight |z|", "weight_rows", "#66a5ad"),
    ("virtual |V|", "virtual_rows", "#c4dfe6"),
)
MOST = 3.0
"""Constraints beyond this multiple of the unknowns are cut off: they say nothing new."""
LONGEST = 14
"""Letters of a name that fit below a bar."""
CROWDED = 14
"""Layers above which the bars lie down, so that every name can be read."""


def plot(analysis: RankAnalysis, path: str | Path) -> None:
    """Write a PNG: for each layer its constraints, stacked, beside its unknowns, in multiples of the unknowns.

    The measured free dimensions, where there are any, are the red part of the unknowns; an index above 0 is red too.
    """
    from matplotlib.figure import Figure  # takes a second, which only pictures need
    from matplotlib.patches import Patch

    layers = analysis.layers
    lying = len(layers) > CROWDED
    size = (9.0, 1.6 + 0.2 * len(layers)) if lying else (max(6.0, 1.05 * len(layers) + 2.4), 4.2)
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    axes = figure.subplots()
    for at, layer in enumerate(layers):
        unit = max(layer.unknowns, 1)
        start = 0.0
        for _, name, colour in _ROWS:
            length = min(getattr(layer, name) / unit, MOST - start)
            _bar(axes, lying, at + 0.2, start, length, colour)
            start += length
        over = sum(getattr(layer, name) for _, name, _ in _ROWS) / unit
        if over > MOST:
            _say(axes, lying, at + 0.2, MOST, f"{over:.0f}x")
        free = (layer.free or 0) / unit
        _bar(axes, lying, at - 0.2, 0.0, 1 - free, _UNKNOWNS)
        _bar(axes, lying, at - 0.2, 1 - free, free, _FREE)
        if layer.free:
            _say(axes, lying, at - 0.2, 1.0, f"{layer.free} free" if lying else f"{layer.free}\nfree")
    labels = [_label(layer, "  " if lying else "\n") for layer in layers]
    of_layers, of_lengths = (axes.yaxis, axes.xaxis) if lying else (axes.xaxis, axes.yaxis)
    of_layers.set_ticks(range(len(layers)), labels, fontsize=8)
    for label, layer in zip(of_layers.get_ticklabels(), layers, strict=True):
        label.set_color(_FREE if layer.index > 0 else "black")
    of_layers.set_label_text("layer, with its index |x| - |W| - |z| - |V|", fontsize=9)
    of_lengths.set_label_text("in multiples of the unknowns |x|", fontsize=9)
    if lying:
        axes.axvline(1, color=_UNKNOWNS, linewidth=0.8, linestyle=":", zorder=0)
        axes.set_ylim(len(layers) - 0.4, -0.6)  # the input on top
        axes.set_xlim(0, MOST + 0.3)
    else:
        axes.axhline(1, color=_UNKNOWNS, linewidth=0.8, linestyle=":", zorder=0)
        axes.set_xlim(-0.6, len(layers) - 0.4)
        axes.set_ylim(0, MOST + 0.25)
    axes.spines[["top", "right"]].set_visible(False)
    patches = [Patch(color=_UNKNOWNS, label="unknowns |x|")]
    if any(layer.free for layer in layers):
        patches.append(Patch(color=_FREE, label="free by measurement"))
    patches += [Patch(color=colour, label=label) for label, _, colour in _ROWS]
    columns = len(patches) if size[0] > 8 else 3
    figure.legend(handles=patches, loc="outside upper center", ncols=columns, fontsize=8, frameon=False)
    save(figure, path)


def _bar(axes: Axes, lying: bool, at: float, start: float, length: float, colour: str) -> None:
    if lying:
        axes.barh(at, length, 0.36, left=start, color=colour)
    else:
        axes.bar(at, length, 0.36, bottom=start, color=colour)


def _say(axes: Axes, lying: bool, at: float, end: float, text: str) -> None:
    """Behind the end of a bar."""
    if lying:
        axes.annotate(text, (end, at), (3, 0), textcoords="offset points", va="center", fontsize=7)
    else:
        axes.annotate(text, (at, end), (0, 3), textcoords="offset points", ha="center", fontsize=7)


def _label(layer: LayerRank, between: str) -> str:
    name = layer.name if len(layer.name) <= LONGEST or between != "\n" else "..." + layer.name[3 - LONGEST :]
    return f"{name}{between}{layer.index:+d}"
