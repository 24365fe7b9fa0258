"""How fast and how large: the closed form beside the paper's own procedure and attacks by optimisation.

    python benchmarks/throughput.py --data FOLDER [--compact] [--out FILE] [--plots FOLDER] [--device cpu]

FOLDER holds `cifar10`, with one subfolder of pictures for each class. Pictures larger than 32 x 32 are photographs from
scikit-image's wheel. Gradients are float32, labels -1 and 1 in turn, and nothing is told to the attacks, except to the
dense baseline (dense.py), which is told the label and the right root, and always runs on the CPU.

Every case runs in a process of its own. Seconds are those of the attack; tracing the model is reported beside them.
Memory is the highest that the attack reaches, less what the process held right before it. Ratios are within this run.
A case that fails is reported with its error. The compact form leaves out the largest pictures and dense matrices, and
stops attacks by optimisation after a few iterations.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

import dense

from rgap import Target, attacks, capture, data, losses, models, score

SIZES = (8, 16, 32, 64, 128, 224, 320)
BATCHES = (1, 4, 16, 64)
LARGE = 128
"""Exponents are fitted from this size on, where what does not depend on the size no longer counts."""
OPTIMISERS = ("DLG", "InvertingGradients")
MEMORY_SHARE = 0.85
"""Of the machine's memory: what one case may take, so that a case that needs more fails by itself."""


@dataclass(frozen=True)
class Case:
    """One measurement."""

    network: str
    size: int
    method: str
    pictures: int = 1
    iterations: int = 0
    """Of attacks by optimisation; 0 for the attack's own number."""
    before: int = 0
    """Pictures of the same model that are attacked first, outside the time: it is then no longer cold."""

    def __str__(self) -> str:
        return f"{self.network} {self.size} x {self.size}, {self.method}, {self.pictures} pictures"


Row = dict[str, Any]


def plan(compact: bool) -> list[Case]:
    """All cases, of one kind from small to large."""
    steps, free = (10, 2) if compact else (100, 8)
    cases = [Case("cnn6", 32, "Recursive"), Case("cnn6", 32, "Dense"), Case("cnn6_d", 32, "Closed", free)]
    cases += [Case("strided", size, "Recursive") for size in (SIZES[:5] if compact else SIZES)]
    cases += [Case("strided", size, "Dense") for size in (SIZES[:1] if compact else SIZES[:3])]
    cases += [Case("cnn6", 32, "Recursive", pictures, before=1) for pictures in BATCHES]
    for method in OPTIMISERS:
        cases += [Case("cnn6", 32, method, pictures, steps, before=1) for pictures in BATCHES]
        cases += [Case("strided", size, method, 1, steps) for size in (SIZES[:3] if compact else SIZES[:4])]
        if not compact:
            cases.append(Case("cnn6", 32, method))
    return cases


def photographs(folder: Path, size: int, count: int) -> torch.Tensor:
    """Pictures of one size, CIFAR-10's unless they would have to be enlarged."""
    if size > 32:
        return data.photographs(count, size).inputs
    return data.folder(folder / "cifar10", size, limit=count).inputs


def made(case: Case, iterations: int) -> attacks.Attack:
    """An attack by its name; iterations only where it has them, and 0 for its own number."""
    kind: Callable[..., attacks.Attack] = getattr(attacks, case.method)
    return kind(iterations=iterations) if iterations else kind()


def measure(case: Case, folder: Path, device: str) -> Row:
    """Run one case; to be called once in a process."""
    Target(models.fcn3(4, (3,)), losses.Logistic(), (4,))  # torch.export imports itself at its first use
    truths = photographs(folder, case.size, case.pictures + case.before)
    labels = [float(2 * (at % 2) - 1) for at in range(len(truths))]
    model = getattr(models, case.network)(3, case.size)
    if case.method != "Dense":
        model, truths = model.to(device), truths.to(device)
    start = time.perf_counter()
    target = Target(model, losses.Logistic(), (3, case.size, case.size), (0.0, 1.0))
    trace = time.perf_counter() - start
    updates = [capture(target, truths[[at]], truths.new_tensor([label])) for at, label in enumerate(labels)]
    meter = Meter(device if case.method != "Dense" else "cpu")
    row: Row = {}
    if case.method == "Dense":
        mu = dense.margin(model, truths[:1], labels[0])
        start = time.perf_counter()
        solved = dense.recover(model, updates[0].gradients, target.input_shape, labels[0], mu)
        seconds = time.perf_counter() - start
        trace, mse = 0.0, list(score(solved.inputs, truths).mse)
        row = {"building": sum(layer.building for layer in solved.layers), "layers": list(map(asdict, solved.layers))}
    else:
        if case.before:
            made(case, min(case.iterations, 1)).many(target, updates[case.pictures :])
            meter.wait()
        start = time.perf_counter()
        found = made(case, case.iterations).many(target, updates[: case.pictures])
        meter.wait()
        seconds = time.perf_counter() - start
        pairs = zip(found, truths[: len(found)], strict=True)
        mse = [score(each, truth[None]).mse[0] if each.answers else math.nan for each, truth in pairs]
        statuses = [each.status.value for each in found]
        row = {"status": {status: statuses.count(status) for status in sorted(set(statuses))}}
    base, peak = meter.read()
    finite = [value for value in mse if math.isfinite(value)]
    return {
        "trace": trace,
        "seconds": seconds,
        "total": trace + seconds,
        "seconds a picture": seconds / case.pictures,
        "pictures a second": case.pictures / seconds,
        "base bytes": base,
        "peak bytes": peak - base,
        "median MSE": statistics.median(finite) if finite else None,
        "worst MSE": max(finite) if finite else None,
        "without answer": len(mse) - len(finite),
        **row,
    }


