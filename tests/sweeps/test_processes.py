"""What goes wrong with real processes: each is killed, stopped or starved, and the store is looked at."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from small_plans import (
    done,
    ended,
    here,
    home,
    hurry,
    impatient_sweep,
    kill,
    outcomes,
    part_of_a_cluster,
    start,
    start_anew,
    toml,
    until,
    workers,
)
from warm import Program

from rgap.sweeps import Progress, SweepStore
from rgap.sweeps.engine import AHEAD


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return home(tmp_path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What the 12 jobs find undisturbed."""
    folder = home(tmp_path_factory.mktemp("alone"))
    plan = toml(folder, seeds=12, name="alone")
    here(plan)
    found = outcomes(folder / "alone.sqlite")
    assert len(found) == 12
    assert {row["state"] for row in found.values()} == {"done"}
    return found


def attempts(store: Path) -> list[int]:
    with SweepStore(store, make=False) as opened:
        return [row["attempts"] for row in opened.rows()]


def same_but_for_the_model(found: dict[str, dict[str, object]], expected: dict[str, dict[str, object]]) -> bool:
    """Models of the same weights by another name have other keys; all that is found is the same."""
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in ("key", "model")} for row in each.values()]
        for each in (found, expected)
    )
    return ours == theirs


def test_a_run_that_is_killed_goes_on_and_does_nothing_twice(folder: Path, alone: dict[str, dict[str, object]]) -> None:
    plan, store = toml(folder, "slow", seeds=12), folder / "plan.sqlite"
    first = start(folder, str(plan), "--workers", "1")
    until(lambda: done(store) >= 3)
    kill(first)
    before = done(store)
    assert 3 <= before < 12
    hurry(folder)
    found = here(plan)
    assert (found.before, found.done) == (before, 12 - before)
    assert same_but_for_the_model(outcomes(store), alone)
    # The one that was being done began twice, no other.
    assert sorted(attempts(store)) == [1] * 11 + [2]


def test_a_worker_that_is_killed_loses_nothing(folder: Path, alone: dict[str, dict[str, object]]) -> None:
    plan, store = toml(folder, "slow", seeds=12), folder / "plan.sqlite"
    run = start(folder, str(plan), "--workers", "2")
    until(lambda: done(store) >= 2)
    victim, *others = workers(run)
    kill(victim)
    assert others
    hurry(folder)
    output = ended(run)
    assert "12 jobs: 12 done" in output
    assert same_but_for_the_model(outcomes(store), alone)
    assert attempts(store) == [1] * 12  # the run itself had no need to begin any of them again


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_that_is_interrupted_gives_back_what_it_had_taken(folder: Path, count: int) -> None:
    plan, store = toml(folder, "held", seeds=12), folder / "plan.sqlite"
    run = start(folder, str(plan), "--workers", str(count))
    until(lambda: done(store) == 1)
    run.send_signal(signal.SIGINT)
    output = ended(run, code=130)
    assert "interrupted" in output
    assert "Traceback" not in output
    with SweepStore(store, make=False) as opened:
        counts = opened.counts()
    assert counts["taken"] == counts["failed"] == 0
    assert counts["done"] == 1


def test_the_workers_of_a_run_that_is_killed_do_not_stay(folder: Path) -> None:
    plan, store = toml(folder, "slow", seeds=12), folder / "plan.sqlite"
    run = start_anew(folder, str(plan), "--workers", "2")
    until(lambda: done(store, "taken") >= 1)
    left = workers(run)
    assert len(left) == 2
    kill(run)
    _, alive = psutil.wait_procs(left, timeout=30)
    assert not alive
    hurry(folder)
    here(plan)
    assert sum(attempts(store)) <= 12 + 2 * AHEAD


def test_a_job_that_kills_its_workers_fails_and_the_others_do_not(folder: Path) -> None:
    plan, store = toml(folder, "poisonous", seeds=4), folder / "plan.sqlite"
    output = ended(start(folder, str(plan), "--workers", "2"), code=4)
    assert "every worker that began this job died" in output
    assert "--retry" in output
    with SweepStore(store, make=False) as opened:
        states = {row["seed"]: row["state"] for row in opened.rows()}
    assert states == {0: "done", 1: "failed", 2: "done", 3: "done"}


