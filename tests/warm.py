"""Programs that start at once: forks of one process that has imported what they need, which takes seconds.

What such a program and the processes that it starts import is there already. So this is for tests of what a program
does, not of what it imports or how it is started.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest

CONTEXT = multiprocessing.get_context("forkserver")
DASK = ["distributed", "distributed.cli.dask_scheduler", "distributed.cli.dask_worker"]
OURS = ["rgap.attacks", "rgap.cli.audit", "rgap.cli.sweep", "rgap.sweeps.equip"]
CONTEXT.set_forkserver_preload([*DASK, *OURS, "pytest", "torch.export._trace"])


@contextmanager
def _prepared() -> Iterator[None]:
    """As the process that programs are forks of is to be started, and they from it."""
    with pytest.MonkeyPatch.context() as patch:
        # Dask reads it when it is imported: the workers of a program are started as it is.
        patch.setenv("DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD", "forkserver")
        # The program that runs the tests is not to be imported in this one.
        patch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
        yield


def begin() -> None:
    """Let the imports begin, so that the first program need not wait for them."""
    with _prepared():
        forkserver.ensure_running()


class Program:
    """Like subprocess.Popen, of a function.

    Args:
        main: what it does; it can be imported.
        arguments: of the function.
        folder: in which it runs, and from which it imports.
        terminal: that it reads from and writes to; without one ``communicate`` returns what it wrote.
        largest: bytes of the largest file that it may write.
        environment: variables that it has beside those of this process.
    """

    def __init__(
        self,
        main: Callable[..., object],
        *arguments: object,
        folder: Path,
        terminal: Path | None = None,
        largest: int | None = None,
        **environment: str,
    ):
        self._kept = Path(tempfile.mkdtemp())
        written = [self._kept / "out", self._kept / "err"]
        streams = [terminal] * 3 if terminal else [Path(os.devnull), *written]
        self._process = CONTEXT.Process(target=_run, args=(main, arguments, folder, streams, largest, environment))
        with _prepared():
            self._process.start()
        self.pid: int = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self.returncode

    def said(self) -> str:
        """What it has written so far."""
        return "".join((self._kept / name).read_text() for name in ("out", "err"))

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to either stream, once it has ended."""
        self.wait(timeout)
        out, err = ((self._kept / name).read_text() for name in ("out", "err"))
        self.close()
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def close(self) -> None:
        shutil.rmtree(self._kept)


def python(*arguments: str) -> None:
    """To be the main of a program: what the interpreter does with -c and code, -m and a module, or a file."""
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def beside(program: Program) -> list[psutil.Process]:
    """All that have been started as programs are but for this one, such as those that it has started."""
    server = psutil.Process(forkserver._forkserver._forkserver_pid)  # type: ignore[attr-defined]
    return [each for each in server.children() if each.pid != program.pid]


def _run(
    main: Callable[..., object],
    arguments: tuple[object, ...],
    folder: Path,
    streams: list[Path],
    largest: int | None,
    environment: dict[str, str],
) -> None:
    for number, stream in enumerate(streams):
        opened = os.open(stream, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOCTTY)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    # A shell's background job ignores the interrupt, and so would all that the tests start there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ.update(environment)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    # What it starts is forked from the same process; without this there would be another.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    main(*arguments)
