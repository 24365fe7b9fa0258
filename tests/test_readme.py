"""The README's Python code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_python_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    out = capsys.readouterr().out
    assert "conv1: [3, 32, 32] -> [12, 17, 17]" in out
    assert "Recursive: exact" in out
    assert "No layer protects the input" in out


@pytest.mark.parametrize("path", sorted((README.parent / "docs").glob("*.md")), ids=lambda path: path.name)
def test_the_python_code_of_the_docs_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        exec(compile(block, str(path), "exec"), scope)


def test_every_command_it_names_exists() -> None:
    from rgap.cli import COMMANDS

    named = set(re.findall(r"^rgap (\w+)", README.read_text(), re.MULTILINE))
    assert named <= set(COMMANDS)
    assert named == set(COMMANDS) - {"reproduce"}
    assert "`rgap reproduce NAME" in README.read_text()
