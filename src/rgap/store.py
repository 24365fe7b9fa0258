"""A folder with the rows of one long run. What is in it is never computed again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from rgap.files import plain, write_atomically

LONG = 24
"""Characters of a value that a message shows."""


class StoreError(ValueError):
    """A folder that cannot be gone on with; says why, and what to do."""


@dataclass(frozen=True)
class Row:
    """What one job found."""

    values: Mapping[str, Any]
    """Ready for JSON."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """What is drawn, such as reconstructions."""


class Store:
    """A folder with the rows of one run. A job that is in it is never run again.

    ``settings.json`` says what was asked for, ``rows.jsonl`` has one line of JSON for each row, ``tensors/`` one
    safetensors file for each row that has tensors. Nothing that is read is executed, and whatever is not whole is as
    if it were not there: its row is done again.

    Args:
        folder: made if need be; its parents too.
        settings: what the rows depend on, ready for JSON.
        fresh: forget what is in the folder.

    Raises:
        StoreError: the folder holds a run with other settings; says which.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], fresh: bool = False):
        self.folder, self.settings = folder, json.loads(json.dumps(plain(dict(settings))))
        self._lines, self._settings_path, self._tensors = (
            folder / name for name in ("rows.jsonl", "settings.json", "tensors")
        )
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            for path in (self._lines, self._settings_path, *self._tensors.glob("*.safetensors")):
                path.unlink(missing_ok=True)
        self._check()
        self.rows = self._read()

    def _check(self) -> None:
        """Refuse to go on with a run that was started with other settings, or with settings that nobody can tell."""
        if not self._settings_path.is_file():
            if self._lines.is_file():
                raise StoreError(f"{self._lines} has no settings.json beside it: pass --fresh to start over")
            write_atomically(self._settings_path, json.dumps(self.settings, indent=1).encode())
            return
        entry = _parsed(self._settings_path.read_bytes())
        if not isinstance(entry, dict):
            raise StoreError(f"{self._settings_path} is not JSON as written by rgap: pass --fresh to start over")
        there, now = dict(_leaves(entry)), dict(_leaves(self.settings))
        changed = [name for name in dict.fromkeys([*there, *now]) if there.get(name) != now.get(name)]
        if changed:
            listed = ", ".join(_told(name, there.get(name), now.get(name)) for name in changed)
            raise StoreError(
                f"{self.folder} holds a run with other settings ({listed}), which says nothing of this one: keep this "
                "one in another folder (--out), or pass --fresh to forget the other"
            )

    def _read(self) -> dict[str, Row]:
        """The rows that are whole; the file keeps no other line, so that the next one begins a line of its own."""
        written = self._lines.read_bytes() if self._lines.is_file() else b""
        found: dict[str, Row] = {}
        kept = b""
        for line in written.split(b"\n")[:-1]:  # what follows the last end of a line was being written
            pair = self._row(line)
            if pair is not None:
                found[pair[0]] = pair[1]
                kept += line + b"\n"
        if kept != written:
            write_atomically(self._lines, kept)
        return found

    def _row(self, line: bytes) -> tuple[str, Row] | None:
        """Key and row of one line; None if the line or its tensors are not what `add` wrote."""
        entry = _parsed(line)
        if not isinstance(entry, dict):
            return None
        key, values, digest = entry.get("key"), entry.get("values"), entry.get("tensors")
        if not isinstance(key, str) or not isinstance(values, dict):
            return None
        if digest is None:
            return key, Row(values)
        path = self._path(key)
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != digest:
            return None
        try:
            return key, Row(values, from_bytes(content))
        except safetensors.SafetensorError:
            return None

    def _path(self, key: str) -> Path:
        return self._tensors / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"

    def add(self, key: str, row: Row) -> None:
        """Keep a row; it is on disk when this returns."""
        digest = None
        if row.tensors:
            self._tensors.mkdir(exist_ok=True)
            content = to_bytes({name: tensor.contiguous().clone() for name, tensor in row.tensors.items()})
            write_atomically(self._path(key), content)
            digest = hashlib.sha256(content).hexdigest()
        line = json.dumps({"key": key, "values": plain(dict(row.values)), "tensors": digest})
        with self._lines.open("a", encoding="utf-8", newline="\n") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[key] = Row(json.loads(line)["values"], row.tensors)  # as it will be read


def _told(name: str, there: str | None, now: str | None) -> str:
    """What is another: with its values, unless they are too long for anyone to read."""
    if max(len(str(value)) for value in (there, now)) > LONG:
        text = name.replace("_", " ")
        return f"other {text}" if text.endswith("s") and not text.endswith("ss") else f"another {text}"
    return f"{name} {there} there, {now} now"


def _parsed(text: bytes) -> Any:
    """The JSON value, or None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Everything inside a JSON object that is no object itself, with a dotted name, as text."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _leaves(entry, f"{name}.{key}" if name else key)
    else:
        yield name, json.dumps(value)
