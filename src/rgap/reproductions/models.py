"""Models that people train, and the attacks on each: rank analysis, recursion, joint solve, bias and matching.

No table of the paper: it asks which of today's models the closed form passes, and what stops it at the others.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from rgap import losses, models
from rgap.attacks import IDLG, Attack, Bias, Closed, Recursive, Status
from rgap.attacks.presets import SIGNED_ADAM
from rgap.losses import Loss
from rgap.models.common import leaky_relu
from rgap.rank import rank_analysis
from rgap.reproductions.base import Job, Options, Reproduction, judged, median_and_worst
from rgap.store import Row
from rgap.target import Target
from rgap.update import capture

SHAPE, VALUE_RANGE = (3, 32, 32), (0.0, 1.0)
EXACT = Status.EXACT.value
SETTLED = 64
"""Pictures that batch norm's statistics are taken from; none of them is attacked."""
CLASSES = losses.CrossEntropy(10)


@dataclass(frozen=True)
class Cell:
    """A model, its loss, and how many of the pictures the slow attacks take."""

    name: str
    build: Callable[..., nn.Module]
    """From a seed."""
    loss: Loss
    matched: int = 1
    """Pictures for gradient matching."""


PLAIN = partial(models.resnet20, norm=False, pool=False, shortcut="conv", activation=leaky_relu)
CELLS = (
    Cell("CNN6, logistic", models.cnn6, losses.Logistic(), 20),
    Cell("CNN6-d, logistic", models.cnn6_d, losses.Logistic(), 20),
    Cell("MLP 512-128", partial(models.mlp, 3072, (512, 128), 10), CLASSES, 20),
    Cell("LeNet, sigmoid", models.lenet, CLASSES, 20),
    Cell("VGG-11, strided", models.vgg11, CLASSES, 1),
    Cell("residual, logistic", models.residual, losses.Logistic(), 2),
    Cell("residual, batch norm", partial(models.residual, classes=10, norm=True), CLASSES, 2),
    Cell("ResNet-20, no norm, no pool", PLAIN, CLASSES, 1),
    Cell("ResNet-20", models.resnet20, CLASSES, 1),
    Cell("ResNet-18", partial(models.resnet18, classes=10), CLASSES, 1),
    Cell("ConvNet-64", models.convnet, CLASSES, 1),
    Cell("ViT-tiny", models.vit_tiny, CLASSES, 1),
)


