"""``rgap rank``"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import click

from rgap.cli.capture import sample as read_sample
from rgap.cli.console import bar, report
from rgap.cli.options import COUNT, PATH, Number, make_target, output_options, target_options
from rgap.files import write_atomically

BUDGET = 60.0
"""Seconds for the free dimensions of a model that is no chain."""
PATIENCE = 2.0
"""Seconds before a progress bar appears."""


@click.command("rank")
@target_options
@click.option("--measure/--no-measure", default=True, help="Measure ranks too, or what stays free of the input.")
@click.option("--budget", type=Number(min=0), default=BUDGET, show_default=True, help="Seconds for what stays free.")
@click.option("--batch-size", type=COUNT, help="Samples behind one gradient; default 1.")
@click.option("--sample", type=PATH, help="Picture to measure at; default: random values in the range.")
@output_options()
def command(
    measure: bool,
    budget: float,
    batch_size: int | None,
    sample: Path | None,
    out: Path,
    as_json: bool,
    **named: Any,
) -> None:
    """Count and measure which layer protects the input, before any update.

    For every layer the unknowns |x|, the constraints |W|, |z| and |V|, the paper's index |x| - |W| - |z| - |V|, and
    the dimensions of its input that stay free, alone and with all later layers. Of models that are no chain of layers
    those of the model's input are measured, whatever the attack. Also up to which batch the network gives everything
    away, by count. Writes rank.json and rank.png.
    """
    from rgap.cli import tables
    from rgap.losses import NeedsMasks
    from rgap.rank import plot, rank_analysis

    try:
        target = make_target(**named)
    except NeedsMasks as error:  # no rank depends on them
        target = make_target(**named | {"loss": error.outputs[:1, 0] * 0})
    values = None if sample is None else read_sample(target, sample, "leave --sample out")
    done, layers = itertools.count(1), len(target.graph.uses)
    with bar(report(stderr=True), as_json, PATIENCE) as step:
        analysis = rank_analysis(
            target,
            values,
            batch_size,
            measure,
            progress=lambda layer: step(f"after {layer.name}", next(done), layers, ""),
            seconds=budget,
            looked=lambda count, of: step("directions of the input", count, of, ""),
        )
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
