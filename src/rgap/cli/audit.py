"""``rgap audit``"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from rgap.cli import options
from rgap.cli.audit_run import AuditRun, audit_options
from rgap.cli.config import config_option
from rgap.cli.console import report

if TYPE_CHECKING:
    from rgap.auditing import Accounting, Audit
    from rgap.tables import Samples
    from rgap.target import Target

DEFENCES = (
    "Clip", "DPSGD", "DropBias", "Freeze", "GaussianNoise", "LaplaceNoise", "Quantise", "Sign", "Soteria", "TopK",
)  # fmt: skip
MASKS = (None, "cross-entropy", "bce", "CrossEntropyLoss", "BCEWithLogitsLoss")
"""Losses that masks are labels of."""


@click.command("audit")
@config_option
@options.target_options
@options.protocol_options
@audit_options("the audit", "Print audit.json and nothing else.")
@click.option(
    "--defence",
    "defences",
    multiple=True,
    metavar="NAME",
    help=f"Sweep this defence over its strengths; may be given several times, or all: {', '.join(DEFENCES)}.",
)
@click.option("--dp-rate", type=options.Number(0, 1), help="Share of clients in a round, to count DPSGD's epsilon.")
@click.option("--dp-steps", type=options.COUNT, help="Rounds of the training, to count DPSGD's epsilon.")
@click.option("--dp-delta", type=options.Number(0, 1), default=1e-5, show_default=True)
@click.option(
    "--data",
    "folder",
    type=options.PATH,
    help="Folder of pictures, a table (.csv with a header, .parquet), or arrays (.npy, .npz with x and y); default: "
    "built-in photographs.",
)
@click.option("--label-column", metavar="NAME", help="Of a table: the column with the labels.")
@click.option("--count", type=options.COUNT, default=8, show_default=True, help="How many samples.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    defences: tuple[str, ...],
    folder: Path | None,
    label_column: str | None,
    count: int,
    **named: Any,
) -> None:
    """Attack a model on pictures or rows, in every way that applies, and report what comes out.

    Every sample is one client, or one sample of a client's batch: what it would send is captured, with all labels in
    turn or the folder's classes, and attacked without knowing sample, label or loss value. Writes audit.json, the
    report audit.html, which needs no other file, and audit.png with each original above its reconstruction. An
    interrupted audit goes on when the same command is given again.
    """
    from rgap.auditing import audit
    from rgap.defences import ALL, by_name

    protocol = options.make_protocol(**options.taken(named, *options.PROTOCOL))
    run = AuditRun.of(named)
    accounting = _accounting(**options.taken(named, "dp_rate", "dp_steps", "dp_delta"))
    swept = [kind.__name__ for kind in ALL] if "all" in defences else defences
    armed = tuple(by_name(name) for name in swept)
    given = _given(ctx, named, folder, label_column, count)
    if given is not None and given.masks is not None and named["loss"] in MASKS:
        named["loss"] = given.masks
    target = options.make_target(**named)
    samples = _pictures(target, folder, count) if given is None else given
    one = partial(
        audit,
        target,
        samples,
        defences=armed,
        protocol=protocol,
        accounting=accounting,
        seed=named["seed"],
    )
    source = "built-in photographs" if folder is None else str(folder)
    columns = {"columns": given.columns} if given is not None and given.columns else {}
    run.run("audit", one, partial(_show, out=run.out), "results", model=named["model"], data=source, **columns)
    run.end()


def _accounting(dp_rate: float | None, dp_steps: int | None, dp_delta: float) -> Accounting | None:
    from rgap.auditing import Accounting

    if dp_rate is None and dp_steps is None:
        return None
    if dp_rate is None or dp_steps is None:
        raise click.BadParameter("--dp-rate and --dp-steps belong together: epsilon needs both")
    return Accounting(dp_rate, dp_steps, dp_delta)


def _given(
    ctx: click.Context, named: dict[str, Any], folder: Path | None, label_column: str | None, count: int
) -> Samples | None:
    """What a file holds, which says its own shape, and nothing of the range of its values; None if there is none."""
    from rgap import tables

    if folder is None or folder.suffix not in tables.FILES:
        return None
    found = tables.read(folder, label_column, count)
    for name, value in (("input_shape", tuple(found.inputs.shape[1:])), ("value_range", None)):
        if ctx.get_parameter_source(name) is ParameterSource.DEFAULT:
            named[name] = value
    return found


def _pictures(target: Target, folder: Path | None, count: int) -> Samples:
    from rgap import data
    from rgap.picture import is_picture
    from rgap.tables import Samples

    shape = target.input_shape
    if not is_picture(shape):
        raise ValueError(
            f"inputs of shape {shape} are no pictures: give a table or arrays with --data "
            "(.csv, .parquet, .npy, .npz), or use rgap.audit from Python"
        )
    channels, *size = shape
    if folder is None:
        found = data.photographs(count, (size[0], size[1]), channels)
    else:
        found = data.folder(folder, (size[0], size[1]), channels, count)
    return Samples(found.inputs, found.names, tuple(data.labels(found, target.loss)))


def _show(result: Audit, out: Path) -> None:
    """The verdict first, then the numbers behind it."""
    from rgap.cli import tables
    from rgap.picture import is_picture

    console = report()
    console.print(result.verdict.headline, style="bold")
    for finding in result.verdict.findings:
        console.print(f"Check this first: {finding}", style="bold red")
    for sentence in result.verdict.sentences:
        console.print(sentence)
    console.print()
    if any(case.results for case in result.cases):
        console.print(tables.pictures(result))
    console.print(tables.attacks(result))
    first = next(((case, case.best) for case in result.cases if case.best is not None and case.best.layers), None)
    if first is not None:
        case, best = first
        console.print(tables.layers(best.layers, best.joint, f"Layer by layer, for {case.name}"))
    for each in result.sweeps:
        console.print(tables.dose_response(each))
    for note in tables.audit_notes(result):
        console.print(f"- {note}")
    drawn = f", pictures: {out / 'audit.png'}" if is_picture(result.shape) else ""
    console.print(f"\nReport: {out / 'audit.html'}{drawn}, numbers: {out / 'audit.json'}")
