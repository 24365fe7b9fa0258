"""What training changes: the attacks on a network before, during and after it has learned its pictures.

No figure of the paper: it asks whether a trained network still gives away what an untrained one does. The loss of a
sample that the network is sure of is saturated, and its gradient sinks towards the rounding of float32.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from rgap import losses, models
from rgap.attacks import Attack, Bias, Closed, Polish, Recursive
from rgap.reproductions.base import Job, Options, Reproduction, judged, median_and_worst, of, scatter
from rgap.reproductions.models import EXACT, SHAPE, VALUE_RANGE, Cell
from rgap.store import Row
from rgap.target import Target
from rgap.training import accuracy, train
from rgap.update import capture

BATCH = 16


CELLS = (
    Cell("CNN6, logistic", models.cnn6, losses.Logistic()),
    Cell("residual, cross-entropy", partial(models.residual, classes=10), losses.CrossEntropy(10)),
)


@dataclass(frozen=True)
class Training(Reproduction):
    """The same attacks after so many epochs on the very pictures that are attacked, and more of them.

    Args:
        cells: networks and losses.
        epochs: after which the network is attacked.
        learned: pictures that it is trained on, the attacked ones among them.
        rate: Adam's learning rate.
    """

    name: ClassVar[str] = "training"

    cells: tuple[Cell, ...] = CELLS
    epochs: tuple[int, ...] = (0, 1, 5, 20, 60)
    learned: int = 320
    rate: float = 1e-3

    @property
    def attacks(self) -> dict[str, Attack]:
        return {
            "recursive": Recursive(),
            "joint": Closed(),
            "polished": Polish(Closed(), steps=4, inner=100),
            "bias": Bias(),
        }

    def jobs(self, options: Options, count: int) -> Sequence[Job]:
        return [
            Job(f"{cell.name}, {epochs}", partial(self._stage, cell, epochs, options, count))
            for cell in self.cells
            for epochs in self.epochs
        ]

    def _pictures(self, cell: Cell, options: Options) -> tuple[Tensor, Tensor]:
        # There are 25 built-in photographs.
        images = options.colour(self.learned if options.data is not None else min(self.learned, 25)).inputs
        choices = cell.loss.examples
        return images, torch.tensor([choices[at % len(choices)] for at in range(len(images))])

    def _trained(self, cell: Cell, epochs: int, options: Options) -> tuple[nn.Module, float]:
        """The network after some epochs, and the share of its pictures that it labels right."""
        model = cell.build(seed=options.seed)
        images, labels = self._pictures(cell, options)
        train(model, cell.loss, images, labels, epochs, self.rate, BATCH, options.seed)
        return model.requires_grad_(True), accuracy(model, images, labels)

    def _stage(self, cell: Cell, epochs: int, options: Options, count: int) -> Row:
        model, accuracy = self._trained(cell, epochs, options)
        target = Target(model, cell.loss, SHAPE, VALUE_RANGE)
        images, labels = self._pictures(cell, options)
        values: dict[str, Any] = {"cell": cell.name, "epochs": epochs, "accuracy": accuracy, "attacks": {}}
        updates = [capture(target, images[at : at + 1], labels[at : at + 1]) for at in range(count)]
        losses = (cell.loss(model(images[at : at + 1]), labels[at : at + 1]) for at in range(count))
        values["loss"] = [float(loss.detach()) for loss in losses]
        values["gradient"] = [update.norm for update in updates]
        for name, attack in self.attacks.items():
            if attack.obstacle(target, 1) is not None:
                continue
            found = [attack(target, update) for update in updates]
            values["attacks"][name] = judged(found, images[:count], labels[:count])
        return Row(values, {})

    def table(self, rows: Mapping[str, Row]) -> Table:
        numbers = ("epochs", "right", "loss", "|gradient|", "attack", "exact", "median MSE", "worst")
        table = self.new_table(("network",), numbers)
        table.add_column("where it is not exact", max_width=60)
        for row in rows.values():
            v = row.values
            first = (
                v["cell"],
                str(v["epochs"]),
                f"{v['accuracy']:.0%}",
                f"{statistics.median(v['loss']):.1e}",
                f"{statistics.median(v['gradient']):.1e}",
            )
            for name, own in v["attacks"].items():
                exact = own["status"].count(EXACT)
                other = next((r for r, s in zip(own["reason"], own["status"], strict=True) if s != EXACT), "")
                table.add_row(*first, name, f"{exact} of {len(own['status'])}", *median_and_worst(own["mse"]), other)
                first = ("", "", "", "", "")
            table.add_section()
        return table

    def summary(self, rows: Mapping[str, Row]) -> dict[str, Any]:
        return {key: row.values for key, row in rows.items()}

    def draw(self, rows: Mapping[str, Row]) -> Figure:
        figure = Figure(figsize=(4.2 * len(self.cells), 3.8), layout="constrained", dpi=150)
        axes = figure.subplots(1, len(self.cells), sharey=True, squeeze=False)[0]
        for ax, cell in zip(axes, self.cells, strict=True):
            stages = [row.values for row in of(rows, cell=cell.name)]
            for name in self.attacks:
                errors = enumerate(stage["attacks"].get(name, {"mse": []})["mse"] for stage in stages)
                scatter(ax, errors, 1e-18, s=10, alpha=0.7, label=name)
            ax.set_yscale("log")
            ax.set_xticks(range(len(stages)), [f"{s['epochs']}\n{s['accuracy']:.0%}" for s in stages], fontsize=8)
            ax.set_title(cell.name, fontsize=9)
            ax.set_xlabel("epochs, and pictures that are labelled right")
            ax.grid(axis="y", alpha=0.3)
        axes[0].set_ylabel("MSE, values in [0, 1]")
        axes[0].legend(fontsize=7)
        return figure

    def remarks(self, rows: Mapping[str, Row]) -> Sequence[str]:
        least = min(each for row in rows.values() for each in row.values["gradient"])
        return (
            f"Networks are trained on {self.learned} pictures with Adam, in batches of {BATCH}; those attacked are "
            "among them. Gradients are in float32, one sample each.",
            f"The smallest gradient has a norm of {least:.1e}. float32 keeps seven digits of any value above 1e-38, so "
            "that a small gradient is as telling as a large one until it underflows; what a saturated loss loses is "
            "the last layer's k, a difference of two numbers that are nearly equal.",
        )
