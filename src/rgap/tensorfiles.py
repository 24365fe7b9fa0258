"""Files of named tensors as other people have them on disk: read, never executed.

What a file is, its first bytes say, not its name.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from rgap.printable import line, listed, shown
from rgap.update import UpdateError

LARGEST = 16 * 2**30
"""How many bytes a file may hold, or claim to hold, where neither a model nor the caller says otherwise."""
MOST = 10_000
"""The same of tensors."""
SPELT = 2048
"""Bytes that the name, shape and place of one tensor may take."""
COPIES = 8
"""Checkpoints hold moments of an optimizer, averaged weights and the like beside the weights."""

NESTS = ("state_dict", "model", "model_state_dict", "gradients")
"""Under which of its keys a pickled dict may hold the dict of tensors."""

_FORMATS = "a .safetensors file, an .npz file, or a .pt, .pth, .bin or .ckpt file written by torch.save"
_AGAIN = "get it again from where it was made"
_SAVE = "Save the tensors by name with safetensors.torch.save_file, or torch.save({name: tensor, ...}, path)."

_MAGIC = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""Near the start of every file torch.save wrote before version 1.6."""


class ReadError(UpdateError):
    """A file of tensors that cannot be read, or does not fit the model."""


@dataclass(frozen=True)
class Room:
    """What a file may hold: whatever is read of it takes no more, in time and memory, than what it is for.

    Args:
        size: bytes of the file, packed or unpacked.
        values: bytes of the tensors that are taken from it.
        tensors: how many there may be.
    """

    size: int = LARGEST
    values: int = LARGEST
    tensors: int = MOST

    @classmethod
    def of(cls, state: Mapping[str, Tensor], largest: int | None) -> Room:
        """For a model's tensors, in double precision at most; or as many bytes as the caller says."""
        tensors = 100 + COPIES * len(state)
        values = 2 * sum(8 * max(t.numel(), 1) for t in state.values()) + SPELT * tensors
        return cls(largest or COPIES * values, largest or values, tensors)

    @property
    def spelt(self) -> int:
        """Bytes of the names, shapes and places of all tensors."""
        return SPELT * self.tensors

    def check_size(self, path: Path, size: int, doing: str) -> None:
        self._check(path, size, self.size, doing)

    def check_values(self, path: Path, size: int) -> None:
        self._check(path, size, self.values, "claims tensors of")

    def check_count(self, path: Path, count: int) -> None:
        if count > self.tensors:
            raise ReadError(f"{path}: got {count:,} tensors, expected at most {self.tensors:,} for this model")

    def check_spelt(self, path: Path, size: int) -> None:
        if size > self.spelt:
            raise ReadError(
                f"{path}: names and shapes of its tensors take {size:,} bytes, expected at most {self.spelt:,} for "
                "this model"
            )

    def _check(self, path: Path, size: int, most: int, doing: str) -> None:
        if size > most:
            raise ReadError(
                f"{path}: {doing} {size:,} bytes, expected at most {most:,}; if that is right, pass a larger `largest`"
            )


def tensors(path: str | Path, largest: int = LARGEST) -> dict[str, Tensor]:
    """The named tensors in a file. Nothing in it is executed.

    Args:
        path: a safetensors file, an npz file, or one written by torch.save that holds a dict of tensors, by itself or
            under one of the keys in `NESTS`.
        largest: how many bytes the file may hold, or claim to hold.

    Returns:
        Tensors of the file's own shapes and types, in the file's order, except those of a safetensors file, which has
        no order of its own: by name.

    Raises:
        ReadError: no such file, damaged, of another kind, too large, or with anything but tensors in it.
    """
    return read(Path(path), Room(largest, largest))[0]


def read(path: Path, room: Room) -> tuple[dict[str, Tensor], bool]:
    """The tensors, and whether the file is an update that rgap wrote."""
    if not path.is_file():
        raise ReadError(f"{path}: no such file; expected {_FORMATS}")
    with guarded(path, "readable"):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(32)
    room.check_size(path, size, "is a file of")
    own = False
    if head.startswith(b"PK\x03\x04"):
        found = _zipped(path, room)
    elif head[:1] == b"\x80" and _MAGIC in head:
        found = _pickled(path, size, room, zipped=False)
    elif head[8:9] == b"{":
        found, own = _safetensors(path, size, room)
    else:
        raise ReadError(f"{path}: got {_looks_like(head)}, expected {_FORMATS}; it may be truncated. {_SAVE}")
    if not found:
        raise ReadError(f"{path}: got 0 tensors, expected one for each parameter")
    return found, own


