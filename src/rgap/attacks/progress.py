"""How far a long attack has come, for whoever wants to watch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

EVERY = 0.1
"""Seconds between two reports."""


@dataclass(frozen=True)
class Tick:
    """One report of an attack that goes on."""

    what: str
    """What is done, such as ``DLG``."""
    done: int
    total: int
    """Iterations, or operations of the network on the way back; an attack may end before the last one."""
    loss: float
    """The least of all candidates; NaN for an attack that has none."""
    rate: float
    """Iterations a second."""

    @property
    def left(self) -> float:
        """Seconds to the last iteration at this rate."""
        return (self.total - self.done) / self.rate if self.rate else float("inf")


_watcher: ContextVar[Callable[[Tick], None] | None] = ContextVar("watcher", default=None)


@contextmanager
def watching(callback: Callable[[Tick], None]) -> Iterator[None]:
    """Call back while attacks run inside this block, now and then and from the same thread."""
    token = _watcher.set(callback)
    try:
        yield
    finally:
        _watcher.reset(token)


class Reporter:
    """Reports the iterations of one attack, at most one in `EVERY` seconds, and the last one."""

    def __init__(self, what: str, total: int):
        self.what, self.total = what, total
        self.start = self.last = time.perf_counter()

    def __call__(self, done: int, loss: float) -> None:
        callback = _watcher.get()
        now = time.perf_counter()
        if callback is None or (now - self.last < EVERY and done < self.total):
            return
        self.last = now
        callback(Tick(self.what, done, self.total, loss, done / max(now - self.start, 1e-9)))
