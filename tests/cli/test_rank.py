"""``rgap rank`` as a person uses it."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

import pytest
from command import run
from PIL import Image
from rich.console import Console

import rgap
from rgap import losses, models
from rgap.cli.console import bar

SMALL = ("--input-shape", "1,12,12")
RESIDUAL = """
import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(576, 10)

    def forward(self, x):
        x = self.a(x)
        return self.c((x + torch.relu(self.b(x))).flatten(1))
"""


@pytest.fixture
def residual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    (tmp_path / "my_residual.py").write_text(RESIDUAL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_residual", raising=False)
    return ("--model", "my_residual:Residual", *SMALL)


def test_the_table_ends_with_the_verdict(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "rank", *SMALL, "--out", tmp_path)
    assert (code, err) == (0, "")
    expected = rgap.rank_analysis(rgap.Target(models.cnn6(1, 12), losses.Logistic(), (1, 12, 12), (0.0, 1.0)))
    lines = out.splitlines()
    assert lines[1].split() == ["layer", "|x|", "|W|", "|z|", "|V|", "index", "rank", "free", "joint", "measured"]
    first = expected.layers[0]
    numbers = (first.unknowns, first.gradient_rows, first.weight_rows, first.virtual_rows, first.index)
    assert lines[2].split() == [first.name, *map(str, numbers), str(first.rank), str(first.free), "0", "exact"]
    assert expected.verdict in " ".join(out.split())
    assert max(map(len, lines[: 2 + len(expected.layers)])) <= 80
    assert json.loads((tmp_path / "rank.json").read_text()) == expected.to_dict()
    with Image.open(tmp_path / "rank.png") as picture:
        assert picture.format == "PNG"


def test_json_prints_nothing_else(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "rank", *SMALL, "--out", tmp_path, "--json", "--no-measure", "--batch-size", 3)
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document == json.loads((tmp_path / "rank.json").read_text())
    assert document["batch_size"] == 3
    assert {layer["measured"] for layer in document["layers"]} == {"not measured"}


def test_ranks_at_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Image.new("L", (12, 12), 100).save(tmp_path / "one.png")
    code, out, _ = run(capsys, "rank", *SMALL, "--sample", tmp_path / "one.png", "--out", tmp_path, "--json")
    assert code == 0
    assert json.loads(out)["at_sample"] is True


def test_models_that_are_no_chain(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, residual: tuple[str, ...]
) -> None:
    code, out, err = run(capsys, "rank", *residual, "--out", tmp_path)
    assert (code, err) == (0, "")
    assert "measured" not in out.split("- ")[0]  # no column of layers that were not
    document = " ".join(out.split())
    assert "no plain chain: add of 2 values (the recursion passes it)" in document
    assert "the input of c is no single layer's output" in document
    assert "it is no plain chain, with add of 2 values" in document
    layers = json.loads((tmp_path / "rank.json").read_text())["layers"]
    assert [layer["name"] for layer in layers] == ["a", "b", "c"]
    assert [layer["virtual_rows"] for layer in layers] == [0, 4 * 144 - 144, 0]


MAPS = "from torch import nn\n\n\ndef make():\n    return {}\n"


@pytest.mark.parametrize(
    "model",
    [
        "nn.Conv2d(1, 2, 3, padding=1)",
        "nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 1))",
        "nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(1, 2, 3), nn.Upsample(scale_factor=2), nn.Conv2d(2, 2, 3))",
    ],
)
def test_networks_of_maps_need_no_masks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    (tmp_path / "my_maps.py").write_text(MAPS.format(model))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_maps", raising=False)
    code, out, err = run(capsys, "rank", "--model", "my_maps:make", *SMALL, "--out", tmp_path)
    assert (code, err) == (0, "")
    assert "the input" in out


@pytest.mark.parametrize(("patience", "shown"), [(0.0, True), (60.0, False)])
def test_progress_appears_only_after_a_while(patience: float, shown: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with bar(console, False, patience) as step:
        time.sleep(0.3)
        step("after conv3", 1, 7, "")
        time.sleep(0.3)
    document = console.file.getvalue()
    assert ("1/7" in document and "conv3" in document) is shown
