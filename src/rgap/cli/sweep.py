"""``rgap sweep``"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from rgap.cli.console import NONE, bar, number, report, say, table
from rgap.cli.options import COUNT, PATH
from rgap.files import plain
from rgap.sweeps.job import AXES
from rgap.sweeps.summary import MEASURES, NUMERIC, Group, axes_of, grouped

if TYPE_CHECKING:
    from rgap.sweeps import Plan, Progress, Summary

FAILED = 4
"""Exit code when jobs of the plan have failed."""
EVERY = 30.0
"""Seconds between two lines of progress where there is no window."""
COLUMNS = ("jobs", "exact", "recog-\nnisable", "PSNR dB", "MSE", "change", "seconds")
ROOMY = 100
"""Columns of text from which on all of them have room."""


class _Runs(click.Group):
    """``rgap sweep PLAN`` is ``rgap sweep run PLAN``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group("sweep", cls=_Runs, context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Run a plan: models x seeds x widths x stages x pictures x attacks x defences.

    `rgap sweep PLAN.toml` does what is left to do of a plan, `show` draws tables and pictures from its store, `export`
    writes the rows for other programs. A run that was interrupted, or killed, goes on when it is started again.
    """


@command.command("run")
@click.argument("plan", type=PATH)
@click.option("--store", type=PATH, help="SQLite file of the results; default: PLAN.sqlite.")
@click.option(
    "--workers",
    type=COUNT,
    default=lambda: len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    show_default="one for each core",
    help="Processes on this machine, each with one job in one thread. 1 needs no Dask.",
)
@click.option("--scheduler", metavar="ADDRESS", help="Of a Dask scheduler, or its file: its workers do the jobs.")
@click.option("--retry", is_flag=True, help="Do jobs that failed once more.")
@click.option("--dry-run", is_flag=True, help="Say how many jobs there are, and how many are done, and stop.")
@click.option("--export", "exported", type=PATH, help="Write all rows to a .csv or .parquet.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON and nothing else.")
def run(
    plan: Path,
    store: Path | None,
    workers: int,
    scheduler: str | None,
    retry: bool,
    dry_run: bool,
    exported: Path | None,
    as_json: bool,
) -> None:
    """Do what is left to do of PLAN, a TOML file.

    Results are kept as they come. Several runs, of one plan or of several, can share a store.
    """
    from rgap.sweeps import Plan, SweepStore, sweep
    from rgap.sweeps.export import export

    chosen, kept = Plan.load(plan), store or plan.with_suffix(".sqlite")
    if dry_run:
        _count(chosen, kept, as_json)
        return
    # Dask leaves tasks behind when a worker dies; what becomes of their jobs is in the store.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    console = report(stderr=True)
    with _progress(console, as_json) as (step, notice):
        found = sweep(chosen, kept, workers, scheduler, retry, step, notice)
    with SweepStore(kept, make=False) as opened:
        rows, failures = list(opened.rows()), opened.failures()
    if exported is not None:
        export(rows, exported)
    if as_json:
        click.echo(json.dumps({"store": str(kept), **asdict(found)}))
    else:
        _report(rows, axes_of(rows))
        _ended(found, kept, failures)
    if found.failed:
        raise click.exceptions.Exit(FAILED)


@command.command("show")
@click.argument("store", type=PATH)
@click.option("--by", metavar="AXES", help=f"With commas, of {', '.join(AXES)}; default: those that vary.")
@click.option("--plot", type=PATH, help="Draw to this file: .png, .svg or .pdf.")
@click.option("--x", type=click.Choice(NUMERIC), help="Axis of the plot; default: the one that varies, else bars.")
@click.option("--y", type=click.Choice(list(MEASURES)), default="recognisable", show_default=True, help="In the plot.")
@click.option("--json", "as_json", is_flag=True, help="Print the groups as JSON and nothing else.")
def show(store: Path, by: str | None, plot: Path | None, x: str | None, y: str, as_json: bool) -> None:
    """Show what is in STORE as a table, and draw it. A run may be writing meanwhile."""
    from rgap.sweeps import SweepStore
    from rgap.sweeps.figure import draw

    with SweepStore(store, make=False) as opened:
        rows, failures = list(opened.rows()), opened.failures()
    axes = tuple(name.strip() for name in by.split(",")) if by else axes_of(rows)
    groups = grouped(rows, axes)
    if plot is not None:
        draw(rows, plot, x, y, axes if by else None)
    if as_json:
        entries = [{**dict(zip(axes, g.values, strict=True)), **plain(asdict(g))} for g in groups]
        click.echo(json.dumps([{key: value for key, value in each.items() if key != "values"} for each in entries]))
        return
    _report(rows, axes)
    for line, times in failures:
        say(f"failed {times} times: {line}")
    if plot is not None:
        say(f"Plot: {plot}")


@command.command("export")
@click.argument("store", type=PATH)
@click.argument("file", type=PATH)
def export_command(store: Path, file: Path) -> None:
    """Write the rows of STORE to FILE, which ends in .csv or .parquet."""
    from rgap.sweeps import SweepStore
    from rgap.sweeps.export import export

    with SweepStore(store, make=False) as opened:
        number = export(opened.rows(), file)
    say(f"{file}: {number} rows")


def _count(plan: Plan, store: Path, as_json: bool) -> None:
    """Say what a run would do, without making the store."""
    from rgap.sweeps import SweepStore

    keys = {job.key for job in plan.jobs()}
    done = 0
    if store.is_file():
        with SweepStore(store, make=False) as opened:
            done = sum(row["state"] == "done" and row["key"] in keys for row in opened.rows())
    if as_json:
        click.echo(json.dumps({"store": str(store), "jobs": len(keys), "done": done}))
    else:
        say(f"{len(keys)} jobs, {done} of them done in {store}")


@contextmanager
def _progress(console: Console, quiet: bool) -> Iterator[tuple[Callable[[Progress], None], Callable[[str], None]]]:
    """A bar with rate and time left; lines now and then where there is no window."""
    last = 0.0
    with bar(console, quiet) as move:

        def step(now: Progress) -> None:
            nonlocal last
            ended = now.done + now.failed
            move(f"jobs, {_pace(now)}", ended, now.total, "")
            if not quiet and not console.is_terminal and now.seconds - last >= EVERY:
                last = now.seconds
                console.print(f"{ended} of {now.total} jobs, {_pace(now)}", highlight=False)

        yield step, lambda text: None if quiet else console.print(text, highlight=False)


def _pace(now: Progress) -> str:
    failed = f", {now.failed} failed" if now.failed else ""
    if now.left is None:
        return f"starting{failed}"
    return f"{now.rate:.1f} a second, {_time(now.left)} left{failed}"


def _time(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _report(rows: list[dict[str, Any]], axes: tuple[str, ...]) -> None:
    console = report()
    joined = "defence" in axes and "strength" in axes  # in one column, to leave room
    named = [name for name in axes if not (joined and name == "strength")]
    columns = COLUMNS if console.width >= ROOMY else COLUMNS[:-2]
    made = table("What came out", tuple(named), columns)
    for column, name in zip(made.columns, named, strict=False):
        column.justify = "right" if name in NUMERIC else "left"
    for group in grouped(rows, axes):
        cells = {name: _cell(value) for name, value in zip(axes, group.values, strict=True)}
        if joined and cells["strength"] != NONE:
            cells["defence"] += f" {cells['strength']}"
        made.add_row(*(cells[name] for name in named), *_figures(group)[: len(columns)])
    console.print(made)


def _figures(group: Group) -> list[str]:
    """As in `COLUMNS`."""
    left, failed = group.jobs - group.done - group.failed, group.failed
    jobs = f"{group.jobs}" + (f", {left} left" if left else "") + (f", {failed} failed" if failed else "")
    if group.done and not group.applied:
        return [jobs, "does not apply", *[NONE] * 5]
    numbers = (
        (group.exact, ".0%"), (group.recognisable, ".0%"), (group.psnr, ".0f"), (group.mse, ".0e"), (group.cost, ".0e"),
        (group.seconds, ".2f"),
    )  # fmt: skip
    return [jobs, *(number(value, form) for value, form in numbers)]


def _cell(value: Any) -> str:
    return NONE if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _ended(found: Summary, store: Path, failures: list[tuple[str, int]]) -> None:
    share = found.store_seconds / found.seconds if found.seconds > 0 else 0.0
    click.echo(
        f"\n{found.jobs} jobs: {found.done} done in {found.seconds:.1f} s, {share:.1%} of it on the store; "
        f"{found.before} were done before, {found.failed} failed"
    )
    for line, times in failures:
        say(f"- failed {times} times: {line}")
    if found.failed:
        say(f"Do them once more with --retry; every failure is in {store} in full.")
    say(f"Store: {store}")
