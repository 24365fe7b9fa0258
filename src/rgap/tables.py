"""Samples as people have them beside pictures: tables with a label column, arrays, tensors and datasets."""

from __future__ import annotations

import csv
import importlib
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgap.data import DataError, Images
from rgap.losses import Loss
from rgap.printable import line, listed, shown

INPUTS, LABELS = ("x", "X", "inputs", "data", "images"), ("y", "Y", "labels", "targets")
"""Names under which arrays are looked for in a file of several."""
FILES = (".csv", ".parquet", ".npy", ".npz")
CLASSES = 10_000
"""Words that a label column may have."""
LARGEST = 2**28
"""Bytes of the rows that are read from one array."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs of any shape, (n, *input_shape), with their labels where they are known, in the loss's own."""

    inputs: Tensor
    names: tuple[str, ...]
    labels: tuple[float, ...] | None = None
    masks: Tensor | None = None
    """(n, h, w): where a label is a class for each pixel; labels are then their numbers."""
    columns: tuple[str, ...] = ()
    """Names of the inputs' values, of a table."""

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
        return _labelled(torch.as_tensor(given[0]), torch.as_tensor(given[1]))
    if hasattr(given, "__getitem__") and hasattr(given, "__len__") and not isinstance(given, Mapping):
        pairs = [given[at] for at in range(len(given))]
        if pairs and all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
            inputs = torch.stack([torch.as_tensor(x) for x, _ in pairs])
            return _numbered(inputs, [float(y) for _, y in pairs])
        if pairs and all(isinstance(x, (Tensor, np.ndarray)) for x in pairs):
            return _numbered(torch.stack([torch.as_tensor(x) for x in pairs]), None)
    raise DataError(
        f"got samples of type {type(given).__name__}, expected a tensor or an array (n, *input_shape), a pair of "
        "inputs and labels, rgap.data's pictures, or a torch Dataset of pairs (that of a DataLoader is its .dataset)"
    )


def _labelled(inputs: Tensor, labels: Tensor | None = None) -> Samples:
    """With labels (n,), or masks (n, h, w) or (n, 1, h, w)."""
    if labels is None or labels.dim() < 3 or labels[:1].numel() == 1:
        return _numbered(inputs, None if labels is None else labels.flatten().tolist())
    return replace(_numbered(inputs, range(len(labels))), masks=labels)


def _numbered(inputs: Tensor, labels: Sequence[float | int] | None) -> Samples:
    names = tuple(f"sample-{at}" for at in range(len(inputs)))
    return Samples(inputs, names, None if labels is None else tuple(float(label) for label in labels))


