"""Writing files so that they are there whole or not at all."""

from __future__ import annotations

import contextlib
import math
import os
import re
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

TEMPORARY = ".rgap-part"
STALE = 3600.0
"""Seconds after which a temporary file is what a killed run left behind: writing takes far less."""


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replace the file in one step; after a failure the old one is still there and nothing else is. What a run that was
    killed while it wrote this file left behind is removed."""
    path = Path(path)
    _remove_stale(path)
    try:
        handle, temporary = tempfile.mkstemp(TEMPORARY, f".{path.name}.", path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # Temporary files are private; give the result the rights any new file has.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _remove_stale(path: Path) -> None:
    """Temporary files of this one that are too old to be of a run that still writes."""
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for each in entries:
            own = each.name.startswith(f".{path.name}.") and each.name.endswith(TEMPORARY)
            if own and time.time() - each.stat(follow_symlinks=False).st_mtime > STALE:
                os.unlink(each.path)


LARGEST_TOML = 2**17
"""Bytes; what people write is shorter."""
DEEPEST = 50
"""Parts of a key."""


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds.

    Raises:
        ValueError: it cannot be read, is larger than anyone writes, or is not TOML; says which.
    """
    try:
        if path.is_file() and path.stat().st_size > LARGEST_TOML:
            raise ValueError(f"{path}: {path.stat().st_size:,} bytes, expected at most {LARGEST_TOML:,}")
        text = path.read_text(encoding="utf-8")
        # Reading a key takes time by the square of its parts.
        if "." * DEEPEST in re.sub(r"[^.\n=,{}\[\]]+", "", text):
            raise RecursionError
        return tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); expected a TOML file") from error
    except RecursionError:
        raise ValueError(f"{path}: not TOML (nested too deep)") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML ({error})") from error


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The same with lists for tuples and None for NaN and infinity, which JSON does not have."""
    return {key: _plain(entry) for key, entry in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return plain(value)
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