def test_two_runs_share_a_store(folder: Path, alone: dict[str, dict[str, object]]) -> None:
    plan, store = toml(folder, "slow", seeds=12), folder / "plan.sqlite"
    other = start(folder, str(plan), "--workers", "1", "--json")
    until(lambda: done(store) >= 1)
    found = here(plan)
    output = ended(other)
    assert same_but_for_the_model(outcomes(store), alone)
    assert attempts(store) == [1] * 12  # nothing was done twice
    own = [int(output.split('"done": ')[1].split(",")[0]), found.done]
    assert sum(own) == 12
    assert min(own) > 0


def test_what_a_dead_run_had_taken_is_done_by_the_one_that_lives(folder: Path) -> None:
    plan, store = toml(folder, "slow", seeds=12), folder / "plan.sqlite"
    doomed = start(folder, str(plan), "--workers", "1")
    until(lambda: done(store) >= 1)

    def at_three(progress: Progress) -> None:
        if progress.done >= 3 and doomed.poll() is None:
            kill(doomed)
            hurry(folder)

    here(plan, at_three)
    assert doomed.poll() == -signal.SIGKILL
    assert done(store) == 12


FULL = 120 * 1024
"""Bytes that a file may have: too few for 200 jobs."""


def test_a_full_disk_ends_the_run_and_spoils_nothing(folder: Path, alone: dict[str, dict[str, object]]) -> None:
    """The files of a run may not grow beyond what is little for 200 jobs; with more room it goes on."""
    plan, store = toml(folder, seeds=50, count=4), folder / "plan.sqlite"
    refused = start(folder, str(plan), "--workers", "1", largest=FULL)
    output = ended(refused, code=1)
    assert "plan.sqlite" in output
    assert "Make room and run the same command again" in output
    assert "Traceback" not in output
    before = done(store)
    assert before < 200
    assert here(plan).jobs == done(store) == 200
    known = {row["seed"]: row["mse"] for row in alone.values()}
    first = [row for row in outcomes(store).values() if row["seed"] in known and row["image"] == "astronaut-0"]
    assert {row["seed"]: row["mse"] for row in first} == known


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def begin(folder: Path, port: int) -> Iterator[Callable[[str], Program]]:
    """Starts a scheduler or a worker of a Dask cluster, as its own commands do."""
    begun: list[Program] = []

    def make(what: str) -> Program:
        options = {
            "scheduler": ["--host", "127.0.0.1", "--port", str(port), "--no-dashboard"],
            "worker": [f"tcp://127.0.0.1:{port}", "--nthreads", "1", "--no-nanny", "--no-dashboard"],
        }[what]
        begun.append(Program(part_of_a_cluster, what, *options, folder=folder))
        return begun[-1]

    yield make
    for process in begun:
        if process.poll() is None:
            kill(process)


def answers(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


def test_a_cluster_finds_the_same_though_a_worker_is_killed(
    folder: Path,
    alone: dict[str, dict[str, object]],
    port: int,
    begin: Callable[[str], Program],
) -> None:
    plan, store = toml(folder, "slow", seeds=12), folder / "plan.sqlite"
    begin("scheduler")
    until(lambda: answers(port))
    first, _ = begin("worker"), begin("worker")
    run = start(folder, str(plan), "--scheduler", f"tcp://127.0.0.1:{port}")
    until(lambda: done(store) >= 2)
    kill(first)
    hurry(folder)
    assert "12 jobs: 12 done" in ended(run)
    assert same_but_for_the_model(outcomes(store), alone)


def test_a_scheduler_that_comes_back_is_gone_on_with(
    folder: Path,
    alone: dict[str, dict[str, object]],
    port: int,
    begin: Callable[[str], Program],
) -> None:
    plan, store = toml(folder, "slow", seeds=12), folder / "plan.sqlite"
    scheduler = begin("scheduler")
    until(lambda: answers(port))
    begin("worker")
    run = start(folder, str(plan), "--scheduler", f"tcp://127.0.0.1:{port}")
    until(lambda: done(store) >= 2)
    kill(scheduler)
    until(lambda: "is gone: waiting for it" in run.said())
    assert done(store) < 12
    hurry(folder)
    begin("scheduler")
    until(lambda: answers(port))
    begin("worker")
    output = ended(run)
    assert "12 jobs: 12 done" in output
    assert same_but_for_the_model(outcomes(store), alone)


def test_no_scheduler_is_said_so(folder: Path, port: int) -> None:
    plan, address = toml(folder), f"tcp://127.0.0.1:{port}"
    output = ended(Program(impatient_sweep, str(plan), "--scheduler", address, folder=folder), code=1)
    assert f"no scheduler answers at {address}" in output
    assert "Traceback" not in output
