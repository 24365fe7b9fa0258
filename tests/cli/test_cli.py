"""The command line as a person uses it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from command import run
from PIL import Image
from safetensors.torch import load_file, save_file

from rgap import data, models
from rgap.attacks import DLG, Attack, Closed, Hybrid, Matching, Polish, Recursive
from rgap.cli import options
from rgap.cli.options import ATTACKS, make_attack


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


# Attacks by optimisation.


@pytest.fixture
def classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A network of three classes that is no chain, as --model names it; the folder it lies in is the current one."""
    (tmp_path / "my_three_classes.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make():\n    with torch.random.fork_rng():\n"
        "        torch.manual_seed(0)\n        return nn.Sequential(\n"
        "            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Sigmoid(), nn.MaxPool2d(2),\n"
        "            nn.Flatten(), nn.Linear(75, 3),\n        )\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return "my_three_classes:make"


@pytest.fixture
def short_polish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "Polish", partial(Polish, steps=1, inner=5))


# torch's forward mode compiles formulas of its own when first used.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


@forward_mode
@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (("dlg",), "DLG"),
        (("idlg", "--restarts", 2), "iDLG"),
        (("inverting-gradients",), "InvertingGradients"),
        (("hybrid",), "Hybrid"),
        (("dlg", "--polish"), "Polish"),
    ],
)
@pytest.mark.parametrize("mine", [True, False], ids=["three classes", "cnn6"])
def test_attacks_by_optimisation(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    photograph: Path,
    classes: str,
    short_polish: None,
    mine: bool,
    attack: tuple[object, ...],
    name: str,
) -> None:
    model = ("--model", classes, "--loss", "cross-entropy", *SMALL) if mine else SMALL
    assert run(capsys, "capture", photograph, "--label", 1, *model)[0] == 0
    arguments = ("attack", "update.safetensors", *model, "--attack", *attack, "--iterations", 3)
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["attack"] == name
    assert said["assumptions"]
    (answer, *_) = said["answers"]
    assert len(answer["labels"]) == 1
    assert answer["labels"][0] in ((0, 1, 2) if mine else (-1, 1))
    if name == "iDLG":
        assert any(assumption.startswith("the best of") for assumption in said["assumptions"])
    if name == "Hybrid" and mine:
        (left_out,) = (line for line in said["assumptions"] if "was left out" in line)
        assert all(word in left_out for word in ("Recursive", "batch_norm", "max_pool2d", "cross-entropy"))
    found = load_file(tmp_path / "rgap-out" / "reconstruction.safetensors")
    assert found["inputs.0"].shape == (1, 1, 12, 12)
    with Image.open(tmp_path / "rgap-out" / "reconstruction.png") as picture:
        assert picture.format == "PNG"


def test_a_search_of_one_iteration_is_told_for_people(
    capsys: pytest.CaptureFixture[str], photograph: Path, classes: str
) -> None:
    model = ("--model", classes, "--loss", "cross-entropy", *SMALL)
    assert run(capsys, "capture", photograph, "--label", 2, *model)[0] == 0
    code, out, _ = run(capsys, "attack", "update.safetensors", *model, "--attack", "idlg", "--iterations", 1)
    words = " ".join(out.split())
    assert code == 0
    assert "not converged, label +2: gradient residual" in words
    assert "after 1 iterations" in words


@pytest.mark.parametrize("attack", ["closed", "recursive"])
@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        (("--iterations", 3), "--iterations"),
        (("--restarts", 2), "--restarts"),
        (("--restarts", 2, "--iterations", 3, "--polish"), "--iterations, --restarts"),
    ],
)
@pytest.mark.parametrize("command", [("audit",), ("attack", "update.safetensors")])
def test_attacks_without_iterations_refuse_their_number(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    chosen: tuple[object, ...],
    named: str,
    attack: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *command, *SMALL, "--attack", attack, *chosen)
    assert code == 2
    assert f"{named}: " in " ".join(err.split())
    assert "is no attack by optimisation, it has neither" in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


@forward_mode
@pytest.mark.parametrize("attack", [Recursive(), Closed()], ids=lambda attack: attack.name)
def test_the_closed_form_is_polished(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, short_polish: None, attack: Attack
) -> None:
    chosen = {kind: name for name, kind in ATTACKS.items()}[type(attack)]
    arguments = ("audit", *SMALL, "--count", 1, "--attack", chosen, "--polish", "--out", tmp_path, "--json")
    code, out, _ = run(capsys, *arguments)
    (case,) = json.loads(out)["cases"]
    assert code == 0
    assert case["reconstruction"]["attack"] == "Polish"
    assert case["reconstruction"]["status"] == "exact"
    assert f"the label is the one that {attack.name} gives" in case["reconstruction"]["assumptions"]


def test_audit_of_what_is_no_chain(capsys: pytest.CaptureFixture[str], tmp_path: Path, classes: str) -> None:
    model = ("--model", classes, "--loss", "cross-entropy", *SMALL)
    code, _, err = run(capsys, "audit", *model, "--count", 2)
    words = " ".join(err.split())
    assert code == 1
    assert all(word in words for word in ("batch_norm", "max_pool2d", "cross-entropy"))
    assert not (tmp_path / "rgap-out").exists()
    code, out, _ = run(capsys, "audit", *model, "--count", 4, "--attack", "idlg", "--iterations", 2)
    assert code == 0
    assert "not converged" in out
    said = json.loads((tmp_path / "rgap-out" / "audit.json").read_text())
    told = json.dumps(said)
    assert all(word in told for word in ("batch_norm", "max_pool2d", "cross-entropy"))
    assert [case["label"] for case in said["cases"]] == [0, 1, 2, 0]
    assert {case["reconstruction"]["attack"] for case in said["cases"]} == {"iDLG"}
    with Image.open(tmp_path / "rgap-out" / "audit.png") as picture:
        assert picture.format == "PNG"


def test_cross_entropy_of_a_single_output_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "audit", *SMALL, "--loss", "cross-entropy", "--attack", "dlg", "--out", tmp_path)
    assert code == 1
    assert "got 1 classes, expected 2 or more" in " ".join(err.split())


def test_every_attack_of_the_command_line_can_be_made() -> None:
    assert set(ATTACKS) == {"closed", "recursive", "dlg", "idlg", "inverting-gradients", "hybrid"}
    for name in ("dlg", "idlg", "inverting-gradients"):
        made = make_attack(name, 7, 3, False)
        assert isinstance(made, Matching)
        assert (made.iterations, made.restarts) == (7, 3)
        assert make_attack(name, None, None, False) == ATTACKS[name]()
        assert make_attack(name, 7, None, True) == Polish(make_attack(name, 7, None, False))
    hybrid = make_attack("hybrid", 7, 3, False)
    assert isinstance(hybrid, Hybrid)
    assert [member for member in hybrid.members if isinstance(member, Matching)] == [DLG(iterations=7, restarts=3)]
    assert len(hybrid.members) == len(Hybrid().members)


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("audit", "--attack", "dlg", "--iterations", "0"), 2, "0 is not in the range"),
        (("audit", "--attack", "nonsense"), 2, "'nonsense' is not one of"),
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
