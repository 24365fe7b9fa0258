"""The audit: what clients would send for a few samples, attacked in every way that applies."""

from rgap.auditing.audit import ATTACKS, Accounting, AttackRun, Audit, Interrupted, Step, audit, audit_updates
from rgap.auditing.describe import describe
from rgap.auditing.dose_response import DoseResponse, Response
from rgap.auditing.results import Case, Level, Result
from rgap.auditing.verdict import Advice, LayerNote, Verdict

__all__ = [
    "ATTACKS",
    "Accounting",
    "Advice",
    "AttackRun",
    "Audit",
    "Case",
    "DoseResponse",
    "Interrupted",
    "LayerNote",
    "Level",
    "Response",
    "Result",
    "Step",
    "Verdict",
    "audit",
    "audit_updates",
    "describe",
]
