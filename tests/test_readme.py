"""The README's Python code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


EXAMPLES = (
    ("No layer protects the input", "2 of 2 samples recovered exactly"),  # a model of pictures
    ("4 of 4 samples recovered exactly",),  # a table
    ("Closed: exact", "Score("),  # an update of a training
)
"""What each of the examples prints, in their order."""


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block, expected in zip(blocks, EXAMPLES, strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            exec(compile(block, str(README), "exec"), scope)
        out = capsys.readouterr().out
        assert all(each in out for each in expected)
    assert (tmp_path / "audit.html").exists()


def test_the_pictures_are_there_and_the_first_screen_has_one() -> None:
    pictures = re.findall(r"!\[.+\]\((.*?)\)", README.read_text())
    assert pictures
    assert all((README.parent / path).is_file() for path in pictures)
    assert re.search(r"!\[", "\n".join(README.read_text().splitlines()[:15]))


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