def _looks_like(head: bytes) -> str:
    if head.startswith(b"\x93NUMPY"):
        return "a single .npy array without a name"
    if head[:1] == b"\x80":
        return "a bare pickle, which is not opened: it could run code"
    return f"a file of another kind that begins with {head[:8]!r}" if head else "an empty file"


@contextmanager
def guarded(path: Path, kind: str) -> Iterator[None]:
    """Whatever a library says of a file it cannot read, errors or warnings, becomes one ReadError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except UpdateError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise ReadError(f"{path}: cannot be read ({error.strerror}); expected {_FORMATS}") from error
            raise ReadError(
                f"{path}: not a whole {kind} file, it may be truncated or changed ({_first_line(error)}); {_AGAIN}"
            ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {line(lines[0], 200)}" if lines else type(error).__name__


def _safetensors(path: Path, size: int, room: Room) -> tuple[dict[str, Tensor], bool]:
    with guarded(path, "safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ReadError(
                f"{path}: not a whole safetensors file, it may be truncated or changed: its header claims "
                f"{length:,} bytes, {size - 8:,} are there; {_AGAIN}"
            )
        room.check_spelt(path, length)
        room.check_values(path, size - length)
        # The library compares the sizes of the tensors with the file's before it makes any.
        with safetensors.safe_open(path, framework="pt") as opened:
            own, names = "rgap" in (opened.metadata() or {}), sorted(opened.keys())
            room.check_count(path, len(names))
            # Cloned: what it gives is a view of the file.
            return {name: opened.get_tensor(name).clone() for name in names}, own


def _zipped(path: Path, room: Room) -> dict[str, Tensor]:
    """What numpy.savez or torch.save wrote."""
    with guarded(path, "zip"):
        # Of a member that has no tensor torch.save writes a few.
        room.check_count(path, _members(path) - 10)
    with guarded(path, "zip"), zipfile.ZipFile(path) as archive:
        kind = _checked(path, archive, room)
        if kind == "npz":
            for member in archive.infolist():
                with archive.open(member) as file:
                    _check_array(path, member, file)
    if kind == "npz":
        with guarded(path, "npz"), np.load(path, allow_pickle=False) as arrays:
            return {name: _from_numpy(arrays[name]) for name in arrays.files}
    if path.suffix.lower() == ".safetensors":
        # torch.load would go by the name.
        raise ReadError(f"{path}: got a torch.save file of another name, expected .pt; rename it")
    return _pickled(path, path.stat().st_size, room, zipped=True)


def _checked(path: Path, archive: zipfile.ZipFile, room: Room) -> str:
    """Which kind of zip file it is: "npz" or "pt". It is whole, of allowed size, and its checksums are right."""
    members = archive.infolist()
    names = [member.filename for member in members]
    if _members(path) != len(members):
        raise ReadError(f"{path}: not a whole zip file: the number of its members is wrong; {_AGAIN}")
    unpacked = sum(member.file_size for member in members)
    room.check_size(path, unpacked, "holds, unpacked,")
    if len(set(names)) < len(names):
        raise ReadError(f"{path}: got two members of one name, expected each name once. {_SAVE}")
    ends = {name.split("/")[-1] for name in names}
    if "constants.pkl" in ends:
        raise ReadError(f"{path}: got a TorchScript archive, which is a program, expected tensors alone. {_SAVE}")
    if "data.pkl" in ends:
        kind, ways = "pt", [zipfile.ZIP_STORED]
        room.check_spelt(path, sum(m.file_size for m in members if m.filename.split("/")[-1] == "data.pkl"))
    elif all(name.endswith(".npy") for name in names):
        kind, ways = "npz", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]
        room.check_values(path, unpacked)
    else:
        raise ReadError(f"{path}: got a zip file with {listed(names)}, expected {_FORMATS}. {_SAVE}")
    packed = [member.filename for member in members if member.compress_type not in ways]
    if packed:
        raise ReadError(f"{path}: {shown(packed[0])} is compressed in a way that its writer never does. {_SAVE}")
    broken = archive.testzip()
    if broken is not None:
        raise ReadError(f"{path}: {shown(broken)} has a wrong checksum: it was changed; {_AGAIN}")
    return kind


def _members(path: Path) -> int:
    """How many members a zip file says it has: one that hides in another's comment is not seen otherwise."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 2**16 + 22), io.SEEK_END)
        tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    return int.from_bytes(tail[at + 10 : at + 12], "little")


