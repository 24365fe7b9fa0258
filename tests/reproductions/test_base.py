"""What is done once is kept, whatever happens to the run or to its files."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table

from rgap.attacks import DLG
from rgap.attacks.distance import cosine
from rgap.cli import main
from rgap.reproductions import CATALOGUE, Job, Options, Reproduction, ReproductionError, by_name, reproduce
from rgap.reproductions.base import labels
from rgap.reproductions.catalogue import Entry
from rgap.store import Row, Store, StoreError


@dataclass(frozen=True)
class Squares(Reproduction):
    """A reproduction that takes no time and notes what it does."""

    name: ClassVar[str] = "squares"
    entry: ClassVar[Entry] = Entry("", "Squares", 4)

    power: int = 2
    attack: DLG = field(default_factory=DLG)
    ran: list[str] = field(default_factory=list, compare=False)
    stop_at: int | None = field(default=None, compare=False)

    def jobs(self, options: Options, count: int) -> Sequence[Job]:
        def job(at: int) -> Row:
            if at == self.stop_at:
                raise KeyboardInterrupt
            self.ran.append(f"ä {at}")
            return Row({"square": at**self.power, "nan": float("nan")}, {"x": torch.full((2, 2), float(at))})

        return [Job(f"ä {at}", lambda at=at: job(at)) for at in range(count)]  # type: ignore[misc]

    def table(self, rows: Mapping[str, Row]) -> Table:
        return Table()

    def draw(self, rows: Mapping[str, Row]) -> Figure:
        return Figure()

    def summary(self, rows: Mapping[str, Row]) -> dict[str, Any]:
        return {"sum": sum(row.values["square"] for row in rows.values())}


KEYS = ["ä 0", "ä 1", "ä 2", "ä 3"]
SETTINGS = {"what": "a test"}


def rows(count: int) -> list[Row]:
    return [Row({"at": at}, {"x": torch.full((3,), float(at))} if at % 2 else {}) for at in range(count)]


def filled(folder: Path, count: int = 4) -> Path:
    """The file of lines of a store with rows, every second with a tensor."""
    store = Store(folder, SETTINGS)
    for key, row in zip(KEYS, rows(count), strict=False):
        store.add(key, row)
    return folder / "rows.jsonl"


def test_a_run_that_was_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    ran: list[str] = []
    told: list[tuple[str, int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        reproduce(Squares(ran=ran, stop_at=2), Options(), tmp_path)
    assert not (tmp_path / "squares.json").exists()
    found = reproduce(Squares(ran=ran), Options(), tmp_path, before=lambda *each: told.append(each))
    assert ran == KEYS  # each job once
    assert told == [("ä 2", 2, 4), ("ä 3", 3, 4)]
    assert [row.values["square"] for row in found.values()] == [0, 1, 4, 9]
    assert [float(row.tensors["x"][0, 0]) for row in found.values()] == [0.0, 1.0, 2.0, 3.0]
    reproduce(Squares(ran=ran), Options(), tmp_path, before=lambda *each: told.append(each))
    assert (len(ran), len(told)) == (4, 2)


def killed(call: str, at: int, run: Callable[[], object]) -> bool:
    """Whether a process that does this, and is killed (SIGKILL) at its so-manyth call of `os.call`, came so far."""
    pid = os.fork()
    if pid:
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    original, calls = getattr(os, call), 0

    def counting(*arguments: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(os, call, counting)
    try:
        run()
    finally:
        os._exit(0)


@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen"])
def test_a_run_that_was_killed_goes_on_where_it_was(call: str, tmp_path: Path) -> None:
    """At whichever of its writes."""
    reproduce(Squares(), Options(), tmp_path / "whole")
    expected = (tmp_path / "whole" / "squares.json").read_bytes()
    at = 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        if not killed(call, at, lambda folder=folder: reproduce(Squares(), Options(), folder)):  # type: ignore[misc]
            break
        assert list(reproduce(Squares(), Options(), folder)) == KEYS
        assert (folder / "squares.json").read_bytes() == expected
    assert at > 4


def test_a_command_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["reproduce", "figure1", "--count", "2", "--json"]
    assert killed("fsync", 3, lambda: main(asked))
    kept = (tmp_path / "rgap-out" / "figure1" / "rows.jsonl").read_bytes()
    assert kept
    with pytest.raises(SystemExit) as ended:
        main(asked)
    assert ended.value.code == 0
    assert (tmp_path / "rgap-out" / "figure1" / "rows.jsonl").read_bytes().startswith(kept)


@pytest.mark.parametrize(
    "values", [{}, {"square": "x"}, {"square": None}, {"square": [1]}, {"other": 1}], ids=lambda values: str(values)
)
def test_rows_that_no_run_wrote_are_refused_in_one_line(values: dict[str, Any], tmp_path: Path) -> None:
    reproduce(Squares(), Options(), tmp_path)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    changed = json.dumps(json.loads(lines[0]) | {"values": values})
    (tmp_path / "rows.jsonl").write_text("\n".join([changed, *lines[1:]]) + "\n")
    with pytest.raises(ReproductionError, match="holds rows that squares never wrote: pass --fresh"):
        reproduce(Squares(), Options(), tmp_path)


def test_what_is_written_says_all_there_is_to_know(tmp_path: Path) -> None:
    reproduce(Squares(), Options(seed=3), tmp_path)
    written = json.loads((tmp_path / "squares.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    expected = {"format": 1, "kind": "rgap-reproduction", "reproduction": "squares", "count": 4, "seed": 3}
    expected |= {"data": None, "title": "Squares", "counted": "pictures", "pictures": "built-in photographs"}
    expected |= {"result": {"sum": 14}, "remarks": []}
    assert {key: written[key] for key in expected} == expected
    assert written["rows"]["ä 3"] == {"square": 9, "nan": None}
    assert written["work"]["attack"]["iterations"] == DLG().iterations
    with Image.open(tmp_path / "squares.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(
    ("reproduction", "options", "message"),
    [
        (Squares(), Options(seed=1), "seed 0 there, 1 now"),
        (Squares(), Options(count=3), "count 4 there, 3 now"),
        (Squares(), Options(data=Path("/nowhere")), 'data null there, "/nowhere" now'),
        (Squares(power=3), Options(), "work.power 2 there, 3 now"),
        (Squares(attack=DLG(iterations=7)), Options(), "work.attack.iterations 300 there, 7 now"),
        (Squares(attack=DLG(distance=cosine)), Options(), 'work.attack.distance "squared" there, "cosine" now'),
    ],
    ids=["seed", "count", "data", "field", "attack", "function"],
)
def test_rows_of_other_settings_are_not_mixed_in(
    tmp_path: Path, reproduction: Squares, options: Options, message: str
) -> None:
    reproduce(Squares(), Options(), tmp_path)
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(StoreError) as caught:
        reproduce(reproduction, options, tmp_path)
    assert f"other settings ({message})" in str(caught.value)
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    again = replace(reproduction, ran=[])
    if options.data is None:
        reproduce(again, options, tmp_path, fresh=True)
        assert len(again.ran) == (options.count or 4)


def test_fresh_forgets_the_rows_and_what_was_made_of_them(tmp_path: Path) -> None:
    reproduce(Squares(), Options(), tmp_path)
    own = tmp_path / "tensors" / "mine.txt"
    own.write_text("not ours")
    stopped = Squares(stop_at=0)
    with pytest.raises(KeyboardInterrupt):
        reproduce(stopped, Options(), tmp_path, fresh=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine.txt", "settings.json", "tensors"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_settings_that_cannot_be_read_are_refused(tmp_path: Path, content: bytes) -> None:
    filled(tmp_path)
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"settings\.json is not JSON as written by rgap: pass --fresh"):
        Store(tmp_path, SETTINGS)


def test_rows_without_settings_are_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(StoreError, match=r"no settings\.json beside it: pass --fresh"):
        Store(tmp_path, SETTINGS)
    assert Store(tmp_path, SETTINGS, fresh=True).rows == {}


def same(found: Mapping[str, Row], keys: Sequence[str]) -> None:
    """These rows, with their values and tensors."""
    assert list(found) == list(keys)
    for key in keys:
        expected = rows(4)[KEYS.index(key)]
        assert found[key].values == expected.values
        assert {name: t.tolist() for name, t in found[key].tensors.items()} == {
            name: t.tolist() for name, t in expected.tensors.items()
        }


@given(cut=st.floats(0, 1))
@settings(deadline=None, max_examples=15)
def test_a_torn_file_keeps_its_whole_rows(tmp_path_factory: pytest.TempPathFactory, cut: float) -> None:
    folder = tmp_path_factory.mktemp("torn")
    lines = filled(folder)
    whole = lines.read_bytes()
    end = round(cut * len(whole))
    lines.write_bytes(whole[:end])
    kept = whole[:end].count(b"\n")
    store = Store(folder, SETTINGS)
    same(store.rows, KEYS[:kept])
    for key, row in zip(KEYS[kept:], rows(4)[kept:], strict=True):  # and the run goes on
        store.add(key, row)
    assert lines.read_bytes() == whole
    same(Store(folder, SETTINGS).rows, KEYS)


@given(junk=st.binary(max_size=40) | st.text(max_size=40).map(str.encode), at=st.integers(0, 3))
@settings(deadline=None, max_examples=10)
def test_a_line_that_is_no_row_is_dropped_and_the_others_stay(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int
) -> None:
    folder = tmp_path_factory.mktemp("junk")
    lines = filled(folder)
    whole = lines.read_bytes().splitlines(keepends=True)
    lines.write_bytes(b"".join([*whole[:at], junk, b"\n", *whole[at:]]))
    same(Store(folder, SETTINGS).rows, KEYS)
    assert lines.read_bytes() == b"".join(whole)


@pytest.mark.parametrize(
    "line",
    [
        "1", "null", "[]", "{}", '{"key": 1, "values": {}, "tensors": null}', '{"key": "a", "values": 1}',
        '{"key": "a", "values": {}, "tensors": true}', '{"key": "a", "values": {}, "tensors": "../../etc/passwd"}',
    ],
)  # fmt: skip
def test_json_that_is_no_row_is_dropped(tmp_path: Path, line: str) -> None:
    lines = filled(tmp_path)
    whole = lines.read_bytes()
    lines.write_bytes(whole + line.encode() + b"\n")
    same(Store(tmp_path, SETTINGS).rows, KEYS)
    assert lines.read_bytes() == whole


@given(cut=st.floats(0, 1), flip=st.booleans())
@settings(deadline=None, max_examples=15)
def test_a_row_whose_tensors_are_not_whole_is_done_again(
    tmp_path_factory: pytest.TempPathFactory, cut: float, flip: bool
) -> None:
    folder = tmp_path_factory.mktemp("tensors")
    filled(folder, 2)
    [file] = (folder / "tensors").iterdir()
    whole = file.read_bytes()
    at = min(int(cut * len(whole)), len(whole) - 1)
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] if flip else whole[:at])
    store = Store(folder, SETTINGS)
    same(store.rows, KEYS[:1])
    store.add(KEYS[1], rows(2)[1])
    same(Store(folder, SETTINGS).rows, KEYS[:2])


def test_a_row_whose_tensors_are_missing_is_done_again(tmp_path: Path) -> None:
    reproduce(Squares(), Options(), tmp_path)
    next(iter((tmp_path / "tensors").iterdir())).unlink()
    again = Squares()
    reproduce(again, Options(), tmp_path)
    assert len(again.ran) == 1


class Bomb:
    """Unpickling this fails the test."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a file of a run was unpickled",)


