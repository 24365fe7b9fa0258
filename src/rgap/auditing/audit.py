"""Attack what clients would send for a few samples, in every way that applies, and say what came out."""

from __future__ import annotations

import html
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rgap.attacks import Attack, Bias, Closed, FeatureMatching, InvertingGradients
from rgap.attacks.named import by_name
from rgap.auditing.document import document
from rgap.auditing.dose_response import Accounting, DoseResponse, dose_response
from rgap.auditing.observed import Truth, captured, received
from rgap.auditing.readout import ReadOut
from rgap.auditing.results import AttackRun, Case
from rgap.auditing.run import Ended, Run, Step
from rgap.auditing.unread import Unread, unread
from rgap.auditing.verdict import Verdict, verdict
from rgap.defences import Defence
from rgap.defences import by_name as defences_by_name
from rgap.files import write_atomically
from rgap.linalg.deadline import within
from rgap.printable import shown
from rgap.protocol import Protocol
from rgap.rank import RankAnalysis
from rgap.report import render
from rgap.target import Target
from rgap.update import PLAIN, Update

Attacks: TypeAlias = Attack | type[Attack] | str | Sequence[Attack | type[Attack] | str]
Defences: TypeAlias = Defence | type[Defence] | str | Sequence[Defence | type[Defence] | str]
ATTACKS: tuple[Attack, ...] = (Bias(), Closed(), FeatureMatching(), InvertingGradients(iterations=1500))
"""In the order in which they run, the cheapest first: what one reads out exactly no other is given."""
NO_DEFENCE = "defences: none was asked for; a sweep measures what it takes to close the leak"


@dataclass(frozen=True, eq=False, repr=False)
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
    ended: Ended
    unfinished: bool
    """Whether an attack that was put off or cut off might still find what none has found."""
    read: ReadOut | None
    """What the updates gave away before any attack; None if nobody looked."""
    findings: tuple[str, ...]
    """What makes the audit mean something else than its reader may think."""
    seconds: float
    bound: str = ""
    """What keeps the local steps of every client from being undone; empty if nothing is known to."""

    @property
    def complete(self) -> bool:
        """Whether nothing was put off."""
        return self.ended is Ended.WHOLE

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return self.target.input_shape

    @property
    def value_range(self) -> tuple[float, float] | None:
        return self.target.value_range

    @property
    def verdict(self) -> Verdict:
        unfinished = self.ended if self.unfinished else Ended.WHOLE
        return verdict(
            self.cases, self.sweeps, self.rank, self.target, self.read, unfinished, self.findings, self.bound
        )

    @property
    def unread(self) -> Unread:
        """Clients with many samples of which nothing was recovered."""
        return unread(self.cases)

    @property
    def pictured(self) -> list[Case]:
        """The samples that are worth a picture."""
        left_out = self.unread.cases
        return [case for at, case in enumerate(self.cases) if at not in left_out]

    @property
    def summary(self) -> str:
        """One sentence: how many samples came back, and how well."""
        return self.verdict.sentences[0]

    def __str__(self) -> str:
        """The verdict in a few lines."""
        found = self.verdict
        return "\n".join((found.headline, *found.findings, *found.sentences))

    __repr__ = __str__

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


class Interrupted(KeyboardInterrupt):
    """An audit that was interrupted; ``audit`` holds what was found so far."""

    def __init__(self, audit: Audit):
        super().__init__("the audit was interrupted")
        self.audit = audit


