"""Plans whose jobs take milliseconds, or as long as a test wants, and `rgap sweep` as a process."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from warm import Program, beside

from rgap import cli
from rgap.sweeps import Plan, Progress, Summary, SweepStore, engine, sweep, work

MODELS = '''
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent


def make(seed=0, width=20):
    """A Linear layer with a bias reads the picture, so that it can be read out exactly."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 1))


def slow(seed=0):
    time.sleep(float((HERE / "nap").read_text()))
    return make(seed)


def held(seed=0):
    """Only the network of seed 0 is ever made."""
    while seed:
        time.sleep(0.05)
    return make(seed)


def poisonous(seed=0):
    """Kills every process that makes the network of seed 1."""
    if seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return make(seed)


def picky(seed=0):
    if seed == 2 and not (HERE / "mended").exists():
        raise RuntimeError("seed 2 is bad luck")
    return make(seed)
'''


def home(folder: Path, nap: float = 0.2) -> Path:
    """A folder that models can be imported from.

    Args:
        nap: seconds that the slow ones take.
    """
    (folder / "small_sweep_models.py").write_text(MODELS)
    (folder / "nap").write_text(str(nap))
    return folder


def spec_of(factory: str = "make", **other: Any) -> dict[str, Any]:
    """A plan of one picture, one attack and no defence."""
    return {
        "models": [f"small_sweep_models:{factory}"],
        "attacks": ["bias"],
        "input-shape": [1, 4, 4],
        "images": {"count": 1},
        **other,
    }


def toml(folder: Path, factory: str = "make", seeds: int = 4, count: int = 1, name: str = "plan") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(
        f'models = ["small_sweep_models:{factory}"]\nattacks = ["bias"]\nseeds = {list(range(seeds))}\n'
        f"input-shape = [1, 4, 4]\n[images]\ncount = {count}\n"
    )
    return path


def rgap_sweep(*arguments: str) -> None:
    cli.main(["sweep", *arguments])


def impatient_sweep(*arguments: str) -> None:
    """A scheduler that is there answers at once."""
    engine.ANSWER = 0.3
    rgap_sweep(*arguments)


def part_of_a_cluster(what: str, *options: str) -> None:
    """A scheduler or a worker of a Dask cluster, as its own commands make it."""
    importlib.import_module(f"distributed.cli.dask_{what}").main(options)


def start(folder: Path, *arguments: str, largest: int | None = None) -> Program:
    """`rgap sweep ...` in that folder.

    Args:
        largest: bytes of the largest file that it may write.
    """
    return Program(rgap_sweep, *arguments, folder=folder, largest=largest)


def start_anew(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The same as a user starts it, where nothing has been imported; it takes seconds, and as long for each worker."""
    # A shell's background job ignores the interrupt, and so would all that the tests start there.
    run = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from rgap.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", run, "sweep", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def here(plan: Path, progress: Callable[[Progress], None] | None = None) -> Summary:
    """What is left of a plan, done in this process: where it is not the one to be killed, that saves starting one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(plan.parent), *sys.path])
        patch.delitem(sys.modules, "small_sweep_models", raising=False)
        work._target.cache_clear()  # of models by the same name in another test's folder
        return sweep(Plan.load(plan), plan.with_suffix(".sqlite"), progress=progress)


def ended(process: subprocess.Popen[str] | Program, code: int = 0, seconds: float = 300.0) -> str:
    """What it printed, once it has ended as it should."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out + err


def until(true: Callable[[], bool], seconds: float = 300.0) -> None:
    """Wait for something to come true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


def done(store: Path, state: str = "done") -> int:
    """How many jobs are done in a store, or in another state; 0 before there is one."""
    if not store.is_file() or not store.stat().st_size:
        return 0
    with SweepStore(store, make=False) as opened:
        return opened.counts()[state]


def hurry(folder: Path) -> None:
    """From now on slow models take no time."""
    (folder / "nap").write_text("0")


def workers(process: subprocess.Popen[str] | Program) -> list[psutil.Process]:
    """The processes that a run has started to work for it."""
    if isinstance(process, Program):
        return beside(process)
    children = psutil.Process(process.pid).children(recursive=True)
    return [each for each in children if "spawn_main" in " ".join(each.cmdline())]


def kill(process: psutil.Process | subprocess.Popen[str] | Program) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    if isinstance(process, Program):
        process.close()
    elif isinstance(process, subprocess.Popen):
        for stream in (process.stdout, process.stderr):  # workers that it leaves may keep the other ends
            if stream is not None:
                stream.close()


def outcomes(store: Path) -> dict[str, dict[str, Any]]:
    """By key, all that a job found but for how long it took, and when and how often it was tried."""
    with SweepStore(store, make=False) as opened:
        rows = list(opened.rows())
    return {row["key"]: {k: v for k, v in row.items() if k not in ("seconds", "finished", "attempts")} for row in rows}
