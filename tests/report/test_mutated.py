"""Audits that were damaged or changed: each is a page without any harm in it, or is refused in one line."""

from __future__ import annotations

import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hostile import MEGABYTES, SECONDS, harmless, peak
from sample_audits import rich
from test_render import Page

from rgap.report import ReportError, reading, render, write

EACH = 75
"""Audits of one block."""
VALUES: list[Any] = [
    None, True, 0, -1, 10**400, 1e308, -1e-320, "", "\x1b[2J\u202e</script><script>alert(1)</script>", "x" * 10**5,
    "javascript:alert(1)", "\ud800", [], {}, [[]], {"": 0}, ["\x1b"] * 50, {"__proto__": {}}, "99999999999999999999",
]  # fmt: skip
TEXTS = ["NaN", "1e999", "-", "{", "[" * 10**5, '"\\ud800"', "9" * 5000, '"' + "y" * 10**6 + '"']


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of everything inside, the way to it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(way for key, entry in inside for way in places(entry, (*path, key)))]


def changed(audit: Any, rng: random.Random) -> bytes:
    """With some values replaced, dropped, repeated or moved; or with its bytes damaged."""
    audit = copy.deepcopy(audit)
    for _ in range(rng.choice([1, 1, 2, 5])):
        *way, key = rng.choice(places(audit)[1:])
        holder = audit
        for step in way:
            holder = holder[step]
        how = rng.randrange(5)
        if how == 0:
            holder[key] = rng.choice(VALUES)
        elif how == 1 and isinstance(holder, dict):
            del holder[key]
        elif how == 2 and isinstance(holder, dict):
            holder[rng.choice(["\x1b[2J", "extra", "__class__"])] = holder[key]
        elif how == 3 and isinstance(holder, list):
            holder.extend(holder[:1] * rng.choice([1, 300]))
        else:
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
    text = json.dumps(audit)
    at = rng.randrange(len(text))
    how = rng.randrange(8)
    if how == 0:
        return text[:at].encode()
    if how == 1:
        return (text[:at] + rng.choice(TEXTS) + text[at + rng.randrange(20) :]).encode()
    if how == 2:
        damaged = bytearray(text.encode())
        damaged[at] ^= 1 << rng.randrange(8)
        return bytes(damaged)
    return text.encode()


@pytest.mark.search
@pytest.mark.parametrize("block", range(4))
def test_a_changed_audit(block: int, first_seed: int, tmp_path: Path) -> None:
    audit, rng = rich(1), random.Random(f"{first_seed} {block}")
    source, page = tmp_path / "audit.json", tmp_path / "audit.html"
    tags = {tag for tag, _ in Page(render(audit)).tags}
    for at in range(EACH):
        source.write_bytes(changed(audit, rng))
        before, start = peak(again=True), time.process_time()
        message = ""
        try:
            write(source, page)
        except ReportError as error:
            message = str(error)
        assert time.process_time() - start < SECONDS, at
        assert peak() - before < MEGABYTES, at
        if message:
            assert "\n" not in message, (at, message)
            assert harmless(message), (at, ascii(message))
            assert len(message) < 1000, (at, message[:300])
            continue
        html = page.read_text()
        assert harmless(html), at
        made = Page(html)
        assert made.open == [], at
        assert not {tag for tag, _ in made.tags} & ({"script", "iframe", "object", "form"} - tags), at


@pytest.mark.parametrize("number", [2**63, -(10**30), 10**400])
@pytest.mark.parametrize("way", [("rank", "layers", 0, "weight_rows"), ("batch_size",), ("seed",)])
def test_no_number_is_too_large(way: tuple[Any, ...], number: int, tmp_path: Path) -> None:
    audit = rich(1)
    holder = audit
    for step in way[:-1]:
        holder = holder[step]
    holder[way[-1]] = number
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    with pytest.raises(ReportError, match="whole number of"):
        write(tmp_path / "audit.json", tmp_path / "audit.html")


def test_an_audit_without_end(tmp_path: Path) -> None:
    (source := tmp_path / "audit.json").write_bytes(b"{")
    with source.open("r+b") as file:
        file.truncate(reading.LARGEST + 1)
    with pytest.raises(ReportError, match="bytes, expected at most"):
        write(source, tmp_path / "audit.html")
