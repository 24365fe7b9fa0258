"""Tables that a person can read."""

from __future__ import annotations

import math
import statistics
from typing import Any

from rich.table import Table

from rgap.attacks import Answer, Reconstruction
from rgap.auditing import Audit, DoseResponse, Level
from rgap.auditing.describe import solved as describe_solved
from rgap.rank import RankAnalysis
from rgap.rank.analysis import about


def pictures(audit: Audit) -> Table:
    """One row for each sample: the attack that gave most away."""
    table = _table("What each sample's update gave away", ("sample", "attack", "level", "status"))
    for name in ("MSE", "PSNR dB", "residual", "error", "seconds"):
        table.add_column(name, justify="right")
    for case in audit.cases:
        best = case.best
        if best is None:
            table.add_row(case.name[-18:], "-", case.level.value, "-", "-", "-", "-", "-", "-")
            continue
        table.add_row(
            case.name[-18:],
            best.attack,
            case.level.value,
            best.status,
            _number(best.mse, ".0e"),
            _number(best.psnr, ".0f"),
            _number(best.gradient_residual, ".0e"),
            _number(best.error, ".0e"),
            f"{best.seconds:.2f}",
        )
    return table


def attacks(audit: Audit) -> Table:
    """One row for each attack, over all samples."""
    table = _table("What each attack read out", ("attack",))
    for name in ("exact", "recognisable", "of", "median seconds"):
        table.add_column(name, justify="right")
    for ran in audit.attacks:
        if ran.obstacle is None and ran.results:
            counts = [
                sum(r.level.rank >= least.rank for r in ran.results) for least in (Level.EXACT, Level.RECOGNISABLE)
            ]
            seconds = statistics.median(result.seconds for result in ran.results)
            table.add_row(ran.name, *map(str, counts), str(len(ran.results)), f"{seconds:.2f}")
    return table


def sweep(found: DoseResponse) -> Table:
    """One row for each strength of a defence."""
    table = _table(f"{found.name}: what still leaks, and what it costs", (found.strength_name or "on",))
    for name in ("median PSNR dB", "recognisable", "change of the update", "epsilon"):
        table.add_column(name, justify="right")
    for point in found.points:
        table.add_row(
            f"{point.strength:g}" if point.strength else "off",
            _number(point.psnr, ".0f"),
            f"{point.recovered:.0%}",
            f"{point.gradient_error:.0e}",
            "-" if point.epsilon is None else f"{point.epsilon:.2g}",
        )
    return table


def audit_notes(audit: Audit) -> list[str]:
    """What a reader must know beside the numbers."""
    notes = [f"{ran.name} does not apply: {ran.obstacle}" for ran in audit.attacks if ran.obstacle is not None]
    best = [case.best for case in audit.cases if case.best is not None]
    notes += dict.fromkeys(f"assumed: {text}" for result in best for text in result.assumptions)
    notes += dict.fromkeys(f"warning: {text}" for result in best for text in result.warnings)
    notes += [
        f"{case.name}: {case.best.status}, {case.best.reason}"
        for case in audit.cases
        if case.best is not None and case.level is not Level.EXACT
    ]
    notes += [each.sentence for each in audit.sweeps]
    notes += [f"not run: {text}" for text in audit.not_run]
    return notes


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def layers(answer: Answer, title: str) -> Table:
    """One row for each layer of an answer; see `solved`."""
    return solved(describe_solved(answer), title)


def solved(record: dict[str, Any], title: str) -> Table:
    """One row for each layer, from the input to the output.

    Layers that were solved jointly show what the recursion measured of them alone, without its residual and error:
    those were of an input that the joint solve replaced.
    """
    jointly = () if record["joint"] is None else record["joint"]["layers"]
    table = _table(title, ("layer",))
    for name in ("|x|", "|z| rows", "|W| rows", "rank", "free", "condition", "residual", "error"):
        table.add_column(name, justify="right")
    table.add_column("solved by")
    for layer in record["layers"]:
        replaced = layer["name"] in jointly
        method = "jointly" if replaced else layer["method"]
        residual = max(_real(layer["weight_residual"]), _real(layer["gradient_residual"]))
        table.add_row(
            layer["name"][-12:],
            *(str(layer[name]) for name in ("unknowns", "weight_rows", "gradient_rows", "rank", "free")),
            _number(_real(layer["condition"]), ".0e"),
            "-" if replaced else _number(residual, ".0e"),
            "-" if replaced else _number(_real(layer["error"]), ".0e"),
            method + (f", {layer['dead_units']} dead" if layer["dead_units"] else ""),
        )
    return table


def _real(value: float | None) -> float:
    """JSON has no NaN and no infinity."""
    return math.nan if value is None else value


def ranks(analysis: RankAnalysis) -> Table:
    """One row for each layer, from the input to the output; the network's largest index in bold."""
    measured = any(layer.free is not None for layer in analysis.layers)
    table = _table("Unknowns against constraints", ("layer",))
    for name in ("|x|", "|W|", "|z|", "|V|", "index", *(("rank", "free", "joint") if measured else ())):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("measured", no_wrap=True)
    for layer in analysis.layers:
        index = f"[bold]{layer.index}[/bold]" if layer is analysis.critical else str(layer.index)
        cells = [layer.unknowns, layer.gradient_rows, layer.weight_rows, layer.virtual_rows, index]
        if measured:
            cells += [_known(layer.rank), about(layer), _known(layer.joint_free)]
        table.add_row(_end(layer.name, 20), *map(str, cells), layer.measured.value)
    return table


def joint_solve(answer: Answer) -> str | None:
    """The layers that were solved jointly, in one line; None if none were."""
    joint = answer.joint
    if joint is None:
        return None
    return (
        f"{' and '.join(joint.layers)} solved together for the input: {joint.unknowns} unknowns, {joint.rows} rows, "
        f"rank {joint.rank}, {joint.free} free, condition {joint.condition:.0e}, {joint.steps} steps"
    )


def _end(name: str, most: int) -> str:
    """The end of a name: in deep networks it tells more than the beginning."""
    return name if len(name) <= most else "..." + name[3 - most :]


def _known(number: int | None) -> str:
    return "-" if number is None else str(number)


def _table(title: str, columns: tuple[str, ...]) -> Table:
    """A table that fits 80 columns: no frame, nothing wrapped."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def notes(found: Reconstruction) -> list[str]:
    """What a reader must know beside the numbers."""
    return [f"assumed: {a}" for a in found.assumptions] + [f"warning: {w}" for w in found.preflight.findings]
