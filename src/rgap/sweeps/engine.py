"""Where the jobs of a sweep are done: in this process, in local processes, or on a Dask cluster.

Local processes are a Dask cluster too, on this machine alone: a worker that is killed is replaced and its job done by
another one, where a process pool would lose all that it was given.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import queue
import signal
import time
import traceback
import uuid
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgap.sweeps.job import Failure
from rgap.sweeps.store import SweepError
from rgap.sweeps.work import NotSupplied, Supplies, do, supply, withdraw

Outcome = Mapping[str, Any] | Failure | None
"""What a job found, what went wrong, or None: it was lost with its worker, and is to be done again."""

AHEAD = 3
"""Jobs for each worker that are on their way: one that is done and two that it can go on with."""
ANY = ""
"""Whichever worker there is."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
KILLED = Failure("KilledWorker: every worker that began this job died, by want of memory or by a signal")
FETCH = 5.0
"""Seconds to wait for what a job found, which lies with the worker that did it."""
ANSWER = 5.0
"""Seconds to wait for a scheduler's answer."""
RETURN = 600.0
"""Seconds to wait for a scheduler that is gone."""


class Engine(ABC):
    """Takes jobs and gives back what came of them, in any order."""

    @abstractmethod
    def lanes(self) -> list[str]:
        """The workers that could do another job now, one entry for each job."""

    @abstractmethod
    def put(self, key: str, spec: Mapping[str, Any], lane: str) -> None:
        """Begin a job, if possible with this worker."""

    @abstractmethod
    def get(self, timeout: float) -> list[tuple[str, Outcome]]:
        """Jobs that have ended; waits for the first of them, but not longer than ``timeout`` seconds."""

    @abstractmethod
    def close(self) -> None:
        """End, whatever is still going on."""


class Here(Engine):
    """One job at a time, in this process."""

    def __init__(self, supplies: Supplies):
        self._name = uuid.uuid4().hex
        supply(self._name, supplies)
        self._jobs: deque[tuple[str, Mapping[str, Any]]] = deque()

    def lanes(self) -> list[str]:
        return [] if self._jobs else ["here"]

    def put(self, key: str, spec: Mapping[str, Any], lane: str) -> None:
        self._jobs.append((key, spec))

    def get(self, timeout: float) -> list[tuple[str, Outcome]]:
        if not self._jobs:
            return []
        key, spec = self._jobs.popleft()
        try:
            return [(key, do(spec))]
        except Exception:
            return [(key, Failure(traceback.format_exc()))]

    def close(self) -> None:
        self._jobs.clear()
        withdraw(self._name)


@dataclass(frozen=True)
class _Begun:
    """A job that is on its way: with which worker, and Dask's handle on it."""

    spec: Mapping[str, Any]
    lane: str
    future: Any


