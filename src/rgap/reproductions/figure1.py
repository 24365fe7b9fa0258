"""Figure 1 of R-GAP: losses l(mu), and the product mu * dl/dmu from which the attack reads the margin mu.

Source: J. Zhu and M. Blaschko, *R-GAP: Recursive Gradient Attack on Privacy*, ICLR 2021, arXiv:2010.07733, Section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from scipy.optimize import brentq, minimize_scalar

from rgap.losses import Exponential, Hinge, Logistic, MarginLoss, SquaredHinge
from rgap.reproductions.base import Job, Options, Reproduction
from rgap.store import Row

HIGHEST = 1.0
"""The largest product of the grid; from 0 on each loss has one root."""
FAR = -50.0
"""No minimum lies below this margin."""
SHARE = 0.6
"""The product whose roots are drawn, as a share of the minimum."""


@dataclass(frozen=True)
class Curve:
    """One loss, and mu * dl/dmu in plain numbers for the margins at which its slope is not zero."""

    ours: MarginLoss
    product: Callable[[float], float]
    end: float
    """Margins from here on have no slope; infinity if all have one."""

    def turning(self) -> tuple[float, float]:
        """The margin with the least product, and that product, by search."""
        highest = min(self.end, -FAR)
        # Where the grid is lowest is where the search begins: it is for functions with one minimum.
        grid = np.linspace(FAR, highest, 2001, endpoint=False)
        at = int(np.argmin([self.product(float(mu)) for mu in grid]))
        low, high = float(grid[at - 1]), float(grid[at + 1]) if at + 1 < len(grid) else highest
        found = minimize_scalar(self.product, bounds=(low, high), method="bounded", options={"xatol": 1e-12})
        return float(found.x), float(found.fun)

    def roots(self, product: float) -> tuple[float, ...]:
        """Every margin with this product, ascending, by bisection on both sides of the turning point."""
        argmin, lowest = self.turning()
        if product <= lowest:
            return ()
        found = [self._root(product, argmin, -1.0)]
        if product < 0 and argmin < self.end - 1e-6:  # beyond the turning point the product rises towards 0
            found.append(self._root(product, argmin, 1.0))
        return tuple(found)

    def _root(self, product: float, argmin: float, side: float) -> float:
        """The root on one side of the turning point."""
        step = 1.0
        while self.product(min(argmin + side * step, self.end)) < product:
            step *= 2
        other = min(argmin + side * step, self.end)
        return float(
            brentq(
                lambda mu: self.product(mu) - product, min(argmin, other), max(argmin, other), xtol=1e-15, rtol=1e-15
            )
        )


CURVES = (
    Curve(Logistic(), lambda mu: float(-mu / (1 + np.exp(mu))), np.inf),
    Curve(Exponential(), lambda mu: float(-mu * np.exp(-mu)), np.inf),
    Curve(Hinge(), lambda mu: -mu, 1.0),
    Curve(SquaredHinge(), lambda mu: -2 * mu * (1 - mu), 1.0),
)


@dataclass(frozen=True)
class Figure1(Reproduction):
    """Four losses; their turning points, minima and roots by search and as `rgap.losses` gives them."""

    name: ClassVar[str] = "figure1"

    def jobs(self, options: Options, count: int) -> Sequence[Job]:
        return [Job(curve.ours.name, lambda curve=curve: _measured(curve, count)) for curve in CURVES]  # type: ignore[misc]

    def table(self, rows: Mapping[str, Row]) -> Table:
        numbers = (
            "turns at: by search", "rgap", "minimum: by search", "rgap", "roots", "missing", "greatest error",
        )  # fmt: skip
        table = self.new_table(("loss", "the paper"), numbers)
        for name, found in self.summary(rows).items():
            table.add_row(
                name,
                "curve only",
                f"{found['turning_by_search']:.6f}",
                f"{found['turning']:.6f}",
                f"{found['minimum_by_search']:.6f}",
                f"{found['minimum']:.6f}",
                str(found["roots"]),
                str(found["missing"]),
                f"{found['greatest_error']:.0e}",
            )
        return table

    def summary(self, rows: Mapping[str, Row]) -> dict[str, Any]:
        return {name: dict(row.values) for name, row in rows.items()}

    def remarks(self, rows: Mapping[str, Row]) -> Sequence[str]:
        return (
            "Eq. 25 of the paper prints dl/dmu = -mu/(1+e^mu) for the logistic loss; it is -1/(1+e^mu).",
            "A product between the minimum and 0 has two roots: two inputs with the same gradient, the twins. The "
            "logistic loss turns at mu = 1 + W(1/e), where the product is -W(1/e).",
            "Below mu = 1 the hinge loss's product comes as near to -1 as one likes; from there on it has no gradient, "
            "so that no product has two roots.",
            "Errors of roots are relative to the margin where it is above 1, else absolute.",
        )

    def pictures(self, options: Options) -> str:
        return "no pictures: the losses alone"

    def draw(self, rows: Mapping[str, Row]) -> Figure:
        figure = Figure(figsize=(12, 5.6), layout="constrained", dpi=150)
        axes = figure.subplots(2, len(CURVES), sharex=True, sharey="row")
        for at, curve in enumerate(CURVES):
            _draw_loss(axes[0][at], curve)
            _draw_product(axes[1][at], curve, rows[curve.ours.name].values)
        axes[0][0].set_ylabel("l(mu)")
        axes[1][0].set_ylabel("mu dl/dmu")
        axes[0][0].set_ylim(-0.2, 4)
        axes[1][0].set_ylim(-1.75, 1.4)
        return figure


def _measured(curve: Curve, count: int) -> Row:
    """What a search finds, beside what `rgap.losses` gives."""
    loss = curve.ours
    turning, minimum = curve.turning()
    # A minimum that no margin attains has no root; the product next to it has.
    meets = loss.roots(loss.lowest_product) or loss.roots(float(np.nextafter(loss.lowest_product, 0.0)))
    roots = missing = 0
    greatest = 0.0
    for product in np.linspace(minimum, HIGHEST, count + 1)[1:].tolist():
        expected, got = curve.roots(product), loss.roots(product)
        roots += len(expected)
        missing += abs(len(expected) - len(got))
        pairs = zip(expected, got, strict=False)
        greatest = max([greatest, *(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)])
    return Row(
        {
            "turning_by_search": turning,
            "turning": meets[0],
            "minimum_by_search": minimum,
            "minimum": loss.lowest_product,
            "roots": roots,
            "missing": missing,
            "greatest_error": greatest,
        }
    )


def _draw_loss(axes: Axes, curve: Curve) -> None:
    mu = torch.linspace(-2, 5, 701, dtype=torch.float64)
    axes.plot(mu, curve.ours.value(mu), color="#00798c")
    axes.set_title(f"{curve.ours.name} loss", fontsize=10)
    _frame(axes)


def _draw_product(axes: Axes, curve: Curve, found: Mapping[str, Any]) -> None:
    """The product, its minimum, and the roots of one product below zero."""
    loss, turning, lowest = curve.ours, found["turning"], found["minimum"]
    mu = torch.linspace(-2, 5, 7001, dtype=torch.float64)
    values = mu * loss.slope(mu)
    jump = (values[1:] - values[:-1]).abs() > 0.5  # the hinge: no line across
    values[1:][jump] = torch.nan
    axes.plot(mu, values, color="#00798c")
    product = SHARE * lowest
    roots = loss.roots(product)
    axes.axhline(product, color="#d1495b", linewidth=0.8, linestyle="--")
    axes.plot(roots, [product] * len(roots), "o", color="#d1495b", markersize=5)
    word = "root" if len(roots) == 1 else "roots"
    word = f"{word} of {product:.3f}:\nmu = " + " and ".join(f"{root:.3f}" for root in roots)
    axes.annotate(word, (0.97, 0.82), xycoords="axes fraction", ha="right", va="center", fontsize=8, color="#d1495b")
    attained = bool(loss.roots(lowest))
    axes.plot(turning, lowest, "v", color="#4a4a4a", markersize=7, markerfacecolor="#4a4a4a" if attained else "white")
    axes.annotate(
        f"minimum {lowest:.4f}\nat mu = {turning:.4f}" + ("" if attained else ",\nnot attained"),
        (turning, lowest), (8, -4), textcoords="offset points", va="top", fontsize=8, color="#4a4a4a",
    )  # fmt: skip
    axes.set_xlabel("margin mu")
    _frame(axes)


def _frame(axes: Axes) -> None:
    axes.axhline(0, color="#bbbbbb", linewidth=0.6, zorder=0)
    axes.axvline(0, color="#bbbbbb", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
