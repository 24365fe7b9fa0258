"""Whole batches in closed form: how many samples are certified, how near they are, how many are certified wrongly.

    python benchmarks/batches.py --data FOLDER [--only TEXT] [--batches 3] [--out FILE]

FOLDER holds `cifar10` and `mnist`, each with one subfolder of pictures for each class. Every gradient is in float32,
weights are drawn as torch draws them, nothing is told but the number of samples. A sample is right where its picture,
or its features where a row says so, has a mean squared error below 1e-4 with the right label; one that is certified and
is not right is wrong. Seconds are those of this machine, the largest of a row's batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from rows import ACTIVATIONS, Tally, measure, parser, perceptron
from torch import Tensor, nn

from rgap import Protocol, Target, attacks, capture, data, losses, models
from rgap.linalg import deadline


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
    training: bool = False
    """Whether batch norms are in training mode, and their running statistics before and after the step are sent."""

    def __str__(self) -> str:
        return f"{self.name} b={self.samples}"


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


FEATURES = 15.0
"""Seconds for a batch whose features alone count: what is in front of them is not waited for."""
WIDTHS = (3072, 512, 256, 10)


def normed_perceptron(activation: str, last: bool) -> nn.Module:
    """Linear layers with batch norms behind all but the last one, or but the last two."""
    torch.manual_seed(0)
    widths, act = (784, 1000, 200, 10), ACTIVATIONS[activation]
    layers: list[nn.Module] = [nn.Flatten()]
    for at, (inputs, outputs) in enumerate(pairwise(widths[:-1])):
        norm = [nn.BatchNorm1d(outputs)] if last or not at else []
        layers += [nn.Linear(inputs, outputs), *norm, act()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


def normed_convolutions(activation: str) -> nn.Module:
    """Two convolutions of stride 2 with batch norms, and two Linear layers, for pictures of 32 x 32."""
    torch.manual_seed(0)
    act = ACTIVATIONS[activation]
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 24), (24, 48)):
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), act()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 64, 128), act(), nn.Linear(128, 10))


ROWS = [
    *(
        Row(f"3072-512-256-10, {act}", partial(perceptron, WIDTHS, act), b)
        for act in ACTIVATIONS
        for b in (8, 16, 32, 64)
    ),
    *(
        Row(f"3072-512-256-10, {act}, no biases", partial(perceptron, WIDTHS, act, False), b)
        for act in ACTIVATIONS
        for b in (8, 16, 32, 64)
    ),
    *(
        Row(f"3072-512-256-10, {act}, mean removed", partial(perceptron, WIDTHS, act), 64, centred=True)
        for act in ("ReLU", "tanh")
    ),
    Row("3072-1000-256-10, ReLU", partial(perceptron, (3072, 1000, 256, 10), "ReLU"), 128),
    *(Row("784-1000-256-10, ReLU", partial(perceptron, (784, 1000, 256, 10), "ReLU"), b, "mnist") for b in (64, 128)),
    Row("200 wide, 6 layers, ReLU, 3 x 224 x 224", partial(perceptron, (150528, *[200] * 5, 10), "ReLU"), 20, size=224),
    *(
        Row(
            f"FCN3, {act}, {'biases' if bias else 'no biases'}",
            partial(perceptron, (784, 1000, 100, 1), act, bias),
            b,
            "mnist",
            2,
        )
        for act in ("LeakyReLU", "ReLU")
        for bias in (False, True)
        for b in (2, 5)
    ),
    *(
        Row(f"one hidden layer, 3072-512-1, {act}", partial(perceptron, (3072, 512, 1), act), b, classes=2)
        for act in ("ReLU", "LeakyReLU")
        for b in (4, 8, 16, 32, 64)
    ),
    *(Row("3 convolutions, 16 x 16", small, b, size=16, distinct=True) for b in (1, 2, 4, 8)),
    *(Row("CNN6, two Linear layers", headed(models.cnn6, 3200), b, distinct=True) for b in (1, 2, 3, 4, 6, 8)),
    *(Row("residual, two Linear layers", headed(models.residual, 3200), b, distinct=True) for b in (2, 4, 8)),
    *(
        Row(
            f"784-1000-200-10, batch norm in training mode{where}, {act}",
            partial(normed_perceptron, act, last),
            b,
            "mnist",
            distinct=True,
            training=True,
        )
        for act in ("ReLU", "LeakyReLU", "tanh")
        for last, b, where in (
            (True, 4, ""),
            (False, 4, " behind the first layer"),
            (False, 8, " behind the first layer"),
        )
    ),
    *(
        Row(
            f"two convolutions, batch norm in training mode, {act}",
            partial(normed_convolutions, act),
            b,
            distinct=True,
            training=True,
        )
        for act in ("ReLU", "LeakyReLU")
        for b in (1, 2, 4)
    ),
    Row(
        "residual, batch norm in training mode",
        partial(models.residual, classes=10, norm=True),
        1,
        distinct=True,
        training=True,
    ),
    *(
        Row(
            "residual, batch norm in training mode, two Linear layers",
            headed(partial(models.residual, norm=True), 3200),
            b,
            distinct=True,
            training=True,
        )
        for b in (1, 2, 4)
    ),
    Row("LeNet of DLG", models.lenet, 2, distinct=True),
    Row("LeNet of DLG, 100 classes", with_classes(models.lenet, 100), 16, classes=100, distinct=True),
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
    Row("features of ConvNet-64, 10 classes", models.convnet, 4, distinct=True),
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
    tally = Tally()
    seconds, statuses = [], []
    model = row.model().train(row.training)
    protocol = Protocol(buffers=row.training)
    for seed in range(batches):
        x, labels = drawn(row, pictures, seed)
        target = Target(model, loss, tuple(x.shape[1:]), value_range, batch_size=row.samples)
        update = capture(target, x, labels, protocol)
        with deadline.within(FEATURES if features else None):
            found = attacks.Closed()(target, update)
        seconds.append(found.seconds)
        statuses.append(found.status.value)
        if features and found.features is not None:
            given, told = found.features.values.flatten(1), found.features.labels
            at = target.network.layers[-1].input_shape
            truth = target.network.forward(x.double())[-2].reshape(row.samples, *at).flatten(1)
            tally.add(given, told, [attacks.Status.EXACT] * len(given), truth, labels)
        elif found.answers:
            verdicts = [sample.status for sample in found.samples] or [found.status]
            tally.add(found.inputs.flatten(1), found.labels, verdicts, x.double().flatten(1), labels)
    return {
        "network": row.name,
        "samples": row.samples,
        "batches": batches,
        **tally.figures(batches * row.samples),
        "status": {status: statuses.count(status) for status in sorted(set(statuses))},
        "seconds": max(seconds),
    }


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--batches", type=int, default=3)
    arguments = asked.parse_args()

    def one(row: Row) -> dict[str, Any]:
        pictures = data.folder(arguments.data / row.pictures, channels=1 if row.pictures == "mnist" else 3)
        return run(row, pictures, arguments.batches)

    columns = ("certified", "found", "wrong", "median MSE", "worst MSE", "seconds")
    measure(((str(row), partial(one, row)) for row in ROWS), arguments.only, "network", columns, arguments.out)


if __name__ == "__main__":
    main()
