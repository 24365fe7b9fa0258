"""rgap tells what a shared gradient gives away."""

from __future__ import annotations

from rgap import attacks, losses
from rgap.attacks import Reconstruction
from rgap.metrics import score
from rgap.nn.chain import NotAChain, Obstacle
from rgap.preflight import preflight
from rgap.target import Target
from rgap.update import Update, UpdateError, capture

__all__ = [
    "NotAChain", "Obstacle", "Reconstruction", "Target", "Update", "UpdateError",
    "attacks", "capture", "losses", "preflight", "score",
]  # fmt: skip
