"""Attacks by optimisation: decibels against seconds of the processor, one float32 gradient of one picture each.

    python benchmarks/matching.py --data FOLDER [--network TEXT] [--attack TEXT] [--pictures 2] [--seconds 60]

FOLDER holds one subfolder of pictures for each class. Weights are as the models draw them, labels in turn, nothing is
told. Every attack has the same time for a picture, and its own iterations at the most. One thread; seconds are those of
the process, and the limit is of the clock, so that a busy machine leaves an attack less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pools import quickstart
from rich.console import Console
from rich.table import Table
from torch import nn

from rgap import Target, attacks, capture, data, losses, models, score
from rgap.linalg import deadline

ATTACKS: tuple[attacks.Matching, ...] = (
    attacks.IDLG(iterations=2000),
    attacks.InvertingGradients(),
    attacks.SeeThroughGradients(),
    attacks.Modern(),
    attacks.FeatureMatching(),
)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", default="", help="networks that contain this")
    parser.add_argument("--attack", default="", help="attacks that contain this")
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="for a picture, by the clock")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = data.folder(arguments.data, channels=3)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: arguments.pictures]
    table = Table("network", "attack", "dB, mean", "least", "seconds a picture")
    for name, make in NETWORKS.items():
        if arguments.network not in name:
            continue
        target = Target(make(), losses.CrossEntropy(10), (3, 32, 32), (0.0, 1.0))
        for attack in ATTACKS:
            if arguments.attack not in attack.name:
                continue
            decibels, seconds = [], []
            for at, x in enumerate(images.inputs[chosen].float()):
                update = capture(target, x[None], torch.tensor([float(at % 10)]))
                start = time.process_time()
                with deadline.within(arguments.seconds):
                    found = attack(target, update)
                seconds.append(time.process_time() - start)
                decibels.append(float(score(found, x[None]).psnr[0]))
            print(json.dumps({"network": name, "attack": attack.name, "dB": decibels, "seconds": seconds}), flush=True)
            means = (statistics.fmean(decibels), min(decibels), statistics.fmean(seconds))
            table.add_row(name, attack.name, *(f"{each:.1f}" for each in means))
    Console().print(table)


if __name__ == "__main__":
    main()
