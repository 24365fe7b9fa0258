"""Commands on a real terminal, where colours are on and whatever acts would: nothing foreign acts."""

from __future__ import annotations

import ctypes
import os
import pty
import re
import select
import signal
import time
from pathlib import Path

from hostile import ACTS, OWN
from warm import Program

from rgap.cli import main

SECONDS = 240.0
"""Until whatever hangs is killed; processes beside this one may slow it down many times."""
EVIL = "\x1b]0;owned\x07\x1b[2J\u202egnp\x9b31m"


def run_all(commands: list[list[str]], without_rights: bool) -> None:
    """One command after another; to be called in a process of its own."""
    for name in ("NO_COLOR", "CI"):
        os.environ.pop(name, None)
    if without_rights and os.geteuid() == 0:
        # Root is stopped by no mode of a folder, but for one that has given up all capabilities: version 3, no bits.
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0
    for arguments in commands:
        print("RUN", ascii(arguments))
        try:
            main(arguments)
        except SystemExit as ended:
            print("ENDED", ended.code)


def seen(commands: list[list[str]], folder: Path, without_rights: bool = False) -> str:
    """All that they write, one after another, to a pseudo-terminal.

    Args:
        without_rights: whether they are run with no more rights than any user has.
    """
    ours, theirs = pty.openpty()
    how = {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    terminal = Path(os.ttyname(theirs))
    child = Program(run_all, commands, without_rights, folder=folder, terminal=terminal, **how)
    found, end = b"", time.monotonic() + SECONDS
    while time.monotonic() < end:
        # What it wrote can be read until the last that has the other side open, which is this process, closes it.
        if not select.select([ours], [], [], 0.1)[0]:
            if child.poll() is None:
                continue
            break
        found += os.read(ours, 65536)
    else:
        child.send_signal(signal.SIGKILL)
    os.close(ours)
    os.close(theirs)
    code = child.wait(20)
    child.close()
    assert code == 0, found[-3000:]
    return found.decode()


def ended(text: str) -> list[str]:
    """How each command ended."""
    return re.findall(r"^ENDED (\w+)\r?$", text, re.MULTILINE)


def assert_harmless(text: str) -> None:
    for each in text.split("RUN ")[1:]:
        left = OWN.sub("", each.replace("\r\n", "\n"))
        assert ACTS.search(left) is None, ascii(each[-3000:])
        assert "Traceback" not in left, each
