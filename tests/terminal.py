"""Commands on a real terminal, where colours are on and whatever acts would: nothing foreign acts."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

from hostile import ACTS, OWN

SECONDS = 240.0
"""Until whatever hangs is killed; processes beside this one may slow it down many times."""
RUNS = """
import json, sys
from rgap.cli import main

for arguments in json.loads(sys.argv[1]):
    print("RUN", ascii(arguments))
    try:
        main(arguments)
    except SystemExit as ended:
        print("ENDED", ended.code)
"""
EVIL = "\x1b]0;owned\x07\x1b[2J\u202egnp\x9b31m"


def seen(commands: list[list[str]], folder: Path, before: tuple[str, ...] = ()) -> str:
    """All that they write, one after another, to a pseudo-terminal.

    Args:
        before: a program that starts them.
    """
    ours, theirs = pty.openpty()
    environment = os.environ | {
        "TERM": "xterm-256color",
        "COLUMNS": "120",
        "LINES": "40",
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)]),
    }
    for name in ("NO_COLOR", "CI"):
        environment.pop(name, None)
    # Lone surrogates, which file names may have, cannot be handed on as they are.
    call = [*before, sys.executable, "-c", RUNS, json.dumps(commands)]
    with subprocess.Popen(call, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment) as child:
        os.close(theirs)
        found, end = b"", time.monotonic() + SECONDS
        while time.monotonic() < end:
            if not select.select([ours], [], [], 0.5)[0]:
                continue
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other side was closed
                break
            if not part:
                break
            found += part
        else:
            child.kill()
    os.close(ours)
    assert child.returncode == 0, found[-3000:]
    return found.decode()


def ended(text: str) -> list[str]:
    """How each command ended."""
    return re.findall(r"^ENDED (\w+)\r?$", text, re.MULTILINE)


def assert_harmless(text: str) -> None:
    for each in text.split("RUN ")[1:]:
        left = OWN.sub("", each.replace("\r\n", "\n"))
        assert ACTS.search(left) is None, ascii(each[-3000:])
        assert "Traceback" not in left, each
