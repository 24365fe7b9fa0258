"""``rgap attack``"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from rgap.cli import options
from rgap.cli.capture import sample
from rgap.cli.config import config_option
from rgap.cli.console import number, report, status
from rgap.cli.options import Number
from rgap.files import write_atomically
from rgap.printable import visible

if TYPE_CHECKING:
    from torch import Tensor

    from rgap.attacks import Reconstruction
    from rgap.target import Target


@click.command("attack")
@click.argument("update", type=options.PATH)
@config_option
@options.target_options
@options.protocol_options
@options.attack_options("closed")
@click.option("--before", type=options.PATH, help="Weights before local training; UPDATE then holds those after it.")
@click.option(
    "--budget",
    type=Number(min=0),
    default=120.0,
    show_default=True,
    help="Seconds; an attack that takes longer is cut off, with the best that it had by then.",
)
@click.option("--truth", type=options.PATH, help="The client's picture, to score with: the attack never sees it.")
@click.option("--partial", is_flag=True, help="Accept an update in which parameters are missing.")
@options.output_options()
def command(
    update: Path,
    before: Path | None,
    budget: float,
    truth: Path | None,
    partial: bool,
    out: Path,
    as_json: bool,
    **named: Any,
) -> None:
    """Reconstruct the input behind one update file, or all inputs of a batch.

    UPDATE is a file written by `rgap capture` or rgap.Update.save, or gradients or weight differences as safetensors,
    npz, or tensors alone as torch.save writes them. Writes reconstruction.json, the exact values as
    reconstruction.safetensors (inputs and labels of every answer, best first; of a batch also what a layer reads of
    each sample), and for pictures reconstruction.png, with all of a batch.
    """
    from rgap.attacks import Status
    from rgap.auditing import describe
    from rgap.auditing.observed import of_nobody_knows
    from rgap.auditing.readout import read_out
    from rgap.linalg import deadline
    from rgap.reading import read_pair, read_update

    chosen, protocol = (
        options.make_attack(**options.taken(named, *options.ATTACK)),
        options.make_protocol(**options.taken(named, *options.PROTOCOL)),
    )
    target = options.make_target(**named)
    picture = None if truth is None else sample(target, truth, "leave --truth out")
    if before is None:
        sent = read_update(update, target, protocol, target.batch_size, partial=partial)
    else:
        sent = read_pair(before, update, target, protocol, target.batch_size, partial=partial)
    with status(), deadline.within(deadline.without_report(budget)):
        found = chosen(target, sent)
    out.mkdir(parents=True, exist_ok=True)
    whole = found.status is Status.EXACT or found.features is not None
    told = () if whole else read_out(target, [of_nobody_knows("the client", sent, target)]).sentences
    scored = None if picture is None or not found.answers else _score(found, picture, target)
    document = describe(found) | ({} if scored is None else {"score": scored}) | {"read_off": " ".join(told)}
    write_atomically(out / "reconstruction.json", json.dumps(document, indent=1).encode())
    anything = bool(found.answers) or found.features is not None
    written = [out / "reconstruction.json", *(_write(found, target, out) if anything else ())]
    if as_json:
        click.echo(json.dumps(document))
    else:
        _show(found, scored, told, written)
        if found.status is Status.CUT_OFF:
            report().print(f"It was cut off after {budget:g} s: --budget gives it more.")


def _score(found: Reconstruction, truth: Tensor, target: Target) -> dict[str, float]:
    """How near the best answer comes to the picture; of several samples the nearest."""
    from rgap.files import plain
    from rgap.metrics import score

    found_range = target.value_range or (float(truth.min()), float(truth.max()))
    each = [score(x[None], truth, found_range) for x in found.inputs]
    best = min(each, key=lambda one: one.mse[0])
    result: dict[str, float] = plain({"mse": best.mse[0], "psnr": best.psnr[0], "ssim": best.ssim[0]})
    return result


def _write(found: Reconstruction, target: Target, out: Path) -> list[Path]:
    """The values of every answer and the features, and the pictures of the best; the files that were written."""
    from safetensors.torch import save as to_bytes

    from rgap.picture import is_picture, sheet, single

    values = {}
    if found.features is not None:
        values["features"] = found.features.values.contiguous()
        values["features.labels"] = found.features.labels.contiguous()
    for at, answer in enumerate(found.answers):
        values[f"inputs.{at}"] = answer.inputs.contiguous()
        values[f"labels.{at}"] = answer.labels.contiguous()
    write_atomically(out / "reconstruction.safetensors", to_bytes(values))
    written = [out / "reconstruction.safetensors"]
    if found.answers and is_picture(target.input_shape):
        picture = sheet(found.inputs)
        own_range = (float(picture.min()), float(picture.max()))
        single(picture, target.value_range or own_range, out / "reconstruction.png")
        written.append(out / "reconstruction.png")
    return written


def _show(found: Reconstruction, scored: dict[str, float] | None, told: Sequence[str], written: Sequence[Path]) -> None:
    """The layers, then how it ended."""
    from rgap.cli import tables

    console = report()
    if found.answers and found.layers:
        best = found.answers[0]
        console.print(tables.layers(best.layers, best.joint, "Layer by layer"))
        if best.joint is not None:
            console.print(tables.joint_solve(best.joint))
    for note in tables.attack_notes(found):
        console.print(f"- {note}")
    if found.samples:
        console.print(tables.samples(found.samples))
    known = found.labels if found.answers else None if found.features is None else found.features.labels
    label = "" if known is None else ", label " + ", ".join(f"{label:+g}" for label in known.tolist())
    twins = f", {len(found.twins)} twin(s)" if found.twins else ""
    console.print(Text.assemble("\n", (found.status.value, "bold"), visible(f"{label}{twins}: {found.reason}")))
    for sentence in told:
        console.print(visible(sentence))
    if scored is not None:
        figures = (number(scored["psnr"], ".1f"), number(scored["ssim"], ".2f"), number(scored["mse"], ".1e"))
        console.print("Beside the true picture: PSNR {} dB, SSIM {}, mean squared error {}".format(*figures))
    console.print(f"Written: {', '.join(map(str, written))}")
