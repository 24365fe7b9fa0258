"""What a certificate may say, from gradients that were computed in another way."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from rgap import Update


def may_be(residual: float, gradients: Sequence[Tensor | None], update: Update) -> bool:
    """Whether a residual is at least the distance of all gradients, and at most that of the one that agrees least."""
    apart, sizes = [], []
    for found, given in zip(gradients, update.gradients.values(), strict=True):
        apart.append(float(((0 if found is None else found.double()) - given.double()).norm()))
        sizes.append(float(given.double().norm()))
    least = math.hypot(*apart) / update.norm
    most = max(a / size if size else (math.inf if a else 0.0) for a, size in zip(apart, sizes, strict=True))
    within = least * (1 - 1e-6) - 1e-12 <= residual <= max(least, most) * (1 + 1e-6) + 1e-12
    return within or not math.isfinite(least)
