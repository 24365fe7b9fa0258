"""``rgap attack``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from safetensors.torch import save as to_bytes

from rgap.auditing import describe
from rgap.cli import tables
from rgap.cli.options import (
    attack_options,
    config_option,
    make_attack,
    make_protocol,
    make_target,
    protocol_options,
    shown,
    target_options,
)
from rgap.files import write_atomically
from rgap.picture import is_picture, single
from rgap.reading import read_pair, read_update


@click.command("attack")
@click.argument("update", type=click.Path(path_type=Path))
@config_option
@target_options
@protocol_options
@attack_options("closed")
@click.option(
    "--before", type=click.Path(path_type=Path), help="Weights before local training; UPDATE then holds those after it."
)
@click.option("--partial", is_flag=True, help="Accept an update in which parameters are missing.")
@click.option("--out", type=click.Path(path_type=Path), default="rgap-out", show_default=True, help="Folder to write.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON and nothing else.")
def command(
    update: Path,
    attack: str,
    iterations: int | None,
    restarts: int | None,
    polish: bool,
    before: Path | None,
    partial: bool,
    out: Path,
    as_json: bool,
    **named: Any,
) -> None:
    """Reconstruct the input behind one update file.

    UPDATE is a file written by `rgap capture` or rgap.Update.save, or gradients or weight differences as safetensors,
    npz, or tensors alone as torch.save writes them. Writes reconstruction.json, the exact values as
    reconstruction.safetensors (inputs and labels of every answer, best first), and for pictures reconstruction.png.
    """
    chosen, protocol = make_attack(attack, iterations, restarts, polish), make_protocol(named)
    target = make_target(**named)
    if before is None:
        received = read_update(update, target, protocol, target.batch_size, partial=partial)
    else:
        received = read_pair(before, update, target, protocol, target.batch_size, partial=partial)
    with shown(Console(stderr=True)):
        found = chosen(target, received)
    out.mkdir(parents=True, exist_ok=True)
    document = describe(found)
    write_atomically(out / "reconstruction.json", json.dumps(document, indent=1).encode())
    if found.answers:
        values = {}
        for at, answer in enumerate(found.answers):
            values[f"inputs.{at}"] = answer.inputs.contiguous()
            values[f"labels.{at}"] = answer.labels.contiguous()
        write_atomically(out / "reconstruction.safetensors", to_bytes(values))
        if is_picture(target.input_shape):
            picture = found.inputs[0]
            single(
                picture, target.value_range or (float(picture.min()), float(picture.max())), out / "reconstruction.png"
            )
    if as_json:
        click.echo(json.dumps(document))
        return
    report = Console()
    if found.answers and found.layers:
        report.print(tables.layers(found.answers[0], "Layer by layer"))
        if (joint := tables.joint_solve(found.answers[0])) is not None:
            report.print(joint, highlight=False)
    for note in tables.notes(found):
        report.print(f"- {note}", highlight=False)
    labels = ", ".join(f"{label:+g}" for label in found.labels.tolist()) if found.answers else ""
    label = f", label {labels}" if labels else ""
    twins = f", {len(found.twins)} twin(s)" if found.twins else ""
    report.print(f"\n[bold]{found.status.value}[/bold]{label}{twins}: {found.reason}", highlight=False)
    report.print(f"Written to {out}", highlight=False)
