"""Whole batches in closed form: how many samples are certified, how near they are, how many are certified wrongly.

    python benchmarks/batches.py --data FOLDER [--only TEXT] [--batches 3] [--out FILE]

FOLDER holds `cifar10` and `mnist`, each with one subfolder of pictures for each class. Every gradient is in float32,
weights are drawn as torch draws them, nothing is told but the number of samples. A sample is right where its picture,
or its features where a row says so, has a mean squared error below 1e-4 with the right label; one that is certified and
is not right is wrong. Seconds are those of this machine, the largest of a row's batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rgap import Target, attacks, capture, data, losses, models

RIGHT = 1e-4
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "tanh": nn.Tanh,
    "GELU": nn.GELU,
    "sigmoid": nn.Sigmoid,
}


@dataclass(frozen=True)
class Row:
    name: str
    model: Callable[[], nn.Module]
    samples: int
    pictures: str = "cifar10"
    classes: int = 10
    centred: bool = False
    """Whether the mean is removed: values from -2 to 2 instead of 0 to 1."""
    size: int = 0
    """Of a side, if not the pictures' own."""
    distinct: bool = False
    """Whether no two samples of a batch have one label."""


def perceptron(widths: tuple[int, ...], activation: str, bias: bool = True) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs, bias=bias), ACTIVATIONS[activation]()]
        return nn.Sequential(*layers[:-1])

    return make


def headed(body: Callable[[], nn.Module], inputs: int, width: int = 128) -> Callable[[], nn.Module]:
    """A network without its last layer, and two Linear layers behind."""

    def make() -> nn.Module:
        layers = list(body().children())[:-1]
        torch.manual_seed(0)
        return nn.Sequential(*layers, nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, 10))

    return make


def small() -> nn.Module:
    """Three convolutions and two Linear layers, for pictures of 16 x 16."""
    torch.manual_seed(0)
    act = ACTIVATIONS["LeakyReLU"]
    convolutions = [nn.Conv2d(3, 12, 4, 2, 2, bias=False), nn.Conv2d(12, 36, 3, 2, 1, bias=False)]
    body = [layer for each in convolutions for layer in (each, act())]
    body += [nn.Conv2d(36, 36, 3, 1, 1, bias=False), act(), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(900, 128), act(), nn.Linear(128, 10))


def with_classes(body: Callable[[], nn.Module], classes: int) -> Callable[[], nn.Module]:
    """A network whose last layer, `fc`, has another number of outputs."""

    def make() -> nn.Module:
        model = body()
        last = model.fc
        assert isinstance(last, nn.Linear)
        torch.manual_seed(0)
        model.fc = nn.Linear(last.in_features, classes)
        return model

    return make


WIDTHS = (3072, 512, 256, 10)
ROWS = [
    *(Row(f"3072-512-256-10, {act}", perceptron(WIDTHS, act), b) for act in ACTIVATIONS for b in (8, 16, 32, 64)),
    *(
        Row(f"3072-512-256-10, {act}, no biases", perceptron(WIDTHS, act, False), b)
        for act in ACTIVATIONS
        for b in (8, 32)
    ),
    *(
        Row(f"3072-512-256-10, {act}, mean removed", perceptron(WIDTHS, act), 64, centred=True)
        for act in ("ReLU", "tanh")
    ),
    Row("3072-1000-256-10, ReLU", perceptron((3072, 1000, 256, 10), "ReLU"), 128),
    *(Row("784-1000-256-10, ReLU", perceptron((784, 1000, 256, 10), "ReLU"), b, "mnist") for b in (64, 128)),
    Row("200 wide, 6 layers, ReLU, 3 x 224 x 224", perceptron((150528, *[200] * 5, 10), "ReLU"), 20, size=224),
    *(
        Row(
            f"FCN3, {act}, {'biases' if bias else 'no biases'}",
            perceptron((784, 1000, 100, 1), act, bias),
            b,
            "mnist",
            2,
        )
        for act in ("LeakyReLU", "ReLU")
        for bias in (False, True)
        for b in (2, 5)
    ),
    *(
        Row(f"one hidden layer, 3072-512-1, {act}", perceptron((3072, 512, 1), act), b, classes=2)
        for act in ("ReLU", "LeakyReLU")
        for b in (4, 8, 16, 32, 64)
    ),
    *(Row("3 convolutions, 16 x 16", small, b, size=16, distinct=True) for b in (1, 2, 4, 8)),
    *(Row("CNN6, two Linear layers", headed(models.cnn6, 3200), b, distinct=True) for b in (1, 2, 3)),
    *(
        Row(
            f"features of ResNet-20, {classes} classes",
            with_classes(models.resnet20, classes),
            b,
            classes=classes,
            distinct=True,
        )
        for classes, b in ((10, 4), (100, 16), (100, 32))
    ),
]


