"""Files of tensors from someone who means harm: each is refused in one line, at once, and nothing in it runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import NAMES, refused
from safetensors.torch import save
from torch import Tensor

MODEL = "import torch\nfrom torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))\n"
SHAPES = {"1.weight": (3, 4), "1.bias": (3,)}
RIGHT = {name: torch.ones(shape) for name, shape in SHAPES.items()}
MANY = 20_000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "hostile_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def attack(file: object, *more: object) -> str:
    return refused("attack", file, "--model", "hostile_model:make", "--input-shape", "1,2,2", *more)


def headed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: object, start: int = 0, end: int = 0, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def rgap(text: str) -> bytes:
    return save(RIGHT, {"rgap": text})


def npz(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def npy(shape: object, descr: object = "<f4", data: bytes = b"", version: int = 1) -> bytes:
    header = (
        shape if isinstance(shape, str) else repr({"descr": descr, "fortran_order": False, "shape": shape})
    ) + "\n"
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + size + header.encode() + data


def bomb(path: Path) -> None:
    """256 MB of zeros in 1 MB: fifty thousand times what the model has."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("1.weight.npy", "w", force_zip64=True) as file,
    ):
        file.write(npy((2**26,)))
        for _ in range(2**4):
            file.write(bytes(2**24))


def sparse(start: bytes) -> Callable[[Path], None]:
    """3 GiB that take no room on the disk."""

    def make(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, 3 * 2**30)

    return make