def read(path: Path, label_column: str | None = None, limit: int | None = None) -> Samples:
    """A table, one row a sample, from a .csv with a header or a .parquet; or arrays from a .npy, or .npz with x and y.

    Words in the label column are classes, numbered in alphabetical order of all rows, however few are taken. Nothing
    in a file is executed.

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
    if path.suffix == ".parquet":
        return _parquet(path, label_column, limit)
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                return _numbered(_rows(file, path.stat().st_size, limit), None)
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            found = [next((members[name] for name in names if name in members), None) for names in (INPUTS, LABELS)]
            if found[0] is None:
                names = f"{path} holds {listed(members)}: expected one of {', '.join(INPUTS)} among them"
                raise DataError(names)
            arrays = []
            for member in filter(None, found):
                with archive.open(member) as file:
                    arrays.append(_rows(file, member.file_size, limit))
    except DataError:
        raise
    except Exception as error:  # numpy and zipfile report a damaged file by any of them
        reason = line(f"{type(error).__name__}: {error}", 200)
        raise DataError(
            f"cannot read {path} as arrays ({reason}); expected numbers as numpy.save and numpy.savez write them"
        ) from error
    return _labelled(arrays[0], *arrays[1:])


def _rows(file: Any, size: int, limit: int | None) -> Tensor:
    """The first rows of an array, and nothing of the others.

    Args:
        size: bytes that are there, unpacked.
    """
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = header(file)
    if dtype.kind not in "biuf" or not shape:
        raise ValueError(f"an array of {dtype} and shape {shape}, expected rows of numbers")
    row = math.prod(shape[1:]) * dtype.itemsize
    # By columns the first rows lie all over the file.
    rows = shape[0] if by_columns or limit is None else min(limit, shape[0])
    if min(shape) < 0 or size < row * shape[0] or row * rows > LARGEST:
        raise ValueError(
            f"shape {shape} of {dtype}, {row * rows:,} bytes in {rows:,} rows, expected at most {LARGEST:,}, and what "
            "it says to be there"
        )
    values = np.frombuffer(file.read(row * rows), dtype).reshape((rows, *shape[1:]), order="F" if by_columns else "C")
    return torch.tensor(values[:limit].astype(dtype.newbyteorder("=")))


def _table(path: Path, label_column: str | None, limit: int | None) -> Samples:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            rows = [row for row in islice(reader, limit) if row]
            at = header.index(label_column) if label_column in header else len(header)
            label_cells = (row[at] for row in chain(rows, reader) if at < len(row))
            classes = _classes(path, list(islice(label_cells, len(rows))), label_cells)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path} as a table ({line(str(error), 200)}); expected UTF-8 text") from error
    return _of_rows(path, header, rows, label_column, classes, 2)


def _parquet(path: Path, label_column: str | None, limit: int | None) -> Samples:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(f"{path}: Parquet needs pyarrow, which is not installed: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            header, count = list(file.schema_arrow.names), file.metadata.num_rows
            size = count if limit is None else min(limit, count)
            if size * len(header) * 8 > LARGEST:
                raise DataError(f"{path}: got {size:,} rows of {len(header)}, expected at most {LARGEST:,} bytes")
            batches = (each.to_pydict() for each in file.iter_batches(batch_size=max(1, min(size, 10_000))))
            cells = chain.from_iterable(zip(*batch.values(), strict=True) for batch in batches)
            rows = list(islice(cells, size))
            own = [label_column] if label_column in header else []
            labels = (cell for batch in file.iter_batches(columns=own) for each in batch for cell in each.to_pylist())
            told = ("" if cell is None else str(cell) for cell in labels)
            classes = _classes(path, list(islice(told, len(rows))), told)
    except DataError:
        raise
    except Exception as error:  # pyarrow reports a damaged file by any of its own
        raise DataError(f"cannot read {path} as Parquet ({line(str(error), 200)}); expected a table") from error
    return _of_rows(path, header, rows, label_column, classes, 1)


def _of_rows(
    path: Path,
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    label_column: str | None,
    classes: tuple[float, ...],
    first: int,
) -> Samples:
    """One sample a row.

    Args:
        classes: the rows' labels, where there is a column of them.
        first: number of the first row, as whoever looks into the file counts them.
    """
    if not rows:
        raise DataError(f"{path} has no rows: expected a header and one row for each sample")
    if label_column is not None and label_column not in header:
        raise DataError(f"{path} has no column {label_column!r}: expected one of {listed(header)}")
    at = None if label_column is None else header.index(label_column)
    values = [
        [_number(path, line, header, column, cell, at is None) for column, cell in enumerate(row) if column != at]
        for line, row in enumerate(rows, start=first)
    ]
    if len({len(row) for row in values}) > 1:
        raise DataError(f"{path}: rows of different lengths, expected {len(header)} cells in each")
    inputs = torch.tensor(values, dtype=torch.float32)
    names = tuple(f"row-{line}" for line in range(first, len(rows) + first))
    columns = tuple(name for column, name in enumerate(header) if column != at)
    return Samples(inputs, names, None if at is None else classes, columns=columns)


def _number(path: Path, line: int, header: Sequence[str], column: int, cell: Any, unlabelled: bool) -> float:
    try:
        return float(cell)
    except (ValueError, TypeError) as error:
        name = header[column] if column < len(header) else str(column + 1)
        remedy = "name the label's column (--label-column), and encode other words" if unlabelled else "encode words"
        raise DataError(
            f"{path}, line {line}, column {shown(name)}: got {shown(str(cell))!r}, expected a number; {remedy}, and "
            "leave out rows without a value, as the client does before the model"
        ) from error


def _classes(path: Path, cells: Sequence[str], others: Iterable[str]) -> tuple[float, ...]:
    """Numbers as they are, else the words' places in alphabetical order.

    Args:
        others: the labels of the rows that are not taken.
    """
    if not all(cells):
        raise DataError(f"{path}: row {list(cells).index('') + 1} of the table has no label, expected one in every row")
    try:
        return tuple(float(cell) for cell in cells)
    except ValueError:
        words = set(cells)
        for word in filter(None, others):
            words.add(word)
            if len(words) > CLASSES:
                raise DataError(f"{path}: got more than {CLASSES:,} words as labels, expected classes") from None
        places = {word: float(at) for at, word in enumerate(sorted(words))}
        return tuple(places[cell] for cell in cells)


def labels(samples: Samples, loss: Loss) -> list[float]:
    """The samples' own labels; where they have none, all labels of the loss in turn."""
    if samples.labels is not None:
        return list(samples.labels)
    return [float(loss.examples[at % len(loss.examples)]) for at in range(len(samples))]
