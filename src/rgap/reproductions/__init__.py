"""The paper's tables and figures again, each beside the paper's numbers."""

from __future__ import annotations

import importlib
from typing import cast

from rgap.reproductions.base import Job, Options, Reproduction, ReproductionError, reproduce

NAMES = (
    "table1", "table2", "figure1", "figure3", "figure4", "figure5", "figure6", "figure7", "inverting-gradients",
    "models", "training",
)  # fmt: skip
"""In the paper's order; then one of another paper, which checks the attack that it brings, and two
of no paper: models that people train, and what training changes."""

HOMES = {"figure6": ("batches", "Figure6"), "figure7": ("batches", "Figure7")}
"""Module and name of those that have no module of their own name."""

__all__ = ["NAMES", "Job", "Options", "Reproduction", "ReproductionError", "by_name", "reproduce"]


def by_name(name: str) -> Reproduction:
    """The reproduction of that name, imported now.

    Raises:
        ReproductionError: there is none; the message lists those there are.
    """
    if name not in NAMES:
        raise ReproductionError(f"unknown reproduction {name!r}: expected one of {', '.join(NAMES)}")
    home, own = HOMES.get(name, (name.replace("-", "_"), "REPRODUCTION"))
    made = getattr(importlib.import_module(f"rgap.reproductions.{home}"), own)
    return cast(Reproduction, made() if isinstance(made, type) else made)
