"""Rows of a benchmark: measured one after the other, printed as they come, kept in a file, and a table at the end.

And what several benchmarks have in common: their options, perceptrons, and samples that are told apart, counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rgap.attacks import Status

RIGHT = 1e-4
"""Mean squared error below which a sample is right."""
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "tanh": nn.Tanh,
    "GELU": nn.GELU,
    "sigmoid": nn.Sigmoid,
}
Row = tuple[str, Callable[[], dict[str, Any]]]
"""Its name, and what measures it."""


def measure(rows: Iterable[Row], only: str, first: str, columns: tuple[str, ...], out: Path | None) -> None:
    """Measure the rows whose name contains a text.

    Args:
        first: the heading of the names.
        columns: which of the figures the table shows.
        out: a file for all of them, written anew after each row.
    """
    table, results, rows = Table(first, *columns), [], list(rows)
    asked = [(name, run) for name, run in rows if only in name]
    if not asked:
        raise SystemExit(f"got --only {only!r}: expected a part of one of {'; '.join(name for name, _ in rows)}")
    for name, run in asked:
        found = run()
        results.append(found)
        print(json.dumps(found), flush=True)
        shown = (found[each] for each in columns)
        table.add_row(name, *(f"{each:.2g}" if isinstance(each, float) else str(each) for each in shown))
        if out:
            out.write_text(json.dumps(results, indent=2))
    Console().print(table)


def parser(about: str | None) -> argparse.ArgumentParser:
    """The options that most benchmarks have."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--only", default="", help="rows that contain this")
    made.add_argument("--out", type=Path, help="write the figures as JSON")
    return made


def perceptron(widths: Sequence[int], activation: str, bias: bool = True) -> nn.Module:
    """Linear layers with activations between, weights as torch draws them."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


@dataclass
class Tally:
    """Samples that were told apart, over several gradients."""

    certified: int = 0
    wrong: int = 0
    """Certified, and not right."""
    right: int = 0
    errors: list[float] = field(default_factory=list)

    def add(self, found: Tensor, told: Tensor, verdicts: Sequence[Status], truth: Tensor, labels: Tensor) -> Tensor:
        """Count those of one gradient, (b, values) each; which sample each is nearest to."""
        apart = torch.cdist(found, truth).square() / truth.shape[1]
        nearest = apart.argmin(1)
        right = (apart.min(1).values < RIGHT) & (told == labels.double()[nearest])
        exact = torch.tensor([verdict is Status.EXACT for verdict in verdicts])
        self.certified += int((right & exact).sum())
        self.wrong += int((~right & exact).sum())
        self.right += len(set(nearest[right].tolist()))
        self.errors += apart.min(0).values.tolist()
        return nearest

    def figures(self, of: int) -> dict[str, Any]:
        """For a row, of so many samples."""
        return {
            "certified": f"{self.certified} of {of}",
            "found": f"{self.right} of {of}",
            "wrong": self.wrong,
            "median MSE": statistics.median(self.errors) if self.errors else float("nan"),
            "worst MSE": max(self.errors, default=float("nan")),
        }
