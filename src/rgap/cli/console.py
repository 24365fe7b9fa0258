"""What commands print: to a window or to a file, with a bar on the standard error while something long goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rgap.printable import visible

if TYPE_CHECKING:
    from rgap.attacks.progress import Tick

WIDE = 160
"""Columns of text that goes to a file: there is no window that it must fit."""
LONGEST = 10_000
"""Characters of a text; of a longer one the middle is left out."""
NONE = "-"
"""In the place of a number that is not there."""


class _Harmless(Console):
    """All text that it prints, in tables too, may be foreign."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(visible(text, LONGEST), **how)


def report(**how: Any) -> Console:
    """The standard output. Names are printed as they are, whatever brackets stand in them, but for what would act on a
    terminal."""
    console = _Harmless(highlight=False, markup=False, **how)
    if console.is_terminal or console.stderr:
        return console
    return _Harmless(highlight=False, markup=False, width=WIDE, soft_wrap=True)


def say(text: str, err: bool = False) -> None:
    """One line, or several, that may be foreign."""
    click.echo(visible(text, LONGEST), err=err)


def table(title: str, text: tuple[str, ...], numbers: tuple[str, ...] = ()) -> Table:
    """A table without a frame. Where it is wider than the window text is wrapped; a number never is, nor cut."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for name in text:
        made.add_column(name, overflow="fold")
    for name in numbers:
        made.add_column(name, no_wrap=True, justify="right")
    return made


def number(value: float | None, form: str) -> str:
    """A number that may not be there: None or NaN."""
    return NONE if value is None or math.isnan(value) else format(value, form)


def tick_line(tick: Tick) -> str:
    """How far an attack has come, in one line."""
    line = f"{tick.what} {tick.done}/{tick.total}"
    return line if math.isnan(tick.loss) else f"{line}, loss {tick.loss:.1e}, {tick.rate:.0f}/s, {tick.left:.0f} s left"


@contextmanager
def status(quiet: bool = False) -> Iterator[None]:
    """Show how far an attack has come, for as long as it runs."""
    from rgap.attacks.progress import watching

    console = report(stderr=True, quiet=quiet)
    with console.status("attacking") as shown, watching(lambda tick: shown.update(tick_line(tick))):
        yield


@contextmanager
def bar(console: Console, quiet: bool, patience: float = 0.0) -> Iterator[Callable[[str, int, int, str], None]]:
    """A bar over steps, with how far the attack of the present one has come.

    Args:
        patience: seconds before it appears: what takes less needs none.

    Yields:
        To be called before each step, with its name, its number from 0, the number of all, and a line to be printed
        above, or none.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from rgap.attacks.progress import watching

    description = TextColumn("{task.description}", markup=False)
    columns = (description, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
    task = progress.add_task("starting", total=None)
    present = ""

    def step(what: str, done: int, total: int, note: str) -> None:
        nonlocal present
        present = what = visible(what)
        if note and not quiet:
            progress.console.print(note, highlight=False, markup=False, soft_wrap=not console.is_terminal)
        if progress.tasks[0].total is None:  # what was done before took no time now
            progress.reset(task, total=total, completed=done, description=what)
        else:
            progress.update(task, description=what, completed=done)

    timer = Timer(patience, progress.start)
    timer.start()
    if not patience:
        timer.join()
    try:
        with watching(lambda tick: progress.update(task, description=f"{present}: {tick_line(tick)}")):
            yield step
    finally:
        timer.cancel()
        timer.join()  # a bar that was about to start has started, and can be stopped
        progress.stop()
