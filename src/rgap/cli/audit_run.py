"""What ``rgap audit`` and ``rgap federation`` have in common: options, the bar, the files, and --fail-if."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from rgap.cli.ci import Files
from rgap.cli.condition import condition
from rgap.cli.console import bar, report
from rgap.cli.options import ATTACK, PATH, F, Number, attack_options, make_attack, options, output_options, taken

if TYPE_CHECKING:
    from rgap.attacks import Attack
    from rgap.auditing import Audit

FAILED = 3
"""Exit code when the condition of --fail-if holds."""
CONDITIONS = "psnr>20, ssim>0.5, exact>0 or recognisable>0.1 (shares of samples)"


def audit_options(of: str, json_help: str) -> Callable[[F], F]:
    """The options of an audit, as `AuditRun.of` takes them.

    Args:
        of: what is audited at a time, for --help.
    """
    return options(
        attack_options(default=None),
        click.option(
            "--budget",
            type=Number(min=0),
            default=120.0,
            show_default=True,
            help=f"Seconds for {of}, shared out among the attacks; one that takes longer is cut off, and named.",
        ),
        click.option(
            "--fail-if",
            callback=condition,
            metavar="CONDITION",
            help=f"Exit with code 3 if it holds for {of}, such as {CONDITIONS}.",
        ),
        click.option(
            "--junit",
            type=PATH,
            metavar="FILE",
            help="Write the gate that --fail-if is as JUnit XML, which CI systems show as tests.",
        ),
        click.option(
            "--sarif",
            type=PATH,
            metavar="FILE",
            help="Write what leaked as SARIF, which CI systems show as code scanning.",
        ),
        click.option("--fresh", is_flag=True, help="Forget what an earlier run left in the folder."),
        output_options(json_help),
    )


@dataclass
class AuditRun:
    """Audits that a command makes, one or several."""

    attacks: tuple[Attack, ...]
    budget: float | None
    out: Path
    fresh: bool
    as_json: bool
    files: Files
    """What CI systems show of them."""

    @classmethod
    def of(cls, named: dict[str, Any]) -> AuditRun:
        """What the options say, which are taken out of ``named``.

        Raises:
            click.BadParameter: they contradict each other.
        """
        attacks = _attacks(**taken(named, *ATTACK))
        files = Files(**taken(named, "junit", "sarif", "fail_if"))
        if files.junit is not None and files.fail_if is None:
            raise click.BadParameter("--junit needs --fail-if, which says what a test fails by")
        files.write()
        return cls(attacks, files=files, **taken(named, "budget", "out", "fresh", "as_json"))

    def run(
        self, name: str, audit: Callable[..., Audit], show: Callable[[Audit], None], results: str, **about: Any
    ) -> None:
        """One audit: run it, write NAME.json, NAME.html and, of pictures, NAME.png, and show it.

        Args:
            audit: takes what is the same for all audits; see `rgap.audit`.
            show: prints it for people.
            results: the folder in OUT where results are kept as they come.
            about: model and data in words, and the names of a table's columns.

        Raises:
            click.Abort: it was interrupted; what was found so far is written and shown.
        """
        from rgap.auditing import Interrupted
        from rgap.auditing.picture import side_by_side
        from rgap.picture import is_picture

        self.out.mkdir(parents=True, exist_ok=True)
        interrupted = False
        with bar(report(stderr=True), self.as_json) as step, ended_by_termination():
            try:
                result = audit(
                    attacks=self.attacks,
                    budget=self.budget,
                    folder=self.out / results,
                    fresh=self.fresh,
                    about={**about, "command": "rgap " + shlex.join(sys.argv[1:])},
                    progress=lambda now: step(now.what, now.done, now.total, now.note),
                )
            except Interrupted as error:
                result, interrupted = error.audit, True
        result.save(self.out / f"{name}.json")
        result.render(self.out / f"{name}.html")
        if is_picture(result.shape):
            if result.pictured:
                side_by_side(result, self.out / f"{name}.png")
            else:  # an earlier run's is none of this one's
                (self.out / f"{name}.png").unlink(missing_ok=True)
        self.files.add(name, result, about["model"], self.out / f"{name}.html")
        if self.as_json:
            click.echo(json.dumps(result.to_dict()))
        else:
            show(result)
        if interrupted:
            raise click.exceptions.Abort

    def end(self) -> None:
        """Leave with exit code 3 if the condition held for any of them."""
        self.files.write(ended=True)
        if any(outcome.failure for outcome in self.files.outcomes):
            click.echo(f"rgap: {self.files.fail_if} holds", err=True)
            raise click.exceptions.Exit(FAILED)


@contextmanager
def ended_by_termination() -> Iterator[None]:
    """A request to terminate, as a scheduler or `timeout` sends it, ends what runs inside as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _attacks(attack: tuple[str, ...], iterations: int | None, restarts: int | None, polish: bool) -> tuple[Attack, ...]:
    """Those that were named, else all that an audit runs."""
    from rgap.attacks.named import resized
    from rgap.auditing import ATTACKS

    if attack:
        return tuple(make_attack(name, iterations, restarts, polish) for name in attack)
    if polish:
        raise click.BadParameter("--polish needs an --attack to go on from")
    return tuple(resized(each, iterations, restarts) for each in ATTACKS)
