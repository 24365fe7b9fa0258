"""Sweeps: the product of models, seeds, widths, training stages, pictures, attacks and defences, as jobs in a store."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rgap.sweeps.job import Job
    from rgap.sweeps.plan import Plan, PlanError
    from rgap.sweeps.run import Progress, Summary, sweep
    from rgap.sweeps.store import SweepError, SweepStore

__all__ = ["Job", "Plan", "PlanError", "Progress", "Summary", "SweepError", "SweepStore", "sweep"]
# Imported when first used: `rgap sweep --help` needs no torch.
_HOME = {"Job": "job", "Plan": "plan", "PlanError": "plan", "SweepError": "store", "SweepStore": "store"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"rgap.sweeps.{_HOME.get(name, 'run')}"), name)
    raise AttributeError(f"module 'rgap.sweeps' has no attribute {name!r}")
