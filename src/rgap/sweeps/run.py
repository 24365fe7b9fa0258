"""A run: jobs out of the store, to the engine, and what they found back into the store."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgap.sweeps.engine import Cluster, Engine, Here, Outcome
from rgap.sweeps.job import Failure
from rgap.sweeps.plan import Plan
from rgap.sweeps.store import Counts, SweepStore

WAIT = 1.0
"""Seconds between two looks at what happens elsewhere."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    done: int
    """Jobs of the plan that are done, earlier ones and those of other runs included."""
    failed: int
    total: int
    here: int
    """Jobs that this run has ended."""
    seconds: float

    @property
    def rate(self) -> float:
        """Jobs a second of this run; 0 before the first."""
        return self.here / self.seconds if self.seconds > 0 else 0.0

    @property
    def left(self) -> float | None:
        """Seconds until all jobs are done, at this rate; None if it is not known."""
        return (self.total - self.done - self.failed) / self.rate if self.rate > 0 else None


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    jobs: int
    """Of the plan."""
    before: int
    """Done before it began."""
    done: int
    """By this run."""
    failed: int
    """All that stand in the store as failed."""
    seconds: float
    store_seconds: float
    """Of these, spent on the store."""


def sweep(
    plan: Plan,
    store: str | Path,
    workers: int = 1,
    scheduler: str | None = None,
    retry: bool = False,
    progress: Callable[[Progress], None] | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> Summary:
    """Do what is left to do of a plan.

    Args:
        store: an SQLite file; made if it is not there. It may hold other plans, and be used by several runs at once.
        workers: local processes, one job each at a time; 1: this process.
        scheduler: address of a Dask scheduler, whose workers do the jobs instead.
        retry: do jobs that failed once more.
        progress: called at least once a second while jobs end.
        notice: called with what a user should know meanwhile.

    Raises:
        PlanError, DataError, ReadError: the plan names something that is not there.
        SweepError: the store cannot be used, the disk is full, or there is no scheduler.
    """
    with SweepStore(store) as kept:
        counts = kept.plan(plan.jobs(), str(plan), retry)
        run = _Run(kept, counts, progress)
        if kept.waits() or kept.elsewhere():
            supplies = plan.supplies()
            alone = scheduler is None and workers == 1
            engine = Here(supplies) if alone else Cluster(supplies, scheduler, workers, notice)
            with closing(engine):
                run.all(engine)
        return run.summary()


class _Run:
    """One run as it goes on."""

    def __init__(self, store: SweepStore, counts: Counts, progress: Callable[[Progress], None] | None):
        self.store, self.progress = store, progress
        self.total, self.before = sum(counts.values()), counts["done"]
        self.here = self.done = 0
        self.start = self.looked = time.perf_counter()

    def all(self, engine: Engine) -> None:
        """Until nothing of the plan is left, here or elsewhere."""
        begun: set[str] = set()
        ended: list[tuple[str, Outcome]] = []
        while True:
            idle = not begun - {key for key, _ in ended}
            lanes = engine.lanes() if self.store.waits(look=idle or self._due()) else []
            taken = self._change(ended, lanes)
            begun -= {key for key, _ in ended}
            for lane, key, spec in taken:
                engine.put(key, spec, lane)
                begun.add(key)
            if begun:
                ended = engine.get(WAIT)
                continue
            ended = []
            if not self.store.waits():
                if not self.store.elsewhere():
                    break
                time.sleep(WAIT)  # another run may die, and leave its jobs to this one
        self._tell()

    def _change(self, ended: list[tuple[str, Outcome]], lanes: list[str]) -> list[tuple[str, str, Any]]:
        """Into the store with what was found, and out of it with what is to be done next."""
        lost = [key for key, outcome in ended if outcome is None]
        if lost:
            self.store.give_back(lost)
        found = [(key, outcome) for key, outcome in ended if outcome is not None]
        taken = self.store.take(lanes, found)
        failed = sum(isinstance(outcome, Failure) for _, outcome in found)
        self.here += len(found)
        self.done += len(found) - failed
        if self._due():
            self._tell()
        return taken

    def _due(self) -> bool:
        return time.perf_counter() - self.looked > WAIT

    def _tell(self) -> None:
        """Say how far it is, what other runs have done included."""
        self.looked = time.perf_counter()
        if self.progress is not None:
            counts, seconds = self.store.counts(), time.perf_counter() - self.start
            self.progress(Progress(counts["done"], counts["failed"], self.total, self.here, seconds))

    def summary(self) -> Summary:
        failed = self.store.counts()["failed"]
        seconds = time.perf_counter() - self.start
        return Summary(self.total, self.before, self.done, failed, seconds, self.store.seconds)
