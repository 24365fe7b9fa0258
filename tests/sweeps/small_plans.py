"""Plans whose jobs take milliseconds, or as long as a test wants, and `rgap sweep` as a process."""

from __future__ import annotations

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

from rgap.sweeps import Plan, Progress, Summary, SweepStore, sweep, work

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
    time.sleep(float(os.environ.get("RGAP_TEST_NAP", "0.2")))
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


def home(folder: Path) -> Path:
    """A folder that models can be imported from."""
    (folder / "small_sweep_models.py").write_text(MODELS)
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


FORKED = (
    "import multiprocessing; from distributed import utils; utils._forkserver_preload_set = True; "
    "needed = ['distributed', 'rgap.sweeps.equip', 'torch.export._trace']; "
    "multiprocessing.get_context('forkserver').set_forkserver_preload(needed); "
)


def start(
    folder: Path, *arguments: str, shell: str = "", fork: bool = False, **environment: str
) -> subprocess.Popen[str]:
    """`rgap sweep ...` in that folder.

    Args:
        shell: what runs before it in the same process, such as a limit.
        fork: whether its workers are forks of one process that has imported all they need, where many of them die.
    """
    # A shell's background job ignores the interrupt, and so would all that the tests start there.
    run = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from rgap.cli import main; main()"
    if fork:
        run, environment = (
            FORKED + run,
            {**environment, "DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD": "forkserver"},
        )
    command = [sys.executable, "-c", run, "sweep", *arguments]
    if shell:
        command = ["sh", "-c", f'{shell}; exec "$0" "$@"', *command]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def here(plan: Path, progress: Callable[[Progress], None] | None = None, nap: float = 0.0) -> Summary:
    """What is left of a plan, done in this process: where it is not the one to be killed, that saves starting one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RGAP_TEST_NAP", str(nap))
        patch.setattr(sys, "path", [str(plan.parent), *sys.path])
        patch.delitem(sys.modules, "small_sweep_models", raising=False)
        work._target.cache_clear()  # of models by the same name in another test's folder
        return sweep(Plan.load(plan), plan.with_suffix(".sqlite"), progress=progress)


def ended(process: subprocess.Popen[str], code: int = 0, seconds: float = 300.0) -> str:
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


def done(store: Path) -> int:
    """How many jobs are done in a store; 0 before there is one."""
    if not store.is_file() or not store.stat().st_size:
        return 0
    with SweepStore(store, make=False) as opened:
        return opened.counts()["done"]


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that a run has started to work for it."""
    children = psutil.Process(process.pid).children(recursive=True)
    names = {each: " ".join(each.cmdline()) for each in children}
    forks = [each for each in children if "forkserver" in names[each] and each.ppid() != process.pid]
    return forks or [each for each in children if "spawn_main" in names[each]]


def kill(process: psutil.Process | subprocess.Popen[Any]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    if isinstance(process, subprocess.Popen):
        for stream in (process.stdout, process.stderr):  # workers that it leaves may keep the other ends
            if stream is not None:
                stream.close()


def outcomes(store: Path) -> dict[str, dict[str, Any]]:
    """By key, all that a job found but for how long it took, and when and how often it was tried."""
    with SweepStore(store, make=False) as opened:
        rows = list(opened.rows())
    return {row["key"]: {k: v for k, v in row.items() if k not in ("seconds", "finished", "attempts")} for row in rows}
