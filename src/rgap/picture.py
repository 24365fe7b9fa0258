"""Pictures for people: originals beside reconstructions."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, runtime_checkable
from typing import Protocol as Structure

from matplotlib.figure import Figure
from torch import Tensor

from rgap.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@runtime_checkable
class Level(Structure):
    @property
    def value(self) -> str: ...


@runtime_checkable
class Result(Structure):
    """What came back of a sample."""

    @property
    def status(self) -> str: ...
    @property
    def mse(self) -> float: ...
    @property
    def inputs(self) -> Tensor | None: ...


@runtime_checkable
class Case(Structure):
    """A sample, and the best that came back of it."""

    @property
    def name(self) -> str: ...
    @property
    def truth(self) -> Tensor | None: ...
    @property
    def level(self) -> Level: ...
    @property
    def best(self) -> Result | None: ...


@runtime_checkable
class Pictured(Structure):
    """What `side_by_side` draws: an `rgap.Audit`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        ...

    @property
    def value_range(self) -> tuple[float, float] | None: ...
    @property
    def cases(self) -> Sequence[Case]: ...


ACROSS = 8
"""Pairs of pictures in one row."""


def is_picture(shape: tuple[int, ...]) -> bool:
    """Whether an input of this shape can be shown: grey or colour, at least 2 x 2."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 1


def show(axes: Axes, picture: Tensor, value_range: tuple[float, float]) -> None:
    """Draw one input (channels, height, width), values outside the range cut off."""
    low, high = value_range
    scaled = ((picture.detach().cpu().double() - low) / (high - low)).nan_to_num().clamp(0, 1)
    values = scaled.permute(1, 2, 0).numpy()
    axes.imshow(values, cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def side_by_side(audit: Pictured, path: str | Path) -> None:
    """Write a PNG with each original, where it is known, above its reconstruction.

    Raises:
        ValueError: the inputs are no pictures.
    """
    shape = audit.shape
    if not is_picture(shape):
        raise ValueError(f"inputs of shape {shape} are no pictures: expected (1 or 3, height, width)")
    rows = math.ceil(len(audit.cases) / ACROSS)
    columns = min(len(audit.cases), ACROSS)
    figure = Figure(figsize=(1.45 * columns + 0.9, 3.5 * rows), layout="constrained", dpi=150)
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for at, case in enumerate(audit.cases):
        row, column = divmod(at, ACROSS)
        best = case.best
        above, below = axes[2 * row][column], axes[2 * row + 1][column]
        pairs = ((above, case.truth), (below, None if best is None else best.inputs))
        value_range = audit.value_range
        for ax, inputs in pairs:
            if inputs is not None:
                # Where no range is known, that of the original holds for both.
                value_range = value_range or (float(inputs.min()), max(float(inputs.max()), float(inputs.min()) + 1e-9))
                show(ax, inputs[0], value_range)
        above.set_title(case.name[-20:], fontsize=7)
        error = "" if best is None or math.isnan(best.mse) else f"\nMSE {best.mse:.0e}"
        below.set_title(case.level.value if best is None else f"{best.status}{error}", fontsize=7)
    for row in range(2 * rows):
        left = axes[row][0]
        word = "from its gradient" if row % 2 else "original"
        left.text(-0.12, 0.5, word, fontsize=8, rotation=90, va="center", ha="right", transform=left.transAxes)
    save(figure, path)


def single(picture: Tensor, value_range: tuple[float, float], path: str | Path) -> None:
    """Write one input (channels, height, width) as a PNG, enlarged to be seen."""
    figure = Figure(figsize=(4, 4 * picture.shape[1] / picture.shape[2]), dpi=100)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    show(axes, picture, value_range)
    save(figure, path)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG in one step."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
