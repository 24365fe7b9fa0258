"""``rgap capture``"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from rgap import data
from rgap.cli.options import make_target, target_options
from rgap.picture import is_picture
from rgap.update import capture


@click.command("capture")
@click.argument("picture", type=click.Path(path_type=Path))
@click.option("--label", type=float, required=True, help="-1 or 1; for cross-entropy the class, from 0.")
@target_options
@click.option(
    "--out", type=click.Path(path_type=Path), default="update.safetensors", show_default=True, help="File to write."
)
def command(picture: Path, label: float, out: Path, **named: Any) -> None:
    """Write the update that a client with one PICTURE would send: its gradient, never the picture."""
    target = make_target(**named)
    if not is_picture(target.input_shape):
        raise ValueError(f"inputs of shape {target.input_shape} are no pictures; use rgap.capture from Python")
    channels, height, width = target.input_shape
    sample = data.picture(picture, size=(height, width), channels=channels)
    capture(target, sample.inputs, torch.tensor([label])).save(out)
    click.echo(f"{out}: gradient of {len(target.parameters)} tensors, model {target.fingerprint[:12]}")
