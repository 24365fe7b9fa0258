"""What every reproduction has in common: jobs that are done once, whatever interrupts them, a table, and a picture."""

from __future__ import annotations

import json
import statistics
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from rgap import data as pictures
from rgap.attacks import Reconstruction
from rgap.data import Images
from rgap.files import plain, write_atomically
from rgap.metrics import score
from rgap.picture import save
from rgap.reproductions.catalogue import CATALOGUE, Entry
from rgap.store import Row, Store


class ReproductionError(ValueError):
    """A reproduction that cannot run as asked; says why, and what to do."""


@dataclass(frozen=True)
class Options:
    """What the person who runs a reproduction chooses.

    Args:
        data: a folder with CIFAR-10 and MNIST pictures in ``cifar10/`` and ``mnist/``, one subfolder for each class;
            None for the built-in photographs.
        count: how many pictures (or other samples) each figure in the table comes from; None for the reproduction's
            own number.
        seed: of weights, starts and noise.
    """

    data: Path | None = None
    count: int | None = None
    seed: int = 0

    def colour(self, count: int) -> Images:
        """CIFAR-10 pictures, or photographs: (count, 3, 32, 32)."""
        return self._pictures("cifar10", count, 32, 3)

    def grey(self, count: int) -> Images:
        """MNIST pictures, or grey photographs: (count, 1, 28, 28)."""
        return self._pictures("mnist", count, 28, 1)

    def pictures(self, shape: tuple[int, int, int], count: int) -> Images:
        """Pictures for a network that takes this shape, one of the two above."""
        return self.colour(count) if shape[0] == 3 else self.grey(count)

    def _pictures(self, name: str, count: int, size: int, channels: int) -> Images:
        if self.data is None:
            return pictures.photographs(count, size=size, channels=channels)
        if not (self.data / name).is_dir():
            raise ReproductionError(
                f"{self.data} has no folder {name}: expected cifar10/ and mnist/ in it, one subfolder for each class"
            )
        found = pictures.folder(self.data / name, size=size, channels=channels, limit=count)
        if len(found) < count:
            raise ReproductionError(
                f"{self.data / name} holds {len(found)} pictures, expected {count}: pass a smaller --count"
            )
        return found


@dataclass(frozen=True)
class Job:
    """A part of a reproduction that is done as a whole."""

    key: str
    """Its name, which tells it from all others of the reproduction."""
    run: Callable[[], Row]


class Reproduction(ABC):
    """One table or figure of the paper, computed again.

    A frozen dataclass whose fields say how thorough it is (iterations, attacks): they belong to the settings of a run,
    so that rows of different work are never mixed.
    """

    name: ClassVar[str]
    """As on the command line, such as ``table1``, and in the catalogue."""

    @property
    def entry(self) -> Entry:
        """What the catalogue says of it."""
        return CATALOGUE[self.name]

    @abstractmethod
    def jobs(self, options: Options, count: int) -> Sequence[Job]:
        """All there is to do; making the list is quick."""

    @abstractmethod
    def table(self, rows: Mapping[str, Row]) -> Table:
        """The paper's numbers beside ours; rows by the key of their job."""

    @abstractmethod
    def draw(self, rows: Mapping[str, Row]) -> Figure:
        """The picture."""

    @abstractmethod
    def summary(self, rows: Mapping[str, Row]) -> dict[str, Any]:
        """The table's numbers, ready for JSON."""

    def new_table(self, text: Sequence[str], numbers: Sequence[str] = ()) -> Table:
        """With these columns, those of numbers to the right."""
        table = Table(*text, title=self.entry.title, title_justify="left", box=None)
        for name in numbers:
            table.add_column(name, justify="right")
        return table

    def remarks(self, rows: Mapping[str, Row]) -> Sequence[str]:
        """Why the two differ, and what a reader must know."""
        return ()

    def pictures(self, options: Options) -> str:
        """Which pictures were used, in a few words."""
        return "built-in photographs" if options.data is None else "CIFAR-10 and MNIST test pictures"


