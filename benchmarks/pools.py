"""Networks with ReLU and maximum pools: how many pictures come back exactly, one picture for each gradient.

    python benchmarks/pools.py --data FOLDER [--only TEXT] [--pictures 20] [--first 0] [--epochs 5] [--out FILE]

FOLDER holds `cifar10` and `mnist`, with one subfolder of pictures for each class. Weights are float32 as torch draws
them, anew for each picture, gradients float32, labels the pictures' own; nothing is told. With --epochs one network has
learned all other pictures for so long, by Adam at a rate of 1e-3 in batches of 16. Seconds of the process, one thread.
A wrong picture that is called exact is counted: there should be none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rows import measure, parser
from torch import Tensor, nn

from rgap import Target, attacks, capture, data, losses, models
from rgap.linalg import deadline
from rgap.training import accuracy, train

WRONG = 1e-4
"""Mean squared error above which an exact picture is wrong."""


def mcmahan(channels: int, size: int, padding: int = 2, pool: type[nn.Module] = nn.MaxPool2d) -> nn.Sequential:
    """The network of FedAvg (McMahan et al. 2017): two 5 x 5 convolutions of 32 and 64, each with a pool, 512 wide."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 32, 5, padding=padding), nn.ReLU(), pool(2)),
        *(nn.Conv2d(32, 64, 5, padding=padding), nn.ReLU(), pool(2)),
        *(nn.Flatten(), nn.LazyLinear(512), nn.ReLU(), nn.Linear(512, 10)),
    )


