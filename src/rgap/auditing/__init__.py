"""The audit: what clients would send for a few samples, attacked in every way that applies."""

from rgap.auditing.audit import ATTACKS, Audit, Interrupted, audit, audit_updates
from rgap.auditing.describe import describe
from rgap.auditing.dose_response import Accounting, DoseResponse, Response
from rgap.auditing.results import AttackRun, Case, Level, Result
from rgap.auditing.run import Ended, Step
from rgap.auditing.verdict import Advice, LayerNote, Verdict

__all__ = [
    "ATTACKS", "Accounting", "Advice", "AttackRun", "Audit", "Case", "DoseResponse", "Ended", "Interrupted",
    "LayerNote", "Level", "Response", "Result", "Step", "Verdict", "audit", "audit_updates", "describe",
]  # fmt: skip
