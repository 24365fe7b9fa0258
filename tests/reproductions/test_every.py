"""One suite for every reproduction. A new one adds one row to CASES."""

from __future__ import annotations

import functools
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from torch import nn

from rgap import losses, models
from rgap.attacks import InvertingGradients
from rgap.reproductions import Options, Reproduction, base, by_name, figure4, figure5, reproduce
from rgap.reproductions import models as zoo
from rgap.reproductions.batches import OPTIMISED, Figure6, Figure7
from rgap.reproductions.figure1 import Figure1
from rgap.reproductions.figure3 import Figure3
from rgap.reproductions.inverting_gradients import Inverting, Setting
from rgap.reproductions.models import Models
from rgap.reproductions.table1 import GREY, Cell, Table1
from rgap.reproductions.table2 import Table2
from rgap.reproductions.training import Cell as Learning
from rgap.reproductions.training import Training
from rgap.store import Row


def full_rank(seed: int) -> nn.Module:
    """In the place of the network of that name, which takes seconds."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 1, bias=False))


@dataclass(frozen=True)
class Case:
    """A reproduction made small, and how often what it counts must be counted at the least."""

    small: Reproduction
    count: int = 1


def small_net(seed: int) -> nn.Module:
    return models.fcn3(hidden=(20,), seed=seed)


def scaled_net(width: float, seed: int) -> nn.Module:
    return models.fcn3(hidden=(round(50 * width),), seed=seed)


TEN = losses.CrossEntropy(10)


def flat_net(seed: int) -> nn.Module:
    return models.fcn3(3072, (2,), bias=True, seed=seed)


def pooled_net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.AvgPool2d(8), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 10))


def small_lenet(seed: int) -> nn.Module:
    return models.lenet(seed=seed)


HASTY = replace(OPTIMISED, iterations=20)
CELL = Cell("FCN3", "MNIST", small_net, GREY, {"R-GAP": (0.5, 0.1)})
CASES = {
    "table2": Case(Table2(networks=((full_rank, -484),))),
    "table1": Case(Table1(cells=(CELL,), iterations=3, scout=1), count=2),
    "figure1": Case(Figure1()),
    "figure3": Case(Figure3(cells=(CELL,), iterations=3, scout=1)),
    "figure4": Case(
        figure4.Figure4(
            networks=(figure4.Network("small", small_net, GREY),), deviations=(1e-4,), shown=1e-4, iterations=50
        )
    ),
    "figure5": Case(
        figure5.Figure5(networks=(figure5.Network("small", scaled_net, GREY, (1.0, 2.0)),), levels=(0.0, 1e-6, 1e-5)),
    ),
    "inverting-gradients": Case(
        Inverting((Setting("LeNet", small_lenet, InvertingGradients(iterations=3), "-"),)), count=2
    ),
    "figure6": Case(Figure6(matching=HASTY, hidden=(20,))),
    "models": Case(
        Models((zoo.Cell("FCN3", flat_net, losses.Logistic(), 1), zoo.Cell("pooled", pooled_net, TEN, 1)), iterations=2)
    ),
    "training": Case(Training((Learning("FCN3", flat_net, losses.Logistic()),), epochs=(0, 1), learned=4)),
    "figure7": Case(Figure7(matching=HASTY, hidden=(20, 10)), count=2),
}
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each reproduction is run once for all tests."""
    return tmp_path_factory.mktemp("reproductions")


@functools.cache
def done(name: str, folder: Path) -> bytes:
    """Run the small reproduction; its JSON."""
    reproduce(CASES[name].small, Options(count=CASES[name].count), folder / name)
    return (folder / name / f"{name}.json").read_bytes()


@functools.cache
def done_again(name: str, folder: Path) -> tuple[dict[str, Row], list[str]]:
    """Run it where it has been run; its rows, which are read, and the jobs that were run this time."""
    done(name, folder)
    case, ran = CASES[name], list[str]()
    again = Options(count=case.count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "save", lambda figure, path: None)  # a picture takes longer than all else, and is there
        rows = reproduce(case.small, again, folder / name, before=lambda key, at, total: ran.append(key))
    return rows, ran


@every_case
def test_the_small_one_is_what_the_name_stands_for(name: str) -> None:
    known = by_name(name)
    assert type(known) is type(CASES[name].small)
    assert known.name == name
    assert known.entry.title
    assert known.entry.count >= 1


@every_case
def test_it_writes_json_and_a_picture(name: str, folder: Path) -> None:
    small = CASES[name].small
    written = json.loads(done(name, folder), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert set(written) == {
        "format", "kind", "reproduction", "data", "count", "counted", "seed", "work", "title", "pictures", "result",
        "remarks", "rows",
    }  # fmt: skip
    assert (written["format"], written["kind"], written["reproduction"]) == (1, "rgap-reproduction", name)
    assert (written["count"], written["seed"], written["data"]) == (CASES[name].count, 0, None)
    keys = [job.key for job in small.jobs(Options(), CASES[name].count)]
    assert list(written["rows"]) == keys
    assert len(set(keys)) == len(keys) > 0
    assert written["result"]
    assert written["remarks"]
    with Image.open(folder / name / f"{name}.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 100
        assert len(picture.convert("L").getcolors() or ()) > 2  # not blank


@every_case
def test_what_is_done_is_not_done_again(name: str, folder: Path) -> None:
    small, before = CASES[name].small, done(name, folder)
    assert done_again(name, folder)[1] == []
    assert (folder / name / f"{name}.json").read_bytes() == before
    assert len((folder / name / "rows.jsonl").read_text(encoding="utf-8").splitlines()) == len(
        small.jobs(Options(), CASES[name].count)
    )


@every_case
def test_the_table_stands_beside_the_papers(name: str, folder: Path) -> None:
    small, (rows, _) = CASES[name].small, done_again(name, folder)
    out = io.StringIO()
    Console(file=out, width=250).print(small.table(rows))
    assert small.entry.title in out.getvalue()
    assert "paper" in out.getvalue().lower()
    assert len(out.getvalue().splitlines()) > 2
    assert isinstance(small.draw(rows), Figure)
    assert small.pictures(Options())
    assert small.pictures(Options(data=Path("somewhere")))
