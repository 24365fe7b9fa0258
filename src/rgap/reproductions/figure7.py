"""Figure 7 of R-GAP: what a gradient of five pictures gives away on FCN3; see `rgap.reproductions.batches`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rgap.reproductions.batches import Batches


@dataclass(frozen=True)
class Figure7(Batches):
    """Batches of five."""

    name: ClassVar[str] = "figure7"
    title: ClassVar[str] = "Figure 7: batches of five on FCN3, R-GAP and DLG"
    counted: ClassVar[str] = "batches of five"
    size: ClassVar[int] = 5


REPRODUCTION = Figure7()