def reproduce(
    reproduction: Reproduction,
    options: Options,
    folder: Path,
    fresh: bool = False,
    before: Callable[[str, int, int], None] | None = None,
) -> dict[str, Row]:
    """Do what is left to do, then write NAME.json and NAME.png.

    Args:
        folder: of this reproduction alone; a run that was interrupted goes on from what is in it.
        fresh: forget what is in it.
        before: called before each job that is left to do, with its key, its number from 0 and the number of all jobs.

    Raises:
        StoreError: the folder holds a run with other settings.
        ReproductionError: the data is missing.
    """
    count = reproduction.entry.count if options.count is None else options.count
    if count < 1:
        raise ReproductionError(f"count is {count}: expected 1 or more")
    settings = {
        "reproduction": reproduction.name,
        "data": None if options.data is None else str(options.data.resolve()),
        "count": count,
        "seed": options.seed,
        "work": _described(reproduction),
    }
    jobs = reproduction.jobs(options, count)
    store = Store(folder, settings, fresh)
    kept = set(store.rows)
    if fresh:  # of the run that is forgotten
        for path in _written(reproduction, folder):
            path.unlink(missing_ok=True)
    for at, job in enumerate(jobs):
        if job.key not in store.rows:
            if before is not None:
                before(job.key, at, len(jobs))
            store.add(job.key, job.run())
    rows = {job.key: store.rows[job.key] for job in jobs}
    try:
        _write(reproduction, options, folder, settings, rows)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if not kept:
            raise
        raise ReproductionError(
            f"{folder} holds rows that {reproduction.name} never wrote: pass --fresh to start over"
        ) from error
    return rows


def _write(
    reproduction: Reproduction, options: Options, folder: Path, settings: Mapping[str, Any], rows: Mapping[str, Row]
) -> None:
    """NAME.json and NAME.png, of rows of which a table can be made."""
    document, picture = _written(reproduction, folder)
    reproduction.table(rows)
    written = {
        "format": 1,
        "kind": "rgap-reproduction",
        **settings,
        "counted": reproduction.entry.counted,
        "title": reproduction.entry.title,
        "pictures": reproduction.pictures(options),
        "result": reproduction.summary(rows),
        "remarks": list(reproduction.remarks(rows)),
        "rows": {key: row.values for key, row in rows.items()},
    }
    write_atomically(document, json.dumps(plain(written), indent=1).encode())
    save(reproduction.draw(rows), picture)


def _written(reproduction: Reproduction, folder: Path) -> tuple[Path, Path]:
    return folder / f"{reproduction.name}.json", folder / f"{reproduction.name}.png"


def _described(value: Any) -> Any:
    """A value's fields, and theirs, ready for JSON and the same in every process: functions and classes by name.

    Fields that do not count when values are compared do not count here.
    """
    if is_dataclass(value) and not isinstance(value, type):
        named = {each.name: _described(getattr(value, each.name)) for each in fields(value) if each.compare}
        return {"class": type(value).__name__, **named}
    if isinstance(value, Mapping):
        return {str(key): _described(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(entry) for entry in value]
    if isinstance(value, partial):
        return {"function": _described(value.func), "arguments": _described([*value.args, value.keywords])}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.dtype, Path)):
        return str(value)
    return getattr(value, "__qualname__", type(value).__name__)


def labels(count: int) -> Tensor:
    """-1 and 1 in turn."""
    return torch.tensor([float(2 * (at % 2) - 1) for at in range(count)])


def of(rows: Mapping[str, Row], **values: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows.values() if all(row.values[name] == value for name, value in values.items())]


def median_and_worst(errors: Iterable[float | None]) -> tuple[str, str]:
    """Of those that are there, for a table."""
    known = [error for error in errors if error is not None]
    return (f"{statistics.median(known):.1e}", f"{max(known):.0e}") if known else ("-", "-")


def statuses(found: Iterable[str]) -> dict[str, int]:
    """How many ended in which way."""
    return dict(sorted(Counter(found).items()))


def counted(found: Mapping[str, int]) -> str:
    """The same in words."""
    return ", ".join(f"{count} {status}" for status, count in found.items())


def judged(found: Sequence[Reconstruction], truth: Tensor, labels: Tensor) -> dict[str, list[Any]]:
    """By name, figures of every picture's reconstruction: None where there is none.

    Args:
        truth: (n, *input_shape); labels: (n,).
    """
    quality = [score(each, x[None]) if each.answers else None for each, x in zip(found, truth, strict=True)]
    return {
        **{name: [None if q is None else getattr(q, name)[0] for q in quality] for name in ("mse", "psnr", "ssim")},
        "residual": [each.gradient_residual if each.answers else None for each in found],
        "status": [each.status.value for each in found],
        "reason": [each.reason for each in found],
        "label right": [bool(e.answers) and float(e.labels[0]) == float(y) for e, y in zip(found, labels, strict=True)],
        "seconds": [each.seconds for each in found],
    }


def scatter(ax: Axes, groups: Iterable[tuple[float, Iterable[float | None]]], least: float, **how: Any) -> None:
    """Errors at their places on an axis, those that are there; the least error that there is to see is drawn for 0."""
    points = [(at, max(error, least)) for at, errors in groups for error in errors if error is not None]
    if points:
        ax.scatter(*zip(*points, strict=True), **how)
