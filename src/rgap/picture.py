"""Pictures for people."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rgap.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def is_picture(shape: tuple[int, ...]) -> bool:
    """Whether an input of this shape can be shown: grey or colour, at least 2 x 2."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 1


def scaled(picture: Tensor, value_range: tuple[float, float] | None) -> Tensor:
    """One input (channels, height, width) as (height, width, channels) from 0 to 1, values outside the range cut off.

    Where no range is known it is that of the values.
    """
    values = picture.detach().cpu().double().nan_to_num(posinf=1e300, neginf=-1e300)
    low, high = value_range or (float(values.min()), float(values.max()))
    return ((values - low) / max(high - low, 1e-300)).clamp(0, 1).permute(1, 2, 0)


def show(axes: Axes, picture: Tensor, value_range: tuple[float, float] | None) -> None:
    """Draw one input as `scaled` has it."""
    axes.imshow(scaled(picture, value_range).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def grid(height: int, width: int, size: tuple[float, float] | None = None) -> tuple[Figure, Any]:
    """A figure of so many pictures, and its axes, which are not drawn."""
    from matplotlib.figure import Figure  # takes a second, which only pictures need

    figure = Figure(figsize=size or (1.3 * width + 1.2, 1.55 * height), layout="constrained", dpi=150)
    # Ticks that are not drawn would take most of the time: where they are is asked for more than once.
    axes = figure.subplots(height, width, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes


def name_row(ax: Axes, words: str, height: float = 0.5) -> None:
    """Name a row of pictures, at the left of its first."""
    ax.text(-0.12, height, words, fontsize=8, rotation=90, va="center", ha="right", transform=ax.transAxes)


def single(picture: Tensor, value_range: tuple[float, float], path: str | Path) -> None:
    """Write one input (channels, height, width) as a PNG, enlarged to be seen."""
    from matplotlib.figure import Figure  # takes a second, which only pictures need

    figure = Figure(figsize=(4, 4 * picture.shape[1] / picture.shape[2]), dpi=100)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xticks=[], yticks=[])
    axes.set_axis_off()
    show(axes, picture, value_range)
    save(figure, path)


def sheet(pictures: Tensor) -> Tensor:
    """Pictures (b, channels, height, width) as one, in rows as near to a square as can be; what is left stays dark."""
    count, channels, height, width = pictures.shape
    across = math.ceil(count**0.5)
    down = math.ceil(count / across)
    made = pictures.new_full((down * across, channels, height, width), float(pictures.min()))
    made[:count] = pictures
    grid = made.reshape(down, across, channels, height, width)
    return grid.permute(2, 0, 3, 1, 4).reshape(channels, down * height, across * width)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure in one step, in the format that the ending of the file says."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix[1:] or "png")
    write_atomically(path, buffer.getvalue())
