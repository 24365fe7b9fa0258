"""The command line as a person uses it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from rgap import cli, data, models
from rgap.attacks import DLG, Attack, Closed, Hybrid, Matching, Polish, Recursive, named
from rgap.attacks.named import BY_NAME
from rgap.cli import console, options
from rgap.cli.audit import DEFENCES
from rgap.cli.options import make_attack
from rgap.defences import ALL
from rgap.models.named import BUILT_IN
from rgap.reproductions import CATALOGUE, by_name


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    values = data.photographs(1, 12, channels=1).inputs[0, 0]
    path = tmp_path / "client.png"
    Image.fromarray((values * 255).round().to(torch.uint8).numpy()).save(path)
    return path


SMALL = ("--input-shape", "1,12,12")


@pytest.mark.parametrize("verb", ["", *cli.COMMANDS])
def test_help_needs_no_torch(verb: str) -> None:
    code = (
        f"import sys, rgap.cli as cli; cli.group.main([{verb!r}, '-h'][not {verb!r}:], standalone_mode=False); "
        "assert not {'torch', 'numpy', 'scipy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("Options" if verb else "Exit codes") in done.stdout


@pytest.mark.parametrize("command", ["audit", "attack", "capture"])
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "--model" in out


def test_audit_on_built_in_photographs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "audit", *SMALL, "--count", 2, "--out", tmp_path)
    words = " ".join(out.split())
    assert code == 0
    assert "Every sample can be read out of the update exactly. 2 of 2 samples recovered exactly" in words
    assert all(word in out for word in ("astronaut", "Closed", "MSE", "PSNR", "rank", "condition", "conv1"))
    with Image.open(tmp_path / "audit.png") as picture:
        assert picture.format == "PNG"
    document = json.loads((tmp_path / "audit.json").read_text())
    assert document["kind"] == "rgap-audit"
    assert document["verdict"]["headline"] in (tmp_path / "audit.html").read_text()
    assert {attack["name"] for attack in document["attacks"] if attack["samples"]} == {"Closed"}
    assert [attack["name"] for attack in document["attacks"]] == [
        "Bias",
        "Closed",
        "FeatureMatching",
        "InvertingGradients",
    ]


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
        code, out, _ = run(capsys, *arguments, "--attack", "closed")
    words = " ".join(out.split())
    assert code == 0
    assert "1 of 1 samples recovered exactly" in words
    assert "jointly" in words
    assert "neighbouring values" not in words  # all constraints decide, no prior
    document = json.loads((tmp_path / "rgap-out" / "audit.json").read_text())
    assert document["samples"][0]["results"][0]["joint"]["free"] == 0
    with torch.random.fork_rng():
        _, out, _ = run(capsys, *arguments, "--attack", "recursive")
    assert "0 of 1 samples recovered exactly" in " ".join(out.split())
    assert "rank-deficient" in out


def test_audit_of_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, photograph: Path) -> None:
    where = ("--data", photograph.parent, "--out", tmp_path / "out", "--attack", "idlg", "--iterations", 1)
    code, out, _ = run(capsys, "audit", *SMALL, *where, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["samples"][0]["name"] == "client.png"
    assert document["settings"]["data"] == str(photograph.parent)


def test_capture_then_attack(capsys: pytest.CaptureFixture[str], tmp_path: Path, photograph: Path) -> None:
    update = tmp_path / "update.safetensors"
    code, _, _ = run(capsys, "capture", photograph, "--label", 1, *SMALL, "--out", update)
    assert code == 0
    code, out, _ = run(capsys, "attack", update, *SMALL, "--out", tmp_path / "out")
    assert code == 0
    assert "exact, label +1" in out
    written = [tmp_path / "out" / f"reconstruction.{kind}" for kind in ("json", "safetensors", "png")]
    assert f"Written: {', '.join(map(str, written))}" in "".join(out.split("\n"))
    assert all(path.is_file() for path in written)
    found = load_file(tmp_path / "out" / "reconstruction.safetensors")
    truth = data.picture(photograph, channels=1).inputs
    assert float((found["inputs.0"] - truth).square().mean()) < 1e-8
    with Image.open(tmp_path / "out" / "reconstruction.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("attack", [("idlg", "--iterations", 1), ("closed", "--budget", 0)])
def test_an_attack_that_finds_no_input_says_what_is_read_off(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, photograph: Path, attack: tuple[str, ...]
) -> None:
    told = "all 588 values that fc reads and the label of the sample"
    options = ("--model", "lenet", "--loss", "cross-entropy", "--input-shape", "1,28,28")
    update = tmp_path / "update.safetensors"
    assert run(capsys, "capture", photograph, "--label", 3, *options, "--out", update)[0] == 0
    code, out, _ = run(capsys, "attack", update, *options, "--attack", *attack, "--out", tmp_path / "out")
    assert code == 0
    assert f"Read off at once, without any search: {told}" in " ".join(out.split())
    assert told in json.loads((tmp_path / "out" / "reconstruction.json").read_text())["read_off"]


@pytest.mark.parametrize("kept", ["fc", "fc.bias", "conv"])
def test_updates_of_some_layers_are_attacked_where_that_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, photograph: Path, kept: str
) -> None:
    options = ("--model", "lenet", "--loss", "cross-entropy", "--input-shape", "1,28,28", "--out", tmp_path)
    update = tmp_path / "update.safetensors"
    assert run(capsys, "capture", photograph, "--label", 3, *options[:-2], "--out", update)[0] == 0
    save_file({name: each for name, each in load_file(update).items() if name.startswith(kept)}, update)
    arguments = ("attack", update, *options, "--attack", "idlg", "--iterations", 1)
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert "(--partial)" in err
    code, out, _ = run(capsys, *arguments, "--partial")
    assert code == 0
    assert "Written:" in out


@pytest.mark.parametrize("other", [False, True])
def test_what_came_back_is_scored_beside_the_truth(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, photograph: Path, other: bool
) -> None:
    update = tmp_path / "update.safetensors"
    assert run(capsys, "capture", photograph, "--label", 1, *SMALL, "--out", update)[0] == 0
    truth = photograph
    if other:
        truth = tmp_path / "other.png"
        Image.new("L", (12, 12), 200).save(truth)
    code, out, _ = run(capsys, "attack", update, *SMALL, "--truth", truth, "--out", tmp_path / "out")
    assert code == 0
    psnr = json.loads((tmp_path / "out" / "reconstruction.json").read_text())["score"]["psnr"]
    assert (psnr > 50) is not other
    assert f"Beside the true picture: PSNR {psnr:.1f} dB" in " ".join(out.split())


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
    monkeypatch.setattr(named, "Polish", partial(Polish, steps=1, inner=5))


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
    document = json.loads(out)
    assert document["attack"] == name
    assert document["assumptions"]
    (answer, *_) = document["answers"]
    assert len(answer["labels"]) == 1
    assert answer["labels"][0] in ((0, 1, 2) if mine else (-1, 1))
    if name == "iDLG":
        assert any(assumption.startswith("the best of") for assumption in document["assumptions"])
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
    "chosen", [("--iterations", 3), ("--restarts", 2), ("--restarts", 2, "--iterations", 3, "--polish")]
)
@pytest.mark.parametrize("command", [("audit",), ("attack", "update.safetensors")])
def test_attacks_without_iterations_refuse_their_number(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    chosen: tuple[object, ...],
    attack: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *command, *SMALL, "--attack", attack, *chosen)
    assert code == 2
    name = attack.capitalize()
    assert f"--iterations and --restarts: {name} is no attack by optimisation" in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


@forward_mode
@pytest.mark.parametrize("attack", [Recursive(), Closed()], ids=lambda attack: attack.name)
def test_the_closed_form_is_polished(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, short_polish: None, attack: Attack
) -> None:
    chosen = {kind: name for name, kind in BY_NAME.items()}[type(attack)]
    arguments = (
        "audit",
        "--input-shape",
        "1,8,8",
        "--count",
        1,
        "--attack",
        chosen,
        "--polish",
        "--out",
        tmp_path,
        "--json",
    )
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    (sample,) = json.loads(out)["samples"]
    (result,) = sample["results"]
    assert result["attack"] == "Polish"
    assert result["status"] == "exact"
    assert f"the label is the one that {attack.name} gives" in result["assumptions"]


def test_audit_of_what_is_no_chain(capsys: pytest.CaptureFixture[str], tmp_path: Path, classes: str) -> None:
    model = ("--model", classes, "--loss", "cross-entropy", *SMALL)
    both = ("--attack", "closed", "--attack", "idlg")
    assert run(capsys, "audit", *model, *both, "--iterations", 2)[0] == 2
    code, out, _ = run(capsys, "audit", *model, "--count", 4, "--attack", "idlg", "--iterations", 2)
    assert code == 0
    assert "not converged" in out
    document = json.loads((tmp_path / "rgap-out" / "audit.json").read_text())
    told = json.dumps(document)
    assert all(word in told for word in ("batch_norm", "max_pool2d"))
    assert [sample["label"] for sample in document["samples"]] == [0, 1, 2, 0]
    assert {result["attack"] for sample in document["samples"] for result in sample["results"]} == {"iDLG"}
    with Image.open(tmp_path / "rgap-out" / "audit.png") as picture:
        assert picture.format == "PNG"
    smaller = (tmp_path / "my_three_classes.py").read_text().replace("Linear(75", "Linear(12")
    (tmp_path / "my_smaller_classes.py").write_text(smaller)
    model = ("--model", "my_smaller_classes:make", "--loss", "cross-entropy", "--input-shape", "1,6,6")
    code, out, _ = run(capsys, "audit", *model, "--count", 1, "--attack", "closed", "--out", "closed")
    assert code == 0
    assert "not converged" in out or "rank-deficient" in out


# An audit in milliseconds.

TINY = ("--input-shape", "1,8,8", "--model", "my_open_network:make")


@pytest.fixture
def open_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Linear layer with a bias reads the picture; the folder of its module is the current one."""
    for name, outputs in (("my_open_network", 1), ("my_open_classes", 4)):
        (tmp_path / f"{name}.py").write_text(
            "import torch\nfrom torch import nn\n\n\ndef make():\n    with torch.random.fork_rng():\n"
            "        torch.manual_seed(0)\n        return nn.Sequential(\n            nn.Flatten(), nn.Linear(64, 80), "
            f"nn.Tanh(), nn.Linear(80, {outputs})\n        ).double()\n"
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def tiny(capsys: pytest.CaptureFixture[str], *more: object) -> tuple[int, str, str]:
    return run(capsys, "audit", *TINY, "--count", 2, "--attack", "bias", *more)


def read(folder: Path) -> Any:
    return json.loads((folder / "rgap-out" / "audit.json").read_text())


def test_audit_as_json_prints_nothing_else(capsys: pytest.CaptureFixture[str], open_network: Path) -> None:
    code, out, err = tiny(capsys, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert [sample["results"][0]["status"] for sample in document["samples"]] == ["exact", "exact"]
    assert document["verdict"] == read(open_network)["verdict"]


def test_several_attacks_one_after_the_other(capsys: pytest.CaptureFixture[str], open_network: Path) -> None:
    assert run(capsys, "audit", *TINY, "--count", 1, "--attack", "recursive", "--attack", "bias")[0] == 0
    document = read(open_network)
    assert [attack["name"] for attack in document["attacks"]] == ["Recursive", "Bias"]
    assert [result["attack"] for result in document["samples"][0]["results"]] == ["Recursive"]


@pytest.mark.parametrize(
    ("condition", "code"),
    [("exact>0", 3), ("exact>=1", 3), ("psnr>50", 3), ("recognisable > 0.9", 3), ("exact<1", 0), ("psnr<50", 0),
     ("ssim>0", 0)],
)  # fmt: skip
def test_pipelines_stop_where_a_condition_holds(
    capsys: pytest.CaptureFixture[str], open_network: Path, condition: str, code: int
) -> None:
    got, out, err = tiny(capsys, "--fail-if", condition)
    assert got == code
    assert ("holds" in err) is (code == 3)
    assert "Every sample" in out
    assert (open_network / "rgap-out" / "audit.html").is_file()


def test_json_and_a_condition(capsys: pytest.CaptureFixture[str], open_network: Path) -> None:
    code, out, err = tiny(capsys, "--json", "--fail-if", "exact>0")
    assert code == 3
    assert json.loads(out)["verdict"]["level"] == "exact"
    assert err == "rgap: exact>0 holds\n"


def test_weight_differences_on_the_command_line(capsys: pytest.CaptureFixture[str], open_network: Path) -> None:
    sends = ("--sends", "difference", "--learning-rate", 0.1, "--optimiser", "momentum")
    code, out, _ = tiny(capsys, *sends)
    assert code == 0
    assert "2 of 2 samples recovered exactly" in " ".join(out.split())
    assert read(open_network)["protocol"].items() >= {
        "sends": "difference", "steps": 1, "learning_rate": 0.1, "optimiser": "momentum", "summed": False, "clients": 1,
        "momentum": 0.9,
    }.items()  # fmt: skip
    # Another protocol is another audit.
    code, _, err = tiny(capsys)
    assert code == 1
    assert "other settings" in " ".join(err.split())
    assert tiny(capsys, "--fresh")[0] == 0


def test_local_epochs_on_the_command_line_and_in_toml(capsys: pytest.CaptureFixture[str], open_network: Path) -> None:
    toml = ("sends = 'difference'", "learning-rate = 0.1", "epochs = 2", "minibatch = 2", "schedule = '1,0.5'")
    Path("own.toml").write_text("\n".join((*toml, "momentum = 0.5", "nesterov = true", "clip-norm = 3.0")))
    options = (
        "--config",
        "own.toml",
        "--batch-size",
        2,
        "--in-order",
        "--weight-decay",
        0.1,
        "--proximal",
        0.2,
        "--buffers",
    )
    code, _, err = run(capsys, "audit", *TINY, *options, "--attack", "idlg", "--iterations", 1)
    assert code == 0, err
    assert read(open_network)["protocol"] == {
        "sends": "difference", "steps": 1, "learning_rate": 0.1, "optimiser": "sgd", "summed": False, "clients": 1,
        "epochs": 2, "minibatch": 2, "shuffled": False, "drop_last": False, "momentum": 0.5, "nesterov": True,
        "weight_decay": 0.1, "proximal": 0.2, "clip_norm": 3.0, "schedule": [1.0, 0.5],
        "buffers": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", -1), "-1 is not in the range"),
        (("--minibatch", 8, "--batch-size", 4), "got minibatch=8 for a client of 4 samples"),
        (("--learning-rate", 0), "0.0 is not in the range"),
        (("--momentum", "nan"), "got nan, expected a finite number"),
        (("--nesterov",), "nesterov=True without momentum"),
        (("--schedule", "1,x"), "got '1,x', expected numbers with commas"),
        (("--schedule", "1,nan"), "got '1,nan', expected numbers with commas"),
        (("--learning-rate", "nan"), "got nan, expected a finite number"),
        (("--mean", "nan"), "got 'nan', expected a number for each channel"),
        (("--std", "1,inf,1"), "got '1,inf,1', expected a number for each channel"),
        (("--value-range", "nan,1"), "got 'nan,1', expected two numbers with a comma"),
        (("--budget", "nan"), "got nan, expected a finite number"),
        (("--schedule", "1,2"), "got a schedule of 2 factors, expected 1"),
    ],
)
def test_protocols_that_make_no_sense_get_one_line(
    options: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str], open_network: Path
) -> None:
    sends = ("--sends", "difference", *(() if "--learning-rate" in options else ("--learning-rate", 0.1)))
    code, _, err = run(capsys, "audit", *TINY, *sends, *options)
    assert code in (1, 2)
    assert message in " ".join(err.split())