def pt(found: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(found, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def pickled(data: bytes) -> bytes:
    """A torch.save file with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/version", "3\n")
        archive.writestr("a/data/0", bytes(4))
    return file.getvalue()


class Runs:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch ran",)


def other(name: str, value: Tensor) -> dict[str, Tensor]:
    return {**RIGHT, name: value}


def broken(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def numbered(count: int) -> dict[str, object]:
    return {f"t{at}": entry([0]) for at in range(count)}


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


EMPTY = b'"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'.__mod__
FLAT = "".join(NAMES.values())
FILES: dict[str, bytes | Callable[[Path], None]] = {
    "empty": b"",
    "one byte": b"{",
    "text": b"\x1b[2J\x1b]0;x\x07" * 9,
    # safetensors
    "half a header": headed({"1.weight": entry([3, 4], 0, 48)})[:20],
    "an endless header": headed({}, length=2**63),
    "a header beyond the file": headed({}, length=10**6),
    "no JSON": headed(b"{\x1b[31m" + b"x" * 40),
    "brackets": headed(b'{"a":' + b"[" * 10**5),
    "spaces": headed(b"{" + b" " * 50_000_000 + b"}"),
    "names twice": headed(b'{"1.bias":' + json.dumps(entry([0])).encode() + b',"1.bias":{}}'),
    "offsets beyond the file": headed({"1.weight": entry([3, 4], 0, 48)}, bytes(8)),
    "offsets that overlap": headed({"1.weight": entry([3, 4], 0, 48), "1.bias": entry([3], 0, 12)}, bytes(48)),
    "offsets backwards": headed({"1.weight": entry([3, 4], 48, 0)}, bytes(48)),
    "a negative shape": headed({"1.weight": entry([-3, 4], 0, 48)}, bytes(48)),
    "a shape that overflows": headed({"1.weight": entry([2**40, 2**40], 0, 48)}, bytes(48)),
    "a shape of text": headed({"1.weight": entry("\x1b[2J", 0, 48)}, bytes(48)),
    "an unknown type": headed({"1.weight": entry([3, 4], 0, 48, "\x1b[2J\u202e")}, bytes(48)),
    "20,000 tensors": lambda path: write(path, headed(numbered(MANY))),
    "a million tensors": lambda path: write(path, headed(b"{" + b",".join(map(EMPTY, range(10**6))) + b"}")),
    "a name that acts": save({FLAT.encode("utf-8", "replace").decode(): torch.ones(1), **RIGHT}),
    "whole numbers": save(other("1.bias", torch.ones(3, dtype=torch.int64))),
    "true and false": save(other("1.bias", torch.ones(3, dtype=torch.bool))),
    "NaN": save(other("1.bias", torch.full((3,), float("nan")))),
    "another shape": save(other("1.bias", torch.ones(1, 3))),
    "3 GiB": sparse(headed({"1.weight": entry([2**29, 1], 0, 2**31)})),
    "its header in brackets": rgap("[" * 10**5),
    "its header of text": rgap('"\x1b[2J"'),
    "its version": rgap(json.dumps({"format": "\x1b[2J" * 9})),
    "its batch": rgap(json.dumps({"format": 1, "kind": "gradient", "batch_size": 10**30, "protocol": {"\x1b[2J": 1}})),
    # npz
    "a zip bomb": bomb,
    "20,000 members": lambda path: write(path, npz({f"{at}.npy": b"" for at in range(MANY)})),
    "a member that is none": npz({"\x1b[2J.exe": b"MZ"}),
    "members that act": npz({f"{at}\x1b[2J\u202e.npy": npy((1,), data=bytes(4)) for at in range(3)}),
    "objects": npz({"1.bias.npy": npy((1,), "|O", pickle.dumps(Runs()))}),
    "a claim": npz({"1.weight.npy": npy((2**40,))}),
    "a negative claim": npz({"1.weight.npy": npy((-1, -4), data=bytes(16))}),
    "a header of brackets": npz({"1.weight.npy": npy("(" * 9000)}),
    "a header that computes": npz({"1.weight.npy": npy("{'descr': '<f4', 'shape': 9**9**9}")}),
    "a third version": npz({"1.weight.npy": npy((1,), version=3)}),
    "a broken checksum": broken(npz({"1.bias.npy": npy((3,), data=bytes(12))}), 60),
    "a way out": npz({"../../x.npy": npy((1,), data=bytes(4))}),
    # torch.save
    "code": pt({"w": Runs()}),
    "old code": pt({"w": Runs()}, zipped=False),
    "bare code": pickle.dumps(Runs()),
    "code with a name that acts": pickled(b"\x80\x02cx\x1b[2Jy\nz\n)R."),
    "a program": npz({"a/constants.pkl": b"", "a/data.pkl": b""}),
    "nested": pickled(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
    "a million entries": lambda path: write(path, pickled(b"\x80\x02}(" + b"X\1\0\0\0aK\1" * 10**6 + b"u.")),
    "a pickle of 3 GiB": sparse(pt(RIGHT)),
    "an old pickle of 3 GiB": sparse(pt(RIGHT, zipped=False)),
    "a tensor that repeats": pt(other("1.bias", torch.ones(1).expand(10**12))),
    "a sparse tensor": pt(other("1.bias", torch.ones(3).to_sparse())),
    "numbers for names": pt({1: torch.ones(1), 2: "\x1b[2J"}),
    "a list": pt([torch.ones(1)] * 3),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_an_update(kind: str, folder: Path) -> None:
    made = FILES[kind]
    path = folder / "update.bin"
    if callable(made):
        made(path)
    else:
        path.write_bytes(made)
    for arguments in ([path], [path, "--weights", path]):
        assert "update.bin" in attack(*arguments)
    assert not (folder / "ran").exists()
    path.unlink()


@pytest.mark.parametrize("kind", NAMES)
def test_a_name(kind: str, folder: Path) -> None:
    path = folder / NAMES[kind].replace("/", "|")
    path.write_bytes(b"nothing")
    assert "expected a .safetensors" in attack(path)
    assert "expected a .safetensors" in attack(path, "--weights", path)


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a device", "a loop"])
def test_what_is_no_file(kind: str, folder: Path) -> None:
    path = folder / "update"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path = Path("/dev/zero")
    else:
        path.symlink_to(path)
    assert "no such file" in attack(path)


def test_right_files_are_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that what is refused above is refused for what is wrong with it."""
    from command import run

    weights = {name: t.half() for name, t in RIGHT.items()}
    arrays = io.BytesIO()
    np.savez(arrays, **{name: t.numpy() for name, t in RIGHT.items()})
    checkpoint = {"state_dict": weights, "optimizer": {"state": {at: RIGHT for at in range(2)}, "lr": 0.1}}
    for at, content in enumerate((save(RIGHT), arrays.getvalue(), pt(RIGHT), pt(RIGHT, zipped=False), pt(checkpoint))):
        (path := folder / f"right{at}").write_bytes(content)
        code, _, err = run(capsys, "attack", path, "--model", "hostile_model:make", "--input-shape", "1,2,2")
        assert (code, err) == (0, ""), err
