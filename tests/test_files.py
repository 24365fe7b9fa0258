"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rgap import files
from rgap.files import write_atomically


@contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


@pytest.mark.parametrize("content", [b"", b"new", bytes(range(256)) * 4096])
@pytest.mark.parametrize("old", [None, b"an older and longer file"])
def test_the_content_is_written(content: bytes, old: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    write_atomically(path, content)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_bare_name_is_written_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_atomically("file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_the_old_file_is_replaced_not_written_into(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"old"  # whoever was reading reads on in the old one


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    old: bytes | None, step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    seen: list[list[str]] = []

    def fail(*_: object) -> None:
        seen.append([entry.name for entry in tmp_path.iterdir() if entry != path])
        raise error

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert len(seen[0]) == 1, "there was a temporary file at that point"
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([] if old is None else [b"old"])


@pytest.mark.parametrize("name", ["file", "a b.json", "[x]*.png"])
def test_what_a_killed_run_left_behind_is_removed(name: str, tmp_path: Path) -> None:
    """By the next write of the same file; another run may be writing what is new, and the rest is somebody else's."""
    killed = "import os, sys; from rgap import files; files.os.replace = lambda *_: os.kill(os.getpid(), 9)"
    code = f"{killed}; files.write_atomically(sys.argv[1], b'half')"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False).returncode == -9
    left, _ = tmp_path.iterdir()
    os.utime(left, (time.time() - 2 * files.STALE,) * 2)
    others = {f".{name}.original", f".{name}.rgap-part.txt", f".other{files.TEMPORARY}", f"x.{name}.a{files.TEMPORARY}"}
    for other in others:
        (tmp_path / other).write_bytes(b"")
        os.utime(tmp_path / other, (0, 0))
    before = {entry.name for entry in tmp_path.iterdir()}
    write_atomically(tmp_path / name, b"whole")
    after = {entry.name for entry in tmp_path.iterdir()}
    assert before - after == {left.name}
    assert after - before == {name}


def test_content_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "file", "text")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError, match="there"):
        write_atomically(tmp_path / "there", b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").is_dir()


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "file", b"new")


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077])
@pytest.mark.parametrize("exists", [False, True])
def test_permissions_follow_the_umask(mask: int, exists: bool, tmp_path: Path) -> None:
    path, plain = tmp_path / "file", tmp_path / "plain"
    if exists:
        path.write_bytes(b"old")
        path.chmod(0o600)
    with umask(mask):
        write_atomically(path, b"new")
        plain.write_bytes(b"as any new file")
        left = os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode) == 0o666 & ~mask
    assert left == mask