def test_batches_and_clients(capsys: pytest.CaptureFixture[str], open_network: Path) -> None:
    options = ("--batch-size", 2, "--summed", "--count", 3, "--attack", "idlg", "--iterations", 1)
    code, out, _ = run(capsys, "audit", *TINY, *options)
    assert code == 0
    document = read(open_network)
    assert (document["target"]["batch_size"], document["protocol"]["clients"], len(document["samples"])) == (2, 1, 2)
    assert document["protocol"]["summed"] is True
    assert "1 samples that do not fill another update" in " ".join(out.split())
    code, _, err = run(capsys, "audit", *TINY, "--clients", 2, "--count", 1, "--out", "other")
    assert code == 1
    assert "got 1 samples, expected 2 or more" in " ".join(err.split())


def test_classes(capsys: pytest.CaptureFixture[str], open_network: Path) -> None:
    model = ("--model", "my_open_classes:make", "--loss", "cross-entropy", "--input-shape", "1,8,8")
    assert run(capsys, "audit", *model, "--count", 3, "--attack", "bias")[0] == 0
    document = read(open_network)
    assert [sample["label"] for sample in document["samples"]] == [0, 1, 2]
    assert [sample["level"] for sample in document["samples"]] == ["exact"] * 3
    assert [sample["results"][0]["labels"] for sample in document["samples"]] == [[0], [1], [2]]


