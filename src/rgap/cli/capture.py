"""``rgap capture``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rgap.cli.console import say
from rgap.cli.options import PATH, Number, make_target, target_options

if TYPE_CHECKING:
    from torch import Tensor

    from rgap.target import Target


@click.command("capture")
@click.argument("picture", type=PATH)
@click.option("--label", type=Number(), required=True, help="-1 or 1; for cross-entropy the class, from 0.")
@target_options
@click.option("--out", type=PATH, default="update.safetensors", show_default=True, help="File to write.")
def command(picture: Path, label: float, out: Path, **named: Any) -> None:
    """Write the update that a client with one PICTURE would send: its gradient, never the picture."""
    import torch

    from rgap.checks import range_misfit
    from rgap.update import capture

    target = make_target(**named)
    x = sample(target, picture, "use rgap.capture from Python")
    capture(target, x, torch.tensor([label])).save(out)
    misfit = range_misfit(target, [x])
    if misfit is not None:
        click.echo(f"Check this: {misfit}", err=True)
    say(f"{out}: gradient of {len(target.parameters)} tensors, model {target.fingerprint[:12]}")


def sample(target: Target, picture: Path, remedy: str) -> Tensor:
    """A picture as the target takes it, (1, channels, height, width).

    Raises:
        ValueError: it takes no pictures; says so with the remedy.
    """
    from rgap import data
    from rgap.picture import is_picture

    if not is_picture(target.input_shape):
        raise ValueError(f"inputs of shape {target.input_shape} are no pictures: {remedy}")
    channels, height, width = target.input_shape
    return data.picture(picture, size=(height, width), channels=channels).inputs
