"""Samples as people have them beside pictures: tables with a label column, arrays, tensors and datasets."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgap.data import DataError, Images
from rgap.losses import Loss

INPUTS, LABELS = ("x", "X", "inputs", "data", "images"), ("y", "Y", "labels", "targets")
"""Names under which arrays are looked for in a file of several."""
FILES = (".csv", ".npy", ".npz")


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs of any shape, (n, *input_shape), with their labels where they are known, in the loss's own."""

    inputs: Tensor
    names: tuple[str, ...]
    labels: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.inputs)


def samples_of(given: Any) -> Samples:
    """Pictures, a tensor, an array, a pair of inputs and labels, or a torch Dataset of such pairs, as `Samples`.

    Raises:
        DataError: it is none of them; says what was got and what was expected.
    """
    if isinstance(given, Samples):
        return given
    if isinstance(given, Images):
        return Samples(given.inputs, given.names)
    if isinstance(given, (Tensor, np.ndarray)):
        return _numbered(torch.as_tensor(given), None)
    if isinstance(given, tuple) and len(given) == 2:
        return _numbered(torch.as_tensor(given[0]), torch.as_tensor(given[1]).flatten().tolist())
    if hasattr(given, "__getitem__") and hasattr(given, "__len__") and not isinstance(given, Mapping):
        pairs = [given[at] for at in range(len(given))]
        if pairs and all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
            inputs = torch.stack([torch.as_tensor(x) for x, _ in pairs])
            return _numbered(inputs, [float(y) for _, y in pairs])
    raise DataError(
        f"got samples of type {type(given).__name__}, expected a tensor or an array (n, *input_shape), a pair of "
        "inputs and labels, rgap.data's pictures, or a torch Dataset of pairs"
    )


def _numbered(inputs: Tensor, labels: Sequence[float | int] | None) -> Samples:
    names = tuple(f"sample-{at}" for at in range(len(inputs)))
    return Samples(inputs, names, None if labels is None else tuple(float(label) for label in labels))


def read(path: Path, label_column: str | None = None, limit: int | None = None) -> Samples:
    """A table, one row a sample, from a .csv with a header; or arrays from a .npy, or from a .npz with x and y.

    Words in the label column are classes, numbered in alphabetical order. Nothing in a file is executed.

    Args:
        label_column: of a table; None: it has none.
        limit: at most so many rows.

    Raises:
        DataError: the file cannot be used as asked; says where and what to do.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist: expected a file ({', '.join(FILES)}) or a folder of pictures")
    if path.suffix == ".csv":
        return _table(path, label_column, limit)
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path} as arrays: {error}; expected numbers as numpy.save writes them") from error
    if isinstance(found, np.ndarray):
        return _numbered(torch.as_tensor(found[:limit]), None)
    inputs = next((found[name] for name in INPUTS if name in found), None)
    labels = next((found[name] for name in LABELS if name in found), None)
    if inputs is None:
        raise DataError(f"{path} holds {', '.join(found)}: expected one of {', '.join(INPUTS)} among them")
    told = None if labels is None else np.asarray(labels).reshape(-1)[:limit].tolist()
    return _numbered(torch.as_tensor(inputs[:limit]), told)


def _table(path: Path, label_column: str | None, limit: int | None) -> Samples:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        rows = [row for row in islice(reader, limit) if row]
    if not rows:
        raise DataError(f"{path} has no rows: expected a header and one row for each sample")
    if label_column is not None and label_column not in header:
        raise DataError(f"{path} has no column {label_column!r}: expected one of {', '.join(header)}")
    at = None if label_column is None else header.index(label_column)
    values = [
        [_number(path, line, header, column, cell) for column, cell in enumerate(row) if column != at]
        for line, row in enumerate(rows, start=2)
    ]
    if len({len(row) for row in values}) > 1:
        raise DataError(f"{path}: rows of different lengths, expected {len(header)} cells in each")
    inputs = torch.tensor(values, dtype=torch.float32)
    labels = None if at is None else _classes([row[at] for row in rows])
    return Samples(inputs, tuple(f"row-{line}" for line in range(2, len(rows) + 2)), labels)


def _number(path: Path, line: int, header: Sequence[str], column: int, cell: str) -> float:
    try:
        return float(cell)
    except ValueError as error:
        name = header[column] if column < len(header) else str(column + 1)
        raise DataError(
            f"{path}, line {line}, column {name}: got {cell!r}, expected a number; name the label's column "
            "(--label-column), and encode or leave out other words"
        ) from error


def _classes(cells: Sequence[str]) -> tuple[float, ...]:
    """Numbers as they are, else the words' places in alphabetical order."""
    try:
        return tuple(float(cell) for cell in cells)
    except ValueError:
        words = sorted(set(cells))
        return tuple(float(words.index(cell)) for cell in cells)


def labels(samples: Samples, loss: Loss) -> list[float]:
    """The samples' own labels; where they have none, all labels of the loss in turn."""
    if samples.labels is not None:
        return list(samples.labels)
    return [float(loss.examples[at % len(loss.examples)]) for at in range(len(samples))]