def test_folders_of_classes_give_the_labels(capsys: pytest.CaptureFixture[str], open_network: Path) -> None:
    pictures = data.photographs(3, 8, channels=1).inputs
    for at, (folder, picture) in enumerate(zip(("zebra", "ant", "cow"), pictures, strict=True)):
        (open_network / "all" / folder).mkdir(parents=True)
        values = (picture[0] * 255).round().to(torch.uint8).numpy()
        Image.fromarray(values).save(open_network / "all" / folder / f"{at}.png")
    model = ("--model", "my_open_classes:make", "--loss", "cross-entropy", "--input-shape", "1,8,8")
    assert run(capsys, "audit", *model, "--data", "all", "--attack", "bias")[0] == 0
    given = {sample["name"]: sample["label"] for sample in read(open_network)["samples"]}
    by_class = {Path(name).parts[-2]: label for name, label in given.items()}
    assert by_class == {"ant": 0, "cow": 1, "zebra": 2}


def test_a_defence_is_swept(capsys: pytest.CaptureFixture[str], open_network: Path) -> None:
    code, out, _ = tiny(capsys, "--defence", "Sign", "--defence", "Clip")
    assert code == 0
    assert [defence["name"] for defence in read(open_network)["defences"]] == ["Sign", "Clip"]
    assert "what still leaks" in " ".join(out.split())


