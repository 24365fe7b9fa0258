"""Counted index, measured rank, attack: which of the two numbers tells what the attack will do?

    python benchmarks/rank_predicts.py [--nets 240] [--out FILE]

Draws small convolutional networks at random, asks the rank analysis before any gradient exists, then attacks the
gradient of one photograph, and compares. The recursion is predicted by the largest count over the layers without
virtual constraints, or by whether every layer's measured rank is full; the closed-form attack as a whole by the
paper's index with virtual constraints, or by whether the measured joint rank is full, at random values or at the
photograph itself. "Recovered" is an MSE of 1e-6 or less. One line of JSON for each network is added to FILE as it is
done; a run that was interrupted goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from rgap import Target, attacks, capture, data, losses, rank_analysis, score

RECOVERED = 1e-6
NEAR = 0.5
"""Networks are kept whose largest count is within this fraction of the layer's unknowns: the others are clear cases."""


def draw(seed: int) -> tuple[nn.Module, tuple[int, int, int]] | None:
    """Two or three convolutions with LeakyReLU and a Linear layer, in float64; None if a size comes out too small."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    channels = (1, 3)[pick(0, 1)]
    size = pick(10, 16) if channels == 1 else pick(8, 12)
    shape, layers = (channels, size, size), []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(pick(2, 3)):
            kernel, stride, width = pick(2, 5), pick(1, 2), pick(2, 12)
            padding = min(pick(0, 2), kernel - 1)
            if size + 2 * padding < kernel:
                return None
            layers += [nn.Conv2d(channels, width, kernel, stride, padding, bias=False), nn.LeakyReLU(0.2)]
            channels, size = width, (size + 2 * padding - kernel) // stride + 1
        layers += [nn.Flatten(), nn.Linear(channels * size * size, 1, bias=False)]
    return nn.Sequential(*layers).double(), shape


def examine(seed: int, anything: bool = False) -> dict[str, Any] | None:
    """What is predicted for one network, and what the attacks do; None if the draw is no network or a clear case."""
    drawn = draw(seed)
    if drawn is None:
        return None
    model, shape = drawn
    target = Target(model, losses.Logistic(), shape, (0.0, 1.0))
    counted = rank_analysis(target, measure=False)
    if not anything and abs(counted.index) > NEAR * counted.critical.unknowns:
        return None
    analysis = rank_analysis(target, seed=seed)
    if analysis.joint_free is None:
        return None
    photograph = data.photographs(25, shape[1], shape[0])[seed % 25].inputs.double()
    update = capture(target, photograph, torch.tensor([(-1.0, 1.0)[seed % 2]]))
    found = {attack.name: attack(target, update) for attack in (attacks.Recursive(), attacks.Closed())}
    joint = found["Closed"].answers[0].joint if found["Closed"].answers else None
    return {
        "seed": seed,
        "layers": [str(layer) for layer in target.network.layers],
        "own index": max(layer.own_index for layer in analysis.layers),
        "index": analysis.index,
        "layers free": max(layer.free or 0 for layer in analysis.layers),
        "joint free": analysis.joint_free,
        "joint free at the sample": rank_analysis(target, photograph, seed=seed).joint_free,
        "attack free": None if joint is None else joint.free,
        "mse": {name: _best(answer, photograph) for name, answer in found.items()},
        "status": {name: answer.status.value for name, answer in found.items()},
    }


def _best(found: attacks.Reconstruction, truth: torch.Tensor) -> float | None:
    errors = [score(answer, truth).mse[0] for answer in found.answers]
    return min(errors) if errors and all(map(math.isfinite, errors)) else None


PREDICTIONS = (
    ("Recursive", "counted: |x| - |W| - |z| <= 0 in every layer", "own index"),
    ("Recursive", "measured: every layer of full rank", "layers free"),
    ("Closed", "counted: the paper's index <= 0", "index"),
    ("Closed", "measured at random values: all layers together of full rank", "joint free"),
    ("Closed", "measured at the photograph: the same", "joint free at the sample"),
)


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each predictor, how often it was right, and its two kinds of mistake."""
    found = []
    for attack, name, key in PREDICTIONS:
        errors = [math.inf if row["mse"][attack] is None else row["mse"][attack] for row in rows]
        pairs = [(row[key] <= 0, error <= RECOVERED) for row, error in zip(rows, errors, strict=True)]
        found.append(
            {
                "attack": attack,
                "prediction": name,
                "right": sum(said == came for said, came in pairs),
                "said leaky, was not": sum(said and not came for said, came in pairs),
                "said safe, leaked": sum(came and not said for said, came in pairs),
                "of": len(pairs),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=int, default=240)
    parser.add_argument("--out", type=Path, default=Path("rank_predicts.jsonl"))
    options = parser.parse_args()
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    seed, console = max((row["seed"] for row in done), default=-1) + 1, Console(stderr=True)
    with options.out.open("a") as file:
        for _ in track(range(len(done), options.nets), "attacking", console=console, transient=True):
            while (row := examine(seed)) is None:
                seed += 1
            seed += 1
            done.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    shown = Table(box=None, padding=(0, 2, 0, 0))
    rows = table(done)
    for name in rows[0]:
        shown.add_column(name, justify="left" if name in ("attack", "prediction") else "right")
    for row in rows:
        shown.add_row(*map(str, row.values()))
    Console(width=140).print(shown)
    disagree = [row for row in done if (row["index"] <= 0) != (row["joint free"] == 0)]
    print(f"index and joint rank disagree on {len(disagree)} of {len(done)} networks")
    same = [row for row in done if row["attack free"] is not None]
    for where in ("joint free", "joint free at the sample"):
        equal = sum(row["attack free"] == row[where] for row in same)
        print(f"{where} = free at the answer of the attack: {equal} of {len(same)}")


if __name__ == "__main__":
    main()
