"""``rgap reproduce``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from rgap.cli.console import bar, report, table
from rgap.cli.options import COUNT, PATH, SEED, output_options
from rgap.reproductions.catalogue import CATALOGUE


class _WithNames(click.Command):
    """A command whose help lists what there is to reproduce."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Names"):
            formatter.write_dl([(name, str(entry)) for name, entry in CATALOGUE.items()])
        super().format_epilog(ctx, formatter)


@click.command("reproduce", cls=_WithNames)
@click.argument("name", type=click.Choice(tuple(CATALOGUE)), metavar="[NAME]", required=False)
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
    number = options.count or chosen.entry.count
    console.print(f"\n{number} {chosen.entry.counted}, seed {options.seed}; {chosen.pictures(options)}.")
    console.print(f"Picture: {folder / name}.png, numbers: {folder / name}.json", soft_wrap=True)


def _list(as_json: bool) -> None:
    if as_json:
        keys = ("title", "count", "counted")
        found = [{"name": name} | {key: getattr(entry, key) for key in keys} for name, entry in CATALOGUE.items()]
        click.echo(json.dumps(found))
        return
    made = table("rgap reproduce NAME", ("name", "what", "by default"))
    for name, entry in CATALOGUE.items():
        made.add_row(name, entry.title, f"{entry.count} {entry.counted}")
    report().print(made)
