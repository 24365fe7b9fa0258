"""One cell of a sweep: the update of one picture or batch, under one defence or none, against one attack."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

AXES = {
    "model": "TEXT", "seed": "INTEGER", "width": "INTEGER", "stage": "INTEGER", "image": "TEXT", "batch": "INTEGER",
    "clients": "INTEGER", "protocol": "TEXT", "attack": "TEXT", "defence": "TEXT", "strength": "REAL",
}  # fmt: skip
"""What the jobs of a sweep differ by, in the order in which they are done, and how SQLite keeps it."""
FIGURES = {
    "level": "TEXT", "status": "TEXT", "reason": "TEXT", "psnr": "REAL", "ssim": "REAL", "mse": "REAL",
    "gradient_residual": "REAL", "error": "REAL", "gradient_error": "REAL", "labels_right": "INTEGER",
    "twins": "INTEGER", "accuracy": "REAL", "seconds": "REAL", "exact": "REAL", "recognisable": "REAL",
}  # fmt: skip
"""What a job finds: of several samples the figures of the one that came back best, and which shares came back."""


@dataclass(frozen=True)
class Failure:
    """A job that raised, or that killed its worker."""

    text: str
    """What went wrong."""


@dataclass(frozen=True)
class Job:
    """What a worker must be told; two jobs with the same content are the same job, whatever plan they come from.

    Args:
        axes: by the names in `AXES`, as they are shown and grouped by.
        spec: everything that the result depends on, ready for JSON: see `rgap.sweeps.plan`.
    """

    axes: Mapping[str, Any]
    spec: Mapping[str, Any]

    @cached_property
    def text(self) -> str:
        """The specification as it is kept."""
        return canonical(self.spec)

    @cached_property
    def key(self) -> str:
        """SHA-256 over the specification."""
        return sha256(self.text)

    @property
    def network(self) -> str:
        """Jobs that agree in this need the same network."""
        return sha256(canonical(self.spec.get("target")))


def sha256(content: str | bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def canonical(value: Any) -> str:
    """JSON that is the same for the same value, in every process."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
