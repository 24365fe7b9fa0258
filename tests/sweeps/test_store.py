"""The store: every job is done once, whatever runs come and go."""

from __future__ import annotations

import random
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_plans import kill

from rgap.sweeps import Job, SweepError, SweepStore, store
from rgap.sweeps.job import AXES, FIGURES, Failure


def job(number: int) -> Job:
    return Job({**dict.fromkeys(AXES), "model": "m", "seed": number}, {"number": number})


def found(number: int) -> dict[str, Any]:
    return {
        **dict.fromkeys(FIGURES),
        "level": "exact",
        "exact": 1.0,
        "recognisable": 1.0,
        "status": "exact",
        "mse": number / 7,
    }


def taken_by(run: SweepStore, number: int) -> list[tuple[str, Any]]:
    """Keys and specifications of jobs that one worker takes."""
    return [(key, spec) for _, key, spec in run.take(["a worker"] * number)]


def jobs(count: int) -> list[Job]:
    return [job(number) for number in range(count)]


def test_what_was_found_comes_back_as_it_was(tmp_path: Path) -> None:
    values = {
        "level": "recognisable", "status": "not converged", "reason": "gave 'up'; \u2603", "psnr": 21.123456789012345,
        "ssim": None, "mse": 1e-300, "gradient_residual": 0.1, "error": None, "gradient_error": 0.0,
        "labels_right": False, "twins": 3, "accuracy": 0.5, "seconds": 0.25,
            "exact": 0.0, "recognisable": 0.75,
    }  # fmt: skip
    assert set(values) == set(FIGURES)
    with SweepStore(tmp_path / "s.sqlite") as kept:
        kept.plan([job(5)], "plan")
        ((key, spec),) = taken_by(kept, 3)
        assert (key, spec) == (job(5).key, {"number": 5})
        kept.take([], [(key, values)])
    with SweepStore(tmp_path / "s.sqlite", make=False) as kept:
        (row,) = kept.rows()
    assert {name: row[name] for name in FIGURES} == values
    assert row["seed"] == 5
    assert (row["state"], row["attempts"], row["failure"]) == ("done", 1, None)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_job_is_done_once_whatever_the_runs_do(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Three runs of overlapping plans on one file take, finish, fail, give back and end as they like."""
    path = tmp_path_factory.mktemp("store") / "s.sqlite"
    total = data.draw(st.integers(1, 8))
    plans = [jobs(total), jobs(data.draw(st.integers(1, total))), jobs(total)[::-1]]
    runs: list[SweepStore | None] = [None, None, None]
    held: list[dict[str, Any]] = [{}, {}, {}]
    finished: dict[str, int] = {}
    for _ in range(data.draw(st.integers(0, 25))):
        at = data.draw(st.integers(0, 2))
        run = runs[at]
        if run is None:
            runs[at] = SweepStore(path)
            runs[at].plan(plans[at], f"plan {at}")  # type: ignore[union-attr]
            continue
        what = data.draw(st.sampled_from(["take", "finish", "give back", "end"]))
        if what == "take":
            run.waits()
            taken = dict(taken_by(run, data.draw(st.integers(1, 3))))
            others = set().union(*held)
            assert not set(taken) & others  # never two runs on one job
            assert not set(taken) & set(finished)  # and none that is done
            held[at].update(taken)
        elif what == "finish" and held[at]:
            key = data.draw(st.sampled_from(sorted(held[at])))
            number = held[at].pop(key)["number"]
            run.take([], [(key, found(number))])
            finished[key] = number
        elif what == "give back" and held[at]:
            key = data.draw(st.sampled_from(sorted(held[at])))
            held[at].pop(key)
            run.give_back([key])
        elif what == "end":
            run.close()
            runs[at], held[at] = None, {}
    for run in runs:
        if run is not None:
            run.close()
    with SweepStore(path) as last:
        counts = last.plan(plans[0], "plan 0")
        assert counts["done"] == len(finished)
        assert counts["taken"] == 0
        left = dict(taken_by(last, total))
        assert set(left) == {each.key for each in plans[0]} - set(finished)
        last.take([], [(key, found(spec["number"])) for key, spec in left.items()])
        rows = list(last.rows())
    assert len(rows) == total
    assert all(row["mse"] == row["seed"] / 7 for row in rows)


def test_failures_stay_until_they_are_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with SweepStore(path) as kept:
        kept.plan(jobs(3), "plan")
        taken = taken_by(kept, 3)
        kept.take([], [(key, Failure("Traceback\n  here\nValueError: bad luck")) for key, _ in taken[:2]])
        kept.take([], [(taken[2][0], found(2))])
        assert kept.failures() == [("ValueError: bad luck", 2)]
    with SweepStore(path) as kept:
        assert kept.plan(jobs(3), "plan")["failed"] == 2
        assert not kept.waits()
    with SweepStore(path) as kept:
        assert kept.plan(jobs(3), "plan", retry=True)["waiting"] == 2
        assert [row["attempts"] for row in kept.rows() if row["state"] == "waiting"] == [1, 1]
        again = taken_by(kept, 5)
        kept.take([], [(key, found(spec["number"])) for key, spec in again])
        assert kept.counts() == {"waiting": 0, "taken": 0, "done": 3, "failed": 0}
        assert [row["attempts"] for row in kept.rows()].count(2) == 2
        assert kept.failures() == []


def test_a_second_result_of_one_job_changes_nothing(tmp_path: Path) -> None:
    """A run that was taken for dead comes back after another has done its job."""
    path = tmp_path / "s.sqlite"
    with SweepStore(path) as first, SweepStore(path) as second:
        first.plan(jobs(1), "plan")
        ((key, _),) = taken_by(first, 1)
        second.plan(jobs(1), "plan")
        second._release([str(first._run)])
        assert second.waits()
        assert [k for k, _ in taken_by(second, 1)] == [key]
        second.take([], [(key, found(1))])
        first.take([], [(key, found(2))])
        first.take([], [(key, Failure("it failed"))])
        (row,) = second.rows()
    assert (row["state"], row["mse"]) == ("done", 1 / 7)


def test_a_run_of_another_machine_is_dead_when_it_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.sqlite"
    own = socket.gethostname
    first = SweepStore(path)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    first.plan(jobs(2), "plan")
    taken_by(first, 1)
    monkeypatch.setattr(socket, "gethostname", own)
    with SweepStore(path) as second:
        assert second.plan(jobs(2), "plan")["taken"] == 1  # it has just begun
        assert second.elsewhere() == 1
        second._base.execute("UPDATE runs SET beat = ? WHERE host = 'elsewhere'", (time.time() - store.SILENCE - 1,))
        taken_by(second, 1)
        assert second.waits()
        assert second.elsewhere() == 0
    first.close()


def test_a_run_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BEAT", 0.02)
    with SweepStore(tmp_path / "s.sqlite") as kept:
        kept.plan(jobs(1), "plan")
        beats = set()
        for _ in range(100):
            beats.add(kept._one("SELECT beat FROM runs"))
            if len(beats) > 2:
                break
            time.sleep(0.02)
        assert len(beats) > 2


def test_a_dead_process_whose_number_another_has_is_dead(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with SweepStore(path) as first, SweepStore(path) as second:
        first.plan(jobs(1), "plan")
        taken_by(first, 1)
        first._base.execute("UPDATE runs SET began = began - 100")  # as if this process had begun later
        second.plan(jobs(1), "plan")
        assert second.waits()


def test_another_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="no such file; expected the store of a sweep"):
        SweepStore(tmp_path / "nothing.sqlite", make=False)
    text = tmp_path / "text.sqlite"
    text.write_text("not a database, but long enough to be told from one" * 50)
    with pytest.raises(SweepError, match="no SQLite file, or a damaged one"):
        SweepStore(text)
    assert text.read_text().startswith("not a database")
    foreign = tmp_path / "foreign.sqlite"
    base = sqlite3.connect(foreign)
    base.execute("CREATE TABLE diary (day TEXT)")
    base.commit()
    base.close()
    with pytest.raises(SweepError, match="an SQLite file, but no store of sweeps"):
        SweepStore(foreign)
    newer = tmp_path / "newer.sqlite"
    SweepStore(newer).close()
    base = sqlite3.connect(newer)
    base.execute("PRAGMA user_version = 3")
    base.close()
    with pytest.raises(SweepError, match="got a store of format 3, expected 2"):
        SweepStore(newer)
    with pytest.raises(SweepError, match="Check that its folder exists"):
        SweepStore(tmp_path / "no" / "folder.sqlite")


def test_a_closed_file_is_open_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect, threads = store._connect, threading.enumerate()

    def slowly(path: Path) -> sqlite3.Connection:
        if threading.current_thread() not in threads:
            time.sleep(0.1)
        return connect(path)

    monkeypatch.setattr(store, "_connect", slowly)
    with SweepStore(tmp_path / "s.sqlite") as kept:
        kept.plan(jobs(2), "plan")
    assert threading.enumerate() == threads
    assert [path.name for path in tmp_path.iterdir()] == ["s.sqlite"]


def test_a_damaged_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with SweepStore(path) as kept:
        kept.plan(jobs(200), "plan")
    assert not Path(f"{path}-wal").exists(), "what would be read in place of the damaged pages"
    content = bytearray(path.read_bytes())
    content[4096:] = random.Random(0).randbytes(len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(SweepError, match="damaged"), SweepStore(path) as kept:
        kept.plan(jobs(200), "plan")


def test_a_process_that_writes_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.sqlite"
    SweepStore(path).close()
    monkeypatch.setattr(store, "PATIENCE", 0.2)
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import sqlite3, time; b = sqlite3.connect({str(path)!r}, isolation_level=None); "
         "b.execute('BEGIN IMMEDIATE'); print('held', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(SweepError, match="Another process has been writing"):
            SweepStore(path)
    finally:
        kill(holder)
