"""Makes the helpers in this folder importable, and time pass as it is looked at."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent))
TICK = 0.005
"""Seconds from one look to the next."""


@pytest.fixture
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget's clock goes on at each look at it, whatever the machine does: nobody waits until it is over."""
    looks = [0]

    def perf_counter() -> float:
        looks[0] += 1
        return TICK * looks[0]

    for name in ("rgap.linalg.deadline", "rgap.auditing.run"):
        monkeypatch.setattr(sys.modules[name], "time", SimpleNamespace(perf_counter=perf_counter))
