"""How well a sweep uses its workers: one against two, the cost of the store, and a cluster that loses a worker.

    python benchmarks/sweep.py [--jobs 1000] [--size 32] [--out sweep.json]

Runs one plan of CNN6 on photographs three times, each into a store of its own: with one worker, which is the
process itself; with two; and on a Dask cluster of two workers, one of which is killed when a third is done. All ratios
are of one run of this program. Results are compared to the last bit.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rgap.sweeps import SweepStore

PICTURES, STRENGTHS = 25, (1e-5, 1e-4, 1e-3)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def plan(folder: Path, jobs: int, size: int) -> tuple[Path, int]:
    """The plan's file, and how many jobs it makes: as many as were asked for, or a few more."""
    seeds = -(-jobs // (PICTURES * (1 + len(STRENGTHS))))
    path = folder / "plan.toml"
    path.write_text(
        f'models = ["cnn6"]\nattacks = ["recursive"]\nseeds = {list(range(seeds))}\ninput-shape = [3, {size}, {size}]\n'
        f'defences = ["none", {{name = "GaussianNoise", strengths = {list(STRENGTHS)}}}]\n'
        f"[images]\ncount = {PICTURES}\n"
    )
    return path, seeds * PICTURES * (1 + len(STRENGTHS))


def begin(*arguments: str) -> subprocess.Popen[str]:
    """`rgap sweep`, as a process."""
    command = [sys.executable, "-c", "from rgap.cli import main; main()", "sweep", *arguments, "--json"]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)


def ended(run: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = run.communicate()
    if run.returncode:
        raise SystemExit(f"the sweep ended with exit code {run.returncode}")
    found: dict[str, Any] = json.loads(out)
    return found


def timed(*arguments: str) -> dict[str, Any]:
    start = time.perf_counter()
    return {**ended(begin(*arguments)), "whole_seconds": time.perf_counter() - start}


def rows(store: Path) -> list[dict[str, Any]]:
    with SweepStore(store, make=False) as opened:
        kept = list(opened.rows())
    return [{k: v for k, v in row.items() if k not in ("seconds", "finished", "attempts")} for row in kept]


def done(store: Path) -> int:
    if not store.is_file():
        return 0
    with SweepStore(store, make=False) as opened:
        return opened.counts()["done"]


def cluster(path: Path, store: Path, jobs: int) -> dict[str, Any]:
    """The plan on two Dask workers, of which one is killed in the middle."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"

    def dask(what: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", *options, "--no-dashboard"]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    processes = [dask("scheduler", "--host", "127.0.0.1", "--port", str(port))]
    try:
        processes += [dask("worker", address, "--nthreads", "1", "--no-nanny") for _ in range(2)]
        start = time.perf_counter()
        run = begin(str(path), "--store", str(store), "--scheduler", address)
        while done(store) < jobs // 3:
            time.sleep(0.2)
        processes[1].kill()
        killed_at = done(store)
        return {**ended(run), "killed_at": killed_at, "whole_seconds": time.perf_counter() - start}
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--size", type=int, default=32, help="of the pictures, which makes jobs longer or shorter")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, jobs = plan(folder, asked.jobs, asked.size)
        found: dict[str, Any] = {"jobs": jobs, "size": asked.size, "cores": os.cpu_count()}
        for workers in (1, 2):
            store = folder / f"{workers}.sqlite"
            found[f"{workers} workers"] = each = timed(str(path), "--store", str(store), "--workers", str(workers))
            share = each["store_seconds"] / each["seconds"]
            print(
                f"{workers} worker(s): {jobs} jobs in {each['seconds']:.1f} s, the store {share:.1%} of it", flush=True
            )
        store = folder / "cluster.sqlite"
        found["cluster"] = each = cluster(path, store, jobs)
        print(
            f"cluster, a worker killed after {each['killed_at']} jobs: {each['done']} done in {each['seconds']:.1f} s"
        )
        alone = rows(folder / "1.sqlite")
        found["speed-up"] = found["1 workers"]["seconds"] / found["2 workers"]["seconds"]
        found["same"] = [rows(folder / f"{name}.sqlite") == alone for name in ("2", "cluster")]
        print(f"2 workers against 1: {found['speed-up']:.2f} times as fast")
        print(f"the same results to the last bit: 2 workers {found['same'][0]}, cluster {found['same'][1]}")
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
