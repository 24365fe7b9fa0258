"""One audit as it goes on: rank analysis, then every attack on every update, and what was found so far."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from rgap.attacks import Attack, Reconstruction, Status
from rgap.auditing.findings import findings
from rgap.auditing.guard import guarded, obstacle_of
from rgap.auditing.local_steps import width_exceeded
from rgap.auditing.observed import Observed, digest
from rgap.auditing.readout import ReadOut, read_out
from rgap.auditing.results import AttackRun, Case, Level, Result, from_certificate, judge, span
from rgap.identity import identity
from rgap.linalg.deadline import OutOfTime, used, within, without_report
from rgap.protocol import Protocol
from rgap.rank import RankAnalysis, rank_analysis
from rgap.store import Row, Store
from rgap.target import Target
from rgap.update import Update

RESULTS = 4
"""Version of what is kept in the folder of an audit."""
CHUNK = 8
"""Updates of one call of an attack: what an interruption can cost."""
LATE, CUT_OFF = "the time was up", "cut off when the time was up"
MANY = 32
"""Samples, or local steps, of one update that most attacks cannot take apart."""
QUICK = 10.0
"""Seconds for what is told before any attack."""


@dataclass(frozen=True)
class Step:
    """How far an audit has come."""

    what: str
    done: int
    total: int
    note: str = ""
    """What is known by now, for people who wait."""

    def __str__(self) -> str:
        """In a line or two, so that `print` is a progress for `rgap.audit`."""
        return "\n".join(filter(None, (self.note, f"{self.done + 1}/{self.total} {self.what}")))


class Ended(Enum):
    """How an audit ended."""

    WHOLE = "whole"
    """Nothing was put off."""
    TIME = "out of time"
    """The budget was spent before all was done."""
    INTERRUPTED = "interrupted"
    """Someone, or the machine, asked it to stop."""


@dataclass
class Run:
    """One audit as it goes on; the arguments are those of `rgap.audit`."""

    target: Target
    observed: Sequence[Observed]
    attacks: Sequence[Attack]
    protocol: Protocol
    seed: int
    budget: float | None
    folder: Path | None
    fresh: bool
    about: Mapping[str, Any]
    progress: Callable[[Step], None] | None
    not_run: list[str] = field(default_factory=list)
    ended: Ended = Ended.WHOLE
    unfinished: bool = False
    """Whether an attack might still find what none has found."""
    found: dict[str, list[Result]] = field(default_factory=dict)
    """By key, what one attack made of one update's samples."""
    rank: RankAnalysis | None = None
    read: ReadOut | None = None

    def __post_init__(self) -> None:
        self.start, self._identities = time.perf_counter(), dict[int, str]()
        if self.budget is not None and not self.budget >= 0:
            raise ValueError(f"got budget={self.budget}, expected 0 seconds or more, or None")
        self.updates = [each.update for each in self.observed]
        self.group = max(each.samples for each in self.observed)
        self.obstacles = [obstacle_of(attack, self.target, self.group) for attack in self.attacks]
        self.able = [each for each, obstacle in zip(self.attacks, self.obstacles, strict=True) if obstacle is None]
        self.store = None if self.folder is None else Store(self.folder, self.settings, self.fresh)

    @property
    def settings(self) -> dict[str, Any]:
        """What the results depend on."""
        return {
            "results": RESULTS,
            "fingerprint": self.target.fingerprint,
            "loss": identity(self.target.loss),
            "batch_size": self.target.batch_size,
            "protocol": str(self.protocol),
            "model": hashlib.sha256(repr(self.target.model).encode()).hexdigest(),
            "value_range": self.target.value_range,
            "samples": digest(self.observed),
            "labels": [label for each in self.observed for label in each.labels or [None] * each.samples],
            "seed": self.seed,
        }

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.start

    @property
    def late(self) -> bool:
        return used() >= 1 or self._left <= 0

    @property
    def _left(self) -> float:
        """Seconds for attacks and defences."""
        return math.inf if self.budget is None else without_report(self.budget) - self.seconds

    def put_off(self, what: str, why: str = LATE) -> None:
        """Note what is left to do."""
        self.not_run.append(f"{what}: {why}")
        if self.ended is Ended.WHOLE:
            self.ended = Ended.TIME

    def tell(self, what: str, done: int = 0, note: str = "") -> None:
        """Say how far it is."""
        if self.progress is not None:
            self.progress(Step(what, done, len(self.updates) * max(1, len(self.attacks)), note))

    def attack(self) -> None:
        """Labels, features and ranks, then every attack on every update that none before it recovered exactly."""
        self.tell("labels", note=self._beginning() if self.progress is not None else "")
        with within(QUICK):
            self.read = read_out(self.target, self.observed)
        self.tell("rank analysis", note=f"Read off at once: {self.read.told}." if self.read.told else "")
        self._rank()
        note = "" if self.rank is None else f"Before any attack: {self.rank.verdict}"
        self.unfinished = True
        short: list[tuple[Attack, int]] = []
        for number, attack in enumerate(self.able):
            left = {at: update for at, update in enumerate(self.updates) if not self._exact(at, self.able[:number])}
            self.tell(attack.name, number * len(self.updates), note)
            note = ""
            begun = self.results(attack, left, share=self.share(len(self.able) - number))
            short += [(attack, at) for at in left if at not in begun or any(map(cut_off, begun[at]))]
        short = [(attack, at) for attack, at in short if not self._exact(at, self.able)]
        for attack in self.able:
            own = [self.of_update(at, [attack]) for each, at in short if each is attack]
            for why, count in ((LATE, own.count([])), (CUT_OFF, len(own) - own.count([]))):
                if count:
                    self.put_off(f"{attack.name} on {count} update{'s' * (count != 1)}", why)
        self.unfinished = bool(short)

    def _rank(self) -> None:
        """Ranks as far as they are measured in a moment, else the counts alone."""
        if not self.target.graph.uses:
            self.not_run.append("rank analysis: the model cannot be traced")
            return
        try:
            with within(QUICK if self.budget is None else min(QUICK, max(self.budget / 4, 1.0))):
                self.rank = rank_analysis(self.target, batch_size=self.group)
        except OutOfTime:
            self.rank = rank_analysis(self.target, batch_size=self.group, measure=False)
            self.not_run.append("measuring ranks: it takes too long here; rgap.rank_analysis does it by itself")

    def share(self, parts: int) -> float | None:
        """Seconds for the next of so many attacks or defences that are left: what one does not need the others have."""
        return None if self.budget is None else max(self._left, 0.0) / parts

    @cached_property
    def findings(self) -> tuple[str, ...]:
        """What makes the audit mean something else than its reader may think."""
        return findings(self.target, self.observed)

    @cached_property
    def bound(self) -> str:
        """What keeps the local steps of every client from being undone; empty if nothing is known to."""
        return width_exceeded(self.target, self.updates)

    def _beginning(self) -> str:
        """What to know before time is spent."""
        return "\n".join((self._plan(), *(f"Check this first: {each}" for each in self.findings)))

    def _plan(self) -> str:
        """What will be tried, and about how long it takes here."""
        if not self.able:
            why = "".join(f"\n- {a.name}: {reason}" for a, reason in zip(self.attacks, self.obstacles, strict=True))
            return f"No attack applies to this model and these updates.{why}{self._large()}"
        updates = len(self.updates)
        parts = []
        for attack in self.able:
            seconds = attack.estimate(self.target, updates)
            parts.append(attack.name if seconds is None else f"{attack.name} (about {_rounded(seconds)} here)")
        count = sum(each.samples for each in self.observed)
        what = f"{', '.join(parts)} on {count} sample{'s' if count > 1 else ''} in {self.target.mode} mode"
        if self.budget is None:
            return f"Trying {what}, as long as that takes.{self._large()}"
        return f"Trying {what}, for {_rounded(self.budget)} at the most (--budget).{self._large()}"

    def _large(self) -> str:
        """What to expect of updates of many samples or steps; empty of few."""
        own = max(1, self.group // self.protocol.clients)
        steps = self.protocol.passes * math.ceil(own / (self.protocol.minibatch or own))
        if self.group < MANY and steps < MANY:
            return ""
        after = f" after {steps} local steps" if steps > 1 else ""
        return (
            f"\nEach update is of {self.group} samples{after}. Attacks by optimisation mix so many, and the closed "
            "form tells apart up to the number that rgap rank counts, after few steps: for what a single sample gives "
            "away audit a smaller client too (--batch-size 1, one step)."
        )

    def results(
        self, attack: Attack, updates: Mapping[int, Update], defence: str = "", share: float | None = None
    ) -> dict[int, list[Result]]:
        """One attack on updates by their number, from the store those that are there; fewer if the time is up.

        Args:
            share: seconds for the attack. One that has been exact so far has all that is left: no other can do better.
        """
        keys = {at: self._key(attack, at, defence) for at in updates}
        for at, key in keys.items():
            if key not in self.found and self.store is not None and key in self.store.rows:
                kept = self._kept(self.store.rows[key], self.observed[at].samples)
                if kept is not None:
                    self.found[key] = kept
        left = [at for at, key in keys.items() if key not in self.found]
        begun, took, exact = time.perf_counter(), math.inf, False
        while left and not self.late:
            seconds = self._left if exact or share is None else begun + share - time.perf_counter()
            if seconds <= 0:
                break
            # One that has no answer before its end takes no more updates at once than it surely ends with.
            count = CHUNK if attack.anytime or self.budget is None else max(1, min(CHUNK, int(seconds / took)))
            chunk, left, start = left[:count], left[count:], time.perf_counter()
            with within(seconds if math.isfinite(seconds) else None):
                attacked = guarded(attack, self.target, [updates[at] for at in chunk])
            took = max(time.perf_counter() - start, 1e-6) / len(chunk)
            for at, each in zip(chunk, attacked, strict=True):
                own = self.found[keys[at]] = self._judged(self.observed[at], each)
                # What was cut off is done again when there is more time.
                if self.store is not None and each.status is not Status.CUT_OFF:
                    tensors = {str(n): result.inputs for n, result in enumerate(own) if result.inputs is not None}
                    self.store.add(keys[at], Row({"results": [result.to_dict() for result in own]}, tensors))
            exact = all(all_exact(self.found[keys[at]]) for at in chunk)
        return {at: self.found[key] for at, key in keys.items() if key in self.found}

    def _kept(self, row: Row, samples: int) -> list[Result] | None:
        """What the store has of one update; None if that is no result of this audit: it is done again."""
        shape = (1, *self.target.input_shape)
        if any(inputs.shape != shape or not inputs.is_floating_point() for inputs in row.tensors.values()):
            return None
        try:
            found = [Result.from_dict(each, row.tensors.get(str(n))) for n, each in enumerate(row.values["results"])]
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        return found if len(found) == samples else None

    def _judged(self, observed: Observed, found: Reconstruction) -> list[Result]:
        if observed.truth is None or observed.labels is None:
            return from_certificate(found, observed.samples)
        return judge(found, observed.truth, observed.labels, self.target.value_range or self._span)

    @cached_property
    def _span(self) -> tuple[float, float]:
        """Of all samples that are known."""
        return span(*(each.truth for each in self.observed if each.truth is not None))

    def _key(self, attack: Attack, at: int, defence: str = "") -> str:
        """Of one attack on one update, which may be defended; what the attack is, is asked once: some keep count."""
        if id(attack) not in self._identities:
            self._identities[id(attack)] = identity(attack)
        return f"{defence}|{at}|{self._identities[id(attack)]}"

    def of_attack(self, attack: Attack) -> list[Result]:
        """What one attack made of all samples of the updates that it was given."""
        return [result for at in range(len(self.updates)) for result in self.found.get(self._key(attack, at), ())]

    def of_update(self, at: int, attacks: Sequence[Attack]) -> list[list[Result]]:
        """What attacks made of one update's samples, by attack; none of those that were not given it."""
        return [self.found[key] for attack in attacks if (key := self._key(attack, at)) in self.found]

    def _exact(self, at: int, attacks: Sequence[Attack]) -> bool:
        return any(results and all_exact(results) for results in self.of_update(at, attacks))

    def cases(self) -> Iterator[Case]:
        """Every sample, with what was made of it so far."""
        for at, observed in enumerate(self.observed):
            own = self.of_update(at, self.able)
            for n, name in enumerate(observed.names):
                truth = None if observed.truth is None else observed.truth[n : n + 1]
                label = None if observed.labels is None else observed.labels[n]
                yield Case(name, truth, label, tuple(results[n] for results in own))

    def attack_runs(self) -> Iterator[AttackRun]:
        for attack, obstacle in zip(self.attacks, self.obstacles, strict=True):
            yield AttackRun(attack.name, obstacle, tuple(self.of_attack(attack)))

    @property
    def leaks(self) -> bool:
        """Whether any sample came back."""
        return any(any_seen(results) for results in self.found.values())


def cut_off(result: Result) -> bool:
    return result.status is Status.CUT_OFF


def _rounded(seconds: float) -> str:
    """A time in words, no more precise than it is known."""
    if seconds < 1:
        return "a second"
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def all_exact(results: Sequence[Result]) -> bool:
    return all(result.level is Level.EXACT for result in results)


def any_seen(results: Sequence[Result]) -> bool:
    return any(result.level is not Level.NOTHING for result in results)
