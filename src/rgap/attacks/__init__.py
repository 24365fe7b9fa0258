"""Attacks: each takes a target and an update, and gives a `Reconstruction`."""

from rgap.attacks.base import Answer, Attack, JointReport, LayerReport, Reconstruction, Status
from rgap.attacks.recursive import Recursive
from rgap.attacks.virtual import Closed, Virtual

__all__ = [
    "Answer",
    "Attack",
    "Closed",
    "JointReport",
    "LayerReport",
    "Reconstruction",
    "Recursive",
    "Status",
    "Virtual",
]
