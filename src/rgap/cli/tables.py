"""Tables that a person can read."""

from __future__ import annotations

from rich.table import Table

from rgap.attacks import LayerReport, Reconstruction
from rgap.auditing import Audit


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


def layers(reports: tuple[LayerReport, ...], title: str) -> Table:
    """One row for each layer, from the input to the output."""
    table = _table(title, ("layer",))
    for name in ("|x|", "|z| rows", "|W| rows", "rank", "free", "condition", "residual", "error"):
        table.add_column(name, justify="right")
    table.add_column("solved by")
    for layer in reports:
        table.add_row(
            layer.name[-12:],
            str(layer.unknowns),
            str(layer.weight_rows),
            str(layer.gradient_rows),
            str(layer.rank),
            str(layer.free),
            f"{layer.condition:.0e}",
            f"{max(layer.weight_residual, layer.gradient_residual):.0e}",
            f"{layer.error:.0e}",
            layer.method + (f", {layer.dead_units} dead" if layer.dead_units else ""),
        )
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    """A table that fits 80 columns: no frame, nothing wrapped."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def notes(found: Reconstruction) -> list[str]:
    """What a reader must know beside the numbers."""
    return [f"assumed: {a}" for a in found.assumptions] + [f"warning: {w}" for w in found.preflight.findings]
