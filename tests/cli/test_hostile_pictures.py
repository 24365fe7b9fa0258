"""Pictures and folders from someone who means harm."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import NAMES, refused, told
from PIL import Image

from rgap import data


def picture(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (9, 9), **how: object) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 3).save(file, kind, **how)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *more: bytes, rows: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(*tags: tuple[int, int, int, int], following: int = 0) -> bytes:
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", following) + bytes(64)


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


BOMB = zlib.compress(bytes(2**27), 1)
SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) (w) file closefile showpage\n"
TOO_LARGE = [
    (256, 4, 1, 90_000), (257, 4, 1, 90_000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
    (278, 4, 1, 90_000), (279, 4, 1, 2**32 - 1),
]  # fmt: skip
FILES: dict[str, bytes] = {
    "empty": b"",
    "text that acts": b"\x1b[2J\x1b]0;x\x07",
    "a program for a printer": SCRIPT,
    "the same behind a picture's first bytes": b"\x89PNG\r\n\x1a\n" + SCRIPT,
    "PDF": b"%PDF-1.4\n%\xe2\xe3\n1 0 obj<</OpenAction 2 0 R>>endobj\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "GIF": picture("GIF", "P"),
    "ICO": picture("ICO", size=(16, 16)),
    "PCX": picture("PCX"),
    "a player's file": b"#EXTM3U\nfile:///etc/passwd\n",
    "half a PNG": picture()[:40],
    "half a JPEG": picture("JPEG")[:300],
    "half a WebP": picture("WEBP")[:30],
    "a wide PNG": png(2**31 - 1, 2**31 - 1),
    "a PNG of 2.5 gigapixels": png(50_000, 50_000, rows=bytes(9000)),
    "a PNG of 60 megapixels": png(10_000, 6_000, rows=bytes(9000)),
    "a PNG of no width": png(0, 9),
    "a PNG whose text is a bomb": png(9, 9, chunk(b"zTXt", b"a\0\0" + BOMB)),
    "a PNG whose profile is a bomb": png(9, 9, chunk(b"iCCP", b"a\0\0" + BOMB)),
    "a TIFF of 8 gigapixels": tiff(*TOO_LARGE),
    "a TIFF that goes round": tiff(following=8),
    "a TIFF of a million tags": b"II*\0" + struct.pack("<IH", 8, 65535) + bytes(2000),
    "a TIFF without anything": tiff((256, 4, 1, 9)),
    "a wide BMP": bmp(2**31 - 1, 2**31 - 1),
    "a BMP of less than nothing": bmp(-9, -9),
    "a PPM of 998 gigapixels": b"P6 999999 998999 255\n" + bytes(99),
    "a PPM whose width has no end": b"P6 " + b"9" * 10**6 + b" 1 255\n",
    "a PPM of numbers below zero": b"P6 -9 -9 255\n" + bytes(99),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def audit(folder: object) -> tuple[object, ...]:
    return (
        "audit",
        "--data",
        folder,
        "--model",
        "strided",
        "--input-shape",
        "3,8,8",
        "--count",
        "1",
        "--attack",
        "bias",
    )


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_picture(kind: str, ending: str, folder: Path) -> None:
    (folder / "in").mkdir()
    (folder / "in" / f"a.{ending}").write_bytes(FILES[kind])
    assert f"cannot read in/a.{ending} as an image: " in refused(*audit("in"))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("content", [b"", picture()], ids=["damaged", "whole"])
def test_names(kind: str, content: bytes, folder: Path) -> None:
    """Of a picture, of its class and of the folder, each refused with its name, or shown with it."""
    name = NAMES[kind].replace("/", "|")
    (folder / name / name).mkdir(parents=True)
    (folder / name / name / f"{name}.png").write_bytes(content)
    if not content:
        assert "cannot read " in refused(*audit(name))
        return
    code, out, err = told(*audit(name), "--out", f"{name}-out")
    assert code == 0, ascii(err)
    assert "Report: " in out
    assert (folder / f"{name}-out" / "audit.html").is_file()


@pytest.mark.parametrize("kind", ["a loop of folders", "a pipe", "a folder called a picture", "a loop", "nothing"])
def test_folders(kind: str, folder: Path) -> None:
    (inside := folder / "in").mkdir()
    made: dict[str, Callable[[], object]] = {
        "a loop of folders": lambda: (inside / "a").symlink_to(inside),
        "a pipe": lambda: os.mkfifo(inside / "a.png"),
        "a folder called a picture": lambda: (inside / "a.png").mkdir(),
        "a loop": lambda: (inside / "a.png").symlink_to(inside / "a.png"),
        "nothing": lambda: None,
    }
    made[kind]()
    assert "no images in in" in refused(*audit("in"))


def test_large_pictures_are_taken(folder: Path) -> None:
    """Those of cameras, in each format that is meant."""
    endings = {"PNG": "png", "JPEG": "jpg", "BMP": "bmp", "PPM": "ppm", "TIFF": "tif", "WEBP": "webp"}
    for kind, ending in endings.items():
        (folder / f"a.{ending}").write_bytes(picture(kind, size=(3000, 2000)))
        assert data.picture(folder / f"a.{ending}", 8).inputs.shape == (1, 3, 8, 8)


def archive(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
        made.writestr(f"{name}.npy", content)
    return file.getvalue()


def array(header: str, content: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + content


def zip_bomb() -> bytes:
    """More zeros than are taken, in a megabyte."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': (1, {2**26 + 1})}}\n"
    return archive("x", array(header, bytes(4 * (2**26 + 1))))


TABLES: dict[str, tuple[str, bytes | Callable[[], bytes]]] = {
    "no array": ("npy", b"\x1b[2J"),
    "an array of objects": ("npy", array("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"\x80\x02cos\n.")),
    "a claim": ("npy", array(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**40}, 4)}}")),
    "a row without end": ("npy", array(f"{{'descr': '<f4', 'fortran_order': False, 'shape': (1, {2**50})}}")),
    "less than nothing": ("npy", array("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4)}")),
    "brackets": ("npy", array("(" * 9000)),
    "no archive": ("npz", b"PK\x03\x04\x1b[2J"),
    "other names": ("npz", archive("a\x1b[2J", b"")),
    "a zip bomb": ("npz", zip_bomb),
    "no rows": ("csv", b""),
    "a cell without end": ("csv", b"a,b\n" + b"1" * 200_000 + b",2\n"),
    "no UTF-8": ("csv", b"a,b\n\xff\xfe,1\n"),
    "cells that act": ("csv", b"a\x1b[2J,b\n\x1b[2J\xe2\x80\xae,1\n"),
    "a quote without end": ("csv", b'a,b\n"' + b"1,\n" * 70_000),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table(kind: str, folder: Path) -> None:
    ending, content = TABLES[kind]
    (folder / f"t.{ending}").write_bytes(content if isinstance(content, bytes) else content())
    assert f"t.{ending}" in refused("audit", "--data", f"t.{ending}", "--label-column", "b")
