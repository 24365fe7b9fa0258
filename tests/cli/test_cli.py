"""The command line as a person uses it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import run
from PIL import Image
from safetensors.torch import load_file, save_file

from rgap import data, models


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    values = data.photographs(1, 12, channels=1).inputs[0, 0]
    path = tmp_path / "client.png"
    Image.fromarray((values * 255).round().to(torch.uint8).numpy()).save(path)
    return path


SMALL = ("--input-shape", "1,12,12")


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, rgap.cli as cli; cli.group.main(['-h'], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Exit codes" in done.stdout


@pytest.mark.parametrize("command", ["audit", "attack", "capture"])
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "--model" in out


def test_audit_on_built_in_photographs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "audit", *SMALL, "--count", 2, "--out", tmp_path)
    assert code == 0
    assert "2 of 2 pictures recovered exactly" in out
    assert all(word in out for word in ("astronaut", "MSE", "PSNR", "rank", "condition", "conv1"))
    with Image.open(tmp_path / "audit.png") as picture:
        assert picture.format == "PNG"
    assert json.loads((tmp_path / "audit.json").read_text())["kind"] == "rgap-audit"


def test_audit_as_json_prints_nothing_else(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "audit", *SMALL, "--count", 1, "--out", tmp_path, "--json")
    assert code == 0
    assert json.loads(out)["cases"][0]["reconstruction"]["status"] == "exact"
    assert err == ""


def test_layers_solved_jointly_are_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_narrow_network.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(\n        nn.Conv2d(1, 6, 4, 2, 2, bias=False), nn.LeakyReLU(0.2),\n"
        "        nn.Conv2d(6, 4, 3, 2, 1, bias=False), nn.LeakyReLU(0.2),\n"
        "        nn.Conv2d(4, 24, 3, 1, 1, bias=False), nn.LeakyReLU(0.2),\n"
        "        nn.Flatten(), nn.Linear(384, 1, bias=False),\n    )\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ("audit", *SMALL, "--count", 1, "--model", "my_narrow_network:make")
    with torch.random.fork_rng():
        code, out, _ = run(capsys, *arguments)
    words = " ".join(out.split())
    assert code == 0
    assert "1 of 1 pictures recovered exactly" in words
    assert "0 and 2 solved together for the input: 144 unknowns" in words
    assert "neighbouring values of the input are similar" in words
    said = json.loads((tmp_path / "rgap-out" / "audit.json").read_text())
    assert said["cases"][0]["reconstruction"]["answers"][0]["joint"]["free"] == 0
    with torch.random.fork_rng():
        _, out, _ = run(capsys, *arguments, "--attack", "recursive")
    assert "0 of 1 pictures recovered exactly, 1 rank-deficient" in " ".join(out.split())


def test_audit_of_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, photograph: Path) -> None:
    code, out, _ = run(capsys, "audit", *SMALL, "--data", photograph.parent, "--out", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["cases"][0]["name"] == "client.png"


def test_capture_then_attack(capsys: pytest.CaptureFixture[str], tmp_path: Path, photograph: Path) -> None:
    update = tmp_path / "update.safetensors"
    code, _, _ = run(capsys, "capture", photograph, "--label", 1, *SMALL, "--out", update)
    assert code == 0
    code, out, _ = run(capsys, "attack", update, *SMALL, "--out", tmp_path / "out")
    assert code == 0
    assert "exact, label +1" in out
    found = load_file(tmp_path / "out" / "reconstruction.safetensors")
    truth = data.picture(photograph, channels=1).inputs
    assert float((found["inputs.0"] - truth).square().mean()) < 1e-8
    with Image.open(tmp_path / "out" / "reconstruction.png") as picture:
        assert picture.format == "PNG"


def test_a_model_of_ones_own_with_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, photograph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_network.py").write_text(
        "from rgap.models import cnn6\n\ndef make():\n    return cnn6(1, 12, seed=7)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    save_file(models.cnn6(1, 12, seed=8).state_dict(), tmp_path / "weights.safetensors")
    mine = ("--model", "my_network:make", *SMALL)
    assert run(capsys, "capture", photograph, "--label", -1, *mine, "--weights", "weights.safetensors")[0] == 0
    code, out, _ = run(capsys, "attack", "update.safetensors", *mine, "--weights", "weights.safetensors")
    assert (code, "exact, label -1" in out) == (0, True)
    code, _, err = run(capsys, "attack", "update.safetensors", *mine)
    assert code == 1
    assert "another model or another checkpoint" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("audit", "--data", "nowhere"), 1, "nowhere does not exist"),
        (("audit", "--model", "resnet"), 2, "expected cnn6, cnn6-d, fcn3, or PKG.MOD:FACTORY"),
        (("audit", "--model", "no_such_package:make"), 2, "cannot import no_such_package"),
        (("audit", "--model", "rgap.models:nothing"), 2, "rgap.models has no nothing"),
        (("audit", "--input-shape", "3,x"), 2, "expected positive sizes with commas"),
        (("audit", "--value-range", "0"), 2, "expected two numbers with a comma"),
        (("audit", "--input-shape", "784", "--model", "fcn3"), 1, "square pictures"),
        (("audit", "--weights", "nowhere.safetensors"), 1, "no such file"),
        (("attack", "nowhere.safetensors"), 1, "no such file"),
        (("capture", "nowhere.png", "--label", "1"), 1, "nowhere.png"),
        (("rank", "--sample", "nowhere.png"), 1, "nowhere.png does not exist"),
        (("rank", "--batch-size", "0"), 2, "0 is not in the range"),
        (
            ("rank", "--input-shape", "784", "--model", "fcn3", "--sample", "x.png"),
            1,
            "no pictures: leave --sample out",
        ),
        (("nonsense",), 2, "No such command"),
    ],
)
def test_bad_input_gets_one_clear_message(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    got, _, err = run(capsys, *arguments)
    assert (got, message in " ".join(err.split())) == (code, True), err
    assert "Traceback" not in err


def test_a_label_outside_the_loss_and_a_grey_picture_for_colour(
    capsys: pytest.CaptureFixture[str], photograph: Path
) -> None:
    code, _, err = run(capsys, "capture", photograph, "--label", 2, *SMALL)
    assert code == 1
    assert "got label 2, expected -1 or 1" in err
    code, _, err = run(capsys, "capture", photograph, "--label", 1)
    assert code == 1
    assert "grey picture" in err
