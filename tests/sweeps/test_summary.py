"""What came out: groups, files and pictures, against sums done by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from PIL import Image

from rgap.sweeps import SweepError
from rgap.sweeps.export import export
from rgap.sweeps.figure import draw
from rgap.sweeps.store import ROW
from rgap.sweeps.summary import MEASURES, axes_of, grouped


def row(**values: Any) -> dict[str, Any]:
    base = {
        **dict.fromkeys(ROW), "key": "k", "model": "m", "seed": 0, "stage": 0, "image": "i", "attack": "a",
        "defence": "none", "state": "done", "level": "exact", "status": "exact", "psnr": 100.0, "mse": 1e-10,
        "gradient_error": 0.0, "seconds": 0.5, "attempts": 1,
    }  # fmt: skip
    level = values.get("level", "exact")
    shares = {"exact": float(level == "exact"), "recognisable": float(level in ("exact", "recognisable"))}
    return {**base, **shares, **values}


ROWS = [
    row(image="i"),
    row(image="j", level="recognisable", psnr=30.0, mse=1e-3, seconds=0.1),
    row(image="k", level="not recovered", psnr=None, mse=None, seconds=0.3),
    row(attack="b", level=None, status="does not apply", psnr=None, mse=None),
    row(attack="b", state="failed", level=None, psnr=None, mse=None, failure="ValueError: no"),
    row(attack="b", state="waiting", level=None, psnr=None, mse=None),
]


def test_groups() -> None:
    first, second = grouped(ROWS, ["attack"])
    assert (first.values, first.jobs, first.done, first.failed, first.applied) == (("a",), 3, 3, 0, 3)
    assert (first.exact, first.recognisable) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (first.psnr, first.mse, first.seconds, first.cost) == (30.0, 1e-3, 0.3, 0.0)
    assert (second.jobs, second.done, second.failed, second.applied) == (3, 1, 1, 0)
    assert math.isnan(second.exact)
    assert math.isnan(second.psnr)


def test_shares_are_of_the_samples_of_batches() -> None:
    (group,) = grouped([row(exact=0.25, recognisable=0.5), row(exact=0.75, recognisable=1.0)], ["batch"])
    assert (group.exact, group.recognisable) == (0.5, 0.75)


def test_no_answer_counts_as_the_worst() -> None:
    (group,) = grouped([row(psnr=None, mse=None), row(psnr=None, mse=None), row()], ["model"])
    assert math.isnan(group.psnr)
    assert math.isnan(group.mse)


def test_pictures_and_seeds_are_averaged_over() -> None:
    assert axes_of(ROWS) == ("attack",)
    assert axes_of([row(seed=0), row(seed=1)]) == ("model", "attack")
    with pytest.raises(ValueError, match="got colour, expected some of model, seed"):
        grouped(ROWS, ["colour"])


def test_files_hold_the_rows_as_they_are(tmp_path: Path) -> None:
    rows = [
        row(labels_right=True, strength=0.1, width=3),
        row(reason='a "quoted", text\nof two lines', labels_right=False),
    ]
    assert export(rows, tmp_path / "r.parquet") == 2
    assert pyarrow.parquet.read_table(tmp_path / "r.parquet").to_pylist() == rows
    assert export(rows, tmp_path / "r.csv") == 2
    with (tmp_path / "r.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert read == [{name: "" if value is None else str(value) for name, value in each.items()} for each in rows]
    # Types are the same when nothing is there to tell them by.
    export([], tmp_path / "empty.parquet")
    ours, theirs = (pyarrow.parquet.read_schema(tmp_path / name) for name in ("r.parquet", "empty.parquet"))
    assert ours.equals(theirs)
    with pytest.raises(SweepError, match=r"got the ending '.xls', expected .csv or .parquet"):
        export(rows, tmp_path / "r.xls")


def noisy() -> list[dict[str, Any]]:
    return [row(), *(row(defence="Noise", strength=s, level="not recovered", psnr=5.0) for s in (1e-4, 1e-2, 1.0))]


@pytest.mark.parametrize("y", MEASURES)
def test_a_figure_against_an_axis(y: str, tmp_path: Path) -> None:
    draw(noisy(), tmp_path / "p.png", None, y)
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size[0] > 600
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20  # something is drawn


def test_axes_and_words_are_in_the_figure(tmp_path: Path) -> None:
    draw(noisy(), tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text()
    assert "<svg" in drawn
    for by, labels in ((None, ("none", "Noise")), (("model",), ("m",))):
        draw(noisy(), tmp_path / "p.svg", "strength", "psnr", by)
        drawn = (tmp_path / "p.svg").read_text()
        assert all(f"<!-- {label} -->" in drawn for label in labels)
        assert by is None or "<!-- Noise -->" not in drawn
    draw([row(model="one"), row(model="two", level="recognisable")], tmp_path / "bars.png")
    draw([row(width=w, model=m) for w in (10, 20) for m in ("one", "two")], tmp_path / "w.pdf", "width", "psnr")
    assert (tmp_path / "w.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"path": "p.gif"}, "got the ending '.gif', expected .png, .svg or .pdf"),
        ({"y": "beauty"}, "got 'beauty', expected one of exact, recognisable"),
        ({"x": "model"}, "got 'model', expected one of seed, width, stage, batch, clients"),
        ({"rows": [row(level=None)]}, "nothing to draw: no job is done"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused(asked: dict[str, Any], message: str, tmp_path: Path) -> None:
    whole = {"rows": noisy(), "path": "p.png", "x": None, "y": "exact", **asked}
    with pytest.raises(ValueError, match=message):
        draw(whole["rows"], tmp_path / whole["path"], whole["x"], whole["y"])
    assert not list(tmp_path.iterdir())
