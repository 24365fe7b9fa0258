"""Writing files so that they are there whole or not at all."""

from __future__ import annotations

import contextlib
import math
import os
import re
import tempfile
import tomllib
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replace the file in one step; after a failure the old one is still there and nothing else is."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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
