"""``rgap federation``"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from rgap import federation
from rgap.auditing import Audit, Interrupted, audit_updates
from rgap.cli import tables
from rgap.cli.audit import FAILED, make_attacks, shown, write
from rgap.cli.condition import Condition, condition
from rgap.cli.options import attack_options, config_option, make_target, target_options


@click.command("federation")
@click.argument("folder", type=click.Path(path_type=Path))
@config_option
@target_options
@attack_options(default=None)
@click.option("--round", "wanted", type=click.IntRange(min=0), help="Only this round; default: all.")
@click.option("--budget", type=click.FloatRange(min=0), help="Seconds for a round after which no attack is begun.")
@click.option(
    "--fail-if",
    "fail_if",
    callback=condition,
    metavar="CONDITION",
    help="Exit with code 3 if it holds in any round, such as exact>0.",
)
@click.option("--out", type=click.Path(path_type=Path), default="rgap-out", show_default=True, help="Folder to write.")
@click.option("--fresh", is_flag=True, help="Forget what an earlier run left in the folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of audit.json for each round and nothing else.")
def command(
    folder: Path,
    attack: tuple[str, ...],
    iterations: int | None,
    restarts: int | None,
    polish: bool,
    wanted: int | None,
    budget: float | None,
    fail_if: Condition | None,
    out: Path,
    fresh: bool,
    as_json: bool,
    **named: Any,
) -> None:
    """Attack what the server of a federation was sent, round by round.

    FOLDER is written by rgap.integrations.flower.Capture, or by rgap.federation.write. The model is the one that was
    trained; its weights come from FOLDER. Nobody knows the samples: a client counts as recovered where the certificate
    of a reconstruction says exact. Writes OUT/round-0001.html, .json and .png, and so on.
    """
    chosen, target = make_attacks(attack, iterations, restarts, polish), make_target(**named)
    out.mkdir(parents=True, exist_ok=True)
    report, holds = Console(), False
    seen = False
    for found in federation.read(folder):
        if wanted is not None and found.number != wanted:
            continue
        seen = True
        own = f"round-{found.number:04}" + ("" if found.attempt == 1 else f".{found.attempt}")
        for each in found.nodes:
            if each.failed:
                click.echo(f"{own}: node {each.node} sent no update: {each.failed}", err=True)
        for at, (given, updates) in enumerate(found.by_target(target)):
            name = own if at == 0 else f"{own}-{at + 1}"
            about = {
                "model": named["model"],
                "data": f"{folder}, {own}",
                "command": "rgap " + shlex.join(sys.argv[1:]),
            }
            clients = {f"node {node}": update for node, update in sorted(updates.items())}
            with shown(as_json) as step:
                try:
                    result = audit_updates(
                        given, clients, None, chosen, budget, out / "results" / name, fresh, about, step
                    )
                except Interrupted as error:
                    write(error.audit, out, name)
                    raise click.exceptions.Abort from error
            write(result, out, name)
            if as_json:
                click.echo(json.dumps(result.to_dict()))
            else:
                _show(report, name, result, out)
            holds = holds or (fail_if is not None and fail_if.holds(result.cases))
    if not seen:
        raise ValueError(f"{folder} has no round {wanted}; expected one that was captured")
    if holds:
        click.echo(f"rgap: {fail_if} holds", err=True)
        raise click.exceptions.Exit(FAILED)


def _show(report: Console, name: str, result: Audit, out: Path) -> None:
    """What was seen of each client, and where the rest stands."""
    report.print(f"[bold]{name}: {result.verdict.headline}[/bold]", highlight=False)
    report.print(tables.pictures(result))
    report.print(f"Report: {out / name}.html\n", highlight=False, soft_wrap=True)
