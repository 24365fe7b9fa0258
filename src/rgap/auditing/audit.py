"""Attack what clients would send for a few samples, in every way that applies, and say what came out."""

from __future__ import annotations

import hashlib
import html
import importlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rgap.attacks import IDLG, Attack, Bias, Closed, InvertingGradients, Reconstruction
from rgap.auditing.document import document, median
from rgap.auditing.dose_response import DoseResponse, Response
from rgap.auditing.observed import Observed, Truth, captured, digest, received
from rgap.auditing.results import Case, Level, Result, from_certificate, gave_away, judge, span
from rgap.auditing.verdict import Verdict, verdict
from rgap.data import Images
from rgap.defences import DPSGD, Defence, gradient_error
from rgap.files import write_atomically
from rgap.protocol import Protocol
from rgap.rank import RankAnalysis, rank_analysis
from rgap.report import render
from rgap.store import Row, Store
from rgap.target import Target
from rgap.update import PLAIN, Update

ATTACKS: tuple[Attack, ...] = (Closed(), Bias(), IDLG(iterations=500), InvertingGradients(iterations=1500))
"""In the order in which they run: those in closed form take seconds, and what they read out exactly needs no other."""
NO_DEFENCE = "defences: none was asked for; a sweep measures what it takes to close the leak"
SWEPT = 4
"""Samples at the most on which a defence is swept."""
LATE, INTERRUPTED = "the time was up", "the same audit goes on when it is run again"
"""Ends of the notes on work that was left out."""
RESULTS = 2
"""Version of what is kept in the folder of an audit."""
SWEEP_ITERATIONS = 500
"""Of an attack by optimisation in a sweep, which runs it many times."""
CHUNK = 8
"""Updates of one call of an attack: what an interruption can cost."""


@dataclass(frozen=True)
class AttackRun:
    """One attack, over all samples."""

    name: str
    obstacle: str | None
    """Why it does not apply; None if it does."""
    results: tuple[Result, ...] = ()


