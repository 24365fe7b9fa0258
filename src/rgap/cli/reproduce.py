"""``rgap reproduce``"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rgap.attacks.progress import watching
from rgap.cli.options import tick_line
from rgap.reproductions import NAMES, Options, by_name, reproduce

WIDE = 160
"""Columns of text that goes to a file: there is no window that it must fit."""


class _WithNames(click.Command):
    """A command whose help lists what there is to reproduce."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Names"):
            formatter.write_dl([(name, f"{title} ({count} {counted})") for name, title, count, counted in _known()])
        super().format_epilog(ctx, formatter)


@click.command("reproduce", cls=_WithNames)
@click.argument("name", type=click.Choice(NAMES), metavar="[NAME]", required=False)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder with CIFAR-10 and MNIST pictures in cifar10/ and mnist/, one subfolder for each class; default: "
    "built-in photographs.",
)
@click.option("--count", type=click.IntRange(min=1), help="How many pictures, or what else NAME counts; see below.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights, starts and noise.")
@click.option(
    "--out", type=click.Path(path_type=Path), default="rgap-out", show_default=True, help="Folder to write OUT/NAME in."
)
@click.option("--fresh", is_flag=True, help="Start over; else a run that was interrupted goes on where it was.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON and nothing else.")
def command(
    name: str | None, data: Path | None, count: int | None, seed: int, out: Path, fresh: bool, as_json: bool
) -> None:
    """Compute a table or figure of the paper again, beside the paper's numbers.

    Without NAME, list what there is. Writes NAME.json and NAME.png to OUT/NAME. What is done is kept there after an
    interruption, and is not done again.
    """
    if name is None:
        _list(as_json)
        return
    chosen = by_name(name)
    options = Options(data, count, seed)
    folder = out / name
    console = Console(stderr=True)
    with _progress(console, not as_json and console.is_terminal) as before:
        rows = reproduce(chosen, options, folder, fresh, before)
    if as_json:
        click.echo(json.dumps(json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))))
        return
    report = Console()
    if not report.is_terminal:
        report = Console(width=WIDE)
    report.print(chosen.table(rows), markup=False)
    for remark in chosen.remarks(rows):
        report.print(f"- {remark}", highlight=False, markup=False)
    number = chosen.count if count is None else count
    report.print(
        f"\n{number} {chosen.counted}, seed {seed}; {chosen.pictures(options)}.", highlight=False, markup=False
    )
    report.print(
        f"Picture: {folder / name}.png, numbers: {folder / name}.json", highlight=False, markup=False, soft_wrap=True
    )


def _known() -> Iterator[tuple[str, str, int, str]]:
    """Name, title, count, and what is counted, of everything there is."""
    for name in NAMES:
        found = by_name(name)
        yield name, found.title, found.count, found.counted


def _list(as_json: bool) -> None:
    if as_json:
        keys = ("name", "title", "count", "counted")
        click.echo(json.dumps([dict(zip(keys, known, strict=True)) for known in _known()]))
        return
    table = Table(title="rgap reproduce NAME", title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for column in ("name", "what", "by default"):
        table.add_column(column, no_wrap=column == "name")
    for name, title, count, counted in _known():
        table.add_row(name, title, f"{count} {counted}")
    Console().print(table, highlight=False)


@contextmanager
def _progress(console: Console, shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over the jobs, with the present one's name and how far its attack has come."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=None)
        present = ""

        def before(key: str, at: int, total: int) -> None:
            nonlocal present
            present = key
            if bar.tasks[0].total is None:
                bar.reset(task, total=total, completed=at, description=key)  # what was done before took no time now
            else:
                bar.update(task, completed=at, description=key)

        with watching(lambda tick: bar.update(task, description=f"{present}: {tick_line(tick)}")):
            yield before
