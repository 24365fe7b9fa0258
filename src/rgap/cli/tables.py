"""Tables that a person can read."""

from __future__ import annotations

from rich.table import Table

from rgap.attacks import Answer, Reconstruction
from rgap.auditing import Audit
from rgap.rank import RankAnalysis
from rgap.rank.analysis import about


def pictures(audit: Audit) -> Table:
    """One row for each sample."""
    table = _table("What each picture's gradient gave away", ("picture", "label", "status"))
    for name in ("MSE", "PSNR dB", "residual", "error", "twins", "seconds"):
        table.add_column(name, justify="right")
    for case in audit.cases:
        found = case.found
        answer = found.answers[0] if found.answers else None
        label = f"{float(answer.labels[0]):+g}" if answer else "-"
        table.add_row(
            case.name[-18:],
            label if answer and float(answer.labels[0]) == case.label else f"[red]{label}[/red]",
            found.status.value,
            f"{case.mse:.0e}",
            f"{case.psnr:.0f}",
            f"{answer.gradient_residual:.0e}" if answer else "-",
            f"{answer.error:.0e}" if answer else "-",
            str(len(found.twins)),
            f"{found.seconds:.2f}",
        )
    return table


def layers(answer: Answer, title: str) -> Table:
    """One row for each layer, from the input to the output.

    Layers that were solved jointly show what the recursion measured of them alone, without its residual and error:
    those were of an input that the joint solve replaced.
    """
    jointly = () if answer.joint is None else answer.joint.layers
    table = _table(title, ("layer",))
    for name in ("|x|", "|z| rows", "|W| rows", "rank", "free", "condition", "residual", "error"):
        table.add_column(name, justify="right")
    table.add_column("solved by")
    for layer in answer.layers:
        replaced = layer.name in jointly
        method = "jointly" if replaced else layer.method
        table.add_row(
            layer.name[-12:],
            str(layer.unknowns),
            str(layer.weight_rows),
            str(layer.gradient_rows),
            str(layer.rank),
            str(layer.free),
            f"{layer.condition:.0e}",
            "-" if replaced else f"{max(layer.weight_residual, layer.gradient_residual):.0e}",
            "-" if replaced else f"{layer.error:.0e}",
            method + (f", {layer.dead_units} dead" if layer.dead_units else ""),
        )
    return table


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


def together(answer: Answer) -> str | None:
    """What is to be said of layers that were solved jointly; None if none were."""
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