def test_nothing_that_is_read_is_executed(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    [file] = (tmp_path / "tensors").iterdir()
    file.write_bytes(pickle.dumps(Bomb()))
    same(Store(tmp_path, SETTINGS).rows, KEYS[:1])


def test_tensors_that_share_memory_or_are_views_are_kept(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    Store(tmp_path, SETTINGS).add("a", Row({}, {"t": base.T, "row": base[0], "same": base[0]}))
    found = Store(tmp_path, SETTINGS).rows["a"].tensors
    assert found["t"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert found["same"].tolist() == found["row"].tolist() == [0.0, 1.0, 2.0]


def test_a_row_is_the_same_when_it_is_made_and_when_it_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path, SETTINGS)
    store.add("a", Row({"nan": float("nan"), "pair": (1, 2)}))
    assert store.rows["a"].values == Store(tmp_path, SETTINGS).rows["a"].values == {"nan": None, "pair": [1, 2]}


def test_a_count_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReproductionError, match="count is 0: expected 1 or more"):
        reproduce(Squares(), Options(count=0), tmp_path)


def test_every_name_has_its_module() -> None:
    for name in CATALOGUE:
        assert by_name(name).name == name
    package = importlib.import_module("rgap.reproductions")
    with pytest.raises(ReproductionError, match="unknown reproduction 'table9': expected one of table1, table2"):
        package.by_name("table9")


def test_data_that_is_missing_or_too_little_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReproductionError, match=r"has no folder mnist: expected cifar10/ and mnist/"):
        Options(data=tmp_path).grey(1)
    (tmp_path / "mnist" / "0").mkdir(parents=True)
    Image.new("L", (28, 28), 7).save(tmp_path / "mnist" / "0" / "a.png")
    assert Options(data=tmp_path).grey(1).inputs.shape == (1, 1, 28, 28)
    with pytest.raises(ReproductionError, match="holds 1 pictures, expected 2: pass a smaller --count"):
        Options(data=tmp_path).grey(2)


def test_labels_are_minus_one_and_one_in_turn() -> None:
    assert labels(5).tolist() == [-1.0, 1.0, -1.0, 1.0, -1.0]
