"""``rgap federation``"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rgap.cli.audit_run import AuditRun, audit_options
from rgap.cli.config import config_option
from rgap.cli.console import report, say
from rgap.cli.options import PATH, make_target, target_options

if TYPE_CHECKING:
    from rgap.auditing import Audit


@click.command("federation")
@click.argument("folder", type=PATH)
@config_option
@target_options
@audit_options("a round", "Print one line of audit.json for each round and nothing else.")
@click.option("--round", "wanted", type=click.IntRange(min=0), help="Only this round; default: all.")
def command(folder: Path, wanted: int | None, **named: Any) -> None:
    """Attack what the server of a federation was sent, round by round.

    FOLDER is written by rgap.integrations.flower.Capture, or by rgap.federation.write. The model is the one that was
    trained; its weights come from FOLDER. Nobody knows the samples: a client counts as exact where the certificate of
    a reconstruction says so, as recognisable where an input was found that has its gradient and little of it stays
    free. Writes OUT/round-0001.html, .json and .png, and so on; no .png where there is nothing to show.
    """
    from rgap import federation
    from rgap.auditing import audit_updates

    run, target = AuditRun.of(named), make_target(**named)
    seen = read = False
    for found in federation.read(folder):
        if wanted not in (None, found.number):
            continue
        seen = True
        failed = [each for each in found.nodes if each.failed]
        if len(failed) == len(found.nodes):
            why = "; ".join(f"node {each.node}: {each.failed}" for each in failed)
            say(f"{found.name} holds no replies that can be read: {why or 'nobody was in it'}", err=True)
            continue
        read = True
        for each in failed:
            say(f"{found.name}: node {each.node} sent no update: {each.failed}", err=True)
        for at, (given, updates) in enumerate(found.by_target(target)):
            name = found.name if at == 0 else f"{found.name}-{at + 1}"
            clients = {f"node {node}": update for node, update in sorted(updates.items())}
            one = partial(audit_updates, given, clients)
            show = partial(_show, name=name, out=run.out)
            run.run(name, one, show, f"results/{name}", model=named["model"], data=f"{folder}, {found.name}")
    if not seen:
        raise ValueError(f"{folder} has no round {wanted}; expected one that was captured")
    if not read:  # a gate must not pass because there was nothing to look at
        raise ValueError(f"{folder}: nothing was audited, as no reply can be read")
    run.end()


def _show(result: Audit, name: str, out: Path) -> None:
    """What was seen of each client, and where the rest stands."""
    from rgap.cli import tables

    console = report()
    console.print(f"{name}: {result.verdict.headline}", style="bold")
    for finding in result.verdict.findings:
        console.print(f"Check this first: {finding}", style="bold red")
    for sentence in result.verdict.sentences:
        console.print(sentence)
    for sentence in result.unread.sentences:
        console.print(sentence)
    if any(case.results for case in result.pictured):
        console.print(tables.pictures(result))
    console.print(f"Report: {out / name}.html\n", soft_wrap=True)
