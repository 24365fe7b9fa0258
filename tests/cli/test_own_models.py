"""Models as people write them, on the command line: factories, normalisation, devices."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy
import pytest
import torch
from command import run
from torch import nn

from rgap import Target, losses
from rgap.models.inputs import normalised

FACTORIES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, hidden=9):
        super().__init__()
        self.f = nn.Sequential(nn.Flatten(), nn.Linear(48, hidden), nn.Tanh(), nn.Linear(hidden, classes))
    def forward(self, x):
        return self.f(x)

def boom():
    raise RuntimeError("no weights here")

def none():
    Net(3)

instance = Net(3)
number = 7
"""
RANK = ("rank", "--no-measure", "--input-shape", "3,4,4", "--model")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "factories_of_mine.py").write_text(FACTORIES)
    (tmp_path / "broken_of_mine.py").write_text("import torch\nundefined_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize("factory", ["Net(classes=5)", "Net(classes=2, hidden=4)", "instance"])
def test_a_factory_may_take_constants(capsys: pytest.CaptureFixture[str], here: Path, factory: str) -> None:
    code, _, err = run(capsys, *RANK, f"factories_of_mine:{factory}")
    assert code == 0, err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("factories_of_mine:Net", "it takes classes; expected all, as factories_of_mine:Net(classes=...)"),
        ("factories_of_mine:Net(5)", "expected constants by their names, such as factories_of_mine:Net(classes=10)"),
        ("factories_of_mine:Net(classes=open('x'))", "expected constants by their names"),
        ("factories_of_mine:Net(classes=5", "expected constants by their names"),
        ("factories_of_mine:Net(depth=5, classes=1)", "unexpected keyword argument 'depth'"),
        ("factories_of_mine:boom", "RuntimeError: no weights here (factories_of_mine.py, line 13)"),
        ("factories_of_mine:none", "got NoneType, expected a torch.nn.Module"),
        ("factories_of_mine:number", "'int' object is not callable"),
        ("broken_of_mine:Net", "NameError: name 'undefined_name' is not defined (broken_of_mine.py, line 2)"),
    ],
)
def test_what_fails_in_a_factory_is_one_line(
    capsys: pytest.CaptureFixture[str], here: Path, model: str, message: str
) -> None:
    code, _, err = run(capsys, *RANK, model)
    assert (code, message in " ".join(err.split())) == (2, True), err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "nonsense"), "no 'nonsense' that torch can use"),
        (("--device", "cuda:77"), "no 'cuda:77' that torch can use"),
        (("--mean", "a"), "expected a number for each channel"),
        (("--mean", "0.1,0.2"), "got 2 values, expected 1, or 3"),
        (("--mean", "0.1,nan,0.2"), "got '0.1,nan,0.2', expected a number for each channel"),
        (("--std", "0.1,0.2,0"), "got 0, expected positive numbers"),
        (("--std", "inf"), "got 'inf', expected a number for each channel"),
    ],
)
def test_unusable_options_are_refused(
    capsys: pytest.CaptureFixture[str], here: Path, options: tuple[str, ...], message: str
) -> None:
    code, _, err = run(capsys, *RANK, "factories_of_mine:instance", *options)
    assert (code in (1, 2), message in " ".join(err.split())) == (True, True), err


def test_normalisation_is_told_once(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    """Pictures, range and what is found are those before it; an audit with another one is another audit."""
    wide = ("audit", "--model", "factories_of_mine:Net(classes=4)", "--input-shape", "3,4,4", "--count", 2)
    fast = (*wide, "--attack", "bias", "--device", "cpu")
    code, out, err = run(capsys, *fast, "--mean", "0.4,0.5,0.6", "--std", "0.25")
    assert code == 0, err
    assert "Every sample can be read out of the update exactly." in out
    assert "Check this first" not in out
    assert json.loads((here / "rgap-out" / "audit.json").read_text())["target"]["value_range"] == [0, 1]
    assert run(capsys, *fast, "--mean", "0.4")[0] == 1


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 12), (5,), (1, 4, 4, 4)])
def test_a_normalised_model_is_the_model_of_normalised_inputs(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(1)
    size = int(torch.tensor(shape).prod())
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.rand(4, *shape, generator=draw)
    mean, std = torch.rand(shape[0], generator=draw), 0.1 + torch.rand(shape[0], generator=draw)
    per_channel = [-1, *[1] * (len(shape) - 1)]
    expected = model((x - mean.reshape(per_channel)) / std.reshape(per_channel))
    names = list(model.state_dict())
    changed = normalised(model, mean.tolist(), std.tolist(), shape[0])
    assert torch.allclose(changed(x), expected, atol=1e-5)
    assert list(changed.state_dict()) == names
    assert Target(changed, losses.CrossEntropy(3), shape).network  # and it is followed


SEVERAL = """
import torch
from torch import nn

class Pair(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.meta, self.b = how, nn.Linear(12, 15), nn.Linear(4, 15), nn.Linear(15, 3)
    def forward(self, x, meta, gain=None):
        h = self.a(x.flatten(1))
        if self.how == "added":
            h = h + self.meta(meta)
        elif self.how == "gated":
            h = h * self.meta(meta).sigmoid()
        else:
            h = h + self.meta(meta) * gain
        return self.b(torch.tanh(h))
"""


@pytest.mark.parametrize(
    ("how", "shapes"),
    [
        ("added", ["x=3,2,2", "meta=4"]),
        ("gated", ["x=3,2,2", "meta=4"]),
        ("scaled", ["x=3,2,2", "meta=4", "gain=1"]),
        ("added", ["meta=4", "x=3,2,2"]),
    ],
    ids=["added", "gated", "three", "the other one"],
)
def test_one_of_several_inputs_is_attacked(
    capsys: pytest.CaptureFixture[str], here: Path, how: str, shapes: list[str]
) -> None:
    (here / "several_of_mine.py").write_text(SEVERAL)
    given = [part for shape in shapes for part in ("--input-shape", shape)]
    data = torch.rand(1, *map(int, shapes[0].partition("=")[2].split(",")), generator=torch.Generator().manual_seed(0))
    numpy.save(here / "x.npy", data.numpy())
    command = ("audit", "--model", f"several_of_mine:Pair(how='{how}')", "--data", "x.npy", "--loss", "cross-entropy")
    code, out, err = run(capsys, *command, *given, "--attack", "closed", "--json")
    assert code == 0, err
    attacked, *others = (shape.partition("=")[0] for shape in shapes)
    assert f"Only {attacked} is attacked: values of {', '.join(others)} are drawn" in err
    (sample,) = json.loads(out)["samples"]
    assert sample["results"][0]["status"] == "exact"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (["x=3,2,2", "4"], "expected a name for each of several"),
        (["3,2,2", "4"], "expected a name for each of several"),
        (["x=3,2,2", "x=4"], "expected a name for each of several"),
        (["x=3,a"], "expected positive sizes with commas"),
        (["x=3,2,2", "mask=4"], "unexpected keyword argument 'mask'"),
        (["3,2,2"], "give each by its name"),
    ],
)
def test_inputs_that_cannot_be_told_apart_are_refused(
    capsys: pytest.CaptureFixture[str], here: Path, shapes: list[str], message: str
) -> None:
    (here / "several_of_mine.py").write_text(SEVERAL)
    given = [part for shape in shapes for part in ("--input-shape", shape)]
    code, _, err = run(capsys, "rank", "--no-measure", "--model", "several_of_mine:Pair(how='added')", *given)
    assert code in (1, 2)
    assert message in " ".join(err.split())
