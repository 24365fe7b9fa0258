"""Attacks: each takes a target and an update, and gives a `Reconstruction`."""

from rgap.attacks.base import Attack, BatchAttack, Certificate, certify, gradient_residual
from rgap.attacks.bias import Bias
from rgap.attacks.class_shares import class_shares
from rgap.attacks.closed import Closed, Recursive, Virtual
from rgap.attacks.hybrid import Hybrid, Rule
from rgap.attacks.labels import candidates
from rgap.attacks.lbfgs import LBFGS
from rgap.attacks.matching import Matching
from rgap.attacks.minimise import Adam
from rgap.attacks.polish import Polish
from rgap.attacks.presets import DLG, IDLG, FeatureMatching, InvertingGradients, Modern, SeeThroughGradients
from rgap.attacks.result import Answer, BatchFeatures, Outcome, Reconstruction, Sample, Status
from rgap.inversion.gauss_newton import Continuation
from rgap.inversion.joint import JointSolve
from rgap.inversion.report import JointReport, LayerReport
from rgap.inversion.subspace.peel import Search

__all__ = [
    "DLG",
    "IDLG",
    "LBFGS",
    "Adam",
    "Answer",
    "Attack",
    "BatchAttack",
    "BatchFeatures",
    "Bias",
    "Certificate",
    "Closed",
    "Continuation",
    "FeatureMatching",
    "Hybrid",
    "InvertingGradients",
    "JointReport",
    "JointSolve",
    "LayerReport",
    "Matching",
    "Modern",
    "Outcome",
    "Polish",
    "Reconstruction",
    "Recursive",
    "Rule",
    "Sample",
    "Search",
    "SeeThroughGradients",
    "Status",
    "Virtual",
    "candidates",
    "certify",
    "class_shares",
    "gradient_residual",
]
