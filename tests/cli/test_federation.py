"""`rgap federation`: what a server was sent, attacked from its files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rgap import Protocol, Target, capture, cli, data, losses, models
from rgap.federation import Received, Round, write
from rgap.protocol import Sends

MODEL = ("--model", "fcn3", "--input-shape", "1,4,4")


@pytest.fixture
def captured(tmp_path: Path) -> Path:
    """Two rounds: in the first all clients have the same weights, in the second each its own."""
    images = data.photographs(2, size=4, channels=1).inputs
    for number in (1, 2):
        nodes = []
        for at in range(2):
            model = models.fcn3(16, seed=number if number == 1 else number + at)
            target = Target(model, losses.Logistic(), (1, 4, 4), (0.0, 1.0))
            protocol = Protocol(Sends.DIFFERENCE, learning_rate=1.0)
            update = capture(target, images[at : at + 1], torch.tensor([1.0]), protocol)
            nodes.append(Received(str(at), model.state_dict(), update))
        if number == 1:
            nodes.append(Received("broken", {}, None, "it sent NaN"))
        write(tmp_path / "captured", Round(number, tuple(nodes)))
    return tmp_path / "captured"


def rgap(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["federation", *arguments])
    out, err = capsys.readouterr()
    assert ended.value.code == code, err
    return out, err


def test_each_round_has_its_report(captured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = captured.parent / "out"
    output, errors = rgap(capsys, str(captured), *MODEL, "--attack", "closed", "--out", str(out))
    assert "round-0001: Every sample can be read out of the update exactly." in output
    assert "round-0002-2: The sample can be read out" in output  # other weights are another audit
    assert "node broken sent no update: it sent NaN" in errors
    names = {
        f"{name}.{kind}" for name in ("round-0001", "round-0002", "round-0002-2") for kind in ("html", "json", "png")
    }
    assert {path.name for path in out.iterdir()} == {*names, "results"}
    found = json.loads((out / "round-0001.json").read_text())
    assert [sample["name"] for sample in found["samples"]] == ["node 0", "node 1"]
    assert all(sample["picture"] is None and sample["level"] == "exact" for sample in found["samples"])


def test_a_round_without_a_reply_that_can_be_read_says_why(
    captured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Round(3, tuple(Received(name, {}, None, f"{name} sent NaN") for name in ("a", "b")))
    why = "round-0003 holds no replies that can be read: node a: a sent NaN; node b: b sent NaN"
    write(captured, broken)  # beside rounds that can be read the audit of these goes on
    arguments = (*MODEL, "--attack", "bias", "--out", str(tmp_path / "out"))
    output, errors = rgap(capsys, str(captured), *arguments)
    assert why in errors
    assert "round-0002" in output
    write(tmp_path / "alone", broken)  # and nothing at all is no audit
    _, errors = rgap(capsys, str(tmp_path / "alone"), *arguments, "--fail-if", "exact>0", code=1)
    assert errors.count(why) == 1
    assert "nothing was audited, as no reply can be read" in errors


def test_one_round_as_json(captured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(captured.parent / "out")
    output, _ = rgap(capsys, str(captured), *MODEL, "--attack", "bias", "--round", "1", "--out", out, "--json")
    (line,) = output.splitlines()
    assert [ran["name"] for ran in json.loads(line)["attacks"]] == ["Bias"]


def test_a_pipeline_can_fail_on_it(captured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (str(captured), *MODEL, "--attack", "closed", "--out", str(captured.parent / "out"))
    assert "exact>0 holds" in rgap(capsys, *arguments, "--fail-if", "exact>0", code=3)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere: no such folder"),
        (("CAPTURED", "--round", "7", *MODEL), "has no round 7"),
        (("CAPTURED", "--model", "cnn6"), "round 1, node 0: "),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said(
    arguments: tuple[str, ...], message: str, captured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(captured) if each == "CAPTURED" else each for each in arguments]
    _, errors = rgap(capsys, *given, "--out", str(captured.parent / "out"), code=1)
    assert message in errors
    assert "Traceback" not in errors
