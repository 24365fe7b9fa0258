"""The jobs of sweeps and what they found, in one SQLite file. What is in it is never computed again.

A job is waiting, taken, done or failed. A run takes jobs in its own name, so that several runs can work on one file;
what a run had taken when it died waits again. Every change is a transaction: whatever happens, the file is whole.
"""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from rgap.printable import line
from rgap.sweeps.job import AXES, FIGURES, Failure, Job, sha256
from rgap.sweeps.lanes import Lanes

FORMAT = 2
_KIND = 0x72676170
"""In the file's header, which says that it is one of these: "rgap"."""
BEAT = 5.0
"""Seconds between two signs of life of a run."""
SILENCE = 60.0
"""Seconds without a sign of life after which a run on another machine counts as dead."""
PATIENCE = 60.0
"""Seconds to wait for another process that is writing."""

ROW = {"key": "TEXT", **AXES, "state": "TEXT", **FIGURES, "failure": "TEXT", "attempts": "INTEGER", "finished": "TEXT"}
"""The columns of a table of results, and what SQLite keeps in each."""
_SCHEMA = f"""
CREATE TABLE jobs (
    key TEXT PRIMARY KEY,
    position INTEGER NOT NULL,
    spec TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'taken', 'done', 'failed')),
    run TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    failure TEXT,
    finished TEXT,
    {", ".join(f"{name} {kind}" for name, kind in (AXES | FIGURES).items())}
) WITHOUT ROWID;
CREATE INDEX by_state ON jobs (state, run);
CREATE TABLE runs (id TEXT PRIMARY KEY, host TEXT, pid INTEGER, began REAL, beat REAL) WITHOUT ROWID;
CREATE TABLE plans (plan TEXT PRIMARY KEY, first_run TEXT) WITHOUT ROWID;
"""
_KINDS: dict[str, Any] = {
    "TEXT": (str, type(None)), "INTEGER": (int, type(None)), "REAL": (int, float, type(None)),
}  # fmt: skip
"""What SQLite gives for a column's type: whatever was put in, it keeps."""


class SweepError(ValueError):
    """A store that cannot be used; says why, and what to do."""


