"""Tables that a person can read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from rgap.attacks import JointReport, LayerReport, Reconstruction, Sample
from rgap.auditing import Audit, DoseResponse, Level
from rgap.cli.console import NONE, number, table
from rgap.rank import RankAnalysis
from rgap.rank.found import about
from rgap.report.digest import SHOWN


def pictures(audit: Audit) -> Table:
    """One row for each sample: the attack that gave most away."""
    cases = audit.pictured
    left_out = len(cases) - SHOWN
    more = f" (the first {SHOWN}; {left_out} more are in the numbers above and in the file)" if left_out > 0 else ""
    made = table(
        f"What each sample's update gave away{more}",
        ("sample", "attack", "level", "status"),
        ("MSE", "PSNR dB", "residual", "error", "seconds"),
    )
    for case in cases[:SHOWN]:
        best = case.best
        if best is None:
            made.add_row(_end(case.name, 18), NONE, case.told, *[NONE] * 6)
            continue
        made.add_row(
            _end(case.name, 18),
            best.attack,
            case.told,
            best.status.value,
            number(best.mse, ".0e"),
            number(best.psnr, ".0f"),
            number(best.gradient_residual, ".0e"),
            number(best.error, ".0e"),
            f"{best.seconds:.2f}",
        )
    return made


def attacks(audit: Audit) -> Table:
    """One row for each attack, over all samples."""
    numbers = ("exact", "certified", "recognisable", "of", "median seconds")
    made = table("What each attack read out", ("attack",), numbers)
    for run in audit.attacks:
        if run.results:
            counts = (run.at_least(Level.EXACT), run.certified, run.at_least(Level.RECOGNISABLE), len(run.results))
            made.add_row(run.name, *map(str, counts), f"{run.median_seconds:.2f}")
    return made


def dose_response(found: DoseResponse) -> Table:
    """One row for each strength of a defence."""
    numbers = ("median PSNR dB", "recognisable", "change of the update", "epsilon")
    made = table(f"{found.name}: what still leaks, and what it costs", (found.strength_name or "on",), numbers)
    for point in found.points:
        made.add_row(
            f"{point.strength:g}" if point.strength else "off",
            number(point.median_psnr, ".0f"),
            f"{point.recovered:.0%}",
            f"{point.gradient_error:.0e}",
            number(point.epsilon, ".2g"),
        )
    return made


def audit_notes(audit: Audit) -> list[str]:
    """What a reader must know beside the numbers."""
    notes = [f"{run.name} does not apply: {run.obstacle}" for run in audit.attacks if run.obstacle is not None]
    best = [(case, case.best) for case in audit.cases if case.best is not None]
    notes += dict.fromkeys(f"assumed: {text}" for _, result in best for text in result.assumptions)
    notes += dict.fromkeys(f"warning: {text}" for _, result in best for text in result.warnings)
    open_ones = [(case, result) for case, result in best if case.level is not Level.EXACT]
    notes += [f"{case.name}: {result.status.value}, {result.reason}" for case, result in open_ones[:SHOWN]]
    notes += [each.sentence for each in audit.sweeps]
    notes += [f"not run: {text}" for text in audit.not_run]
    return notes


def attack_notes(found: Reconstruction) -> list[str]:
    """What a reader must know beside the numbers."""
    notes = [f"assumed: {a}" for a in found.assumptions] + [f"warning: {w}" for w in found.preflight.findings]
    return notes + [f"local steps: {each}" for each in found.step_notes]


def samples(samples: Sequence[Sample]) -> Table:
    """One row for each sample of a batch that was told apart."""
    made = table("Sample by sample", ("sample",), ("label", "error"))
    made.add_column("status")
    made.add_column("why")
    for at, sample in enumerate(samples):
        made.add_row(str(at), f"{sample.label:g}", number(sample.error, ".0e"), sample.status.value, sample.reason)
    return made


def layers(layers: Sequence[LayerReport], joint: JointReport | None, title: str) -> Table:
    """One row for each layer, from the input to the output.

    Layers that were solved jointly show what the recursion measured of them alone, without its residual and error:
    those were of an input that the joint solve replaced.
    """
    numbers = ("|x|", "|z| rows", "|W| rows", "rank", "free", "condition", "residual", "error")
    made = table(title, ("layer",), numbers)
    made.add_column("solved by")
    for layer in layers:
        replaced = joint is not None and layer.name in joint.layers
        residual = max(layer.weight_residual, layer.gradient_residual)
        method = "jointly" if replaced else layer.method
        made.add_row(
            _end(layer.name, 12),
            *map(str, (layer.unknowns, layer.weight_rows, layer.gradient_rows, layer.rank, layer.free)),
            number(layer.condition, ".0e"),
            number(math.nan if replaced else residual, ".0e"),
            number(math.nan if replaced else layer.error, ".0e"),
            method + (f", {layer.dead_units} dead" if layer.dead_units else ""),
        )
    return made


def joint_solve(joint: JointReport) -> str:
    """The layers that were solved jointly, in one line."""
    return (
        f"{' and '.join(joint.layers)} solved together for the input: {joint.unknowns} unknowns, {joint.rows} rows, "
        f"rank {joint.rank}, {joint.free} free, condition {joint.condition:.0e}, {joint.steps} steps"
    )


def ranks(analysis: RankAnalysis) -> Table:
    """One row for each layer, from the input to the output; the network's largest index in bold."""
    measured = any(layer.free is not None for layer in analysis.layers)
    numbers = ("|x|", "|W|", "|z|", "|V|", "index", *(("rank", "free", "joint") if measured else ()))
    made = table("Unknowns against constraints", ("layer",), numbers)
    if measured:
        made.add_column("measured", no_wrap=True)
    for layer in analysis.layers:
        counts = (layer.unknowns, layer.gradient_rows, layer.weight_rows, layer.virtual_rows)
        index = Text(str(layer.index), style="bold" if layer is analysis.critical else "")
        cells = (_known(layer.rank), about(layer), _known(layer.joint_free), layer.measured.value)
        made.add_row(_end(layer.name, 20), *map(str, counts), index, *(cells if measured else ()))
    return made


def _end(name: str, most: int) -> str:
    """The end of a name: in deep networks it tells more than the beginning."""
    return name if len(name) <= most else "..." + name[3 - most :]


def _known(number: int | None) -> str:
    return NONE if number is None else str(number)
