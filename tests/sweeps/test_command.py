"""`rgap sweep` as a user meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from small_plans import home, toml

from rgap import cli
from rgap.cli import sweep as command
from rgap.sweeps import Progress, work


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "small_sweep_models", raising=False)
    work._target.cache_clear()
    return tmp_path


def rgap(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", *arguments])
    captured = capsys.readouterr()
    assert ended.value.code == code, captured.err
    return captured.out + captured.err


def test_a_plan_is_run_shown_and_exported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml(folder, seeds=2, count=2)
    assert "4 jobs, 0 of them done in plan.sqlite" in rgap(capsys, "plan.toml", "--dry-run")
    assert not (folder / "plan.sqlite").exists()
    words = rgap(capsys, "plan.toml", "--workers", "1", "--export", "rows.csv")
    assert "4 jobs: 4 done" in words
    assert "small_sweep_models:make bias" in words
    assert (folder / "rows.csv").read_text().count("\n") == 5
    assert json.loads(rgap(capsys, "plan.toml", "--dry-run", "--json")) == {
        "store": "plan.sqlite",
        "jobs": 4,
        "done": 4,
    }
    summary = json.loads(rgap(capsys, "run", "plan.toml", "--workers", "1", "--json"))
    assert (summary["jobs"], summary["before"], summary["done"], summary["failed"]) == (4, 4, 0, 0)
    words = rgap(capsys, "show", "plan.sqlite", "--by", "seed, attack", "--plot", "p.png", "--x", "seed", "--y", "psnr")
    assert "Plot: p.png" in words
    assert (folder / "p.png").is_file()
    groups = json.loads(rgap(capsys, "show", "plan.sqlite", "--by", "seed", "--json"))
    assert [(each["seed"], each["jobs"], each["exact"]) for each in groups] == [(0, 2, 1.0), (1, 2, 1.0)]
    assert "values" not in groups[0]
    assert rgap(capsys, "export", "plan.sqlite", "rows.parquet") == "rows.parquet: 4 rows\n"


def test_failures_are_told_and_end_with_a_code_of_their_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml(folder, "picky", seeds=3)
    words = rgap(capsys, "plan.toml", "--workers", "1", "--store", "s.sqlite", code=command.FAILED)
    assert "RuntimeError: seed 2 is bad luck" in words
    assert "--retry" in words
    assert "3, 1 failed" in words
    assert "failed 1 times" in rgap(capsys, "show", "s.sqlite")
    (folder / "mended").touch()
    assert "1 done" in rgap(capsys, "plan.toml", "--workers", "1", "--store", "s.sqlite", "--retry")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nothing.toml",), 1, "nothing.toml: cannot be read"),
        (("show", "nothing.sqlite"), 1, "nothing.sqlite: no such file; expected the store of a sweep"),
        (("export", "plan.toml", "x.csv"), 1, "no SQLite file"),
        (("plan.toml", "--workers", "0"), 2, "Invalid value for '--workers'"),
        (("show",), 2, "Missing argument 'STORE'"),
        ((), 2, "Usage: rgap sweep"),
        (("--help",), 0, "rgap sweep PLAN.toml"),
        (("run", "--help"), 0, "Several runs, of one plan"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(
    arguments: tuple[str, ...], code: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toml(folder)
    assert message in rgap(capsys, *arguments, code=code)
    assert not (folder / "nothing.sqlite").exists()


def test_several_workers_need_dask(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    toml(folder)
    monkeypatch.setitem(sys.modules, "distributed", None)
    words = rgap(capsys, "plan.toml", "--workers", "2", code=1)
    assert "pip install 'rgap[sweep]', or pass --workers 1" in words


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (Progress(0, 0, 10, 0, 1.0), "starting"),
        (Progress(5, 0, 10, 5, 10.0), "0.5 a second, 10 s left"),
        (Progress(5, 2, 1007, 7, 7.0), "1.0 a second, 17 min left, 2 failed"),
        (Progress(1, 0, 20001, 1, 1.0), "1.0 a second, 5.6 h left"),
    ],
)
def test_rate_and_time_left(now: Progress, words: str) -> None:
    assert command._pace(now) == words
