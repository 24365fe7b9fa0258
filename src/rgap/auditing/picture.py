"""An audit's pictures: originals above reconstructions."""

from __future__ import annotations

import math
from pathlib import Path

from rgap.auditing.audit import Audit
from rgap.picture import grid, is_picture, name_row, save, show
from rgap.report.digest import SHOWN

ACROSS = 8
"""Pairs of pictures in one row."""


def side_by_side(audit: Audit, path: str | Path) -> None:
    """Write a PNG with each original, where it is known, above its reconstruction; of many samples the first.

    Raises:
        ValueError: the inputs are no pictures, or there is no sample that is worth one.
    """
    shape = audit.shape
    if not is_picture(shape):
        raise ValueError(f"inputs of shape {shape} are no pictures: expected (1 or 3, height, width)")
    cases = audit.pictured[:SHOWN]
    if not cases:
        raise ValueError("nothing was recovered of any sample: there is no picture to show")
    rows = math.ceil(len(cases) / ACROSS)
    columns = min(len(cases), ACROSS)
    figure, axes = grid(2 * rows, columns, (1.45 * columns + 0.9, 3.5 * rows))
    for at, case in enumerate(cases):
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
        above.set_title(case.name[-20:], fontsize=7, parse_math=False)
        error = "" if best is None or math.isnan(best.mse) else f"\nMSE {best.mse:.0e}"
        below.set_title(case.told if best is None else f"{best.status.value}{error}", fontsize=7, parse_math=False)
    for row in range(2 * rows):
        name_row(axes[row][0], "from its gradient" if row % 2 else "original")
    save(figure, path)
