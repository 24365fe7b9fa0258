"""What CI systems show of a gate: JUnit XML as test reports, SARIF as code scanning."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from xml.etree import ElementTree

from rgap.files import write_atomically
from rgap.printable import line, listed, visible

if TYPE_CHECKING:
    from rgap.auditing import Audit
    from rgap.cli.condition import Condition

NOT_ENDED = "rgap did not come to its end: standard error says why"
RULES = {
    "fail-if": "The condition of --fail-if holds",
    "exact": "Samples can be read out of the update exactly",
    "recognisable": "Samples can be recognised in what the update gives away",
}
"""What SARIF lists, with the level of each finding beside it: only what fails the pipeline is an error."""


@dataclass(frozen=True)
class Outcome:
    """One audit, or one round of a federation."""

    name: str
    failure: str
    """What makes the gate close; empty if it stays open."""
    leaked: dict[str, str]
    """By level, in words."""
    said: str
    seconds: float
    file: str
    """What the findings are about: the model's source, or the report where there is none here."""
    at: int | None
    """The line."""

    @classmethod
    def of(cls, name: str, audit: Audit, condition: Condition | None, model: str, page: Path) -> Outcome:
        from rgap.auditing import Level

        failure = ""
        if condition is not None and condition.holds(audit.cases):
            failure = f"{condition} holds: {condition.figure} is {condition.value(audit.cases):.3g}"
        leaked = {}
        for level in (Level.EXACT, Level.RECOGNISABLE):
            names = [case.name for case in audit.cases if case.level is level]
            if names:
                leaked[level.value] = f"{len(names)} of {len(audit.cases)} samples {level.value}: {listed(names)}"
        return cls(line(name), failure, leaked, visible(str(audit)), audit.seconds, *_source(model, page))


@dataclass
class Files:
    """The files that were asked for. They are written before the first audit, after each, and at the end: one that
    broke off leaves what was found, and an error; never the files of an earlier run."""

    junit: Path | None
    sarif: Path | None
    fail_if: Condition | None
    outcomes: list[Outcome] = field(default_factory=list)

    def add(self, name: str, audit: Audit, model: str, page: Path) -> None:
        """One more audit, of a model by its name on the command line, with its report."""
        self.outcomes.append(Outcome.of(name, audit, self.fail_if, model, page))
        self.write()

    def write(self, ended: bool = False) -> None:
        for path, content in ((self.junit, _junit), (self.sarif, _sarif)):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, content(self.outcomes, self.fail_if, ended))


def _source(model: str, page: Path) -> tuple[str, int | None]:
    """Where the model is made, as a URI below the present folder, and the line; else the report."""
    module, _, called = model.partition(":")
    path, at = page.resolve(), None
    try:
        made = getattr(sys.modules[module], called.partition("(")[0])
        path, at = Path(inspect.getfile(made)).resolve(), inspect.getsourcelines(made)[1]
    except (KeyError, AttributeError, TypeError, OSError):  # built in, or nothing that has a line
        pass
    here = Path.cwd()
    if not path.is_relative_to(here):
        path, at = page.resolve(), None
    return (quote(os.fsencode(path.relative_to(here).as_posix())) if path.is_relative_to(here) else path.as_uri()), at


def _junit(outcomes: Sequence[Outcome], condition: Condition | None, ended: bool) -> bytes:
    """A test for each audit, which fails where the condition holds."""
    counts = {
        "tests": len(outcomes) + (not ended),
        "failures": sum(bool(each.failure) for each in outcomes),
        "errors": int(not ended),
        "time": f"{sum(each.seconds for each in outcomes):.3f}",
    }
    about = {"name": "rgap", **{name: str(value) for name, value in counts.items()}}
    root = ElementTree.Element("testsuites", about)
    suite = ElementTree.SubElement(root, "testsuite", about)
    for each in outcomes:
        named = {"classname": "rgap", "name": f"{each.name}: not {condition}", "time": f"{each.seconds:.3f}"}
        test = ElementTree.SubElement(suite, "testcase", named)
        if each.failure:
            failure = ElementTree.SubElement(test, "failure", message=each.failure, type="leak")
            failure.text = "\n".join(each.leaked.values())
        ElementTree.SubElement(test, "system-out").text = each.said
    if not ended:
        test = ElementTree.SubElement(suite, "testcase", classname="rgap", name="rgap")
        ElementTree.SubElement(test, "error", message=NOT_ENDED, type="not-ended")
    ElementTree.indent(root)
    return b'<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root) + b"\n"


def _sarif(outcomes: Sequence[Outcome], condition: Condition | None, ended: bool) -> bytes:
    """A finding for each level of each audit, and one where the condition holds."""
    driver = {
        "name": "rgap",
        "version": importlib.metadata.version("rgap"),
        "rules": [{"id": rule, "shortDescription": {"text": text}} for rule, text in RULES.items()],
    }
    found = [
        _finding(each, rule, text)
        for each in outcomes
        for rule, text in {"fail-if": each.failure, **each.leaked}.items()
        if text
    ]
    invocation: dict[str, Any] = {"executionSuccessful": ended}
    if not ended:
        invocation["toolExecutionNotifications"] = [{"level": "error", "message": {"text": NOT_ENDED}}]
    run = {"tool": {"driver": driver}, "invocations": [invocation], "results": found}
    schema = "https://json.schemastore.org/sarif-2.1.0.json"
    return json.dumps({"$schema": schema, "version": "2.1.0", "runs": [run]}, indent=1).encode()


def _finding(outcome: Outcome, rule: str, text: str) -> dict[str, Any]:
    place: dict[str, Any] = {"artifactLocation": {"uri": outcome.file}}
    if outcome.at is not None:
        place["region"] = {"startLine": max(outcome.at, 1)}
    return {
        "ruleId": rule,
        "ruleIndex": list(RULES).index(rule),
        "level": "error" if rule == "fail-if" else "warning",
        "message": {"text": line(f"{outcome.name}: {text}")},
        "locations": [{"physicalLocation": place}],
        "partialFingerprints": {"rgap/v1": f"{rule} {outcome.name}"},
    }
