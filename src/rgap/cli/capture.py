"""``rgap capture``"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from rgap import data
from rgap.cli.options import make_target, target_options
from rgap.update import capture


@click.command("capture")
@click.argument("picture", type=click.Path(path_type=Path))
@click.option("--label", type=float, required=True, help="-1 or 1.")
@target_options
@click.option(
    "--out", type=click.Path(path_type=Path), default="update.safetensors", show_default=True, help="File to write."
)
def command(picture: Path, label: float, out: Path, **named: Any) -> None:
    """Write the update that a client with one PICTURE would send: its gradient, never the picture."""
    target = make_target(**named)
    channels, *size = target.input_shape
    sample = data.picture(picture, size=size[0], channels=channels)
    capture(target, sample.inputs, torch.tensor([label])).save(out)
    click.echo(f"{out}: gradient of {len(target.parameters)} tensors, model {target.fingerprint[:12]}")