class Meter:
    """The highest memory since this was made: of the CUDA device, or of this process."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            return
        self.reset = False
        try:
            # Linux forgets the highest value; elsewhere it is that of the whole process, which is no less.
            Path("/proc/self/clear_refs").write_text("5")
            self.reset = True
            self.base = _held("VmRSS")
        except OSError:
            self.base = _highest()

    def wait(self) -> None:
        """Until the device has done its work."""
        if self.cuda:
            torch.cuda.synchronize()

    def read(self) -> tuple[int, int]:
        """What was held at first, and the highest since, in bytes."""
        if self.cuda:
            return self.base, torch.cuda.max_memory_allocated()
        return self.base, max(self.base, _held("VmHWM") if self.reset else _highest())


def _held(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def _highest() -> int:
    import resource  # not everywhere

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(case: Case, folder: Path, device: str) -> None:
    """Measure one case, and print its row or its error as the last line."""
    if not device.startswith("cuda") and sys.platform == "linux":
        import resource

        most = int(MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        row = measure(case, folder, device)
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
    print(json.dumps(row))


def apart(case: Case, options: argparse.Namespace) -> Row:
    """Measure one case in a process of its own; whatever becomes of that process, there is a row."""
    command = [sys.executable, __file__, "--data", str(options.data), "--device", options.device]
    command += ["--case", json.dumps(asdict(case))]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {options.timeout:g} seconds"}
    lines = ran.stdout.strip().splitlines()
    if ran.returncode == 0 and lines:
        row: Row = json.loads(lines[-1])
        return row
    said = ran.stderr.strip().splitlines()
    return {"error": f"ended with {ran.returncode}" + (f": {said[-1]}" if said else "")}


def run(cases: Sequence[Case], options: argparse.Namespace, keep: Callable[[list[Row]], None]) -> list[Row]:
    """All cases in turn; `keep` is called with what there is after each.

    Where one runs out of time or memory, the larger ones of its kind are not tried.
    """
    rows: list[Row] = []
    given_up: dict[tuple[str, str, bool], Case] = {}
    for case in track(cases, "cases", console=Console(stderr=True), transient=True):
        kind = case.network, case.method, bool(case.before)
        row: Row = asdict(case)
        shape = (3, case.size, case.size)
        row["dense bytes"] = dense.bytes_needed(getattr(models, case.network)(*shape[:2]), shape)
        if kind in given_up:
            row["error"] = f"not tried: {given_up[kind]} failed"
        else:
            row["load before"] = os.getloadavg()[0]  # others' work on the machine makes times worthless
            row |= apart(case, options)
            if re.search("not done|ended with|allocate|out of memory|OutOfMemory|MemoryError", row.get("error", "")):
                given_up[kind] = case
        rows.append(row)
        keep(rows)
    return rows


def find(rows: Sequence[Row], network: str, size: int, method: str, pictures: int = 1, before: int = 0) -> Row | None:
    """The row of a case that did not fail; of several the one with most iterations."""
    wanted = {"network": network, "size": size, "method": method, "pictures": pictures, "before": before}
    fit = [row for row in rows if row.items() >= wanted.items() and "error" not in row]
    return max(fit, key=lambda row: row["iterations"] or math.inf, default=None)


def exponent(rows: Sequence[Row], key: str, smallest: int) -> float | None:
    """The slope of log(key) against log(pixels) over the sweep of sizes; None with fewer than two points."""
    points = [
        (2 * math.log(row["size"]), math.log(row[key]))
        for row in sweep(rows, "Recursive")
        if row["size"] >= smallest and row[key] > 0
    ]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else None


def sweep(rows: Sequence[Row], method: str) -> list[Row]:
    """One picture each through `models.strided`, from small to large, without those that failed."""
    return [row for row in rows if row["network"] == "strided" and row["method"] == method and "error" not in row]


def batches(rows: Sequence[Row], method: str) -> list[Row]:
    """CNN6, from one picture to many, without those that failed."""
    return [row for row in rows if row["before"] and row["method"] == method and "error" not in row]


def conclude(rows: Sequence[Row]) -> Row:
    """The ratios and exponents of one run; None where a case is missing."""

    def ratio(above: Row | None, below: Row | None, over: str, under: str | None = None) -> float | None:
        return None if above is None or below is None else above[over] / (below[under or over] or math.nan)

    def named(row: Row) -> str:
        return f"{row['method']} ({row['iterations']} iterations)"

    cold, slow = find(rows, "cnn6", 32, "Recursive"), find(rows, "cnn6", 32, "Dense")
    many = {pictures: find(rows, "cnn6", 32, "Recursive", pictures, 1) for pictures in BATCHES}
    dense_sweep = {row["size"]: row for row in sweep(rows, "Dense")}
    return {
        "CNN6 32 x 32": {
            "dense / cold, seconds": ratio(slow, cold, "total"),
            "dense / one of 16, seconds": ratio(slow, many[16], "total", "seconds a picture"),
            "dense / cold, peak bytes": ratio(slow, cold, "peak bytes"),
            "dense / cold, MSE": ratio(slow, cold, "median MSE"),
            "cold / one of 16, seconds": ratio(cold, many[16], "total", "seconds a picture"),
        },
        "strided, dense / Recursive": {
            str(row["size"]): {
                "seconds": ratio(dense_sweep.get(row["size"]), row, "total"),
                "peak bytes": ratio(dense_sweep.get(row["size"]), row, "peak bytes"),
            }
            for row in sweep(rows, "Recursive")
            if row["size"] in dense_sweep
        },
        "strided, bytes of the dense matrix / peak of Recursive": {
            str(row["size"]): row["dense bytes"] / row["peak bytes"] if row["peak bytes"] else None
            for row in sweep(rows, "Recursive")
        },
        "exponents against pixels": {
            f"{key}, sizes from {smallest}": exponent(rows, key, smallest)
            for key in ("total", "peak bytes")
            for smallest in (LARGE, SIZES[0])
        },
        "pictures a second, batch / one by one": {
            str(pictures): ratio(row, many[1], "pictures a second") for pictures, row in many.items()
        },
        "optimisation / Recursive, seconds a picture": {
            named(row) + f", {row['pictures']} pictures": ratio(row, many[row["pictures"]], "seconds a picture")
            for method in OPTIMISERS
            for row in batches(rows, method)
        },
    }


def machine(device: str) -> Row:
    """What the times were measured on."""
    name = platform.processor()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    return {
        "device": device,
        "name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "memory bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def table(rows: Sequence[Row]) -> Table:
    """All rows, for a terminal; a warm row's seconds are without tracing."""
    shown = Table("network", "size", "attack", "pictures", "iterations", "seconds", "a picture", "peak MB", "MSE")
    for row in rows:
        start = [row["network"], str(row["size"]), row["method"] + (", warm" if row["before"] else "")]
        start += [str(row["pictures"]), str(row["iterations"] or "")]
        if "error" in row:
            shown.add_row(*start, "failed")
            continue
        error = row["median MSE"]
        shown.add_row(
            *start,
            f"{row['total'] if not row['before'] else row['seconds']:.2f}",
            f"{row['seconds a picture']:.3f}",
            f"{row['peak bytes'] / 1e6:.0f}",
            "none" if error is None else f"{error:.0e}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--compact", action="store_true", help="a few minutes: fewer pictures and iterations")
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    parser.add_argument("--plots", type=Path, default=None, help="write the plots as SVG into this folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--timeout", type=float, default=None, help="seconds for each case")
    parser.add_argument("--case", type=json.loads, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        child(Case(**options.case), options.data, options.device)
        return
    options.timeout = options.timeout or (120.0 if options.compact else 600.0)
    start = time.perf_counter()
    figures: Row = {"machine": machine(options.device), "compact": options.compact}

    def keep(rows: list[Row]) -> None:
        figures.update(minutes=(time.perf_counter() - start) / 60, ratios=conclude(rows), rows=rows)
        if options.out is not None:
            options.out.write_text(json.dumps(figures, indent=1))

    rows = run(plan(options.compact), options, keep)
    Console(width=140).print(table(rows))
    for row in rows:
        if "error" in row:
            print(f"{row['network']} {row['size']} x {row['size']}, {row['method']}: {row['error']}")
    print(json.dumps({key: value for key, value in figures.items() if key != "rows"}, indent=1))
    if options.plots is not None:
        import throughput_plots

        for file in throughput_plots.draw(rows, figures["ratios"], options.plots):
            print(file)


if __name__ == "__main__":
    main()
