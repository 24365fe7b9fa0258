"""What every reproduction has in common: jobs that are done once, whatever interrupts them, a table, and a picture."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from rich.table import Table
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from rgap import data as pictures
from rgap.auditing import plain
from rgap.data import Images
from rgap.files import write_atomically
from rgap.picture import save


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
                f"{self.data / name} holds {len(found)} pictures, expected {count}: pass --count {len(found)}"
            )
        return found


@dataclass(frozen=True)
class Row:
    """What one job found."""

    values: Mapping[str, Any]
    """Ready for JSON."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """What is drawn, such as reconstructions."""


@dataclass(frozen=True)
class Job:
    """A part of a reproduction that is done as a whole."""

    key: str
    """Its name, which tells it from all others of the reproduction."""
    run: Callable[[], Row]


class Reproduction(ABC):
    """One table or figure of the paper, computed again."""

    name: ClassVar[str]
    """As on the command line, such as ``table1``."""
    title: ClassVar[str]
    count: ClassVar[int]
    """How many pictures it takes unless told otherwise."""

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

    def remarks(self, rows: Mapping[str, Row]) -> Sequence[str]:
        """Why the two differ, and what a reader must know."""
        return ()

    def pictures(self, options: Options) -> str:
        """Which pictures were used, in a few words."""
        return "built-in photographs" if options.data is None else "CIFAR-10 and MNIST test pictures"


class Store:
    """A folder with the rows of one run. A job that is in it is never run again."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], fresh: bool = False):
        self.folder, self.settings = folder, plain(dict(settings))
        self._lines = folder / "rows.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            self._lines.unlink(missing_ok=True)
            (folder / "settings.json").unlink(missing_ok=True)
        self._check()
        self.rows = dict(self._read())

    def _check(self) -> None:
        """Refuse to go on with a run that was started with other settings."""
        path = self.folder / "settings.json"
        said = json.loads(path.read_text()) if path.is_file() else None
        if said is not None and said != json.loads(json.dumps(self.settings)):
            changed = ", ".join(
                f"{k}={said.get(k)!r} there, {v!r} now" for k, v in self.settings.items() if said.get(k) != v
            )
            raise ReproductionError(
                f"{self.folder} holds a run with other settings ({changed}): pass --fresh to start over, or another "
                "--out"
            )
        write_atomically(path, json.dumps(self.settings, indent=1).encode())

    def _read(self) -> Iterator[tuple[str, Row]]:
        if not self._lines.is_file():
            return
        whole = b""
        for line in self._lines.read_bytes().splitlines(keepends=True):
            try:
                found = json.loads(line)
            except ValueError:
                break  # the line that was being written when the run ended
            if not line.endswith(b"\n"):
                break
            whole += line
            path = self._tensors(found["key"])
            yield found["key"], Row(found["values"], load_file(path) if found["tensors"] else {})
        if whole != self._lines.read_bytes():
            write_atomically(self._lines, whole)

    def _tensors(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"

    def add(self, key: str, row: Row) -> None:
        """Keep a row; it is on disk when this returns."""
        if row.tensors:
            write_atomically(self._tensors(key), to_bytes({k: t.contiguous().clone() for k, t in row.tensors.items()}))
        line = json.dumps({"key": key, "values": plain(dict(row.values)), "tensors": bool(row.tensors)})
        with self._lines.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[key] = Row(json.loads(line)["values"], row.tensors)


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
        before: called before each job with its key, its number and the number of jobs.

    Raises:
        ReproductionError: the folder holds a run with other settings, or the data is missing.
    """
    count = reproduction.count if options.count is None else options.count
    if count < 1:
        raise ReproductionError(f"count is {count}: expected 1 or more")
    settings = {
        "reproduction": reproduction.name,
        "data": None if options.data is None else str(options.data.resolve()),
        "count": count,
        "seed": options.seed,
    }
    jobs = reproduction.jobs(options, count)
    store = Store(folder, settings, fresh)
    for at, job in enumerate(jobs):
        if before is not None:
            before(job.key, at, len(jobs))
        if job.key not in store.rows:
            store.add(job.key, job.run())
    rows = {job.key: store.rows[job.key] for job in jobs}
    written = {
        "format": 1,
        "kind": "rgap-reproduction",
        **settings,
        "title": reproduction.title,
        "pictures": reproduction.pictures(options),
        "result": reproduction.summary(rows),
        "remarks": list(reproduction.remarks(rows)),
        "rows": {key: row.values for key, row in rows.items()},
    }
    write_atomically(folder / f"{reproduction.name}.json", json.dumps(plain(written), indent=1).encode())
    save(reproduction.draw(rows), folder / f"{reproduction.name}.png")
    return rows


def labels(count: int) -> Tensor:
    """-1 and 1 in turn."""
    return torch.tensor([float(2 * (at % 2) - 1) for at in range(count)])
