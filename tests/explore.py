"""Draws new examples for the tests that draw theirs, for as long as it is told.

    python tests/explore.py --minutes 30 [paths]

`make test` draws the same examples every time. This draws others: the property tests, and the searches marked `search`,
run again and again in one process, in a new order and with a new seed each round, until the time is over. What fails
is printed with its seed, the command that shows it again, and the line that makes a test of it.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import secrets
import sys
import threading
from collections.abc import Generator, Iterator
from itertools import groupby
from types import ModuleType
from typing import IO

import pytest
import torch

FALSIFYING = re.compile(r"(?:Falsifying example|Failing test case): (?P<test>\w+)\(\n(?P<arguments>.*?)\n\)", re.DOTALL)
AGAIN = re.compile(r"@reproduce_failure\(.*\)")


def notes(error: BaseException) -> Iterator[str]:
    """Everything that was noted on an error, and on those within it."""
    yield "\n".join(getattr(error, "__notes__", []))
    for each in getattr(error, "exceptions", ()):
        yield from notes(each)


def as_decorator(arguments: str, module: ModuleType) -> str | None:
    """The @example of these arguments, with the imports that it needs; None where their repr is no code."""
    import networks

    from rgap import losses

    line = "@example(" + " ".join(re.sub(r"  #.*", "", row).strip() for row in arguments.splitlines()).rstrip(",") + ")"
    names, imports = {**vars(module), "example": dict}, ["from hypothesis import example"]
    while True:
        try:
            eval(line[1:], names)
        except NameError as error:
            home = next((home for home in (networks, losses, torch, math) if hasattr(home, error.name)), None)
            if home is None:
                return None
            names[error.name] = getattr(home, error.name)
            imports.append(f"from {home.__name__} import {error.name}")
        except Exception:  # what a repr says may be anything
            return None
        else:
            return "\n".join([*imports, line])


def remedy(note: str, item: pytest.Item, seed: int) -> str:
    """What to add as a test, and where."""
    found, again = FALSIFYING.search(note), AGAIN.search(note)
    place = f"{item.location[0]}, above {item.location[2].split('[')[0].split('.')[-1]}"
    if found is None:
        return f"Add to {item.location[0]} a test of this case; it was drawn from seed {seed}."
    if decorator := as_decorator(found["arguments"], item.module):
        return f"Add to {place}:\n{decorator}"
    shown = f" To see it again:\n{again[0]}" if again else ""
    return f"Add to {place} a test of this case, whose arguments cannot be written as an @example.{shown}"


class Rounds:
    """A plugin of pytest: rounds of the tests that draw, each with a seed of its own, until the time is over."""

    def __init__(self, out: IO[str], minutes: float):
        self.out, self.minutes = out, minutes
        self.seed, self.rounds, self.runs = 0, 0, 0
        self.failures: dict[str, int] = {}
        self.seen: set[str] = set()

    def say(self, line: str) -> None:
        print(line, file=self.out, flush=True)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if {"hypothesis", "search"} & {mark.name for mark in item.iter_markers()}]

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        from hypothesis import core  # pytest wants to load it itself

        if not session.items:
            self.say("No test here draws examples.")
            return True
        # Whatever runs at the end is given up: raising an error in the middle of a test would look like a failure.
        timer = threading.Timer(60 * self.minutes, lambda: os._exit(self.summary()))
        timer.daemon = True
        timer.start()
        while True:
            self.rounds, self.seed = self.rounds + 1, secrets.randbits(32)
            self.say(f"Round {self.rounds}: {len(session.items)} tests, seed {self.seed}.")
            core.global_force_seed = session.config.option.hypothesis_seed = self.seed
            order = self.shuffled(session.items)
            for item, following in zip(order, [*order[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                self.runs += 1
        return True

    def shuffled(self, items: list[pytest.Item]) -> list[pytest.Item]:
        """The files in a random order, so that short runs see any of them; fixtures are shared within one."""
        files = [list(group) for _, group in groupby(items, key=lambda item: item.path)]
        random.Random(self.seed).shuffle(files)
        return [item for file in files for item in file]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.failed and call.excinfo is not None:
            self.failures[item.nodeid] = self.failures.get(item.nodeid, 0) + 1
            for note in [note for note in notes(call.excinfo.value) if FALSIFYING.search(note)] or [""]:
                key = f"{item.nodeid} {note or call.excinfo.exconly()}"
                if key not in self.seen:
                    self.seen.add(key)
                    self.tell(item, note, report.longreprtext)
        return report

    def tell(self, item: pytest.Item, note: str, trace: str) -> None:
        self.say(f"\nFAILED {item.nodeid}\n{trace}\n\nSeed {self.seed}; to run it again:")
        self.say(f"    python -m pytest --hypothesis-seed={self.seed} '{item.nodeid}'")
        self.say(f"{remedy(note, item, self.seed)}\n")

    def summary(self) -> int:
        """Says what came of it; the exit status."""
        failed = sum(self.failures.values())
        self.say(f"{self.rounds} rounds, {self.runs} tests run, {failed} failed.")
        for name, count in sorted(self.failures.items()):
            self.say(f"    {name}: {count}")
        return 1 if failed or not self.runs else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Draw new examples for the tests that draw theirs.")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default 10)")
    parser.add_argument("paths", nargs="*", default=["tests"], help="files or tests (default all)")
    asked = parser.parse_args(arguments)
    rounds = Rounds(os.fdopen(os.dup(1), "w"), asked.minutes)
    # With a seed given, whichever it is, the profile is that which draws others. What pytest says itself is left out.
    ended = pytest.main(["--hypothesis-seed=0", "-p", "no:terminal", "-p", "no:cacheprovider", *asked.paths], [rounds])
    rounds.say(f"Nothing was drawn: pytest ended with {ended!r}. `python -m pytest --collect-only` says why.")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
