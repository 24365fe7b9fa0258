"""Attacks: each takes a target and an update, and gives a `Reconstruction`."""

from rgap.attacks.base import Answer, Attack, LayerReport, Reconstruction, Status
from rgap.attacks.recursive import Recursive

__all__ = ["Answer", "Attack", "LayerReport", "Reconstruction", "Recursive", "Status"]
