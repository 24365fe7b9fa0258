"""rgap tells what a shared gradient gives away."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rgap import attacks, data, losses, models, rank
    from rgap.attacks import Reconstruction
    from rgap.auditing import Audit, audit, audit_updates
    from rgap.checks import preflight
    from rgap.embedding import tokens
    from rgap.metrics import score
    from rgap.nn.obstacles import NotAChain
    from rgap.protocol import Protocol
    from rgap.rank import RankAnalysis, rank_analysis
    from rgap.target import Target
    from rgap.update import Update, UpdateError, capture
    from rgap.watching import watch

# Public names and where they live. Each is imported when it is first used: torch takes seconds, and `rgap --help`
# needs none of it.
_HOME = {
    "attacks": ("Reconstruction",),
    "auditing": ("Audit", "audit", "audit_updates"),
    "checks": ("preflight",),
    "embedding": ("tokens",),
    "metrics": ("score",),
    "nn.obstacles": ("NotAChain",),
    "protocol": ("Protocol",),
    "rank": ("RankAnalysis", "rank_analysis"),
    "target": ("Target",),
    "update": ("Update", "UpdateError", "capture"),
    "watching": ("watch",),
}
_MODULES = ("attacks", "data", "losses", "models", "rank")

__all__ = [
    "Audit", "NotAChain", "Protocol", "RankAnalysis", "Reconstruction", "Target", "Update", "UpdateError", "attacks",
    "audit", "audit_updates", "capture", "data", "losses", "models", "preflight", "rank", "rank_analysis", "score",
    "tokens", "watch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"rgap.{name}")
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"rgap.{module}"), name)
    raise AttributeError(f"module 'rgap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