def example(channels: int, size: int) -> nn.Sequential:
    """The network of PyTorch's MNIST example, its dropout off."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.LazyLinear(128), nn.ReLU(), nn.Linear(128, 10)),
    )


def quickstart(channels: int, size: int) -> nn.Sequential:
    """The network of PyTorch's CIFAR-10 tutorial: 6 and 16 channels."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.LazyLinear(120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def stem(channels: int, size: int) -> nn.Sequential:
    """A beginning as AlexNet's: overlapping pools of 3 with stride 2."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 64, 7, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Flatten(), nn.LazyLinear(256), nn.ReLU(), nn.Linear(256, 10)),
    )


def le_net(activation: Callable[[], nn.Module]) -> Callable[[int, int], nn.Sequential]:
    """LeNet-5 with average pooling."""

    def make(channels: int, size: int) -> nn.Sequential:
        return nn.Sequential(
            *(nn.Conv2d(channels, 6, 5, padding=2), activation(), nn.AvgPool2d(2)),
            *(nn.Conv2d(6, 16, 5), activation(), nn.AvgPool2d(2), nn.Flatten()),
            *(nn.LazyLinear(120), activation(), nn.Linear(120, 84), activation(), nn.Linear(84, 10)),
        )

    return make


def surrogate(channels: int, size: int) -> nn.Sequential:
    """The networks of SME (Zhu, Yao and Blaschko 2023, arXiv:2306.00127) with average pooling: for pictures in colour
    twice as wide as for others."""
    wide = 64 if channels == 3 else 32
    return nn.Sequential(
        *(nn.Conv2d(channels, wide, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(wide, 2 * wide, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.LazyLinear(200 if channels == 3 else 100), nn.ReLU(), nn.LazyLinear(10)),
    )


def vgg(channels: int, size: int) -> nn.Sequential:
    """VGG-11 in its form for CIFAR-10, with maximum pools."""
    layers: list[nn.Module] = []
    for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        channels = width or channels
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))


def res_net(channels: int, size: int) -> nn.Module:
    """ResNet-18 in its form for CIFAR-10: it begins with 3 x 3 and no maximum, and ends in a mean over all places."""
    model = models.resnet18(channels, size, 10)
    model.conv, model.maximum = nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.Identity()
    return model


ROWS: dict[str, tuple[Callable[[int, int], nn.Module], str, int | None]] = {
    "PyTorch's MNIST example": (example, "mnist", None),
    "FedAvg's network, MNIST": (mcmahan, "mnist", None),
    "FedAvg's network without padding, MNIST": (lambda c, s: mcmahan(c, s, 0), "mnist", None),
    "FedAvg's network, CIFAR-10": (mcmahan, "cifar10", None),
    "FedAvg's network with average pools, MNIST": (lambda c, s: mcmahan(c, s, 2, nn.AvgPool2d), "mnist", None),
    "FedAvg's network with average pools, CIFAR-10": (lambda c, s: mcmahan(c, s, 2, nn.AvgPool2d), "cifar10", None),
    "SME's network with average pools, MNIST": (surrogate, "mnist", None),
    "SME's network with average pools, CIFAR-10": (surrogate, "cifar10", None),
    "PyTorch's tutorial network, CIFAR-10": (quickstart, "cifar10", None),
    "AlexNet-like beginning, CIFAR-10": (stem, "cifar10", None),
    "AlexNet-like beginning, CIFAR-10 enlarged to 64 x 64": (stem, "cifar10", 64),
    "VGG-11, CIFAR-10": (vgg, "cifar10", None),
    "ResNet-18, CIFAR-10": (res_net, "cifar10", None),
    "ConvNet-64, CIFAR-10": (models.convnet, "cifar10", None),
    "LeNet-5, average pools, sigmoid, MNIST": (le_net(nn.Sigmoid), "mnist", None),
    "LeNet-5, average pools, tanh, MNIST": (le_net(nn.Tanh), "mnist", None),
    "LeNet-5, average pools, ReLU, MNIST": (le_net(nn.ReLU), "mnist", None),
}
"""What makes each network, its pictures, and the size to which they are enlarged."""


@dataclass(frozen=True)
class Pictures:
    """Those of a data set that are attacked, and the others."""

    x: Tensor
    y: Tensor
    others: Tensor
    others_y: Tensor


def pictures_of(folder: Path, kind: str, size: int | None, count: int) -> Pictures:
    images = data.folder(folder / kind, size, channels=1 if kind == "mnist" else 3)
    classes = sorted(set(images.classes))
    labels = torch.tensor([float(classes.index(each)) for each in images.classes])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    first, rest = order[:count], order[count:]
    inputs = images.inputs.float()
    return Pictures(inputs[first], labels[first], inputs[rest], labels[rest])


def network(name: str, pictures: Pictures, epochs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = ROWS[name][0](pictures.x.shape[1], pictures.x.shape[-1]).eval()
    model(pictures.x[:1])
    train(model.train(), losses.CrossEntropy(10), pictures.others, pictures.others_y, epochs, 1e-3, 16, seed)
    return model.eval()


def learned(model: nn.Module, pictures: Pictures) -> dict[str, float]:
    """The loss on the pictures it has learned, the share of them that it labels right, and of those attacked."""
    with torch.no_grad():
        batches = zip(pictures.others.split(64), pictures.others_y.split(64), strict=True)
        loss = sum(float(losses.CrossEntropy(10)(model(x), y)) * len(x) for x, y in batches) / len(pictures.others)
    right = accuracy(model, pictures.others, pictures.others_y)
    return {"loss": loss, "learned": right, "labelled right": accuracy(model, pictures.x, pictures.y)}


def run(name: str, pictures: Pictures, first: int, epochs: int, limit: float) -> dict[str, Any]:
    trained = network(name, pictures, epochs, 0) if epochs else None
    exact, wrong, errors, seconds, reasons = 0, 0, [], [], []
    for at in range(first, len(pictures.x)):
        x, y = pictures.x[at : at + 1], pictures.y[at : at + 1]
        model = trained or network(name, pictures, 0, at)
        target = Target(model, losses.CrossEntropy(10), tuple(x.shape[1:]), (0.0, 1.0))
        update = capture(target, x, y)
        start = time.process_time()
        with deadline.within(limit):
            found = attacks.Closed()(target, update)
        seconds.append(time.process_time() - start)
        reasons.append(f"{found.status.value}: {found.reason}")
        error = float((found.inputs - x).square().mean()) if found.answers else float("nan")
        errors += [error] if found.answers else []
        certified = found.status is attacks.Status.EXACT
        exact += int(certified)
        wrong += int(certified and not error < WRONG)
    return {
        "network": name,
        "exact": f"{exact} of {len(seconds)}",
        **(learned(trained, pictures) if trained else {}),
        "wrong": wrong,
        "median MSE": statistics.median(errors) if errors else float("nan"),
        "worst MSE": max(errors, default=float("nan")),
        "seconds": statistics.median(seconds),
        "most seconds": max(seconds),
        "status": reasons,
    }


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--pictures", type=int, default=20)
    asked.add_argument("--first", type=int, default=0, help="the first of these that is attacked")
    asked.add_argument("--epochs", type=int, default=0, help="of training")
    asked.add_argument("--limit", type=float, default=240.0, help="seconds for a picture")
    arguments = asked.parse_args()
    if not 0 <= arguments.first < arguments.pictures:
        asked.error(f"got --first {arguments.first} of --pictures {arguments.pictures}: expected 0 or more, and less")
    torch.set_num_threads(1)
    columns = ("exact", "wrong", "median MSE", "worst MSE", "seconds", "most seconds")

    def one(name: str, kind: str, size: int | None) -> dict[str, Any]:
        pictures = pictures_of(arguments.data, kind, size, arguments.pictures)
        return run(name, pictures, arguments.first, arguments.epochs, arguments.limit)

    rows = ((name, partial(one, name, kind, size)) for name, (_, kind, size) in ROWS.items())
    measure(rows, arguments.only, "network", columns, arguments.out)


if __name__ == "__main__":
    main()
