"""How many updates fit into memory at once."""

from __future__ import annotations

MOST, CANDIDATES = 64, 2
"""Updates that are followed at once, at the most; candidates that each may have on the way, about."""
