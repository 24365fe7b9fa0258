"""How long what goes on may still take: asked by every loop that may take long, set by whoever waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

REPORT, MOST = 0.08, 10.0
"""Share of a budget, and seconds at the most, that are kept for starting, for an attack's end and for the report."""


class OutOfTime(Exception):
    """The time was up before there was anything to give back."""


@dataclass(frozen=True)
class Limit:
    """From when to when, as the clock has it."""

    begin: float
    end: float


_limit: ContextVar[Limit | None] = ContextVar("limit", default=None)


@contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """What runs inside this block is to end within so many seconds, and within what an outer block allows; None: as
    long as that."""
    outer, now = _limit.get(), time.perf_counter()
    if seconds is None:
        yield
        return
    end = now + seconds
    token = _limit.set(Limit(now, end if outer is None else min(end, outer.end)))
    try:
        yield
    finally:
        _limit.reset(token)


def without_report(budget: float) -> float:
    """Seconds of a budget for attacks, so that what they found is shown when it is over."""
    return budget - min(REPORT * budget, MOST)


def used() -> float:
    """The share of the time that has passed, 1 or more where it is up; 0 without a limit."""
    limit = _limit.get()
    if limit is None:
        return 0.0
    allowed = limit.end - limit.begin
    return (time.perf_counter() - limit.begin) / allowed if allowed > 0 else 1.0


def share(part: float) -> float | None:
    """Seconds of this part of the time that is left; None without a limit."""
    limit = _limit.get()
    return None if limit is None else max(0.0, part * (limit.end - time.perf_counter()))


def check() -> None:
    """Raise OutOfTime if the time is up: for loops that have nothing to give back before they end."""
    if used() >= 1:
        raise OutOfTime
