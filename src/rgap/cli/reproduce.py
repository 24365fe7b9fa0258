"""``rgap reproduce``"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from rgap.cli.console import bar, report, table
from rgap.cli.options import COUNT, PATH, SEED, output_options

NAMES = {
    "table1": "Table 1: mean MSE of R-GAP, DLG and H-GAP (50 pictures)",
    "table2": "Table 2: index and reconstruction error of five networks (6 pictures)",
    "figure1": "Figure 1: losses, and the product that tells the margin (200 products for each loss)",
    "figure3": "Figure 3: R-GAP, DLG and H-GAP on CNN6 (6 pictures)",
    "figure4": "Figure 4: twin data, two inputs with one gradient (10 pictures)",
    "figure5": "Figure 5: noise on the gradient, against the width of the network (5 pictures)",
    "figure6": "Figure 6: batches of two on FCN3, R-GAP and DLG (10 batches of two)",
    "figure7": "Figure 7: batches of five on FCN3, R-GAP and DLG (10 batches of five)",
    "inverting-gradients": "Inverting Gradients: PSNR in dB on untrained networks, one picture a gradient "
    "(20 pictures)",
    "models": "Models that people train, and the attacks on each (no table of the paper) (20 pictures)",
    "training": "What training changes (no figure of the paper) (5 pictures)",
}
"""What there is to reproduce, by name, as --help tells it: a test holds it against the reproductions."""


class _WithNames(click.Command):
    """A command whose help lists what there is to reproduce."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Names"):
            formatter.write_dl(list(NAMES.items()))
        super().format_epilog(ctx, formatter)


@click.command("reproduce", cls=_WithNames)
@click.argument("name", type=click.Choice(tuple(NAMES)), metavar="[NAME]", required=False)
@click.option(
    "--data",
    type=PATH,
    help="Folder with CIFAR-10 and MNIST pictures in cifar10/ and mnist/, one subfolder for each class; default: "
    "built-in photographs.",
)
@click.option("--count", type=COUNT, help="How many pictures, or what else NAME counts; see below.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of weights, starts and noise.")
@click.option("--fresh", is_flag=True, help="Start over; else a run that was interrupted goes on where it was.")
@output_options()
def command(name: str | None, out: Path, fresh: bool, as_json: bool, **named: Any) -> None:
    """Compute a table or figure of the paper again, beside the paper's numbers.

    Without NAME, list what there is. Writes NAME.json and NAME.png to OUT/NAME. What is done is kept there after an
    interruption, and is not done again.
    """
    from rgap.reproductions import Options, by_name, reproduce

    if name is None:
        _list(as_json)
        return
    chosen, options, folder = by_name(name), Options(**named), out / name
    with bar(report(stderr=True), as_json) as step:
        rows = reproduce(chosen, options, folder, fresh, lambda what, done, total: step(what, done, total, ""))
    if as_json:
        click.echo(json.dumps(json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))))
        return
    console = report()
    console.print(chosen.table(rows))
    for remark in chosen.remarks(rows):
        console.print(f"- {remark}")
    number = options.count or chosen.count
    console.print(f"\n{number} {chosen.counted}, seed {options.seed}; {chosen.pictures(options)}.")
    console.print(f"Picture: {folder / name}.png, numbers: {folder / name}.json", soft_wrap=True)


def _known() -> Iterator[tuple[str, str, int, str]]:
    """Name, title, count, and what is counted, of everything there is."""
    from rgap.reproductions import by_name

    for name in NAMES:
        found = by_name(name)
        yield name, found.title, found.count, found.counted


def _list(as_json: bool) -> None:
    if as_json:
        keys = ("name", "title", "count", "counted")
        click.echo(json.dumps([dict(zip(keys, known, strict=True)) for known in _known()]))
        return
    made = table("rgap reproduce NAME", ("name", "what", "by default"))
    for name, title, count, counted in _known():
        made.add_row(name, title, f"{count} {counted}")
    report().print(made)