def _check_array(path: Path, member: zipfile.ZipInfo, file: Any) -> None:
    """Refuse an array that is not of numbers, or claims another size than it has, before it is made."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ReadError(f"{path}: {shown(member.filename)} has npy version {version}, expected 1.0 or 2.0. {_SAVE}")
    shape, _, dtype = readers[version](file)
    if dtype.kind not in "biufc" or dtype.itemsize > (16 if dtype.kind == "c" else 8):
        kind = "objects, which are not opened: they could run code" if dtype.hasobject else f"type {dtype}"
        raise ReadError(
            f"{path}: {shown(member.filename)} holds {kind}; expected numbers of at most 64 bits. "
            "Save one array of numbers for each parameter with numpy.savez."
        )
    claimed, there = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
    if claimed != there or min(shape, default=0) < 0:
        raise ReadError(
            f"{path}: {shown(member.filename)} claims shape {shape}, {claimed:,} bytes, but holds {there:,}; {_AGAIN}"
        )


def _from_numpy(array: Any) -> Tensor:
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _pickled(path: Path, size: int, room: Room, zipped: bool) -> dict[str, Tensor]:
    """What torch.save wrote.

    A zipped file is mapped, so that a tensor that claims more than is there cannot reach beyond the file; an older one
    is read from memory, which keeps torch from trying still older formats.
    """
    with guarded(path, "torch.save"):
        source = path if zipped else io.BytesIO(path.read_bytes())
        try:
            found = torch.load(source, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:
            asked = re.search(r"GLOBAL (\S+)|[Uu]nsupported class (\S+)", str(error))
            if asked is None:
                raise
            got = f"a pickle that asks for {shown(asked[1] or asked[2])}"
            raise ReadError(f"{path}: got {got}, expected tensors alone; nothing was executed. {_SAVE}") from error
        return _owned(path, _flat(path, found), size, room)


def _flat(path: Path, found: Any) -> dict[str, Tensor]:
    """The dict of tensors in what was unpickled; a list of them by their numbers."""
    expected = (
        f"expected a dict of tensors by name or a list in the model's order, by itself or under one of "
        f"{', '.join(NESTS)}. {_SAVE}"
    )
    if isinstance(found, (list, tuple)):
        found = {str(at): value for at, value in enumerate(found)}
    if not isinstance(found, dict):
        raise ReadError(f"{path}: got a {type(found).__name__}, {expected}")
    nests = [key for key in NESTS if isinstance(found.get(key), (dict, list, tuple))]
    if len(nests) > 1:
        raise ReadError(f"{path}: got dicts under {' and '.join(nests)}, expected one. {_SAVE}")
    within = f" under {nests[0]}" if nests else ""
    values = found[nests[0]] if nests else found
    if not isinstance(values, dict):
        values = {str(at): value for at, value in enumerate(values)}
    wrong = [f"{key!r} ({_kind(v)})" for key, v in values.items() if not (isinstance(key, str) and _plain(v))]
    if wrong:
        raise ReadError(f"{path}: got a dict{within} with {listed(wrong)}, {expected}")
    return dict(values)


def _kind(value: Any) -> str:
    sparse = isinstance(value, Tensor) and value.layout is not torch.strided
    return "a sparse tensor: save its to_dense()" if sparse else type(value).__name__


def _plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_nested
    )


def _owned(path: Path, found: dict[str, Tensor], size: int, room: Room) -> dict[str, Tensor]:
    """Copies of what the tensors see of their storage; one that repeats a number keeps doing so."""
    spans = {
        name: 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        for name, t in found.items()
    }
    room.check_count(path, len(found))
    room.check_values(path, sum(max(spans[name], t.numel()) * t.element_size() for name, t in found.items()))
    large = [name for name, t in found.items() if t.untyped_storage().nbytes() > size]
    if large:
        raise ReadError(f"{path}: {shown(large[0])} claims more than the {size:,} bytes that the file has")
    kept = {}
    for name, t in found.items():
        flat = t.detach().as_strided((spans[name],), (1,), t.storage_offset()).clone()
        kept[name] = flat.as_strided(t.shape, t.stride(), 0)
    return kept