def test_epsilon_of_dpsgd(capsys: pytest.CaptureFixture[str], open_network: Path) -> None:
    code, _, _ = tiny(capsys, "--defence", "DPSGD", "--dp-rate", 0.01, "--dp-steps", 100)
    assert code == 0
    (defence,) = read(open_network)["defences"]
    assert defence["points"][-1]["epsilon"] > 0
    for alone in (("--dp-rate", 0.1), ("--dp-steps", 5)):
        code, _, err = tiny(capsys, "--defence", "DPSGD", *alone)
        assert code == 2
        assert "belong together" in " ".join(err.split())


def test_an_audit_goes_on_where_it_was(capsys: pytest.CaptureFixture[str], open_network: Path) -> None:
    assert tiny(capsys)[0] == 0
    rows = (open_network / "rgap-out" / "results" / "rows.jsonl").read_bytes()
    before = read(open_network)["samples"]
    assert tiny(capsys, "--budget", 0)[0] == 0
    assert read(open_network)["samples"] == before
    assert read(open_network)["complete"] is True
    assert (open_network / "rgap-out" / "results" / "rows.jsonl").read_bytes() == rows


def test_no_time_at_all(capsys: pytest.CaptureFixture[str], open_network: Path) -> None:
    code, out, _ = tiny(capsys, "--budget", 0, "--fail-if", "psnr>0")
    assert code == 0
    assert "Bias on 2 updates: the time was up" in " ".join(out.split())
    assert "every gradient is zero" not in out
    document = read(open_network)
    assert (document["complete"], [sample["best"] for sample in document["samples"]]) == (False, [None, None])
    assert (open_network / "rgap-out" / "audit.png").is_file()


