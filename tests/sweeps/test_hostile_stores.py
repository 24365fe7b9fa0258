"""Stores of sweeps that were damaged, or made to do harm."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hostile import NAMES, refused, told
from small_plans import home, toml

from rgap.cli.sweep import FAILED
from rgap.sweeps import Plan, sweep

ACTS = "\x1b]0;x\x07\x1b[2J\u202e[/]"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a sweep of four jobs, and its plan beside it."""
    folder = home(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(folder)
        sweep(Plan.load(toml(folder)), folder / "s.sqlite")
    with closing(sqlite3.connect(folder / "s.sqlite")) as base:
        base.execute("PRAGMA journal_mode = DELETE")
    return folder / "s.sqlite"


def sql(*statements: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as base:
            base.execute("PRAGMA writable_schema = ON")
            for statement in statements:
                base.execute(statement)

    return change


def bytewise(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes()))  # type: ignore[return-value]


def zeroed(first: int, last: int) -> Callable[[Path], None]:
    """Pages from 1 on."""

    def change(content: bytes) -> bytes:
        size = int.from_bytes(content[16:18], "big")
        end = min(last * size, len(content))
        return content[: (first - 1) * size] + bytes(max(0, end - (first - 1) * size)) + content[end:]

    return bytewise(change)


ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x AS key, x AS state FROM c"
DAMAGES: dict[str, Callable[[Path], None]] = {
    "text": lambda path: path.write_bytes(ACTS.encode() * 100),  # type: ignore[return-value]
    "the first bytes alone": bytewise(lambda content: content[:100]),
    "half": bytewise(lambda content: content[: len(content) // 2]),
    "no jobs": sql("DROP TABLE jobs"),
    "no runs": sql("DROP TABLE runs"),
    "no plans": sql("DROP TABLE plans"),
    "no index": sql("DROP INDEX by_state"),
    "an endless view": sql("DROP TABLE jobs", f"CREATE VIEW jobs AS {ENDLESS}"),
    "a trigger": sql("CREATE TRIGGER t AFTER UPDATE ON jobs BEGIN DELETE FROM jobs; END"),
    "a column more": sql("ALTER TABLE jobs ADD COLUMN x TEXT"),
    "another format": sql("PRAGMA user_version = 99"),
    "another program's": sql("PRAGMA application_id = 7"),
    "a schema that acts": sql(f"UPDATE sqlite_schema SET sql = sql || '/*{ACTS}*/'"),
    "a schema of nothing": sql("UPDATE sqlite_schema SET rootpage = 99999 WHERE name = 'jobs'"),
    "bytes for text": sql("UPDATE jobs SET model = x'ff00'"),
    "text that is none": sql("UPDATE jobs SET reason = CAST(x'fffe' AS TEXT)"),
    "words for numbers": sql(f"UPDATE jobs SET psnr = '{ACTS}'"),
    "bytes for numbers": sql("UPDATE jobs SET seconds = x'00'"),
    "numbers for words": sql("UPDATE jobs SET attack = x'01', image = x'02'"),
    "a first page of zeros": zeroed(1, 1),
    "a second page of zeros": zeroed(2, 2),
    "all pages but the first of zeros": zeroed(2, 99),
    "random pages": bytewise(lambda content: content[:4096] + random.Random(0).randbytes(len(content) - 4096)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_store(kind: str, whole: Path, tmp_path: Path) -> None:
    shutil.copy(whole, path := tmp_path / "s.sqlite")
    DAMAGES[kind](path)
    for arguments in (("show", path), ("show", path, "--json"), ("export", path, tmp_path / "rows.csv")):
        assert "s.sqlite" in refused("sweep", *arguments)
    assert not (tmp_path / "rows.csv").exists()


def test_a_store_of_nothing_is_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "s.sqlite").write_bytes(b"")
    assert told("sweep", "show", tmp_path / "s.sqlite")[0] == 0


def test_text_that_acts_is_shown_and_does_nothing(whole: Path, tmp_path: Path) -> None:
    shutil.copy(whole, path := tmp_path / "s.sqlite")
    columns = ("model", "attack", "defence", "image")
    sql(*(f"UPDATE jobs SET {name} = '{ACTS}' || {name}" for name in columns))(path)
    sql(f"UPDATE jobs SET state = 'failed', failure = 'a' || char(10) || '{ACTS}' WHERE seed = 0")(path)
    code, out, err = told("sweep", "show", path, "--by", "model,attack,image")
    assert (code, err) == (0, "")
    assert told("sweep", "show", path, "--by", "attack", "--plot", tmp_path / "p.png")[0] == 0
    assert "[U+001B]]0;x[U+0007]" in "".join(out.split())


def test_a_store_cannot_say_which_code_runs(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home(tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    (folder / "evil.py").write_text("from pathlib import Path\n\nPath('ran').touch()\nmake = None\n")
    own = Plan.load(toml(folder))
    shutil.copy(whole, folder / "s.sqlite")
    sql("UPDATE jobs SET state = 'waiting', spec = replace(spec, 'small_sweep_models:make', 'evil:make')")(
        folder / "s.sqlite"
    )
    with pytest.raises(ValueError, match="the specification of a job is not the plan's"):
        sweep(own, folder / "s.sqlite")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("start", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(1)", "\t=1"])
def test_no_cell_is_a_formula(start: str, whole: Path, tmp_path: Path) -> None:
    shutil.copy(whole, path := tmp_path / "s.sqlite")
    with closing(sqlite3.connect(path, isolation_level=None)) as base:
        base.execute("UPDATE jobs SET image = ?, reason = ?", (start, start))
    assert told("sweep", "export", path, tmp_path / "rows.csv")[0] == 0
    text = (tmp_path / "rows.csv").read_text()
    assert f"'{start}" in text
    assert f",{start}" not in text


@pytest.mark.parametrize("kind", NAMES)
def test_names(kind: str, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / NAMES[kind].replace("/", "|")
    assert "no such file" in refused("sweep", "show", path)
    shutil.copy(whole, path)
    assert told("sweep", "show", path, "--plot", f"{path}.png")[0] in (0, FAILED)
    zeroed(2, 99)(path)
    refused("sweep", "show", path)
