"""The example's plan, and a small one of the benchmark."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from benchmark import load

from rgap.sweeps import Plan, SweepStore, sweep

ROOT = Path(__file__).parents[2]


def test_the_example_runs(tmp_path: Path) -> None:
    """On one picture and one network, of which every other cell is one of the example's own."""
    whole = Plan.load(ROOT / "examples" / "sweep.toml")
    small = Plan.of({**whole.spec, "models": ["cnn6"], "seeds": [0], "images": {"count": 1}})
    assert sweep(small, tmp_path / "s.sqlite").failed == 0
    with SweepStore(tmp_path / "s.sqlite") as kept:
        rows = list(kept.rows())
    assert {row["key"] for row in rows} <= {job.key for job in whole.jobs()}
    levels = Counter(row["level"] for row in rows if row["defence"] == "none" and row["stage"] == 0)
    assert levels == {"exact": 2}


def test_the_benchmark_makes_the_jobs_it_says(tmp_path: Path) -> None:
    path, jobs = load("sweep").plan(tmp_path, 150, 8)
    assert jobs == 200
    assert len({job.key for job in Plan.load(path).jobs()}) == jobs
