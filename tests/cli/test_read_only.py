"""Folders in which nothing may be written, of a process that has no more rights than any user."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from terminal import assert_harmless, ended, seen

MODEL = ("--model", "fcn3", "--input-shape", "1,4,4")
AUDIT = ("audit", *MODEL, "--count", "1", "--attack", "bias", "--out")
PLAN = 'models = ["fcn3"]\nattacks = ["bias"]\ninput-shape = [1, 4, 4]\n[images]\ncount = 1\n'
COMMANDS = {
    "capture": ("capture", "a.png", "--label", "1", *MODEL, "--out", "update.safetensors"),
    "audit": (*AUDIT, "new"),
    "audit here": (*AUDIT, "."),
    "rank": ("rank", *MODEL, "--out", "."),
    "sweep": ("sweep", "plan.toml", "--workers", "1"),
    "reproduce": ("reproduce", "figure1", "--count", "1"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "plan.toml").write_text(PLAN)
    Image.new("L", (4, 4), 9).save(tmp_path / "a.png")
    tmp_path.chmod(0o555)
    yield tmp_path
    tmp_path.chmod(0o755)


def test_nothing_is_written_and_one_line_says_why(folder: Path) -> None:
    before = {each.name for each in folder.iterdir()}
    text = seen([list(command) for command in COMMANDS.values()], folder, without_rights=True)
    assert_harmless(text)
    assert ended(text) == ["1"] * len(COMMANDS)
    said = [each for each in text.replace("\r", "").split("\n") if "rgap: " in each]
    assert len(said) == len(COMMANDS), said
    assert all("Permission denied" in each or "can be written to" in each for each in said), said
    assert "update.safetensors'" in said[0]  # and no name of a file in between
    assert {each.name for each in folder.iterdir()} == before