def drawn(row: Row, pictures: data.Images, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(pictures), generator=generator)[: row.samples]
    x = pictures.inputs[chosen]
    if row.size:
        x = nn.functional.interpolate(x, size=(row.size, row.size), mode="area" if row.size < 32 else "bicubic").clamp(
            0, 1
        )
    x = (x - 0.5) / 0.25 if row.centred else x
    if row.distinct:
        labels = torch.randperm(row.classes, generator=generator)[: row.samples]
    else:
        labels = torch.randint(row.classes, (row.samples,), generator=generator)
    return x.float(), (2.0 * labels - 1 if row.classes == 2 else labels.float())


def run(row: Row, pictures: data.Images, batches: int) -> dict[str, Any]:
    loss = losses.Logistic() if row.classes == 2 else losses.CrossEntropy(row.classes)
    value_range = (-2.0, 2.0) if row.centred else (0.0, 1.0)
    features = row.name.startswith("features")
    errors: list[float] = []
    certified = wrong = labels_right = 0
    seconds, statuses = [], []
    model = row.model().eval()
    for seed in range(batches):
        x, labels = drawn(row, pictures, seed)
        target = Target(model, loss, tuple(x.shape[1:]), value_range, batch_size=row.samples)
        found = attacks.Closed()(target, capture(target, x, labels))
        truth, given, verdicts = x.double().flatten(1), None, [sample.status for sample in found.samples]
        if features and found.features is not None:
            given, told = found.features.values.flatten(1), found.features.labels
            at = target.network.layers[-1].input_shape
            truth = target.network.forward(x.double())[-2].reshape(row.samples, *at).flatten(1)
            verdicts = [attacks.Status.EXACT] * len(given)
        elif found.answers:
            given, told = found.inputs.flatten(1), found.labels
        seconds.append(found.seconds)
        statuses.append(found.status.value)
        if given is None:
            errors += [float("nan")] * row.samples
            continue
        apart = torch.cdist(given, truth).square() / truth.shape[1]
        nearest = apart.argmin(1)
        right = (apart.min(1).values < RIGHT) & (told == labels.double()[nearest])
        exact = torch.tensor([verdict is attacks.Status.EXACT for verdict in verdicts])
        certified += int((right & exact).sum())
        wrong += int((~right & exact).sum())
        labels_right += len(set(nearest[right].tolist()))
        errors += apart.min(0).values.tolist()
    known = sorted(error for error in errors if error == error)
    return {
        "network": row.name,
        "samples": row.samples,
        "batches": batches,
        "certified": f"{certified} of {batches * row.samples}",
        "labels": f"{labels_right} of {batches * row.samples}",
        "wrong": wrong,
        "median MSE": statistics.median(known) if known else float("nan"),
        "worst MSE": known[-1] if known else float("nan"),
        "status": {status: statuses.count(status) for status in sorted(set(statuses))},
        "seconds": max(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="", help="rows whose name, or name and number of samples, contains this")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    chosen = [row for row in ROWS if arguments.only in f"{row.name} b={row.samples}"]
    channels = {"cifar10": 3, "mnist": 1}
    names = sorted({row.pictures for row in chosen})
    pictures = {name: data.folder(arguments.data / name, channels=channels[name]) for name in names}
    table, results = Table("network", "b", "certified", "labels", "wrong", "median MSE", "worst MSE", "seconds"), []
    for row in chosen:
        found = run(row, pictures[row.pictures], arguments.batches)
        results.append(found)
        print(json.dumps(found), flush=True)
        mse = [f"{found[name]:.1e}" for name in ("median MSE", "worst MSE")]
        table.add_row(
            row.name,
            str(row.samples),
            found["certified"],
            found["labels"],
            str(found["wrong"]),
            *mse,
            f"{found['seconds']:.1f}",
        )
    Console().print(table)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