def audit(
    target: Target,
    samples: Any,
    labels: Sequence[float | int] | None = None,
    attacks: Attacks = ATTACKS,
    defences: Defences = (),
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
        samples: pictures, a tensor or an array (n, *input_shape), a pair of inputs and labels, or a torch Dataset of
            such pairs; taken in groups of the target's batch size times the protocol's clients, one update for each.
        labels: one for each sample, in the loss's labels; by default the samples' own, or all labels in turn.
        attacks: one or several, in the order in which they run; those of the command line by their names too.
        defences: one or several, by their names too; each is swept over its own levels, on a few of the samples, with
            the attacks that did best.
        protocol: what a client does between its data and what it sends.
        accounting: to give an epsilon for each strength of DPSGD; None: none is given.
        seed: of the defences' noise.
        budget: seconds, shared out evenly among the attacks that are left; one that takes longer is cut off, unless it
            has been exact so far, and what was cut off or left out is listed. Updates of which one takes long are
            attacked one after the other.
        folder: where results are kept as they come; an audit that was interrupted goes on from there.
        fresh: forget what is in the folder.
        about: model, data and command in words, for the report.
        progress: called before each step; `print` does, in a notebook too.

    Raises:
        ValueError: samples or labels do not fit; says what was got and what was expected.
        StoreError: the folder holds another audit.
        Interrupted: a KeyboardInterrupt, with the audit as far as it came; the results are in the folder.
    """
    observed, left_out = captured(target, samples, labels, protocol)
    about = {"data": "samples given to rgap.audit", **(about or {})}
    armed = _made(defences, Defence, defences_by_name)
    tried = _made(attacks, Attack, by_name)
    run = Run(target, observed, tried, protocol, seed, budget, folder, fresh, about, progress)
    if left_out is not None:
        run.not_run.append(left_out)
    return _finished(run, armed, accounting)


def audit_updates(
    target: Target,
    updates: Mapping[str, Update],
    truth: Mapping[str, Truth] | None = None,
    attacks: Attacks = ATTACKS,
    budget: float | None = None,
    folder: Path | None = None,
    fresh: bool = False,
    about: dict[str, Any] | None = None,
    progress: Callable[[Step], None] | None = None,
) -> Audit:
    """Attack updates that a server was sent: what did it see of each client?

    Where the samples are not known, nothing can be compared: a sample then counts as exact if the certificate of a
    reconstruction says so, as recognisable if an input was found that has the gradient that was sent and of which
    little stays free, and the report says so.

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
    observed = received(target, updates, truth or {})
    about = {"data": "updates given to rgap.audit_updates", **(about or {})}
    protocol = observed[0].update.header.protocol
    made = _made(attacks, Attack, by_name)
    return _finished(Run(target, observed, made, protocol, 0, budget, folder, fresh, about, progress), (), None)


def _made(given: Any, kind: Any, by_name: Callable[[str], Any]) -> list[Any]:
    """Attacks or defences, however they were given.

    Raises:
        ValueError: one is none; says what was got and what was expected.
    """
    found, name = [], kind.__name__.lower()
    for each in [given] if isinstance(given, (str, type, kind)) else given:
        made = by_name(each) if isinstance(each, str) else each() if isinstance(each, type) else each
        if not isinstance(made, kind):
            raise ValueError(f"got {shown(repr(each))}, expected one of rgap.{name}s, its name, or several of them")
        found.append(made)
    return found


def _finished(run: Run, defences: Sequence[Defence], accounting: Accounting | None) -> Audit:
    """Everything, as far as the budget goes."""
    sweeps: list[DoseResponse] = []
    try:
        run.attack()
        if run.leaks:
            for number, defence in enumerate(defences):
                with within(run.share(len(defences) - number)):
                    swept = dose_response(run, defence, accounting)
                if swept is not None:
                    sweeps.append(swept)
            if not defences and all(each.made_here for each in run.observed):
                run.not_run.append(NO_DEFENCE)
        elif defences:
            run.not_run.append("the defences: nothing leaked that they could close")
    except KeyboardInterrupt as error:
        run.ended = Ended.INTERRUPTED
        run.put_off("the rest", "interrupted, the same audit goes on when it is run again")
        raise Interrupted(_audit(run, sweeps)) from error
    return _audit(run, sweeps)


def _audit(run: Run, sweeps: Sequence[DoseResponse]) -> Audit:
    """What was found so far."""
    cases = tuple(run.cases())
    return Audit(
        target=run.target,
        protocol=run.protocol,
        settings={"seed": run.seed, "budget": run.budget, **run.about, "samples": len(cases)},
        cases=cases,
        attacks=tuple(run.attack_runs()),
        sweeps=tuple(sweeps),
        rank=run.rank,
        not_run=tuple(run.not_run),
        ended=run.ended,
        unfinished=run.unfinished,
        read=run.read,
        findings=run.findings,
        seconds=run.seconds,
        bound=run.bound,
    )
