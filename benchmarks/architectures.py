"""What every family of architectures gives away of one sample, by which attack, and what is said of it.

    python benchmarks/architectures.py --seconds 10 --out table.md

Each attack, and rank analysis, has so many seconds of the processor for each family, so that other programs on the
machine change nothing; an attack that raises ends the program with its error.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from zoo import FAMILIES, Family

from rgap import Target, capture, data, rank_analysis, score
from rgap.attacks import Attack, Bias, Closed, InvertingGradients
from rgap.linalg import deadline
from rgap.linalg.deadline import OutOfTime, within

ATTACKS = (Bias(), Closed(), InvertingGradients(iterations=500))
HEADER = ("family", "parameters", "rank", *(attack.name for attack in ATTACKS), "what the closed form says", "seconds")


def row(family: Family, seconds: float) -> tuple[str, ...]:
    """One line of the table."""
    start = time.process_time()
    torch.manual_seed(0)
    picture = len(family.shape) == 3
    target = Target(family.make().eval(), None, family.shape, (0.0, 1.0))
    x = data.photographs(1).inputs if picture else torch.rand(1, *family.shape)
    update = capture(target, x, torch.tensor([1.0]))
    cells, said = [], ""
    for attack in ATTACKS:
        cell, message = _attacked(attack, target, update, x, seconds)
        said = message if isinstance(attack, Closed) else said
        cells.append(cell)
    parameters = f"{sum(p.numel() for p in target.parameters.values()):,}"
    return family.name, parameters, _rank(target, seconds), *cells, said, f"{time.process_time() - start:.1f}"


def _attacked(attack: Attack, target: Target, update: object, x: torch.Tensor, seconds: float) -> tuple[str, str]:
    """How it ended, with the PSNR, and why."""
    obstacle = attack.obstacle(target, 1)
    if obstacle is not None:
        return "-", obstacle.removeprefix("the recursion cannot pass this model: ")
    try:
        with within(seconds):
            found = attack(target, update)  # type: ignore[arg-type]
    except OutOfTime:
        return "time up", "the time was up"
    psnr = f", {score(found, truth=x).mean_psnr:.0f} dB" if found.answers else ""
    return f"{found.status.value}{psnr}", found.reason.split(";")[0]


def _rank(target: Target, seconds: float) -> str:
    """Free dimensions of the input, a bound on them, or the paper's index where neither was told in time."""
    if not target.graph.uses:
        return "not traced"
    try:
        with within(seconds):
            found = rank_analysis(target, seconds=seconds)
    except OutOfTime:
        return "time up"
    if found.joint_free is not None:
        return f"{found.joint_free} free"
    bounded = found.local is not None and found.local.free < found.local.unknowns
    return f"at most {found.local.free} free" if found.local and bounded else f"index {found.index}"


def lines(seconds: float) -> Iterator[str]:
    """The table in Markdown, a line at a time."""
    yield f"| {' | '.join(HEADER)} |"
    yield f"|{' --- |' * len(HEADER)}"
    for family in FAMILIES:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row(family, seconds))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each attack on each family")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    arguments = parser.parse_args()
    written = []
    with mock.patch.object(deadline, "time", SimpleNamespace(perf_counter=time.process_time)):
        for line in lines(arguments.seconds):
            print(line, flush=True)
            written.append(line)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(written) + "\n")


if __name__ == "__main__":
    main()
