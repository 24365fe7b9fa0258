"""``rgap audit``"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rgap import data
from rgap.attacks import Attack
from rgap.attacks.named import resized
from rgap.attacks.progress import watching
from rgap.auditing import ATTACKS, Accounting, Audit, Interrupted, Step, audit
from rgap.cli import tables
from rgap.cli.condition import Condition, condition
from rgap.cli.options import (
    attack_options,
    config_option,
    make_attack,
    make_protocol,
    make_target,
    protocol_options,
    target_options,
    tick_line,
)
from rgap.data import Images
from rgap.defences import ALL, Defence, by_name
from rgap.picture import is_picture, side_by_side
from rgap.target import Target

FAILED = 3
"""Exit code when the condition of --fail-if holds."""


@click.command("audit")
@config_option
@target_options
@protocol_options
@attack_options(default=None)
@click.option(
    "--defence",
    "defences",
    multiple=True,
    metavar="NAME",
    help="Sweep this defence over its strengths; may be given several times, or all: "
    + ", ".join(sorted(kind.__name__ for kind in ALL))
    + ".",
)
@click.option("--dp-rate", type=click.FloatRange(0, 1), help="Share of clients in a round, to count DPSGD's epsilon.")
@click.option("--dp-steps", type=click.IntRange(min=1), help="Rounds of the training, to count DPSGD's epsilon.")
@click.option("--dp-delta", type=click.FloatRange(0, 1), default=1e-5, show_default=True)
@click.option(
    "--data", "folder", type=click.Path(path_type=Path), help="Folder of pictures; default: built-in photographs."
)
@click.option("--count", type=click.IntRange(min=1), default=8, show_default=True, help="How many pictures.")
@click.option("--budget", type=click.FloatRange(min=0), help="Seconds after which no further attack is begun.")
@click.option(
    "--fail-if",
    "fail_if",
    callback=condition,
    metavar="CONDITION",
    help="Exit with code 3 if it holds, such as psnr>20, ssim>0.5, exact>0 or recognisable>0.1 (shares of samples).",
)
@click.option("--out", type=click.Path(path_type=Path), default="rgap-out", show_default=True, help="Folder to write.")
@click.option("--fresh", is_flag=True, help="Forget what an earlier run left in the folder.")
@click.option("--json", "as_json", is_flag=True, help="Print audit.json and nothing else.")
def command(
    attack: tuple[str, ...],
    iterations: int | None,
    restarts: int | None,
    polish: bool,
    defences: tuple[str, ...],
    dp_rate: float | None,
    dp_steps: int | None,
    dp_delta: float,
    folder: Path | None,
    count: int,
    budget: float | None,
    fail_if: Condition | None,
    out: Path,
    fresh: bool,
    as_json: bool,
    **named: Any,
) -> None:
    """Attack a model on pictures, in every way that applies, and report what comes out.

    Every picture is one client, or one sample of a client's batch: what it would send is captured, with all labels in
    turn or the folder's classes, and attacked without knowing picture, label or loss value. Writes audit.json, the
    report audit.html, which needs no other file, and audit.png with each original above its reconstruction. An
    interrupted audit goes on when the same command is given again.
    """
    protocol = make_protocol(named)
    chosen = make_attacks(attack, iterations, restarts, polish)
    swept = _defences(defences)
    accounting = _accounting(dp_rate, dp_steps, dp_delta)
    target = make_target(**named)
    samples = _samples(target, folder, count)
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "model": named["model"],
        "data": "built-in photographs" if folder is None else str(folder),
        "command": "rgap " + shlex.join(sys.argv[1:]),
    }

    def run(step: Callable[[Step], None]) -> Audit:
        return audit(
            target,
            samples,
            labels=data.labels(samples, target.loss),
            attacks=chosen,
            defences=swept,
            protocol=protocol,
            accounting=accounting,
            seed=named["seed"],
            budget=budget,
            folder=out / "results",
            fresh=fresh,
            about=about,
            progress=step,
        )

    with shown(as_json) as step:
        try:
            result, interrupted = run(step), False
        except Interrupted as error:
            result, interrupted = error.audit, True
    write(result, out, "audit")
    if as_json:
        click.echo(json.dumps(result.to_dict()))
    else:
        _show(result, out)
    if interrupted:
        raise click.exceptions.Abort
    if fail_if is not None and fail_if.holds(result.cases):
        click.echo(f"rgap: {fail_if} holds", err=True)
        raise click.exceptions.Exit(FAILED)


@contextmanager
def shown(quiet: bool) -> Iterator[Callable[[Step], None]]:
    """A bar over the steps of an audit, with how far the attack of the moment has come."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("starting", total=None)
        present = ""

        def step(now: Step) -> None:
            nonlocal present
            present = now.what
            progress.update(task, description=now.what, completed=now.done, total=now.total)

        with watching(lambda tick: progress.update(task, description=f"{present}: {tick_line(tick)}")):
            yield step


def make_attacks(
    names: tuple[str, ...], iterations: int | None, restarts: int | None, polish: bool
) -> tuple[Attack, ...]:
    """Those that were named, else all that an audit runs."""
    if names:
        return tuple(make_attack(name, iterations, restarts, polish) for name in names)
    if polish:
        raise click.BadParameter("--polish needs an --attack to go on from")
    return tuple(resized(attack, iterations, restarts) for attack in ATTACKS)


def _defences(names: tuple[str, ...]) -> tuple[Defence, ...]:
    if "all" in names:
        return tuple(by_name(kind.__name__) for kind in ALL)
    return tuple(by_name(name) for name in names)


def _accounting(rate: float | None, steps: int | None, delta: float) -> Accounting | None:
    if rate is None and steps is None:
        return None
    if rate is None or steps is None:
        raise click.BadParameter("--dp-rate and --dp-steps belong together: epsilon needs both")
    return Accounting(rate, steps, delta)


def _samples(target: Target, folder: Path | None, count: int) -> Images:
    shape = target.input_shape
    if not is_picture(shape) or shape[1] != shape[2]:
        raise ValueError(f"the audit takes square pictures, got input shape {shape}; use rgap.audit from Python")
    if folder is None:
        return data.photographs(count, size=shape[1], channels=shape[0])
    return data.folder(folder, size=shape[1], channels=shape[0], limit=count)


def write(result: Audit, out: Path, name: str) -> None:
    """The report, its numbers and, of pictures, a picture: NAME.html, NAME.json and NAME.png."""
    result.save(out / f"{name}.json")
    result.render(out / f"{name}.html")
    if is_picture(result.shape):
        side_by_side(result, out / f"{name}.png")


def _show(result: Audit, out: Path) -> None:
    """The verdict first, then the numbers behind it."""
    report = Console()
    verdict = result.verdict
    report.print(f"[bold]{verdict.headline}[/bold]", highlight=False)
    for sentence in verdict.sentences:
        report.print(sentence, highlight=False)
    report.print()
    report.print(tables.pictures(result))
    report.print(tables.attacks(result))
    first = next((case for case in result.cases if case.best is not None and case.best.layers), None)
    if first is not None and first.best is not None:
        record = {"layers": first.best.layers, "joint": first.best.joint}
        report.print(tables.solved(record, f"Layer by layer, for {first.name}"))
    for sweep in result.sweeps:
        report.print(tables.sweep(sweep))
    for note in tables.audit_notes(result):
        report.print(f"- {note}", highlight=False)
    report.print(f"\nReport: {out / 'audit.html'}, pictures: {out / 'audit.png'}, numbers: {out / 'audit.json'}")