@dataclass(frozen=True, eq=False)
class Audit:
    """What the attacks read out of each sample's update."""

    target: Target
    protocol: Protocol
    settings: dict[str, Any]
    """What was asked for: seed, samples, data, budget, command."""
    cases: tuple[Case, ...]
    attacks: tuple[AttackRun, ...]
    sweeps: tuple[DoseResponse, ...]
    rank: RankAnalysis | None
    not_run: tuple[str, ...]
    complete: bool
    seconds: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return self.target.input_shape

    @property
    def value_range(self) -> tuple[float, float] | None:
        return self.target.value_range

    @property
    def verdict(self) -> Verdict:
        return verdict(self.cases, self.sweeps, self.rank, self.target)

    @property
    def summary(self) -> str:
        """One sentence: how many samples came back, and how well."""
        return self.verdict.sentences[0]

    def to_dict(self) -> dict[str, Any]:
        """Everything, pictures included, as audit.json has it; see ``rgap/report/schema.json``."""
        return document(self)

    def to_pandas(self) -> Any:
        """A pandas.DataFrame with one row for each sample and attack.

        Raises:
            ImportError: pandas is not installed; says so.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("to_pandas needs pandas, which is not installed: pip install pandas") from error
        columns = ("attack", "status", "psnr", "ssim", "mse", "gradient_residual", "seconds")
        return pandas.DataFrame(
            [
                {"sample": case.name, "label": case.label, "level": result.level.value}
                | {name: getattr(result, name) for name in columns}
                for case in self.cases
                for result in case.results
            ],
            columns=["sample", "label", "level", *columns],
        )

    def _repr_html_(self) -> str:
        """The report, in a frame of its own, for notebooks."""
        page = html.escape(render(self.to_dict()))
        return f'<iframe srcdoc="{page}" title="rgap audit" style="width: 100%; height: 40em; border: 0"></iframe>'

    def save(self, path: str | Path) -> None:
        """Write audit.json, whole or not at all."""
        write_atomically(path, json.dumps(self.to_dict(), indent=1).encode())

    def render(self, path: str | Path) -> None:
        """Write the report, one HTML file that needs no other."""
        write_atomically(path, render(self.to_dict()).encode())


@dataclass(frozen=True)
class Accounting:
    """What differential privacy is counted with.

    Args:
        rate: the share of clients in a round.
        steps: rounds of the whole training.
        delta: the probability with which the guarantee may fail.
    """

    rate: float
    steps: int
    delta: float = 1e-5

    def __post_init__(self) -> None:
        if not (0 < self.rate <= 1 and 0 < self.delta < 1 and self.steps >= 0):
            raise ValueError(
                f"got rate={self.rate}, steps={self.steps}, delta={self.delta}: expected 0 < rate <= 1, steps >= 0, "
                "0 < delta < 1"
            )


class Interrupted(KeyboardInterrupt):
    """An audit that was interrupted; ``audit`` holds what was found so far."""

    def __init__(self, audit: Audit):
        super().__init__("the audit was interrupted")
        self.audit = audit


@dataclass(frozen=True)
class Step:
    """How far an audit has come."""

    what: str
    done: int
    total: int


def audit(
    target: Target,
    samples: Images | Tensor,
    labels: Sequence[float] | None = None,
    attacks: Sequence[Attack] = ATTACKS,
    defences: Sequence[Defence] = (),
    protocol: Protocol = PLAIN,
    accounting: Accounting | None = None,
    seed: int = 0,
    budget: float | None = None,
    folder: Path | None = None,
    fresh: bool = False,
    about: dict[str, Any] | None = None,
    progress: Callable[[Step], None] | None = None,
) -> Audit:
    """Capture what clients with these samples would send, attack it, compare.

    The attacks see the updates and the target, never the samples; only the comparison does. An attack that does not
    apply is named with the reason. A sample that one attack recovers exactly is not given to those after it.

    Args:
        samples: pictures, or (n, *input_shape); taken in groups of the target's batch size times the protocol's
            clients, one update for each.
        labels: one for each sample, in the loss's labels; by default all labels in turn.
        attacks: in the order in which they run.
        defences: each is swept over its own levels, on a few of the samples, with the attacks that did best.
        protocol: what a client does between its data and what it sends.
        accounting: to give an epsilon for each strength of DPSGD; None: none is given.
        seed: of the defences' noise.
        budget: seconds after which no further attack is begun; what was left out is listed.
        folder: where results are kept as they come; an audit that was interrupted goes on from there.
        fresh: forget what is in the folder.
        about: model, data and command in words, for the report.
        progress: called before each step.

    Raises:
        ValueError: samples or labels do not fit; says what was got and what was expected.
        StoreError: the folder holds another audit.
        Interrupted: a KeyboardInterrupt, with the audit as far as it came; the results are in the folder.
    """
    asked = {"seed": seed, "budget": budget, "data": "samples given to rgap.audit", **(about or {})}
    sent, left_out = captured(target, samples, labels, protocol)
    run = _Run(target, sent, tuple(attacks), protocol, accounting, asked, folder, fresh, progress)
    if left_out is not None:
        run.not_run.append(left_out)
    return run.all(tuple(defences))


def audit_updates(
    target: Target,
    updates: Mapping[str, Update],
    truth: Mapping[str, Truth] | None = None,
    attacks: Sequence[Attack] = ATTACKS,
    budget: float | None = None,
    folder: Path | None = None,
    fresh: bool = False,
    about: dict[str, Any] | None = None,
    progress: Callable[[Step], None] | None = None,
) -> Audit:
    """Attack updates that a server was sent: what did it see of each client?

    Where the samples are not known, nothing can be compared: a sample then counts as recovered if the certificate
    of a reconstruction says *exact*, and not otherwise, and the report says so.

    Args:
        target: with the weights that the clients were given.
        updates: by the name of the client.
        truth: samples and labels of those clients whose data the auditor knows; the attacks never see them.
        attacks, budget, folder, fresh, about, progress: as in `audit`.

    Raises:
        ValueError: there is no update, or the truth does not fit; says what was got and what was expected.
        UpdateError: an update is not one of the target's.
        StoreError: the folder holds another audit.
        Interrupted: as in `audit`.
    """
    asked = {"seed": 0, "budget": budget, "data": "updates given to rgap.audit_updates", **(about or {})}
    sent = received(target, updates, truth or {})
    protocol = sent[0].update.header.protocol
    run = _Run(target, sent, tuple(attacks), protocol, None, asked, folder, fresh, progress)
    return run.all(())


@dataclass
class _Run:
    """One audit as it goes on."""

    target: Target
    sent: list[Observed]
    attacks: tuple[Attack, ...]
    protocol: Protocol
    accounting: Accounting | None
    asked: dict[str, Any]
    folder: Path | None
    fresh: bool
    progress: Callable[[Step], None] | None
    not_run: list[str] = field(default_factory=list)
    found: dict[str, list[Result]] = field(default_factory=dict)
    """By key, what one attack made of one update's samples."""
    sweeps: list[DoseResponse] = field(default_factory=list)
    rank: RankAnalysis | None = None

    def __post_init__(self) -> None:
        self.start = time.perf_counter()
        self.updates = [each.update for each in self.sent]
        self.group = max(each.samples for each in self.sent)
        self.obstacles = [attack.obstacle(self.target, self.group) for attack in self.attacks]
        self.able = [each for each, obstacle in zip(self.attacks, self.obstacles, strict=True) if obstacle is None]
        self.store = None if self.folder is None else Store(self.folder, self.settings, self.fresh)

    @property
    def settings(self) -> dict[str, Any]:
        """What the results depend on."""
        return {
            "results": RESULTS,
            "fingerprint": self.target.fingerprint,
            "loss": self.target.loss.name,
            "batch_size": self.target.batch_size,
            "protocol": str(self.protocol),
            "model": hashlib.sha256(repr(self.target.model).encode()).hexdigest(),
            "value_range": self.target.value_range,
            "samples": digest(self.sent),
            "labels": [label for each in self.sent for label in each.labels or [None] * each.samples],
            "seed": self.seed,
        }

    @property
    def seed(self) -> int:
        return int(self.asked["seed"])

    @property
    def late(self) -> bool:
        budget = self.asked["budget"]
        return budget is not None and time.perf_counter() - self.start > budget

    def all(self, defences: tuple[Defence, ...]) -> Audit:
        """Everything, as far as the budget goes."""
        try:
            self.rank = self._rank()
            self._attack(self.able)
            if self._leaks():
                for defence in defences:
                    self._sweep(defence)
                if not defences and all(each.made_here for each in self.sent):
                    self.not_run.append(NO_DEFENCE)
            elif defences:
                self.not_run.append("the defences: nothing leaked that they could close")
        except KeyboardInterrupt as error:
            self.not_run.append(f"the rest: interrupted, {INTERRUPTED}")
            raise Interrupted(self.audit()) from error
        return self.audit()

    def audit(self) -> Audit:
        """What was found so far."""
        cases = tuple(self._cases())
        ran = tuple(
            AttackRun(attack.name, obstacle, tuple(self._of(attack)))
            for attack, obstacle in zip(self.attacks, self.obstacles, strict=True)
        )
        return Audit(
            target=self.target,
            protocol=self.protocol,
            settings={**self.asked, "samples": len(cases)},
            cases=cases,
            attacks=ran,
            sweeps=tuple(self.sweeps),
            rank=self.rank,
            not_run=tuple(self.not_run),
            complete=not any(note.endswith((LATE, INTERRUPTED)) for note in self.not_run),
            seconds=time.perf_counter() - self.start,
        )

    def _rank(self) -> RankAnalysis | None:
        self._tell("rank analysis", 0)
        if not self.target.graph.uses:
            self.not_run.append("rank analysis: the model cannot be traced")
            return None
        return rank_analysis(self.target, batch_size=self.group)

    def _tell(self, what: str, done: int) -> None:
        if self.progress is not None:
            self.progress(Step(what, done, len(self.updates) * max(1, len(self.attacks))))

    def _attack(self, able: Sequence[Attack]) -> None:
        """Every attack on every update that none before it recovered exactly."""
        for number, attack in enumerate(able):
            left = [at for at in range(len(self.updates)) if not self._exact(at, able[:number])]
            self._tell(attack.name, number * len(self.updates))
            begun = self._run("", attack, {at: self.updates[at] for at in left})
            if len(begun) < len(left):
                self.not_run.append(f"{attack.name} on {len(left) - len(begun)} updates: {LATE}")

    def _key(self, defence: str, at: int, attack: Attack) -> str:
        # A function's repr holds its address, which is another one in the next process.
        settings = re.sub(r"<function (\S+) at 0x[0-9a-f]+>", r"\1", repr(attack))
        return f"{defence}|{at}|{settings}"

    def _run(self, defence: str, attack: Attack, updates: dict[int, Update]) -> dict[int, list[Result]]:
        """One attack on updates by their number, from the store those that are there; fewer if the time is up."""
        found: dict[int, list[Result]] = {}
        keys = {at: self._key(defence, at, attack) for at in updates}
        for at, key in keys.items():
            if key not in self.found and self.store is not None and key in self.store.rows:
                row = self.store.rows[key]
                found_rows = enumerate(row.values["results"])
                self.found[key] = [Result.from_dict(each, row.tensors.get(str(n))) for n, each in found_rows]
            if key in self.found:
                found[at] = self.found[key]
        left = [at for at in updates if at not in found]
        for start in range(0, len(left), CHUNK):
            if self.late:
                break
            chunk = left[start : start + CHUNK]
            for at, each in zip(chunk, attack.many(self.target, [updates[at] for at in chunk]), strict=True):
                found[at] = self.found[keys[at]] = self._judged(at, each)
                if self.store is not None:
                    tensors = {str(n): r.inputs for n, r in enumerate(found[at]) if r.inputs is not None}
                    values = {"results": [r.to_dict() for r in found[at]]}
                    self.store.add(keys[at], Row(values, tensors))
        return found

    def _judged(self, at: int, found: Reconstruction) -> list[Result]:
        sent = self.sent[at]
        if sent.truth is None or sent.labels is None:
            return from_certificate(found, sent.samples)
        return judge(found, sent.truth, sent.labels, self.target.value_range or self._span)

    @property
    def _span(self) -> tuple[float, float]:
        """Of all samples that are known."""
        return span(*(each.truth for each in self.sent if each.truth is not None))

    def _exact(self, at: int, attacks: Sequence[Attack]) -> bool:
        own = [self.found.get(self._key("", at, attack), []) for attack in attacks]
        return any(results and all(r.level is Level.EXACT for r in results) for results in own)

    def _cases(self) -> Iterator[Case]:
        for at, sent in enumerate(self.sent):
            own = [self.found[key] for attack in self.able if (key := self._key("", at, attack)) in self.found]
            for n, name in enumerate(sent.names):
                truth = None if sent.truth is None else sent.truth[n : n + 1]
                label = None if sent.labels is None else sent.labels[n]
                yield Case(name, truth, label, tuple(results[n] for results in own))

    def _of(self, attack: Attack) -> Iterator[Result]:
        """What one attack made of all samples."""
        for at in range(len(self.updates)):
            yield from self.found.get(self._key("", at, attack), ())

    def _leaks(self) -> bool:
        return any(r.level is not Level.NOTHING for results in self.found.values() for r in results)

    def _sweep(self, defence: Defence) -> None:
        """The defence at each of its levels, on the first updates, against the attacks that gave most away."""
        best = self._best()
        points: list[Response] = []
        for strength in (None, *type(defence).levels):
            point = None if self.late else self._point(defence, strength, best)
            if point is None:
                since = "at all" if strength is None else f"from {defence.strength_name} {strength:g} on"
                self.not_run.append(f"{defence.name} {since}: {LATE}")
                break
            points.append(point)
        if points:
            private = isinstance(defence, DPSGD)
            named = defence.strength_name or "on"
            self.sweeps.append(DoseResponse(defence.name, named, defence.about, tuple(points), private))

    def _swept(self) -> list[int]:
        """The numbers of the updates of a sweep: those that leak before those that do not."""

        def leaks(at: int) -> bool:
            own = (self.found.get(self._key("", at, attack), ()) for attack in self.able)
            return any(r.level is not Level.NOTHING for results in own for r in results)

        first = sorted(range(len(self.updates)), key=lambda at: not leaks(at))
        return sorted(first[: max(1, SWEPT // self.group)])

    def _best(self) -> list[Attack]:
        """The attack that gave most away, and the best of those that look for the input by optimisation: the closed
        form is the first to break down when a gradient is changed."""

        def gave(attack: Attack) -> tuple[int, float]:
            own = [r for at in range(len(self.updates)) for r in self.found.get(self._key("", at, attack), [])]
            return max(map(gave_away, own), default=(-1, -math.inf))

        first = max(self.able, key=gave)
        robust = (attack for attack in self.able if isinstance(attack, InvertingGradients))
        short = [replace(attack, iterations=min(attack.iterations, SWEEP_ITERATIONS)) for attack in robust]
        return list(dict.fromkeys([first, *short]))

    def _point(self, defence: Defence, strength: float | None, attacks: Sequence[Attack]) -> Response | None:
        """One strength, None for the update as it is; no point if the time is up."""
        armed = defence if strength is None else defence.with_strength(strength)
        self._tell(f"{defence.name} {'off' if strength is None else f'{strength:g}'}", 0)
        sent = {}
        for at in self._swept():
            update = self.updates[at]
            generator = torch.Generator().manual_seed(self.seed + at)
            sent[at] = update if strength is None else armed(update, generator)
        errors = [gradient_error(self.updates[at], update) for at, update in sent.items()]
        every: dict[int, list[list[Result]]] = {at: [] for at in sent}
        left = sent
        for attack in attacks:
            found = self._run("" if strength is None else repr(armed), attack, left)
            if len(found) < len(left):
                return None  # without this attack a leak could pass for closed
            for at, results in found.items():
                every[at].append(results)
            exact = [at for at, results in found.items() if all(r.level is Level.EXACT for r in results)]
            left = {at: update for at, update in left.items() if at not in exact}
        rounds = [tried for tried in every.values() if tried]
        best = [max(each, key=gave_away) for tried in rounds for each in zip(*tried, strict=True)]
        if not best:
            return None
        return Response(
            strength=0.0 if strength is None else strength,
            psnr=median([r.psnr for r in best]),
            ssim=median([r.ssim for r in best]),
            recovered=sum(r.level is not Level.NOTHING for r in best) / len(best),
            gradient_error=sum(errors) / len(errors),
            epsilon=self._epsilon(armed) if strength is not None else None,
        )

    def _epsilon(self, defence: Defence) -> float | None:
        if self.accounting is None or not isinstance(defence, DPSGD):
            return None
        return defence.epsilon(self.accounting.rate, self.accounting.steps, self.accounting.delta)
