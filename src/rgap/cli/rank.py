"""``rgap rank``"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rgap.cli.capture import sample as read_sample
from rgap.cli.console import report
from rgap.cli.options import COUNT, PATH, make_target, output_options, target_options
from rgap.files import write_atomically

if TYPE_CHECKING:
    from rgap.rank import LayerRank

PATIENCE = 2.0
"""Seconds before a progress bar appears."""


@click.command("rank")
@target_options
@click.option("--measure/--no-measure", default=True, help="Measure ranks too, where the model is a chain.")
@click.option("--batch-size", type=COUNT, help="Samples behind one gradient; default 1.")
@click.option("--sample", type=PATH, help="Picture to measure at; default: random values in the range.")
@output_options()
def command(measure: bool, batch_size: int | None, sample: Path | None, out: Path, as_json: bool, **named: Any) -> None:
    """Count and measure which layer protects the input, before any update.

    For every layer the unknowns |x|, the constraints |W|, |z| and |V|, the paper's index |x| - |W| - |z| - |V|, and
    the dimensions of its input that stay free, alone and with all later layers. Models that are no chain of layers are
    counted, not measured. Also up to which batch the network gives everything away, by count. Writes rank.json and
    rank.png.
    """
    from rgap.cli import tables
    from rgap.rank import plot, rank_analysis

    target = make_target(**named)
    values = None if sample is None else read_sample(target, sample, "leave --sample out")
    console = report(stderr=True)
    with _progress(len(target.graph.uses), console, not as_json and console.is_terminal) as step:
        analysis = rank_analysis(target, values, batch_size, measure, progress=step)
    out.mkdir(parents=True, exist_ok=True)
    document = analysis.to_dict()
    write_atomically(out / "rank.json", json.dumps(document, indent=1).encode())
    plot(analysis, out / "rank.png")
    if as_json:
        click.echo(json.dumps(document))
        return
    console = report()
    console.print(tables.ranks(analysis))
    for note in analysis.notes:
        console.print(f"- {note}")
    console.print(f"\n{analysis.verdict}", style="bold")
    console.print(f"Picture: {out / 'rank.png'}, numbers: {out / 'rank.json'}")


@contextmanager
def _progress(layers: int, console: Console, shown: bool) -> Iterator[Callable[[LayerRank], None]]:
    """A bar that appears only when there is something to wait for."""
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TextColumn("layers {task.description}"))
    bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not shown)
    task = bar.add_task("", total=layers)

    def step(layer: LayerRank) -> None:
        bar.update(task, advance=1, description=f"after {layer.name}")

    timer = Timer(PATIENCE, bar.start)
    timer.start()
    try:
        yield step
    finally:
        timer.cancel()
        timer.join()  # a bar that was about to start has started, and can be stopped
        bar.stop()
