"""``rgap audit``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rgap import data
from rgap.auditing import Case, audit
from rgap.cli import tables
from rgap.cli.options import ATTACKS, attack_option, make_target, target_options
from rgap.picture import is_picture, side_by_side


@click.command("audit")
@target_options
@attack_option
@click.option(
    "--data", "folder", type=click.Path(path_type=Path), help="Folder of pictures; default: built-in photographs."
)
@click.option("--count", type=click.IntRange(min=1), default=8, show_default=True, help="How many pictures.")
@click.option("--out", type=click.Path(path_type=Path), default="rgap-out", show_default=True, help="Folder to write.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON and nothing else.")
def command(folder: Path | None, attack: str, count: int, out: Path, as_json: bool, **named: Any) -> None:
    """Attack a model on pictures and show what comes out.

    Every picture is one client: its gradient is captured with labels -1 and 1 in turn, and attacked without knowing
    picture, label or loss value. Writes audit.json, and audit.png with each original above its reconstruction.
    """
    target = make_target(**named)
    shape = target.input_shape
    if not is_picture(shape) or shape[1] != shape[2]:
        raise ValueError(f"the audit attacks square pictures, got input shape {shape}; use `rgap attack` on an update")
    target.chain  # noqa: B018 - lists every obstacle before any work is done
    if folder is None:
        samples = data.photographs(count, size=shape[1], channels=shape[0])
    else:
        samples = data.folder(folder, size=shape[1], channels=shape[0], limit=count)
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    columns = (
        TextColumn("attacking"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("pictures"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=as_json or not console.is_terminal) as progress:
        task = progress.add_task("attack", total=len(samples))

        def step(case: Case) -> None:
            progress.update(task, advance=1)

        result = audit(target, samples, attack=ATTACKS[attack](), progress=step)
    result.save(out / "audit.json")
    side_by_side(result, out / "audit.png")
    if as_json:
        click.echo(json.dumps(result.to_dict()))
        return
    report = Console()
    report.print(tables.pictures(result))
    first = next((case for case in result.cases if case.found.answers), None)
    if first is not None:
        report.print(tables.layers(first.found.answers[0], f"Layer by layer, for {first.name}"))
        if (joint := tables.together(first.found.answers[0])) is not None:
            report.print(joint, highlight=False)
    for note in dict.fromkeys(note for case in result.cases for note in tables.notes(case.found)):
        report.print(f"- {note}", highlight=False)
    for case in result.cases:
        if case.found.status.value != "exact":
            report.print(f"- {case.name}: {case.found.status.value}, {case.found.reason}", highlight=False)
    report.print(f"\n[bold]{result.summary}.[/bold] Pictures: {out / 'audit.png'}, numbers: {out / 'audit.json'}")