@dataclass(frozen=True)
class Models(Reproduction):
    """All models.

    Args:
        cells: models and losses.
        iterations: of gradient matching.
    """

    name: ClassVar[str] = "models"

    cells: tuple[Cell, ...] = CELLS
    iterations: int = 200

    @property
    def attacks(self) -> dict[str, Attack]:
        matching = IDLG(minimiser=SIGNED_ADAM, boxed=True, iterations=self.iterations, dtype=torch.float32)
        return {"recursive": Recursive(), "joint": Closed(), "bias": Bias(), "matching": matching}

    def jobs(self, options: Options, count: int) -> Sequence[Job]:
        found = []
        for cell in self.cells:
            found.append(Job(f"{cell.name}, rank", partial(self._rank, cell, options)))
            for name in self.attacks:
                pictures = min(count, cell.matched) if name == "matching" else count
                for at in range(pictures):
                    found.append(Job(f"{cell.name}, {name}, {at}", partial(self._attack, cell, name, options, at)))
        return found

    def _target(self, cell: Cell, options: Options) -> tuple[Target, Tensor]:
        """With the pictures, and batch norm as it is on others."""
        images = options.colour(self.entry.count if options.count is None else options.count).inputs
        model = cell.build(seed=options.seed)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            generator = torch.Generator().manual_seed(options.seed)
            mixed = images[torch.randint(len(images), (SETTLED,), generator=generator)]
            models.settled(model, mixed.flip(-1))
        return Target(model, cell.loss, SHAPE, VALUE_RANGE), images

    def _rank(self, cell: Cell, options: Options) -> Row:
        target, _ = self._target(cell, options)
        found = rank_analysis(target, measure=False)
        worst = max((layer for layer in found.layers), key=lambda layer: layer.index)
        return Row({"layer": worst.name, "index": worst.index, "layers": len(found.layers)}, {})

    def _attack(self, cell: Cell, name: str, options: Options, at: int) -> Row:
        target, images = self._target(cell, options)
        choices = target.loss.examples
        y = torch.tensor([choices[at % len(choices)]])
        attack, x = self.attacks[name], images[at : at + 1]
        reason = attack.obstacle(target, 1)
        if reason is not None:
            return Row({"status": "does not apply", "reason": reason, "mse": None, "seconds": 0.0}, {})
        found = attack(target, capture(target, x, y))
        values = {name: each[0] for name, each in judged([found], x, y).items()}
        return Row(values, {"inputs": found.inputs.float()} if found.answers else {})

    def outcomes(self, rows: Mapping[str, Row], cell: Cell, name: str) -> list[Mapping[str, Any]]:
        """One attack on all pictures of a model."""
        start = f"{cell.name}, {name}, "
        return [row.values for key, row in rows.items() if key.startswith(start)]

    def table(self, rows: Mapping[str, Row]) -> Table:
        table = self.new_table(("model", "attack"), ("pictures", "median MSE", "worst", "s a picture"))
        table.add_column("status")
        table.add_column("reason", max_width=60)
        for cell in self.cells:
            rank = rows[f"{cell.name}, rank"].values
            worst_index = f"worst index {rank['index']} at {rank['layer']}, of {rank['layers']} layers"
            table.add_row(cell.name, "rank", "", "", "", "", "leaks" if rank["index"] <= 0 else "protects", worst_index)
            for name in self.attacks:
                own = self.outcomes(rows, cell, name)
                if not own:
                    continue
                status, count = Counter(each["status"] for each in own).most_common(1)[0]
                numbers = (str(len(own)), *median_and_worst(each["mse"] for each in own))
                seconds = f"{statistics.fmean(each['seconds'] for each in own):.2f}"
                status_shown = status if count == len(own) else f"{status} ({count} of {len(own)})"
                table.add_row("", name, *numbers, seconds, status_shown, "" if status == EXACT else own[0]["reason"])
            table.add_section()
        return table

    def summary(self, rows: Mapping[str, Row]) -> dict[str, Any]:
        return {
            cell.name: {
                "rank": rows[f"{cell.name}, rank"].values,
                **{
                    name: {
                        "pictures": len(own),
                        "median": statistics.median(mse) if mse else None,
                        "worst": max(mse) if mse else None,
                        "exact": sum(each["status"] == EXACT for each in own),
                        "exact and wrong": sum(each["status"] == EXACT and each["mse"] > WRONG for each in own),
                        "seconds": statistics.fmean(each["seconds"] for each in own),
                        "reason": own[0]["reason"],
                    }
                    for name in self.attacks
                    if (own := self.outcomes(rows, cell, name))
                    for mse in [[each["mse"] for each in own if each["mse"] is not None]]
                },
            }
            for cell in self.cells
        }

    def draw(self, rows: Mapping[str, Row]) -> Figure:
        figure = Figure(figsize=(9, 0.45 * len(self.cells) + 1.6), layout="constrained", dpi=150)
        ax = figure.subplots()
        colours = {"recursive": "tab:blue", "joint": "tab:purple", "bias": "tab:orange", "matching": "tab:grey"}
        for at, (name, colour) in enumerate(colours.items()):
            points = [
                (max(each["mse"], 1e-20), row + 0.15 * (at - 1.5))
                for row, cell in enumerate(self.cells)
                for each in self.outcomes(rows, cell, name)
                if each["mse"] is not None
            ]
            ax.scatter([x for x, _ in points], [y for _, y in points], s=9, color=colour, label=name)
        ax.set_xscale("log")
        ax.set_yticks(range(len(self.cells)), [cell.name for cell in self.cells], fontsize=8)
        ax.invert_yaxis()
        ax.grid(axis="x", alpha=0.3)
        ax.set_xlabel("MSE of each picture, values in [0, 1]; no point where an attack has no answer")
        ax.legend(fontsize=7)
        return figure

    def remarks(self, rows: Mapping[str, Row]) -> Sequence[str]:
        found = self.summary(rows).values()
        wrong = sum(own["exact and wrong"] for cell in found for name, own in cell.items() if name != "rank")
        return (
            "Weights are as torch draws them; batch norm has statistics of other pictures. Nothing is told to any "
            "attack.",
            f"Of all answers that were called exact {wrong} are off by more than an MSE of {WRONG:g}.",
            f"Matching is {self.iterations} iterations of signed Adam from one start, and takes fewer pictures of the "
            "large models.",
        )


WRONG = 1e-6
"""An answer called exact whose MSE is above this is wrong."""
