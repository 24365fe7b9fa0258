"""Inverting Gradients on untrained networks, beside the figures that its authors report.

Source: J. Geiping, H. Bauermeister, H. Droege and M. Moeller, *Inverting Gradients - How easy is it to break privacy in
federated learning?*, NeurIPS 2020, arXiv:2003.14053, and the notebooks published with it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import nn

from rgap import losses, models
from rgap.attacks import IDLG, LBFGS, FeatureMatching, InvertingGradients, Matching
from rgap.picture import grid, name_row, show
from rgap.reproductions.base import Job, Options, Reproduction, judged, of
from rgap.store import Row
from rgap.target import Target
from rgap.update import capture

CLASSES = 10
SHAPE = (3, 32, 32)
VALUE_RANGE = (0.0, 1.0)
CHUNK = 10
"""Pictures of one job, which are attacked together."""
DEVIATION = 0.25
"""Of the pixels of CIFAR-10, about: the authors divide by it, so that their total variation weighs four times ours."""


@dataclass(frozen=True)
class Setting:
    """One network under one attack.

    Args:
        name: for people.
        build: from a seed.
        attack: its settings.
        paper: PSNR in decibels that the authors report, and where.
        most: pictures at the most; large networks take minutes for each.
    """

    name: str
    build: Callable[..., nn.Module]
    attack: Matching
    paper: str
    most: int = 1000


SETTINGS = (
    Setting(
        "LeNet, InvertingGradients",
        models.lenet,
        InvertingGradients(iterations=4800, variation=1e-2 / DEVIATION),
        "18.00 +- 3.33",
    ),
    Setting("LeNet, L-BFGS", models.lenet, IDLG(minimiser=LBFGS(history=20), iterations=2000), "-"),
    Setting("LeNet, FeatureMatching", models.lenet, FeatureMatching(), "-"),
    Setting(
        "ConvNet64, InvertingGradients",
        models.convnet,
        InvertingGradients(iterations=4000, variation=1e-6 / DEVIATION),
        "about 28.0",
        most=1,
    ),
)


@dataclass(frozen=True)
class Inverting(Reproduction):
    """Each setting on its pictures."""

    name: ClassVar[str] = "inverting-gradients"

    settings: tuple[Setting, ...] = SETTINGS

    def jobs(self, options: Options, count: int) -> Sequence[Job]:
        return [
            Job(f"{setting.name}, {start}", partial(self._attack, setting, options, count, start))
            for setting in self.settings
            for start in range(0, min(count, setting.most), CHUNK)
        ]

    def _attack(self, setting: Setting, options: Options, count: int, start: int) -> Row:
        at = range(start, min(start + CHUNK, count, setting.most))
        pictures = options.colour(count).inputs[start : start + len(at)]
        labels = torch.tensor([float(each % CLASSES) for each in at])
        target = Target(setting.build(seed=options.seed), losses.CrossEntropy(CLASSES), SHAPE, VALUE_RANGE)
        updates = [capture(target, x[None], y[None]) for x, y in zip(pictures, labels, strict=True)]
        found = setting.attack.many(target, updates)
        inputs = torch.cat([each.inputs for each in found])
        values = {"setting": setting.name, **judged(found, pictures, labels)}
        return Row(values, {"inputs": inputs.float(), "truth": pictures})

    def column(self, rows: Mapping[str, Row], setting: Setting, name: str) -> list[Any]:
        """One figure of every picture."""
        return [value for row in of(rows, setting=setting.name) for value in row.values[name]]

    def table(self, rows: Mapping[str, Row]) -> Table:
        numbers = ("ours", "deviation", "mean SSIM", "pictures", "label right", "s a picture")
        table = self.new_table(("network, attack", "paper"), numbers)
        for name, found in self.summary(rows).items():
            deviation = "-" if found["deviation"] is None else f"{found['deviation']:.2f}"
            ours = (f"{found['psnr']:.2f}", deviation, f"{found['ssim']:.2f}", str(found["pictures"]))
            table.add_row(name, found["paper"], *ours, str(found["label right"]), f"{found['seconds']:.0f}")
        return table

    def summary(self, rows: Mapping[str, Row]) -> dict[str, Any]:
        found = {}
        for setting in self.settings:
            psnr, ssim, seconds = (self.column(rows, setting, name) for name in ("psnr", "ssim", "seconds"))
            found[setting.name] = {
                "paper": setting.paper,
                "psnr": statistics.fmean(psnr),
                "deviation": statistics.stdev(psnr) if len(psnr) > 1 else None,
                "pictures": len(psnr),
                "ssim": statistics.fmean(ssim),
                "label right": sum(self.column(rows, setting, "label right")),
                "seconds": statistics.fmean(seconds),
            }
        return found

    def draw(self, rows: Mapping[str, Row]) -> Figure:
        columns = min(6, max(len(self.column(rows, setting, "psnr")) for setting in self.settings))
        figure, axes = grid(2 * len(self.settings), columns)
        for block, setting in enumerate(self.settings):
            own = of(rows, setting=setting.name)
            truth, inputs = (torch.cat([row.tensors[name] for row in own]) for name in ("truth", "inputs"))
            for at, psnr in enumerate(self.column(rows, setting, "psnr")[:columns]):
                above, below = axes[2 * block][at], axes[2 * block + 1][at]
                show(above, truth[at], VALUE_RANGE)
                show(below, inputs[at], VALUE_RANGE)
                below.set_title(f"{psnr:.1f} dB", fontsize=7)
            name_row(axes[2 * block + 1][0], setting.name.replace(", ", "\n"), 1.1)
        return figure

    def remarks(self, rows: Mapping[str, Row]) -> Sequence[str]:
        return (
            "LeNet: the authors' mean over the first 100 CIFAR-10 validation pictures, cosine distance, signed Adam of "
            "rate 0.1, 4,800 iterations, total variation 0.01, one start. Ours: the same, in values from 0 to 1.",
            "ConvNet64: the authors' notebook shows 16.03 dB for one picture of a car with values divided by their "
            "standard deviation, 4,000 iterations, total variation 1e-6; with values from 0 to 1 it is about 28.0 dB. "
            "The model is in evaluation mode there and here.",
            "The authors know the label or infer it; here it is inferred from the last layer's gradient.",
            "L-BFGS on the squared distance, DLG's setting, comes far nearer on a smooth network such as LeNet.",
        )
