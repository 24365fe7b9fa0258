"""Table 2 of R-GAP again: five networks, their index, and how near the attack comes. Paper | ours.

    python reproductions/table2.py [--data FOLDER] [--count 10] [--out FILE]

FOLDER holds one subfolder of CIFAR-10 pictures for each class; without it the built-in photographs are used. Labels -1
and 1 in turn, gradients in float32, nothing told to the attack, weights from seed 0. One line of JSON for each picture
is added to FILE as it is done; a run that was interrupted goes on from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from architectures import INPUT_SHAPE, NETWORKS
from rich.console import Console
from rich.progress import track
from rich.table import Table

from rgap import Target, attacks, capture, data, losses, rank_analysis, score

PAPER = {
    "full_rank": "4e-09",
    "deficient_first": "0.056 to 0.063",
    "deficient_first_wide": "0.056 to 0.063",
    "full_rank_by_virtual": "2.7e-04",
    "deficient_second": "0.013",
}
"""The MSE that Table 2 prints; for the two networks of index 405 in one order or the other."""


def examine(target: Target, network: str, at: int, truth: torch.Tensor) -> dict[str, Any]:
    """Both attacks on one picture."""
    update = capture(target, truth, torch.tensor([float(2 * (at % 2) - 1)]))
    row: dict[str, Any] = {"network": network, "picture": at}
    for attack in (attacks.Recursive(), attacks.Closed()):
        found = attack(target, update)
        joint = found.answers[0].joint
        row[attack.name] = {
            "mse": score(found, truth).mse[0],
            "status": found.status.value,
            "residual": found.gradient_residual,
            "free": None if joint is None else joint.free,
            "seconds": found.seconds,
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("table2.jsonl"))
    options = parser.parse_args()
    if options.data is None:
        pictures = data.photographs(options.count)
    else:
        pictures = data.folder(options.data, limit=options.count)
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    known = {(row["network"], row["picture"]) for row in done}
    columns = ("network", "paper's index", "index", "free, layer by layer", "free, jointly", "free, at the answer")
    table = Table(*columns, "paper's MSE", "Recursive", "Closed", "worst", "status", "seconds", box=None)
    for build, index in NETWORKS:
        target = Target(build(0), losses.Logistic(), INPUT_SHAPE, (0.0, 1.0))
        for at in track(range(len(pictures)), build.__name__, console=Console(stderr=True), transient=True):
            if (build.__name__, at) not in known:
                done.append(examine(target, build.__name__, at, pictures[at].inputs))
                with options.out.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
        rows = [row for row in done if row["network"] == build.__name__]
        closed = [row["Virtual"] for row in rows]
        errors = [row["mse"] for row in closed]
        analysis = rank_analysis(target)
        free = sorted({row["free"] for row in closed if row["free"] is not None})
        statuses = [row["status"] for row in closed]
        table.add_row(
            build.__name__,
            str(index),
            str(analysis.index),
            " ".join(str(layer.free) for layer in analysis.layers),
            str(analysis.joint_free),
            "-" if not free else f"{free[0]} to {free[-1]}" if len(free) > 1 else str(free[0]),
            PAPER[build.__name__],
            f"{statistics.mean(row['Recursive']['mse'] for row in rows):.1e}",
            f"{statistics.mean(errors):.1e}",
            f"{max(errors):.1e}",
            ", ".join(f"{statuses.count(status)} {status}" for status in sorted(set(statuses))),
            f"{statistics.median(row['seconds'] for row in closed):.1f}",
        )
    Console(width=200).print(table)
    print(f"{len(pictures)} pictures a network; mean MSE, values in [0, 1]")


if __name__ == "__main__":
    main()