# A file with options.


def configured(capsys: pytest.CaptureFixture[str], folder: Path, text: str, *more: object) -> tuple[int, str, str]:
    (folder / "audit.toml").write_text(text)
    return run(capsys, "audit", "--config", folder / "audit.toml", *more)


OPTIONS = 'model = "my_open_network:make"\ninput-shape = "1,8,8"\ncount = 3\nattack = ["bias"]\n'


def test_a_file_gives_options_and_the_command_line_wins(capsys: pytest.CaptureFixture[str], open_network: Path) -> None:
    text = OPTIONS + 'defence = ["Sign", "DropBias"]\nbatch-size = 1\nsummed = true\njson = true\n'
    code, out, err = configured(capsys, open_network, text)
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert len(document["samples"]) == 3
    assert [defence["name"] for defence in document["defences"]] == ["Sign", "DropBias"]
    assert document["protocol"]["summed"] is True
    code, out, _ = configured(capsys, open_network, text, "--count", 1, "--defence", "Clip", "--fresh")
    document = json.loads(out)
    assert code == 0
    assert len(document["samples"]) == 1
    assert [defence["name"] for defence in document["defences"]] == ["Clip"]


def test_a_file_can_say_when_to_fail(capsys: pytest.CaptureFixture[str], open_network: Path) -> None:
    assert configured(capsys, open_network, OPTIONS + 'fail-if = "exact>0"\n')[0] == 3
    assert configured(capsys, open_network, OPTIONS + 'fail-if = "exact>0"\n', "--fail-if", "exact<0")[0] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1\n", "unknown colour; expected some of attack, batch-size"),
        ("batch_size = 1\n", "unknown batch_size"),
        ('config = "other.toml"\n', "unknown config"),
        ("[audit]\ncount = 1\n", "unknown audit"),
        ('count = "many"\n', "'many' is not a valid integer"),
        ("count = 0\n", "0 is not in the range"),
        ("count = 1.5\n", "--count"),
        ("count = true\n", "--count"),
        ('loss = "mine"\n', "'mine' is not one of"),
        ('defence = ["Nonsense"]\n', "Nonsense"),
        ("defence = [[1]]\n", "got --defence a list, expected text or a number"),
        ('fail-if = "psnr"\n', "expected one of psnr"),
        ("input-shape = [1, 8, 8]\n", "expected a name for each of several"),
        ('loss = ["mse"]\n', "got --loss a list, expected text or a number"),
        ("count = \n", "not TOML"),
    ],
)
def test_a_file_with_something_wrong_in_it(
    capsys: pytest.CaptureFixture[str], open_network: Path, text: str, message: str
) -> None:
    begun = "\n".join(line for line in OPTIONS.splitlines() if line.split(" ")[0] != text.split(" ")[0]) + "\n"
    code, out, err = configured(capsys, open_network, begun + text)
    assert code in (1, 2)
    assert message in " ".join(err.split())
    assert out == ""
    assert not (open_network / "rgap-out" / "audit.json").exists()


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "audit", "--config", tmp_path / "nowhere.toml")
    assert code == 2
    assert "nowhere.toml: no such file" in "".join(err.split("\n")).replace("│", "") or "no such file" in err


