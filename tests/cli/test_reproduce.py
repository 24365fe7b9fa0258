"""``rgap reproduce`` as a person uses it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from command import run
from PIL import Image
from rich.console import Console

from rgap.attacks.progress import Reporter
from rgap.cli.console import bar
from rgap.reproductions import CATALOGUE, figure1
from rgap.store import Row


def test_without_a_name_it_lists_what_there_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(capsys, "reproduce")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:] if line and line[0] != " "] == list(CATALOGUE)
    assert "losses, and the product" in " ".join(out.split())
    assert "200 products for each loss" in " ".join(out.split())


def test_the_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "reproduce", "--json")
    assert (code, err) == (0, "")
    listed = json.loads(out)
    assert [each["name"] for each in listed] == list(CATALOGUE)
    assert next(each for each in listed if each["name"] == "figure1")["count"] == 200


def test_help_lists_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "reproduce", "--help")
    assert code == 0
    assert all(f"  {name} " in out for name in CATALOGUE)
    assert "--fresh" in out


def test_a_figure_with_its_table_remarks_and_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "reproduce", "figure1", "--count", 3, "--seed", 5, "--out", tmp_path)
    words = " ".join(out.split())
    assert (code, err) == (0, "")
    assert "Figure 1: losses" in words
    assert "Eq. 25 of the paper prints" in words
    assert "3 products for each loss, seed 5; no pictures: the losses alone." in words
    assert str(tmp_path / "figure1" / "figure1.png") in words
    with Image.open(tmp_path / "figure1" / "figure1.png") as picture:
        assert picture.format == "PNG"
    assert json.loads((tmp_path / "figure1" / "figure1.json").read_text())["count"] == 3


def test_as_json_it_prints_nothing_else(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "reproduce", "figure1", "--count", 2, "--out", tmp_path, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((tmp_path / "figure1" / "figure1.json").read_text())


def test_after_an_interruption_it_goes_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    measured = figure1._measured

    def interrupted(curve: figure1.Curve, count: int) -> Row:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(curve.ours.name)
        return measured(curve, count)

    def whole(curve: figure1.Curve, count: int) -> Row:
        ran.append(curve.ours.name)
        return measured(curve, count)

    arguments = ("reproduce", "figure1", "--count", 2, "--out", tmp_path)
    monkeypatch.setattr(figure1, "_measured", interrupted)
    code, _, err = run(capsys, *arguments)
    assert (code, "interrupted" in err) == (130, True)
    monkeypatch.setattr(figure1, "_measured", whole)
    assert run(capsys, *arguments)[0] == 0
    assert ran == [curve.ours.name for curve in figure1.CURVES]
    code, _, err = run(capsys, "reproduce", "figure1", "--count", 3, "--out", tmp_path)
    assert code == 1
    assert "count 2 there, 3 now), which says nothing of this one" in " ".join(err.split())
    assert run(capsys, "reproduce", "figure1", "--count", 3, "--out", tmp_path, "--fresh")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("figure2",), 2, "'figure2' is not one of"),
        (("figure1", "--count", "0"), 2, "0 is not in the range"),
        (("table2", "--data", "nowhere"), 1, "nowhere has no folder cifar10"),
        (("table2", "--count", "99"), 1, "count is 99: expected 1 to 25"),
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
    got, _, err = run(capsys, "reproduce", *arguments)
    assert (got, message in " ".join(err.split())) == (code, True), err
    assert "Traceback" not in err


def test_the_bar_tells_the_job_and_how_far_its_attack_has_come() -> None:
    out = io.StringIO()
    with bar(Console(file=out, force_terminal=True, width=150), quiet=False) as before:
        before("batch 3", 3, 7, "")
        Reporter("DLG", 10)(10, 0.5)
    assert "batch 3: DLG 10/10, loss 5.0e-01" in out.getvalue()
    assert "3/7" in out.getvalue()


def test_no_bar_where_nobody_looks() -> None:
    out = io.StringIO()
    with bar(Console(file=out, force_terminal=True), quiet=True) as before:
        before("batch 3", 3, 7, "")
    assert out.getvalue() == ""