class SweepStore(AbstractContextManager["SweepStore"]):
    """The file. To be closed, or used in a ``with`` statement, in the thread that opened it.

    Args:
        path: made if it is not there.
        make: False: refuse a file that is not there.

    Raises:
        SweepError: the file is no store of sweeps, or of a format that this version does not know.
    """

    def __init__(self, path: str | Path, make: bool = True):
        self.path, self.seconds = Path(path), 0.0
        """``seconds``: spent in here so far."""
        self._run: str | None = None
        self._left = Lanes()
        """Jobs of the plan that may be waiting."""
        self._stop = threading.Event()
        self._beats: list[threading.Thread] = []
        if not make and not self.path.is_file():
            raise SweepError(f"{self.path}: no such file; expected the store of a sweep, as `rgap sweep PLAN` makes it")
        try:
            self._base = _connect(self.path)
            self._open()
        except sqlite3.Error as error:
            raise self._told(error) from error

    def _open(self) -> None:
        with self._change():
            kind, version = (
                self._base.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
            )
            if not kind and not self._base.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                for statement in _SCHEMA.split(";"):
                    self._base.execute(statement)
                self._base.execute(f"PRAGMA application_id = {_KIND}")
                self._base.execute(f"PRAGMA user_version = {FORMAT}")
                kind, version = _KIND, FORMAT
        if kind != _KIND:
            raise SweepError(f"{self.path}: an SQLite file, but no store of sweeps; expected one, or another --store")
        if version != FORMAT:
            raise SweepError(
                f"{self.path}: got a store of format {version}, expected {FORMAT}; use the version of rgap that made it"
            )
        if _tables(self._base) != _expected():  # a view can be endless, a trigger write anything
            raise self._changed("it has other tables")

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what this run had taken, and close the file."""
        self._stop.set()
        try:
            if self._run is not None:
                with self._change():
                    self._release([self._run])
        except (sqlite3.Error, SweepError):
            pass  # the disk is full, say: another run finds that this one is dead
        finally:
            self._run = None
            for each in self._beats:  # they have the file open; the last that closes it leaves nothing beside it
                each.join()
            self._base.close()

    # A run: plan, then take and finish in turn.

    def plan(self, jobs: Iterable[Job], text: str, retry: bool = False) -> Counts:
        """Begin a run of these jobs; those that the file does not know are put into it.

        Args:
            text: the plan itself, kept for the reader.
            retry: jobs that failed wait again.
        """
        own = psutil.Process()
        self._run = uuid.uuid4().hex
        jobs = list(jobs)
        rows = [(job.key, at, job.text, *(job.axes[name] for name in AXES)) for at, job in enumerate(jobs)]
        networks = [(job.key, job.network) for job in jobs]
        names = ("key", "position", "spec", *AXES)
        with self._change():
            self._base.execute(
                "INSERT INTO runs VALUES (?, ?, ?, ?, ?)",
                (self._run, socket.gethostname(), own.pid, own.create_time(), time.time()),
            )
            self._base.execute("INSERT OR IGNORE INTO plans VALUES (?, ?)", (text, self._run))
            self._base.executemany(
                f"INSERT OR IGNORE INTO jobs ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})", rows
            )
            self._base.execute(
                "CREATE TEMP TABLE IF NOT EXISTS mine (key TEXT PRIMARY KEY, network TEXT) WITHOUT ROWID"
            )
            self._base.execute("DELETE FROM mine")
            self._base.executemany("INSERT OR IGNORE INTO mine VALUES (?, ?)", networks)
            if retry:
                self._base.execute(
                    "UPDATE jobs SET state = 'waiting', failure = NULL "
                    "WHERE state = 'failed' AND key IN (SELECT key FROM mine)"
                )
            self._bury()
        self._look()
        beat = threading.Thread(target=self._beat, args=(self._run,), daemon=True)
        beat.start()
        self._beats.append(beat)
        return self.counts()

    def take(
        self, lanes: Sequence[str], finished: Sequence[tuple[str, Mapping[str, Any] | Failure]] = ()
    ) -> list[tuple[str, str, Any]]:
        """Keep what was finished, and take more of what waits, in one transaction.

        Args:
            lanes: who could do another job; one entry for each job.
            finished: keys with what the jobs found, or with what went wrong.

        Returns:
            Lanes, keys and specifications; fewer than there are lanes if not enough is waiting.
        """
        if not finished and not (lanes and self._left):
            return []
        taken: list[tuple[str, str, Any]] = []
        with self._change():
            for key, outcome in finished:
                self._finish(key, outcome)
            for lane in lanes:
                while (job := self._left.next(lane)) is not None:
                    found = self._base.execute(
                        "UPDATE jobs SET state = 'taken', run = ?, attempts = attempts + 1 "
                        "WHERE key = ? AND state = 'waiting' RETURNING spec",
                        (self._run, job),
                    ).fetchall()
                    if found:
                        spec = str(found[0][0])
                        # It names code of one's own: nobody else may say which.
                        if sha256(spec) != job:
                            raise self._changed("the specification of a job is not the plan's")
                        taken.append((lane, job, json.loads(spec)))
                        break  # else another run was faster
        return taken

    def give_back(self, keys: Iterable[str]) -> None:
        """Jobs that were taken and not done: they wait again, before all others."""
        keys = list(keys)
        with self._change():
            self._base.executemany(
                "UPDATE jobs SET state = 'waiting', run = NULL, attempts = attempts - 1 "
                "WHERE key = ? AND state = 'taken' AND run = ?",
                [(key, self._run) for key in keys],
            )
        networks = [(key, self._one("SELECT network FROM mine WHERE key = ?", key)) for key in keys]
        self._left.give_back(reversed(networks))

    def waits(self, look: bool = True) -> bool:
        """Whether a job of the plan may still be waiting.

        Args:
            look: into the file, if this run knows of none: another one may have given some back, or have died.
        """
        if not self._left and look:
            with self._change():
                self._bury()
            self._look()
        return bool(self._left)

    def elsewhere(self) -> int:
        """How many jobs of the plan other runs have taken."""
        return int(
            self._one("SELECT count(*) FROM mine JOIN jobs USING (key) WHERE state = 'taken' AND run != ?", self._run)
        )

    def _look(self) -> None:
        self._left.fill(
            self._all("SELECT key, network FROM mine JOIN jobs USING (key) WHERE state = 'waiting' ORDER BY position")
        )

    def _finish(self, key: str, outcome: Mapping[str, Any] | Failure) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        # What another run has done meanwhile, having taken this one for dead, stays as it is.
        if isinstance(outcome, Failure):
            self._base.execute(
                "UPDATE jobs SET state = 'failed', run = NULL, failure = ?, finished = ? "
                "WHERE key = ? AND state != 'done'",
                (outcome.text, now, key),
            )
            return
        settings = ", ".join(f"{name} = ?" for name in FIGURES)
        self._base.execute(
            f"UPDATE jobs SET state = 'done', run = NULL, failure = NULL, finished = ?, {settings} "
            "WHERE key = ? AND state != 'done'",
            (now, *(outcome[name] for name in FIGURES), key),
        )

    def _bury(self) -> None:
        """Runs that are dead give back what they had taken."""
        host, now = socket.gethostname(), time.time()
        dead = [
            run
            for run, home, pid, began, beat in self._base.execute("SELECT * FROM runs").fetchall()
            if run != self._run and (not _lives(pid, began) if home == host else now - beat > SILENCE)
        ]
        self._release(dead)

    def _release(self, runs: Sequence[str]) -> None:
        for run in runs:
            self._base.execute(
                "UPDATE jobs SET state = 'waiting', run = NULL WHERE state = 'taken' AND run = ?", (run,)
            )
            self._base.execute("DELETE FROM runs WHERE id = ?", (run,))

    def _beat(self, run: str) -> None:
        """Signs of life, over a connection of their own: a run may wait long for its workers."""
        base = _connect(self.path)
        try:
            while not self._stop.wait(BEAT):
                try:
                    base.execute("UPDATE runs SET beat = ? WHERE id = ?", (time.time(), run))
                except sqlite3.Error:
                    continue  # the next transaction of the run itself says what is wrong
        finally:
            base.close()

    # What is in it.

    def counts(self) -> Counts:
        """Jobs of the plan by their state; of the whole file if there is no plan."""
        where = "" if self._run is None else "WHERE key IN (SELECT key FROM mine)"
        found = self._all(f"SELECT state, count(*) FROM jobs {where} GROUP BY state")
        return {state: 0 for state in ("waiting", "taken", "done", "failed")} | dict(found)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every job as a row, by the names in `ROW`, in the order of the plans."""
        for values in self._all(f"SELECT {', '.join(ROW)} FROM jobs ORDER BY position, key"):
            row = dict(zip(ROW, values, strict=True))
            for name, value in row.items():
                if not isinstance(value, _KINDS[ROW[name]]):
                    raise self._changed(f"{name} of a job is of type {type(value).__name__}")
            if row["labels_right"] is not None:
                row["labels_right"] = bool(row["labels_right"])
            yield row

    def failures(self, most: int = 5) -> list[tuple[str, int]]:
        """What went wrong, the last line of each, and how often; the most frequent first."""
        found = self._all("SELECT failure FROM jobs WHERE state = 'failed'")
        lines = (line(str(text or "").strip().rpartition("\n")[2]) for (text,) in found)
        return Counter(lines).most_common(most)

    def _all(self, query: str, *values: Any) -> list[Any]:
        try:
            return self._base.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._told(error) from error

    def _one(self, query: str, *values: Any) -> Any:
        return self._all(query, *values)[0][0]

    @contextmanager
    def _change(self) -> Iterator[None]:
        """A transaction; what another process is writing is waited for."""
        start = time.perf_counter()
        try:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._base.execute("COMMIT")
            except BaseException:
                if self._base.in_transaction:
                    self._base.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise self._told(error) from error
        finally:
            self.seconds += time.perf_counter() - start

    def _changed(self, what: str) -> SweepError:
        return SweepError(
            f"{self.path}: {what}, as no sweep writes: the file is damaged, or was changed. Expected a store of "
            "sweeps, or another --store."
        )

    def _told(self, error: sqlite3.Error) -> SweepError:
        reason = line(str(error))
        if "full" in reason or "disk I/O" in reason:
            left = "Make room and run the same command again: what is in the store stays, and is not done again"
        elif "locked" in reason:
            left = f"Another process has been writing for {PATIENCE:.0f} s: end it, and run the same command again"
        elif any(words in reason for words in ("not a database", "malformed", "no such", "corrupt", "decode")):
            left = "It is no SQLite file, or a damaged one: expected a store of sweeps, or another --store"
        else:
            left = "Check that its folder exists and can be written to, or pass another --store"
        return SweepError(f"{self.path}: {reason}. {left}.")


def _tables(base: sqlite3.Connection) -> list[Any]:
    return base.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY name").fetchall()


@cache
def _expected() -> list[Any]:
    """`_tables` of a new store."""
    with closing(sqlite3.connect(":memory:")) as base:
        base.executescript(_SCHEMA)
        return _tables(base)


Counts = dict[str, int]
"""How many jobs are waiting, taken, done and failed."""


def _connect(path: Path) -> sqlite3.Connection:
    base = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
    try:
        # Readers and a writer do not wait for each other, and a commit is on the disk when it returns.
        base.execute("PRAGMA journal_mode = WAL")
        base.execute("PRAGMA synchronous = FULL")
        base.execute("PRAGMA wal_autocheckpoint = 200")  # pages: little is left to make room for
        base.execute("PRAGMA temp_store = MEMORY")
    except BaseException:
        base.close()
        raise
    return base


def _lives(pid: int, began: float) -> bool:
    """Whether the process that began then still runs; another one may have its number since."""
    try:
        return abs(psutil.Process(pid).create_time() - began) < 1.0
    except psutil.Error:
        return False
