"""Figure 3 of R-GAP: what the closed form, DLG and their hybrid make of the same pictures, on CNN6.

Source: J. Zhu and M. Blaschko, *R-GAP: Recursive Gradient Attack on Privacy*, ICLR 2021, arXiv:2010.07733.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from matplotlib.figure import Figure

from rgap.picture import grid, name_row, show
from rgap.reproductions.table1 import CELLS, VALUE_RANGE, Cell, Table1, tensors
from rgap.store import Row

MOST = 8
"""Pictures that are drawn."""


@dataclass(frozen=True)
class Figure3(Table1):
    """CNN6 alone, on a few pictures of each kind that are shown."""

    name: ClassVar[str] = "figure3"

    cells: tuple[Cell, ...] = tuple(cell for cell in CELLS if cell.network == "CNN6")

    def draw(self, rows: Mapping[str, Row]) -> Figure:
        columns = min(MOST, len(tensors(rows, self.cells[0], "R-GAP", "truth")))
        figure, axes = grid(4 * len(self.cells), columns)
        for block, cell in enumerate(self.cells):
            own = {name: self.column(rows, cell, name) for name in ("R-GAP", "DLG")}
            truth = tensors(rows, cell, "R-GAP", "truth")
            found = {name: tensors(rows, cell, name, "inputs") for name in own}
            for at in range(columns):
                kept = min(own, key=lambda name: own[name]["roughness"][at])
                strip = [
                    ("original", truth, None),
                    *((name, found[name], name) for name in own),
                    ("H-GAP", found[kept], kept),
                ]
                for line, (word, pictures, attack) in enumerate(strip):
                    ax = axes[4 * block + line][at]
                    show(ax, pictures[at], VALUE_RANGE)
                    if attack is not None:
                        ax.set_title(f"MSE {own[attack]['mse'][at]:.0e}", fontsize=7)
                    if at == 0:
                        name_row(ax, word)
        return figure
