"""What is asked of a command that is given a hostile file: one line, no traceback, little time and memory."""

from __future__ import annotations

import io
import os
import pty
import re
import resource
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from unittest import mock

from rgap.cli import main

SECONDS = 2.0
"""Of the processor, which another process on the machine does not change."""
MEGABYTES = 500
# Whatever acts on a terminal, turns text around, or cannot be encoded.
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What rich writes of its own: colours, links, the cursor hidden and shown, moved up, and lines cleared.
OWN = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[[0-9]*[AK]|\r(?=[\n\x1b]|$)")
# A line that was written and cleared again, as bars are.
CLEARED = re.compile(r"[^\n]*\n?(?:\x1b\[\?25h)?\r(?:\x1b\[1A)?\x1b\[2K")
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


class Terminal:
    """A pseudo-terminal that a stream of this process writes to."""

    def __init__(self) -> None:
        self._ours, theirs = pty.openpty()
        self.stream = os.fdopen(theirs, "w", encoding="utf-8", errors="surrogateescape")
        assert self.stream.isatty()
        self._parts: list[bytes] = []
        self._reader = Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # the other side was closed
            while part := os.read(self._ours, 65536):
                self._parts.append(part)

    def end(self) -> str:
        """What stays, but for what rich writes of its own; nothing that was written acts."""
        self.stream.close()
        self._reader.join()
        os.close(self._ours)
        text = b"".join(self._parts).decode("utf-8", "surrogateescape").replace("\r\n", "\n")
        assert harmless(OWN.sub("", text)), ascii(text)
        return OWN.sub("", CLEARED.sub("", text))


def told(*arguments: object) -> tuple[int, str, str]:
    """How a command ended, and what it printed on a terminal, all of which is harmless."""
    _warm()
    before, start = peak(again=True), time.process_time()
    out, err = Terminal(), Terminal()
    plain = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    ended = SystemExit()
    try:
        with (
            mock.patch.dict(os.environ, plain | {"TERM": "xterm-256color", "COLUMNS": "200"}, clear=True),
            redirect_stdout(out.stream),
            redirect_stderr(err.stream),
        ):
            main([str(argument) for argument in arguments])
    except SystemExit as error:
        ended = error
    finally:
        printed = out.end(), err.end()
    assert time.process_time() - start < SECONDS
    assert peak() - before < MEGABYTES
    return int(ended.code or 0), *printed


def refused(*arguments: object) -> str:
    """Why it was refused, in one line."""
    code, out, err = told(*arguments)
    assert code in (1, 2), (code, out[-500:], err)
    assert out == ""
    *usage, last = err.strip("\n").split("\n")
    # click says how a command is called before it says what was wrong.
    assert not usage or (code == 2 and usage[0].startswith("Usage: ")), err
    assert last.startswith(("rgap: ", "Error: ")), err
    return last
