"""``rgap rank``"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rgap import data
from rgap.cli import tables
from rgap.cli.options import make_target, target_options
from rgap.files import write_atomically
from rgap.picture import is_picture
from rgap.rank import LayerRank, plot, rank_analysis
from rgap.rank.analysis import Progress as Step

PATIENCE = 2.0
"""Seconds before a progress bar appears."""


@click.command("rank")
@target_options
@click.option("--measure/--no-measure", default=True, help="Measure ranks too, where the model is a chain.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Samples behind one gradient; default 1.")
@click.option(
    "--sample", type=click.Path(path_type=Path), help="Picture to measure at; default: random values in the range."
)
@click.option("--out", type=click.Path(path_type=Path), default="rgap-out", show_default=True, help="Folder to write.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON and nothing else.")
def command(measure: bool, batch_size: int | None, sample: Path | None, out: Path, as_json: bool, **named: Any) -> None:
    """Count and measure which layer protects the input, before any update.

    For every layer the unknowns |x|, the constraints |W|, |z| and |V|, the paper's index |x| - |W| - |z| - |V|, and
    the dimensions of its input that stay free, alone and with all later layers. Models that are no chain of layers are
    counted, not measured. Writes rank.json and rank.png.
    """
    target = make_target(**named)
    values = None
    if sample is not None:
        if not is_picture(target.input_shape):
            raise ValueError(f"inputs of shape {target.input_shape} are no pictures: leave --sample out")
        channels, height, width = target.input_shape
        values = data.picture(sample, size=(height, width), channels=channels).inputs
    console = Console(stderr=True)
    with _progress(len(target.graph.uses), console, not as_json and console.is_terminal) as step:
        analysis = rank_analysis(target, values, batch_size, measure, progress=step)
    out.mkdir(parents=True, exist_ok=True)
    document = analysis.to_dict()
    write_atomically(out / "rank.json", json.dumps(document, indent=1).encode())
    plot(analysis, out / "rank.png")
    if as_json:
        click.echo(json.dumps(document))
        return
    report = Console()
    report.print(tables.ranks(analysis))
    for note in analysis.notes:
        report.print(f"- {note}", highlight=False, markup=False)
    report.print(f"\n{analysis.verdict}", style="bold", highlight=False, markup=False)
    report.print(f"Picture: {out / 'rank.png'}, numbers: {out / 'rank.json'}", highlight=False, markup=False)


@contextmanager
def _progress(layers: int, console: Console, shown: bool) -> Iterator[Step]:
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
