"""The audit: what clients would send for a few samples, attacked in every way that applies."""

from rgap.auditing.audit import ATTACKS, Accounting, Audit, Interrupted, Ran, Step, audit, audit_updates
from rgap.auditing.describe import describe
from rgap.auditing.results import Case, Level, Result
from rgap.auditing.sweep import Point, Sweep
from rgap.auditing.verdict import Advice, LayerNote, Verdict

__all__ = [
    "ATTACKS",
    "Accounting",
    "Advice",
    "Audit",
    "Case",
    "Interrupted",
    "LayerNote",
    "Level",
    "Point",
    "Ran",
    "Result",
    "Step",
    "Sweep",
    "Verdict",
    "audit",
    "audit_updates",
    "describe",
]
