"""How far the products of conjugate gradients are from what the machine can do.

    python benchmarks/bound.py [--size 224] [--systems 1] [--out FILE]

For each convolution of `models.strided` (and of CNN6 at 32 x 32): the seconds of one product in float32, the operations
that it takes and the bytes of the arrays that it reads and writes, beside the machine's own multiplication of matrices
and copying of arrays of the same size, measured in the same run. The bound is the larger of operations and bytes, each
over the machine's rate.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rgap import Target, losses, models
from rgap.nn.layers import Layer

FLOAT = 4


def seconds(run: Callable[[], object], least: float = 0.3) -> float:
    """The least of several runs."""
    run()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < least:
        before = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - before)
    return best


def operations_a_second(count: int = 1536) -> float:
    a = torch.randn(count, count)
    return 2 * count**3 / seconds(lambda: a @ a)


def bytes_a_second(count: int) -> float:
    """Copying an array of so many bytes: reads and writes."""
    a = torch.randn(max(count // FLOAT, 1))
    b = torch.empty_like(a)
    return 2 * FLOAT * a.numel() / seconds(lambda: b.copy_(a))


def product(layer: Layer, systems: int) -> dict[str, Any]:
    """(W'W + K'K) x, as `Layer.normal` computes it."""
    single = layer.single
    x = torch.randn(systems, layer.channels, layer.pixels)
    k = torch.randn(systems, layer.outputs, layer.positions)
    scale = torch.ones(systems, layer.groups)
    operations = 8.0 * systems * layer.weight.numel() * layer.positions
    patches = systems * layer.channels * layer.table.numel()
    # Patches are written, read by W and by k, and their adjoints written twice, added and read; z, k, x are small.
    moved = FLOAT * (8 * patches + systems * (4 * layer.weight_rows + 3 * layer.unknowns))
    took = seconds(lambda: single.normal(x, k, None, scale))
    own = FLOAT * patches
    return {"layer": layer.name, "seconds": took, "operations": operations, "bytes": moved, "array": own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--systems", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    options = parser.parse_args()
    peak = operations_a_second()
    table = Table("network", "layer", "ms", "Gop/s", "of the peak", "GB/s", "of a copy", "of the bound")
    rows = []
    for name, model, size in (("CNN6", models.cnn6(), 32), ("strided", models.strided(3, options.size), options.size)):
        target = Target(model, losses.Logistic(), (3, size, size))
        for layer in target.network.layers[:3]:
            row = product(layer, options.systems)
            copy = bytes_a_second(row["array"])
            bound = max(row["operations"] / peak, row["bytes"] / copy)
            row |= {"network": name, "peak": peak, "copy": copy, "of the bound": bound / row["seconds"]}
            rows.append(row)
            flops, rate = row["operations"] / row["seconds"], row["bytes"] / row["seconds"]
            table.add_row(
                f"{name} {size}",
                layer.name,
                f"{1e3 * row['seconds']:.2f}",
                f"{flops / 1e9:.0f}",
                f"{flops / peak:.0%}",
                f"{rate / 1e9:.0f}",
                f"{rate / copy:.0%}",
                f"{row['of the bound']:.0%}",
            )
    Console(width=120).print(table)
    print(f"peak {peak / 1e9:.0f} Gop/s, {options.systems} system(s), {torch.get_num_threads()} threads")
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
