"""Sweeps: the product of models, seeds, widths, training stages, pictures, attacks and defences, as jobs in a store."""

from rgap.sweeps.job import Job
from rgap.sweeps.plan import Plan, PlanError
from rgap.sweeps.run import Progress, Summary, sweep
from rgap.sweeps.store import SweepError, SweepStore

__all__ = ["Job", "Plan", "PlanError", "Progress", "Summary", "SweepError", "SweepStore", "sweep"]
