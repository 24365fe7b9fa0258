"""Attacks: each takes a target and an update, and gives a `Reconstruction`."""

from rgap.attacks.base import Answer, Attack, Reconstruction, Status
from rgap.attacks.bias import Bias
from rgap.attacks.hybrid import Hybrid, Rule
from rgap.attacks.matching import DLG, IDLG, InvertingGradients, Matching
from rgap.attacks.minimise import LBFGS, Adam
from rgap.attacks.polish import Polish
from rgap.attacks.recursive import Recursive
from rgap.attacks.virtual import Closed, Virtual
from rgap.inversion.report import JointReport, LayerReport

__all__ = [
    "DLG",
    "IDLG",
    "LBFGS",
    "Adam",
    "Answer",
    "Attack",
    "Bias",
    "Closed",
    "Hybrid",
    "InvertingGradients",
    "JointReport",
    "LayerReport",
    "Matching",
    "Polish",
    "Reconstruction",
    "Recursive",
    "Rule",
    "Status",
    "Virtual",
]
