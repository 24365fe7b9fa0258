"""The closed-form attack on the paper's networks: how near, how sure, how fast.

    python benchmarks/closed_form.py --data FOLDER [--count 50] [--beside 1] [--out FILE]

FOLDER holds `cifar10` and `mnist`, each with one subfolder of pictures for each class. Every picture is one client
with a gradient in float32, labels -1 and 1 in turn, nothing told to the attack. Times are ratios within this one run.
With --beside each row is run once more with that many busy processes beside it, which multiply matrices on one thread
each; "beside / alone" is what the neighbours cost.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from rgap import Target, attacks, capture, data, losses, models, score

BUSY = """
import torch
torch.set_num_threads(1)
matrix = torch.randn(800, 800)
while True:
    matrix @ matrix
"""


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many busy processes, as long as this lasts."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        time.sleep(5 * bool(running))  # until they have imported what they need
        yield
    finally:
        for each in running:
            each.kill()
            each.wait()


def run(name: str, target: Target, pictures: data.Images, attack: attacks.Attack) -> dict[str, Any]:
    """Attack every picture; the figures of one row."""
    first, best, ratio, seconds, statuses, labels = [], [], [], [], [], 0
    inside = 0
    for at in track(range(len(pictures)), name, console=Console(stderr=True), transient=True):
        truth, label = pictures[at].inputs, float(2 * (at % 2) - 1)
        found = attack(target, capture(target, truth, torch.tensor([label])))
        errors = [score(answer, truth).mse[0] for answer in found.answers] or [float("nan")]
        first.append(errors[0])
        best.append(min(errors))
        ratio.append(found.answers[0].error / errors[0] ** 0.5 if found.answers else float("nan"))
        seconds.append(found.seconds)
        statuses.append(found.status.value)
        labels += bool(found.answers) and float(found.labels[0]) == label
        inside += errors[0] == min(errors)
    return {
        "network": name,
        "attack": attack.name,
        "pictures": len(pictures),
        "median MSE": statistics.median(first),
        "MSE at 90 %": sorted(first)[math.ceil(0.9 * len(first)) - 1],
        "worst MSE": max(first),
        "worst MSE, twins allowed": max(best),
        "right answer first": inside,
        "right label": labels,
        "status": {status: statuses.count(status) for status in sorted(set(statuses))},
        "estimated / true error": [min(ratio), statistics.median(ratio), max(ratio)],
        "seconds, first": seconds[0],
        "seconds, median of the others": statistics.median(seconds[1:] or seconds),
    }


def cold(pictures: data.Images) -> dict[str, float]:
    """One CNN6 picture from a new target, model factorisation included, beside a second one of the same model."""
    Target(models.fcn3(4, (3,)), losses.Logistic(), (4,))  # torch.export imports itself at its first use
    start = time.perf_counter()
    target = Target(models.cnn6(), losses.Logistic(), (3, 32, 32), (0.0, 1.0))
    traced = time.perf_counter() - start
    times = []
    for at in range(2):
        update = capture(target, pictures[at].inputs, torch.tensor([1.0]))
        start = time.perf_counter()
        attacks.Recursive()(target, update)
        times.append(time.perf_counter() - start)
    return {
        "trace": traced,
        "first picture": times[0],
        "second picture": times[1],
        "first / second": times[0] / times[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--beside", type=int, default=0, help="run each row once more beside so many busy processes")
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    options = parser.parse_args()
    cifar = data.folder(options.data / "cifar10", limit=options.count)
    mnist = data.folder(options.data / "mnist", channels=1, limit=options.count)
    figures: dict[str, Any] = {"cold": cold(cifar), "threads": torch.get_num_threads(), "rows": []}
    for name, model, pictures, attack in (
        ("CNN6, CIFAR-10", models.cnn6(), cifar, attacks.Recursive()),
        ("CNN6, MNIST", models.cnn6(1, 28), mnist, attacks.Recursive()),
        ("FCN3, MNIST", models.fcn3(), mnist, attacks.Recursive()),
        ("CNN6-d, CIFAR-10", models.cnn6_d(), cifar, attacks.Closed()),
        ("CNN6-d, MNIST", models.cnn6_d(1, 28), mnist, attacks.Closed()),
    ):
        target = Target(model, losses.Logistic(), tuple(pictures.inputs.shape[1:]), (0.0, 1.0))
        row = run(name, target, pictures, attack)
        if options.beside:
            with neighbours(options.beside):
                beside = run(f"{name}, beside {options.beside}", target, pictures, attack)
            key = "seconds, median of the others"
            row |= {"beside": beside[key], "beside / alone": beside[key] / row[key]}
        figures["rows"].append(row)
    print(json.dumps(figures, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
