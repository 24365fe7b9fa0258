"""What is asked of a command that is given a hostile file: one line, no traceback, little time and memory."""

from __future__ import annotations

import io
import re
import resource
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from command import run

from rgap.cli import main

SECONDS = 2.0
"""Of the processor, which another process on the machine does not change."""
MEGABYTES = 500
# Whatever acts on a terminal, turns text around, or cannot be encoded.
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
NAMES = {
    "escape": "\x1b]0;owned\x07\x1b[2J",
    "right to left": "\u202egnp.exe",
    "isolate": "a\u2066b\u2069",
    "markup": "[bold red]x[/bold red]",
    "markup that ends": "x[/]y",
    "a line": "a\nrgap: all is well",
    "C1": "a\x9b2Jb",
    "no UTF-8": b"a\xff\xfeb".decode("utf-8", "surrogateescape"),
    "mathematics": "a$\\frac{$",
    "long": "n" * 200,
}
"""Names that a file or a folder may have."""


def peak(again: bool = False) -> int:
    """In megabytes, of this process so far, or since it was last asked to begin again."""
    try:
        if again:
            Path("/proc/self/clear_refs").write_text("5")
        (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmHWM"))
        return int(line.split()[1]) // 1024
    except (OSError, ValueError):  # not on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def harmless(text: str) -> bool:
    return ACTS.search(text) is None and "Traceback" not in text


@cache
def _warm() -> None:
    """Import whatever takes its time, to the last page of a report, which no file is to blame for."""
    quiet = io.StringIO()
    audit = ["audit", "--model", "strided", "--input-shape", "3,8,8", "--count", "1", "--attack", "bias", "--out"]
    with TemporaryDirectory() as out, redirect_stdout(quiet), redirect_stderr(quiet), suppress(SystemExit):
        main([*audit, out])


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """How a command ended, and what it printed, all of which is harmless."""
    _warm()
    before, start = peak(again=True), time.process_time()
    code, out, err = run(capsys, *arguments)
    assert harmless(out), ascii(out)
    assert harmless(err), ascii(err)
    assert time.process_time() - start < SECONDS
    assert peak() - before < MEGABYTES
    return code, out, err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Why it was refused, in one line."""
    code, out, err = told(capsys, *arguments)
    assert code in (1, 2), (code, out[-500:], err)
    assert out == ""
    *usage, last = err.strip("\n").split("\n")
    # click says how a command is called before it says what was wrong.
    assert not usage or (code == 2 and usage[0].startswith("Usage: ")), err
    assert last.startswith(("rgap: ", "Error: ")), err
    return last