class Cluster(Engine):
    """A Dask cluster; the workers write through this process.

    Args:
        supplies: for every worker, also those that come later.
        address: of the scheduler, or a file in which it stands; None: a cluster of its own on this machine.
        workers: of the local cluster.
        notice: called with what a user should know, such as that the scheduler is gone.

    Raises:
        SweepError: Dask is not installed, or there is no scheduler at the address.
    """

    def __init__(
        self,
        supplies: Supplies,
        address: str | None = None,
        workers: int = 1,
        notice: Callable[[str], None] = lambda text: None,
    ):
        try:
            self._dask = importlib.import_module("distributed")
        except ImportError as error:
            raise SweepError(
                f"several workers need Dask ({error}): install it with pip install 'rgap[sweep]', or pass --workers 1"
            ) from error
        # Workers and schedulers that leave are what this is for; their farewells are not for the user.
        for name in [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "distributed"]:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._gone = (OSError, TimeoutError, self._dask.comm.core.CommClosedError)
        self._equip = importlib.import_module("rgap.sweeps.equip").Equip
        self._name = f"rgap-{uuid.uuid4().hex}"
        self._supplies, self._address, self._notice = supplies, address, notice
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._begun: dict[str, _Begun] = {}
        self._suspects: dict[str, Mapping[str, Any]] = {}
        """Specifications of jobs whose workers died. They are done at the end, one by one, to see which kills."""
        self._on_trial: str | None = None
        self._threads: dict[str, int] = {}
        self._looked, self._waiting = -math.inf, False
        self._local: Any = None
        if address is None:
            self._local = self._own(workers)
        self._client = self._connect(0.0)

    def _own(self, workers: int) -> Any:
        """Processes of this machine. Who is not this process cannot give them work: connections are encrypted and
        need a certificate that is made anew each time."""
        settings = {
            # A job that kills is found out by itself, see `get`: one more try tells enough.
            "distributed.scheduler.allowed-failures": 1,
            # Without Dask's own setting of malloc, by which workers give memory back at once: jobs that make and free
            # tensors of some megabytes then wait for the system to clear new pages most of the time.
            "distributed.nanny.pre-spawn-environ": {name: "1" for name in THREADS},
            # What Dask measures of its processes takes time from the jobs.
            "distributed.worker.profile.enabled": False,
            "distributed.admin.tick.interval": "1s",
            "distributed.admin.system-monitor.interval": "10s",
        }
        with importlib.import_module("dask").config.set(settings):
            return self._dask.LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                memory_limit=0,
                security=True,
                host="127.0.0.1",
                silence_logs=logging.CRITICAL,  # of workers too, that are stopped in the middle of a job
            )

    def _connect(self, patience: float) -> Any:
        start = time.monotonic()
        while True:
            try:
                return self._client_now()
            except self._gone as error:
                if time.monotonic() - start >= patience:
                    raise SweepError(
                        f"no scheduler answers at {self._address} ({error}); expected the address of a Dask scheduler, "
                        "such as tcp://host:8786. What is done is in the store: the same command goes on"
                    ) from error
                time.sleep(1.0)

    def _client_now(self) -> Any:
        where: dict[str, Any] = {"address": self._local or self._address}
        if self._address is not None and Path(self._address).is_file():
            where = {"scheduler_file": self._address}
        client = self._dask.Client(**where, set_as_default=False, timeout=ANSWER)
        try:
            client.register_plugin(self._equip(self._name, self._supplies), name=self._name)
        except BaseException as error:
            client.close(timeout=5)
            if isinstance(error, (ImportError, AttributeError)):
                raise SweepError(
                    f"a worker at {self._address} has not the same rgap as this process ({error})"
                ) from error
            raise
        return client

    def lanes(self) -> list[str]:
        if self._on_trial is not None:
            return []
        self._look()
        if not self._threads:
            return [] if self._begun else [ANY]
        busy = Counter(job.lane for job in self._begun.values())
        room = {address: AHEAD * threads - busy[address] for address, threads in self._threads.items()}
        # In turn, so that no worker gets all that is left.
        return [address for at in range(max(room.values())) for address, free in room.items() if at < free]

    def _look(self) -> None:
        """See which workers there are, now and then."""
        if time.monotonic() - self._looked < 1.0:
            return
        try:
            self._threads = dict(self._client.nthreads())
        except self._gone:
            return  # what it had been given will be lost, see `get`
        self._looked = time.monotonic()
        if not self._threads and not self._waiting:
            self._notice("the scheduler has no workers: waiting for the first")
        self._waiting = not self._threads
        # If all workers die at once, Dask forgets jobs that were for one of them when others come.
        for key, job in list(self._begun.items()):
            if job.lane != ANY and job.lane not in self._threads and job.future.status == "pending":
                self.put(key, job.spec, ANY)

    def put(self, key: str, spec: Mapping[str, Any], lane: str) -> None:
        # A name of its own: a job that failed before would be answered from the scheduler's memory.
        name = f"rgap-{key}-{uuid.uuid4().hex[:8]}"
        where = {} if lane == ANY else {"workers": [lane], "allow_other_workers": True}
        future = self._client.submit(do, dict(spec), key=name, pure=False, **where)
        self._begun[key] = _Begun(spec, lane, future)
        future.add_done_callback(lambda ended, key=key: self._ended.put((key, ended)))

    def get(self, timeout: float) -> list[tuple[str, Outcome]]:
        self._look()
        if not self._begun and self._suspects:
            self._on_trial, spec = self._suspects.popitem()
            self.put(self._on_trial, spec, ANY)
        found: list[tuple[str, Outcome]] = []
        while True:
            try:
                key, future = self._ended.get(block=not found, timeout=timeout)
            except queue.Empty:
                break
            if key not in self._begun or self._begun[key].future is not future:
                continue  # of a scheduler that is gone
            outcome = self._outcome(future)
            if outcome is None and future.status in ("cancelled", "error"):
                return [*found, *self._again()]
            job = self._begun.pop(key)
            if outcome == KILLED and key != self._on_trial:
                self._suspects[key] = job.spec  # it may only have waited behind the one that kills
                continue
            self._on_trial = None
            found.append((key, outcome))
        return found

    def _outcome(self, future: Any) -> Outcome:
        """What a job found, or what went wrong; None if it was lost."""
        try:
            if future.status == "finished":
                found: Mapping[str, Any] = future.result(timeout=FETCH)
                return found
            if future.status != "error":
                return None
            error = future.exception(timeout=FETCH)
            if isinstance(error, self._dask.scheduler.KilledWorker):
                return KILLED
            if isinstance(error, NotSupplied):  # a scheduler that was started anew knows nothing of the supplies
                return None
            lines = traceback.format_exception(type(error), error, future.traceback(timeout=FETCH))
            return Failure("".join(lines))
        except (*self._gone, self._dask.CancelledError):
            return None  # the worker died that had it

    def _again(self) -> list[tuple[str, Outcome]]:
        """Find the scheduler anew; all that it had been given is lost."""
        lost = [*self._begun, *self._suspects]
        self._begun.clear()
        self._suspects.clear()
        self._on_trial = None
        self._notice(f"the scheduler at {self._address} is gone: waiting for it")
        self._client.close(timeout=1)
        self._client = self._connect(RETURN)
        return [(key, None) for key in lost]

    def close(self) -> None:
        if self._local is not None and self._begun:
            self._kill()
        self._begun.clear()
        with contextlib.suppress(*self._gone, ValueError):  # a scheduler that was started anew does not know the name
            self._client.unregister_worker_plugin(self._name)
        self._client.close(timeout=10)
        if self._local is not None:
            self._local.close(timeout=10)

    def _kill(self) -> None:
        """End local workers in the middle of their jobs. Dask would ask them to end, and wait for seconds first."""
        for nanny in list(self._local.workers.values()):
            nanny.auto_restart = False
            if nanny.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(nanny.pid, signal.SIGKILL)
