"""The same examples are drawn every time, and others when they are asked for, with what makes a test of a failure."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from warm import Program, python

TESTS = Path(__file__).parent
DRAWS = """
import os, random
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

def log(name, *values):
    with open(Path(os.environ["LOG"]) / name, "a") as file:
        print(*values, file=file)

@pytest.fixture(scope="module")
def shared():
    return torch.rand(2).tolist(), random.random()

@settings(max_examples=50)
@given(st.integers(), st.text(), st.sampled_from(sorted({"a", "b", "c"})))
def test_drawn(number, text, letter):
    log("drawn", number, repr(text), letter, torch.rand(1).item(), random.random(), np.random.rand())

def test_not_seeded(shared):
    log("plain", shared, torch.rand(1).item(), random.random(), np.random.rand())
"""
# Before those, tests that draw, fail, and have constants of their own.
OTHERS = """
import random, torch
from hypothesis import given, strategies as st
NUMBERS = [123456789, 987654321, 555666777, 111222333]

@given(st.integers())
def test_fails(number):
    assert number < 1000 + torch.rand(1)

def test_draws():
    assert torch.rand(3).sum() + random.random() > 0 and NUMBERS
"""
FAILING = """
import os
import pytest
from hypothesis import given, strategies as st
from networks import clients

def log(line):
    with open(os.environ["LOG"] + "/seeds", "a") as file:
        print(line, file=file)

@given(clients())
def test_no_network_is_deep(client):
    assert len(client.convolutions) < 2

@given(st.data())
def test_numbers_are_small(data):
    assert data.draw(st.integers()) < 1000

@pytest.mark.search
def test_a_search(first_seed):
    log(first_seed)

def test_that_draws_nothing():
    log("never")
"""


def run(folder: Path, *arguments: str, **environment: str) -> str:
    """Python on a folder whose tests are drawn as those here are; what it prints."""
    (folder / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    program = Program(python, *arguments, folder=folder, **environment)
    return "".join(program.communicate())


def run_anew(folder: Path, *arguments: str, **environment: str) -> str:
    """The same in a process that has imported nothing, and hashes as it is told."""
    (folder / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    found = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    return found.stdout + found.stderr


def test_every_run_draws_the_same(tmp_path: Path) -> None:
    (tmp_path / "test_draws.py").write_text(DRAWS)
    (tmp_path / "test_others.py").write_text(OTHERS)
    runs = {
        "alone": ["test_draws.py"],
        "behind others": ["test_others.py", "test_draws.py::test_not_seeded", "test_draws.py::test_drawn"],
    }
    logs = []
    for start, (name, files) in zip((run, run_anew), runs.items(), strict=True):
        log = tmp_path / name
        log.mkdir()
        said = start(tmp_path, "-m", "pytest", "-q", *files, LOG=str(log), PYTHONHASHSEED="1")
        assert "2 passed" in said or "3 passed" in said, said
        logs.append([(log / kind).read_text() for kind in ("drawn", "plain")])
    assert logs[0] == logs[1]
    assert logs[0][0].count("\n") == 50


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder, and what is printed of two or more rounds."""
    folder = tmp_path_factory.mktemp("explored")
    (folder / "test_failing.py").write_text(FAILING)
    said = run(folder, str(TESTS / "explore.py"), "--minutes", "0.05", "test_failing.py", LOG=str(folder))
    return folder, said


def test_exploring_draws_others_in_each_round_until_the_time_is_over(explored: tuple[Path, str]) -> None:
    folder, said = explored
    seeds = re.findall(r"^Round \d+: 3 tests, seed (\d+)\.$", said, re.MULTILINE)
    searched = (folder / "seeds").read_text().split()
    assert len(set(seeds)) == len(seeds) >= 1
    assert searched == seeds[: len(searched)]
    assert len(searched) >= len(seeds) - 1
    assert re.search(rf"^{len(seeds)} rounds, \d+ tests run, \d+ failed\.$", said, re.MULTILINE)


def test_what_fails_is_printed_with_its_seed_and_what_to_add(explored: tuple[Path, str]) -> None:
    folder, said = explored
    assert re.search(r"^--hypothesis-seed=\d+ ", said.replace("    python -m pytest ", ""), re.MULTILINE)
    assert "Add to test_failing.py, above test_no_network_is_deep:\n" in said
    assert "from networks import Client\n" in said
    (line,) = set(re.findall(r"^@example\(.*\)$", said, re.MULTILINE))
    text = FAILING.replace("@given(clients())", f"{line}\n@given(clients())")
    (folder / "test_added.py").write_text(
        f"from hypothesis import example\nfrom networks import Client\nfrom rgap.losses import *\n{text}"
    )
    seed, name = re.findall(r"--hypothesis-seed=(\d+) '(.*numbers.*)'", said)[0]
    again = run(folder, "-m", "pytest", "-q", f"--hypothesis-seed={seed}", name, LOG=str(folder))
    assert "1 failed" in again
    added = run(folder, "-m", "pytest", "-q", "test_added.py::test_no_network_is_deep", LOG=str(folder))
    assert "1 failed" in added
    assert "explicit" in added
    assert "Add to test_failing.py, above test_numbers_are_small a test of this case" in said
    assert "@reproduce_failure(" in said
