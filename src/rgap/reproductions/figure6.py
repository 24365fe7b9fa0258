"""Figure 6 of R-GAP: what a gradient of two pictures gives away on FCN3; see `rgap.reproductions.batches`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rgap.reproductions.batches import Batches


@dataclass(frozen=True)
class Figure6(Batches):
    """Batches of two."""

    name: ClassVar[str] = "figure6"
    title: ClassVar[str] = "Figure 6: batches of two on FCN3, R-GAP and DLG"
    counted: ClassVar[str] = "batches of two"
    size: ClassVar[int] = 2


REPRODUCTION = Figure6()