def test_cross_entropy_of_a_single_output_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "audit", *SMALL, "--loss", "cross-entropy", "--attack", "dlg", "--out", tmp_path)
    assert code == 1
    assert "got 1 classes, expected 2 or more" in " ".join(err.split())


def test_every_attack_of_the_command_line_can_be_made() -> None:
    published = {"dlg", "idlg", "inverting-gradients", "see-through-gradients", "modern"}
    assert set(BY_NAME) == {"closed", "recursive", "bias", "feature-matching", "hybrid", *published}
    for name in (*published, "feature-matching"):
        made = make_attack(name, 7, 3, False)
        assert isinstance(made, Matching)
        assert (made.iterations, made.restarts) == (7, 3)
        assert make_attack(name, None, None, False) == BY_NAME[name]()
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
        (("audit", "--fail-if", "psnr"), 2, "got 'psnr', expected one of psnr, ssim, exact, recognisable"),
        (("audit", "--fail-if", "mse>1"), 2, "got 'mse>1', expected one of"),
        (("audit", "--defence", "Nonsense"), 1, "Nonsense"),
        (("audit", "--sends", "difference"), 2, "a weight difference needs a positive one"),
        (("audit", "--local-steps", "2"), 2, "takes no local steps"),
        (("audit", "--learning-rate", "0"), 2, "0"),
        (("audit", "--polish"), 2, "--polish needs an --attack to go on from"),
        (("audit", "--data", "nowhere"), 1, "nowhere does not exist"),
        (
            ("audit", "--model", "resnet"),
            2,
            "expected cnn6, cnn6-d, fcn3, residual, lenet, vgg11, resnet20",
        ),
        (("audit", "--model", "no_such_package:make"), 2, "cannot import no_such_package"),
        (("audit", "--model", "rgap.models:nothing"), 2, "rgap.models has no nothing"),
        (("audit", "--input-shape", "3,x"), 2, "expected positive sizes with commas"),
        (("audit", "--value-range", "0"), 2, "expected two numbers with a comma"),
        (("audit", "--input-shape", "784", "--model", "fcn3"), 1, "no pictures: give a table"),
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


# What --help names without importing anything.


