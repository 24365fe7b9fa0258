"""Attacks by optimisation, and `Closed`: decibels against seconds, one float32 gradient of one picture each.

    python benchmarks/matching.py --data FOLDER [--network TEXT] [--attack TEXT] [--pictures 2] [--seconds 5 20 60]
        [--plots FOLDER]

FOLDER holds one subfolder of pictures for each class. Weights are as the models draw them, labels in turn, nothing is
told. Every attack has the same times for a picture, one run each, and its own iterations at most. One thread; seconds
are those of the process, and the limit is of the clock, so that a busy machine leaves an attack less.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import plotting
import torch
from plotting import Look
from pools import quickstart
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rgap import Target, attacks, capture, data, losses, models, score
from rgap.linalg import deadline

ATTACKS: tuple[attacks.Attack, ...] = (
    attacks.IDLG(iterations=2000),
    attacks.InvertingGradients(),
    attacks.SeeThroughGradients(),
    attacks.Modern(),
    attacks.FeatureMatching(),
    attacks.Closed(),
)
LOOKS = {
    "iDLG": Look("iDLG", "#007A5A", "^"),
    "InvertingGradients": Look("Inverting Gradients", "#A8578A", "v"),
    "SeeThroughGradients": Look("See through Gradients", "#8A6D00", "D"),
    "breaching's modern": Look("breaching's modern", "#D55E00", "s"),
    "FeatureMatching": Look("FeatureMatching", "#0072B2", "o", ours=True),
    "Closed": Look("Closed", "#222222", "P", ours=True),
}


def tutorial() -> nn.Module:
    """The network of PyTorch's CIFAR-10 tutorial."""
    torch.manual_seed(0)
    model = quickstart(3, 32)
    model(torch.zeros(1, 3, 32, 32))
    return model.eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "LeNet with sigmoids": models.lenet,
    "PyTorch's tutorial network": tutorial,
    "ResNet-18": lambda: models.resnet18(size=32, classes=10),
    "ConvNet-64": models.convnet,
}


def measured(attack: attacks.Attack, target: Target, pictures: Tensor, limit: float) -> tuple[list[float], list[float]]:
    """Decibels of the pictures that came back, and seconds of the process."""
    decibels, seconds = [], []
    for at, x in enumerate(pictures):
        update = capture(target, x[None], torch.tensor([float(at % 10)]))
        start = time.process_time()
        with deadline.within(limit):
            found = attack(target, update)
        seconds.append(time.process_time() - start)
        if found.answers:
            decibels.append(float(score(found, x[None]).psnr[0]))
    return decibels, seconds


def plot(network: str, points: dict[str, list[tuple[float, float]]], folder: Path) -> None:
    """Mean decibels against mean seconds, one line for each attack."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [plotting.Line(name, tuple(sorted(own)), LOOKS[name].label) for name, own in points.items() if own]
    with matplotlib.rc_context(plotting.STYLE):
        figure, axes = plotting.figure(f"PSNR in dB, {network}")
        axes.set_xscale("log")
        plotting.draw_lines(axes, lines, LOOKS)
        ticks = [1.0, 3.0, 10.0, 30.0, 100.0]
        seen = [x for line in lines for x, _ in line.points]
        kept = [tick for tick in ticks if min(seen) / 2 <= tick <= 2 * max(seen)]
        plotting.ticks(axes, kept, [f"{tick:g}" for tick in kept])
        axes.set_xlabel("seconds for a picture, one thread")
        plotting.name_lines(axes, lines, LOOKS)
    slug = re.sub("[^a-z0-9]+", "-", network.lower().replace("'s", ""))
    plotting.save(figure, folder / f"matching-{slug}.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", default="", help="networks that contain this")
    parser.add_argument("--attack", default="", help="attacks that contain this")
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--seconds", type=float, nargs="+", default=[60.0], help="for a picture, by the clock")
    parser.add_argument("--plots", type=Path, help="folder for a plot of each network")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = data.folder(arguments.data, channels=3)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: arguments.pictures]
    table = Table("network", "attack", "limit", "dB, mean", "least", "seconds a picture")
    for name, make in NETWORKS.items():
        if arguments.network not in name:
            continue
        target = Target(make(), losses.CrossEntropy(10), (3, 32, 32), (0.0, 1.0))
        points: dict[str, list[tuple[float, float]]] = {}
        for attack in ATTACKS:
            if arguments.attack not in attack.name:
                continue
            for limit in arguments.seconds:
                decibels, seconds = measured(attack, target, images.inputs[chosen].float(), limit)
                row = {"network": name, "attack": attack.name, "limit": limit, "dB": decibels, "seconds": seconds}
                print(json.dumps(row), flush=True)
                if len(decibels) < len(chosen):
                    table.add_row(name, attack.name, f"{limit:g}", "-", "-", f"{statistics.fmean(seconds):.1f}")
                    continue
                mean, spent = statistics.fmean(decibels), statistics.fmean(seconds)
                points.setdefault(attack.name, []).append((spent, mean))
                table.add_row(name, attack.name, f"{limit:g}", f"{mean:.1f}", f"{min(decibels):.1f}", f"{spent:.1f}")
        if arguments.plots is not None and points:
            plot(name, points, arguments.plots)
    Console().print(table)


if __name__ == "__main__":
    main()
