"""Samples as people have them: what is read, and what is refused with the place and the remedy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from rgap import Target, audit, capture, data, losses
from rgap.data import DataError
from rgap.tables import labels, read, samples_of

X, Y = torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (X, None),
        (X.numpy(), None),
        ((X, Y), (0.0, 1.0, 1.0, 0.0)),
        ((X.numpy(), Y.numpy()), (0.0, 1.0, 1.0, 0.0)),
        ((X, [0, 1, 1, 0]), (0.0, 1.0, 1.0, 0.0)),
        (TensorDataset(X, Y), (0.0, 1.0, 1.0, 0.0)),
        (list(X), None),
        ([(x, int(y)) for x, y in zip(X, Y, strict=True)], (0.0, 1.0, 1.0, 0.0)),
    ],
)
def test_samples_of_any_kind(given: Any, told: tuple[float, ...] | None) -> None:
    found = samples_of(given)
    assert torch.equal(found.inputs, X)
    assert found.labels == told
    assert labels(found, losses.CrossEntropy(3)) == list(told or (0.0, 1.0, 2.0, 0.0))


@pytest.mark.parametrize("given", ["photographs", 3, {"x": X}])
def test_what_holds_no_samples_is_refused(given: Any) -> None:
    with pytest.raises(DataError, match="expected a tensor or an array"):
        samples_of(given)


@pytest.mark.parametrize(
    ("text", "column", "inputs", "told"),
    [
        ("a,b,y\n1,2,no\n3,4,yes\n", "y", [[1, 2], [3, 4]], (0.0, 1.0)),
        ("y,a,b\n2,1,2\n0,3,4\n", "y", [[1, 2], [3, 4]], (2.0, 0.0)),
        ("a,b\n1e3,-2\n", None, [[1000, -2]], None),
        ("\ufeffa,b\n1,2\n", None, [[1, 2]], None),
    ],
)
def test_tables(tmp_path: Path, text: str, column: str | None, inputs: list[Any], told: Any) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    found = read(path, column)
    assert found.inputs.tolist() == inputs
    assert found.labels == told
    assert found.names[0] == "row-2"
    assert len(read(path, column, 1)) == 1


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("a,b\n1,red\n", None, "line 2, column b: got 'red', expected a number"),
        ("a,b\n1,\n", None, "line 2, column b: got ''"),
        ("a,b\n1,2\n", "y", "no column 'y': expected one of a, b"),
        ("a,b\n1,2\n3\n", None, "rows of different lengths, expected 2"),
        ("a,b\n", None, "has no rows"),
        ("", None, "has no rows"),
    ],
)
def test_a_table_that_cannot_be_read_says_where(tmp_path: Path, text: str, column: str | None, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read(path, column)


@pytest.mark.parametrize(
    ("words", "count", "told"),
    [
        (["c", "a", "b"], 1, (2.0,)),
        (["b", "b", "b", "a"], 3, (1.0, 1.0, 1.0)),
        (["no", "yes", "maybe", "no"], 2, (1.0, 2.0)),
        (["3", "1", "no"], 2, (3.0, 1.0)),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_classes_are_numbered_over_all_rows_however_few_are_taken(
    tmp_path: Path, words: list[str], count: int, told: tuple[float, ...], kind: str
) -> None:
    path = tmp_path / f"table.{kind}"
    if kind == "csv":
        path.write_text("a,y\n" + "".join(f"{at},{word}\n" for at, word in enumerate(words)))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"a": list(range(len(words))), "y": words}), path)
    assert read(path, "y", count).labels == told


@pytest.mark.parametrize("labels", ["1,,0", "yes,,no", ",a,b"])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_row_without_a_label_is_refused(tmp_path: Path, labels: str, kind: str) -> None:
    words = labels.split(",")
    path = tmp_path / f"table.{kind}"
    if kind == "csv":
        path.write_text("a,y\n" + "".join(f"1,{word}\n" for word in words))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"a": [1] * 3, "y": [word or None for word in words]}), path)
    with pytest.raises(DataError, match=f"row {words.index('') + 1} of the table has no label"):
        read(path, "y")


def test_a_column_of_names_is_no_column_of_labels(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("a,y\n" + "".join(f"1,name {at}\n" for at in range(10_001)))
    with pytest.raises(DataError, match="more than 10,000 words as labels"):
        read(path, "y", 2)


@pytest.mark.parametrize(
    ("columns", "label", "inputs", "told"),
    [
        ({"a": [1, 3], "b": [2.5, 4.0], "y": ["no", "yes"]}, "y", [[1, 2.5], [3, 4]], (0.0, 1.0)),
        ({"y": [2, 0], "a": [True, False], "b": [1, 2]}, "y", [[1, 1], [0, 2]], (2.0, 0.0)),
        ({"a": [1e3], "b": [-2]}, None, [[1000, -2]], None),
    ],
)
def test_parquet(tmp_path: Path, columns: dict[str, list[Any]], label: str | None, inputs: Any, told: Any) -> None:
    path = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    found = read(path, label)
    assert found.inputs.tolist() == inputs
    assert found.labels == told
    assert found.names[0] == "row-1"
    assert torch.equal(read(path, label, 1).inputs, found.inputs[:1])


@pytest.mark.parametrize(
    ("columns", "label", "message"),
    [
        ({"a": [1.0, None]}, None, "line 2, column a: got 'None', expected a number"),
        ({"a": ["red"]}, None, "line 1, column a: got 'red'"),
        ({"a": [[1, 2]]}, None, "column a: got '.1, 2.'"),
        ({"a": [1]}, "y", "no column 'y': expected one of a"),
        ({"a": pyarrow.array([], pyarrow.int64())}, None, "has no rows"),
        (None, None, "cannot read .* as Parquet"),
    ],
)
def test_parquet_that_cannot_be_read_says_where(tmp_path: Path, columns: Any, label: str | None, message: str) -> None:
    path = tmp_path / "table.parquet"
    if columns is None:
        path.write_bytes(b"PAR1, but no more")
    else:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(DataError, match=message):
        read(path, label)


def test_without_pyarrow_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="Parquet needs pyarrow, which is not installed: pip install pyarrow"):
        read(tmp_path / "table.parquet")


def test_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X.numpy())
    np.savez(tmp_path / "b.npz", X=X.numpy(), labels=Y.numpy())
    np.savez(tmp_path / "c.npz", weights=X.numpy())
    assert torch.equal(read(tmp_path / "a.npy").inputs, X)
    found = read(tmp_path / "b.npz", limit=3)
    assert (len(found), found.labels) == (3, (0.0, 1.0, 1.0))
    with pytest.raises(DataError, match="holds weights: expected one of x, X"):
        read(tmp_path / "c.npz")
    np.save(tmp_path / "d.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(DataError, match="expected numbers"):
        read(tmp_path / "d.npy")
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "e.npy")


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, "numpy"])
def test_arrays_are_captured_and_audited_by_attacks_names(kind: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    target = Target(model, losses.CrossEntropy(2), (3,))
    x: Any = X.numpy() if kind == "numpy" else X.to(kind)
    update = capture(target, x[:1], [1])
    assert update.header.batch_size == 1
    found = audit(target, (x, Y), attacks=["bias"])
    assert [case.label for case in found.cases] == [0.0, 1.0, 1.0, 0.0]
    assert [case.level.value for case in found.cases] == ["exact"] * 4


@pytest.mark.parametrize("size", [(8, 12), (12, 8), (5, 20)])
def test_pictures_that_are_not_square(size: tuple[int, int]) -> None:
    found = data.photographs(2, size, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(size[0] * size[1], 7), nn.Tanh(), nn.Linear(7, 2))
    target = Target(model, losses.CrossEntropy(2), (1, *size), (0.0, 1.0))
    assert [case.level.value for case in audit(target, found, attacks=["bias"]).cases] == ["exact"] * 2
