"""Updates of several samples on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import run
from PIL import Image
from safetensors.torch import load_file

from rgap import Target, capture, losses, models
from rgap.federation import Received, Round, write
from rgap.models.named import built_in

SMALL = ("--model", "fcn3", "--input-shape", "1,8,8")


def target_of(samples: int) -> Target:
    return Target(models.fcn3(64), losses.Logistic(), (1, 8, 8), (0.0, 1.0), samples)


def pictures(samples: int) -> torch.Tensor:
    return torch.rand(samples, 1, 8, 8, generator=torch.Generator().manual_seed(samples))


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_attack_writes_and_prints_every_sample(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, samples: int
) -> None:
    x, y = pictures(samples), torch.tensor([1.0, -1.0] * 3)[:samples]
    capture(target_of(samples), x, y).save(tmp_path / "update.safetensors")
    options = (*SMALL, "--batch-size", samples, "--out", tmp_path)
    code, out, _ = run(capsys, "attack", tmp_path / "update.safetensors", *options)
    assert code == 0
    assert "Sample by sample" in out
    assert all(f"\n{at} " in out for at in range(samples))
    document = json.loads((tmp_path / "reconstruction.json").read_text())
    (answer,) = document["answers"]
    assert [sample["status"] for sample in answer["samples"]] == ["exact"] * samples
    found = load_file(tmp_path / "reconstruction.safetensors")
    apart = torch.cdist(found["inputs.0"].flatten(1), x.double().flatten(1))
    assert float(apart.min(1).values.max()) < 1e-2
    assert torch.equal(found["labels.0"], y.double()[apart.argmin(1)])
    assert found["features"].shape[0] == samples
    with Image.open(tmp_path / "reconstruction.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ((1, 1, 2), "2 of label 1, 1 of label 2"),
        ((0, 0, 0), "3 of label 0"),
        ((2, 2, 2, 2, 0), "4 of label 2, 1 of label 0"),
    ],
)
def test_attack_says_how_often_each_label_occurs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, labels: tuple[int, ...], told: str
) -> None:
    batch = len(labels)
    options = ("--model", "lenet", "--loss", "cross-entropy", "--input-shape", "1,28,28", "--batch-size", batch)
    target = Target(built_in("lenet", (1, 28, 28)), losses.CrossEntropy(10), (1, 28, 28), (0.0, 1.0), batch)
    x = torch.rand(batch, 1, 28, 28, generator=torch.Generator().manual_seed(batch))
    capture(target, x, torch.tensor(labels).float()).save(tmp_path / "update.safetensors")
    code, out, _ = run(capsys, "attack", tmp_path / "update.safetensors", *options, "--budget", 0, "--out", tmp_path)
    assert code == 0
    assert f"How often each label occurs is estimated: {told}." in " ".join(out.split())
    assert told in json.loads((tmp_path / "reconstruction.json").read_text())["read_off"]


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_a_federation_counts_the_samples_of_its_clients(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, samples: int
) -> None:
    target = target_of(samples)
    update = capture(target, pictures(samples), torch.tensor([1.0, -1.0] * 2)[:samples])
    node = Received("7", target.model.state_dict(), update)
    write(tmp_path / "captured", Round(1, (node,)))
    options = (*SMALL, "--attack", "closed", "--out", tmp_path / "out")
    code, out, _ = run(capsys, "federation", tmp_path / "captured", *options)
    assert code == 0
    assert out.count("Closed") == samples
    document = json.loads((tmp_path / "out" / "round-0001.json").read_text())
    assert [each["level"] for each in document["samples"]] == ["exact"] * samples
    assert f"{samples} of {samples} samples certified" in " ".join(document["verdict"]["sentences"])