def test_the_names_in_help_are_those_there_are() -> None:
    assert tuple(BUILT_IN) == options.MODELS
    assert tuple(BY_NAME) == options.ATTACKS
    assert sorted(DEFENCES) == sorted(kind.__name__ for kind in ALL)
    assert [by_name(name).name for name in CATALOGUE] == list(CATALOGUE)


@pytest.mark.parametrize("width", [40, 80, 160])
def test_a_narrow_table_wraps_words_and_cuts_no_number(width: int) -> None:
    made = console.table("Title", ("sample", "attack", "level"), ("MSE", "PSNR dB", "residual"))
    made.add_row("a-long-name-of-a-file.png", "InvertingGradients", "not recovered", "1e-300", "143", "2.5e-07")
    out = io.StringIO()
    Console(file=out, width=width).print(made)
    assert all(number in out.getvalue() for number in ("1e-300", "143", "2.5e-07"))
    assert "…" not in out.getvalue()


# Models, losses and data of one's own.


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Networks that draw new weights each time they are made, and a loss; the folder of their module is the current
    one."""
    (tmp_path / "my_own_things.py").write_text(
        "from torch import nn\nfrom torch.nn import functional\n\n\ndef table():\n"
        "    return nn.Sequential(nn.Linear(3, 9), nn.Dropout(0.5), nn.Linear(9, 2))\n\n\ndef picture():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(40, 9), nn.Tanh(), nn.Linear(9, 2), nn.LogSoftmax(1))\n\n\n"
        "def loss(outputs, targets):\n    return functional.nll_loss(outputs, targets)\n"
    )
    (tmp_path / "rows.csv").write_text("a,b,c,y\n0.1,0.2,0.9,no\n0.4,0.5,0.6,yes\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


ROWS = ("audit", "--model", "my_own_things:table", "--data", "rows.csv", "--label-column", "y", "--attack", "bias")


def test_a_table_is_audited_with_its_own_shape_labels_and_mode(capsys: pytest.CaptureFixture[str], mine: Path) -> None:
    code, out, err = run(capsys, *ROWS)
    assert code == 0
    assert "Trying Bias on 2 samples in evaluation mode, for 120 s at the most" in err
    assert "Every sample can be read out of the update exactly." in out
    assert "audited in evaluation mode" in " ".join(out.split())
    document = read(mine)
    assert (document["target"]["input_shape"], document["target"]["value_range"]) == ([3], None)
    assert [sample["label"] for sample in document["samples"]] == [0, 1]
    assert document["settings"]["columns"] == ["a", "b", "c"]
    assert document["samples"][1]["values"] == pytest.approx([0.4, 0.5, 0.6])
    assert document["samples"][1]["results"][0]["values"] == pytest.approx([0.4, 0.5, 0.6], abs=1e-4)
    assert not (mine / "rgap-out" / "audit.png").exists()
    code, out, _ = run(capsys, *ROWS, "--training", "--fresh")
    assert code == 0
    assert "audited in training mode" in " ".join(out.split())
    assert read(mine)["target"]["mode"] == "training"


def test_an_audit_of_a_model_with_drawn_weights_goes_on(capsys: pytest.CaptureFixture[str], mine: Path) -> None:
    """Its weights come from --seed."""
    assert run(capsys, *ROWS)[0] == 0
    rows = (mine / "rgap-out" / "results" / "rows.jsonl").read_bytes()
    assert run(capsys, *ROWS, "--budget", 0)[0] == 0
    assert read(mine)["complete"] is True
    assert (mine / "rgap-out" / "results" / "rows.jsonl").read_bytes() == rows
    code, _, err = run(capsys, *ROWS, "--seed", 1)
    assert code == 1
    words = " ".join(err.split())
    assert "another fingerprint" in words
    assert "another folder (--out), or pass --fresh" in words
    assert not any(len(word) > 60 for word in words.split())


@pytest.mark.parametrize("loss", ["nll", "NLLLoss", "my_own_things:loss", None])
def test_losses_by_name_and_of_ones_own(capsys: pytest.CaptureFixture[str], mine: Path, loss: str | None) -> None:
    more = () if loss is None else ("--loss", loss)
    wide = ("--model", "my_own_things:picture", "--input-shape", "1,4,10", "--count", 2, "--attack", "bias")
    code, out, err = run(capsys, "audit", *wide, *more)
    assert code == 0, err
    assert "Every sample can be read out of the update exactly." in out
    assert ("Check this first" in out) is (loss == "my_own_things:loss")
