"""Table 2 of R-GAP: five networks, their index, and how near the attack comes.

Source: J. Zhu and M. Blaschko, *R-GAP: Recursive Gradient Attack on Privacy*, ICLR 2021, arXiv:2010.07733, Section 4.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.table import Table
from torch import Tensor, nn

from rgap import attacks, losses
from rgap.metrics import mse
from rgap.rank import rank_analysis
from rgap.reproductions.architectures import INPUT_SHAPE, NETWORKS
from rgap.reproductions.base import Job, Options, Reproduction, counted, labels, statuses
from rgap.store import Row
from rgap.target import Target
from rgap.update import capture

PAPER = {
    "full_rank": (4e-9, 4e-9),
    "deficient_first": (0.056, 0.063),
    "deficient_first_wide": (0.056, 0.063),
    "full_rank_by_virtual": (2.7e-4, 2.7e-4),
    "deficient_second": (0.013, 0.013),
}
"""The MSE that Table 2 prints, as a range: the two networks of index 405 have one or the other."""
ATTACKS = {"recursive": attacks.Recursive(), "closed": attacks.Closed()}
RANK = "rank"
"""The job of a network, beside those of its pictures."""


@dataclass(frozen=True)
class Table2(Reproduction):
    """Five small networks; the recursion, and the closed form that solves layers jointly.

    Args:
        networks: what makes each from a seed, and the index that the paper prints for it.
    """

    name: ClassVar[str] = "table2"

    networks: tuple[tuple[Callable[[int], nn.Sequential], int], ...] = NETWORKS

    def jobs(self, options: Options, count: int) -> Sequence[Job]:
        inputs, y = options.colour(count).inputs, labels(count)
        found = []
        for build, _ in self.networks:
            target = Target(build(options.seed), losses.Logistic(), INPUT_SHAPE, (0.0, 1.0))
            found.append(Job(f"{build.__name__} {RANK}", partial(_ranked, target)))
            for at in range(count):
                attacked = partial(_attacked, target, inputs[at : at + 1], y[at : at + 1])
                found.append(Job(f"{build.__name__} {at}", attacked))
        return found

    def pictures(self, options: Options) -> str:
        return "built-in photographs" if options.data is None else "CIFAR-10 test pictures"

    def table(self, rows: Mapping[str, Row]) -> Table:
        columns = (
            "network", "index: the paper", "ours", "free: each layer", "jointly", "at the answer", "MSE: the paper",
            "recursive", "closed", "worst", "status", "seconds",
        )  # fmt: skip
        table = self.new_table(columns)
        for name, found in self.summary(rows).items():
            closed = found["closed"]
            table.add_row(
                name,
                str(found["index_paper"]),
                str(found["index"]),
                " ".join(map(str, found["free_layers"])),
                str(found["free_jointly"]),
                " to ".join(map(str, dict.fromkeys(found["free_at_answer"]))) or "-",
                " to ".join(f"{bound:.2g}" for bound in dict.fromkeys(found["mse_paper"])),
                f"{found['recursive']['mse']:.1e}",
                f"{closed['mse']:.1e}",
                f"{closed['worst']:.1e}",
                counted(closed["statuses"]),
                f"{closed['seconds']:.1f}",
            )
        return table

    def summary(self, rows: Mapping[str, Row]) -> dict[str, Any]:
        found = {}
        for build, index in self.networks:
            name = build.__name__
            rank, own = rows[f"{name} {RANK}"].values, self._own(rows, name)
            free = [row["closed"]["free"] for row in own if row["closed"]["free"] is not None]
            found[name] = {
                "index_paper": index,
                **rank,
                "free_at_answer": [min(free), max(free)] if free else [],
                "mse_paper": list(PAPER[name]),
                **{attack: _summed([row[attack] for row in own]) for attack in ATTACKS},
            }
        return found

    def remarks(self, rows: Mapping[str, Row]) -> Sequence[str]:
        return (
            "The architectures are reconstructed from the published indices: the paper draws the networks without "
            "naming their layers. The layers after the critical one are our own choice.",
            "MSE is the mean over the pictures, values in [0, 1]; gradients in float32, labels -1 and 1 in turn, "
            "nothing told to the attack.",
            "Recursive goes layer by layer, as the paper's attack does. Closed solves layers that the recursion leaves "
            "open together; what is free even then is filled by smoothness, an assumption.",
            "Of the two networks of index 405 it is not known which is which: the paper prints 0.056 and 0.063.",
        )

    def draw(self, rows: Mapping[str, Row]) -> Figure:
        figure = Figure(figsize=(9, 4.8), layout="constrained", dpi=150)
        axes = figure.subplots()
        summary = self.summary(rows)
        ticks = []
        for at, (name, found) in enumerate(summary.items()):
            low, high = found["mse_paper"]
            axes.plot([at - 0.25] * 2, [low, high], color=INK["the paper"], linewidth=2)
            axes.plot([at - 0.25] * 2, [low, high], "D", color=INK["the paper"], markersize=6)
            own = self._own(rows, name)
            for attack, aside in (("recursive", 0.0), ("closed", 0.25)):
                values = [row[attack]["mse"] for row in own]
                axes.plot([at + aside] * len(values), values, "o", color=INK[attack], alpha=0.4, markersize=5)
                mean = statistics.mean(values)
                axes.plot([at + aside - 0.1, at + aside + 0.1], [mean, mean], color=INK[attack], linewidth=2)
            free = f"free: {' '.join(map(str, found['free_layers']))}\njointly {found['free_jointly']}"
            ticks.append(f"{name}\nindex {found['index']}\n{free}")
        axes.set_yscale("log")
        axes.set_ylabel("mean squared error, values in [0, 1]")
        axes.set_xticks(range(len(summary)), ticks, fontsize=8)
        axes.set_xlim(-0.6, len(summary) - 0.4)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        handles = [
            Line2D([], [], marker="D" if word == "the paper" else "o", linewidth=2, color=colour, label=word)
            for word, colour in INK.items()
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9, frameon=False)
        return figure

    def _own(self, rows: Mapping[str, Row], name: str) -> list[Mapping[str, Any]]:
        """What was found of one network's pictures."""
        ours = [key for key in rows if key.rsplit(" ", 1)[0] == name and not key.endswith(RANK)]
        return [rows[key].values for key in ours]


INK = {"the paper": "#4a4a4a", "recursive": "#d1495b", "closed": "#00798c"}


def _ranked(target: Target) -> Row:
    """Counted and measured, before any gradient."""
    analysis = rank_analysis(target)
    return Row(
        {
            "index": analysis.index,
            "free_layers": [layer.free for layer in analysis.layers],
            "free_jointly": analysis.joint_free,
        }
    )


def _attacked(target: Target, truth: Tensor, y: Tensor) -> Row:
    """Both attacks on one picture."""
    update = capture(target, truth, y)
    values = {}
    for name, attack in ATTACKS.items():
        found = attack(target, update)
        joint = found.answers[0].joint
        values[name] = {
            "mse": mse(found.inputs, truth)[0],
            "status": found.status.value,
            "residual": found.gradient_residual,
            "free": None if joint is None else joint.free,
            "seconds": found.seconds,
        }
    return Row(values)


def _summed(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    errors = [each["mse"] for each in found]
    return {
        "mse": statistics.mean(errors),
        "worst": max(errors),
        "statuses": statuses(each["status"] for each in found),
        "seconds": statistics.median(each["seconds"] for each in found),
    }
