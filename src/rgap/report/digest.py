"""What the report says beyond what stands in the audit: counts, medians over samples, and what belongs together."""

from __future__ import annotations

import base64
import binascii
import contextlib
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median
from typing import Any

from rgap.report import words

SHOWN = 24
"""Samples that are shown with their pictures."""
ROWS = 12
"""Values of an input that is no picture that are shown."""
SMALL = 128
"""Pixels across, below which each pixel of a picture is shown as a square."""


@dataclass(frozen=True)
class Fact:
    """A number worth printing large, and what it counts."""

    number: str
    about: str


@dataclass(frozen=True)
class Picture:
    """A picture inside the page."""

    uri: str
    width: int
    height: int
    """0 if the file does not say."""

    @property
    def small(self) -> bool:
        return 0 < self.width < SMALL


@dataclass(frozen=True)
class ValueRow:
    """One value of an input that is no picture."""

    name: str
    original: float | None
    found: float | None


@dataclass(frozen=True)
class LayerRow:
    """One layer over all samples, as one attack met it."""

    name: str
    unknowns: str
    constraints: str
    rank: str
    free: str
    condition: str
    worst: str
    """The largest condition."""
    error: str
    dead: str
    how: str


def facts(audit: dict[str, Any]) -> tuple[Fact, ...]:
    """The numbers behind the verdict."""
    samples = audit["samples"]
    if not samples:
        return ()
    exact = sum(sample["level"] == "exact" for sample in samples)
    seen = sum(sample["level"] in ("exact", "recognisable") for sample in samples)
    best = [result for result in map(best_result, samples) if result is not None]
    found = [
        Fact(f"{words.count(exact)} of {words.count(len(samples))}", "recovered exactly"),
        Fact(f"{words.count(seen)} of {words.count(len(samples))}", "recognisable, exact ones included"),
    ]
    psnr = _median(result["psnr"] for result in best)
    if psnr is not None:
        found.append(Fact(words.decibels(psnr), "median PSNR of the best attack"))
    time = _median(result["seconds"] for result in best)
    if time is not None:
        found.append(Fact(words.seconds(time), "median time for one update"))
    return tuple(found)


def best_result(sample: dict[str, Any]) -> dict[str, Any] | None:
    """The result of the sample's best attack."""
    return next((result for result in sample["results"] if result["attack"] == sample["best"]), None)


def most_samples(audit: dict[str, Any]) -> int:
    """Behind one update, as the updates say."""
    return max((result.get("of", 1) for sample in audit["samples"] for result in sample["results"]), default=1)


def level(sample: dict[str, Any]) -> str:
    """How much came back; not known where something did, and nobody has the sample to compare it with."""
    best = best_result(sample)
    unknown = sample["label"] is None and best is not None and best["gradient_residual"] is not None
    return "not known" if unknown and sample["level"] == "not recovered" else str(sample["level"])


def shown(audit: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples that are worth a picture: not those of clients of whose many samples nothing was recovered."""
    return [sample for sample in audit["samples"] if not sample.get("unread")]


def values(sample: dict[str, Any], columns: Sequence[str]) -> tuple[ValueRow, ...]:
    """The first values of an input that is no picture, as it was and as it came back; none where nothing did."""
    best = best_result(sample)
    found = best and best.get("values")
    if not found:
        return ()
    original = sample.get("values") or []
    names = [*columns, *(f"value {at + 1}" for at in range(len(columns), len(found)))]
    rows = zip_longest(names[: len(found)], original[: len(found)], found)
    return tuple(ValueRow(*row) for row in rows)[:ROWS]


def picture(text: str | None) -> Picture | None:
    """A PNG file in base64, with the size that its header says."""
    if text is None:
        return None
    width = height = 0
    # A file without a size is shown all the same: the browser may make sense of it.
    with contextlib.suppress(binascii.Error, struct.error):
        # The size follows the signature (8 bytes), and the length and name of the first chunk (8 bytes).
        width, height = struct.unpack(">II", base64.b64decode(text[:32])[16:24])
    return Picture(f"data:image/png;base64,{text}", width, height)


def layers(audit: dict[str, Any]) -> tuple[str | None, tuple[LayerRow, ...]]:
    """What the solver met at each layer, and which attack it was: the one with such a record for most samples."""
    recorded = [
        result for sample in audit["samples"] for result in sample["results"] if result["layers"] and result["attack"]
    ]
    if not recorded:
        return None, ()
    attack = Counter(result["attack"] for result in recorded).most_common(1)[0][0]
    found: dict[str, list[dict[str, Any]]] = {}
    for result in recorded:
        if result["attack"] == attack:
            for layer in result["layers"]:
                found.setdefault(layer["name"], []).append(layer)
    return attack, tuple(_row(name, same) for name, same in found.items())


def _row(name: str, same: list[dict[str, Any]]) -> LayerRow:
    conditions = [layer["condition"] for layer in same if layer["condition"] is not None]
    how = dict.fromkeys(words.name(layer["method"]) for layer in same if layer["method"])
    opened = dict.fromkeys(words.name(layer["open_since"]) for layer in same if layer["open_since"] is not None)
    return LayerRow(
        name=name,
        unknowns=_span(same, "unknowns", words.count),
        constraints=_over((layer["weight_rows"] + layer["gradient_rows"] for layer in same), words.count),
        rank=_span(same, "rank", words.count),
        free=_span(same, "free", words.count),
        condition=words.number(_median(conditions)),
        worst=words.number(max(conditions, default=None)),
        error=words.number(max((layer["error"] for layer in same if layer["error"] is not None), default=None)),
        dead=_span(same, "dead_units", words.count),
        how=", ".join(how) + (f"; open since {', '.join(opened)}" if opened else ""),
    )


def joint(audit: dict[str, Any]) -> tuple[tuple[str, dict[str, Any]], ...]:
    """The samples whose layers were solved together, and how, for their best attack."""
    best = ((sample["name"], best_result(sample)) for sample in audit["samples"])
    return tuple((name, result["joint"]) for name, result in best if result is not None and result["joint"])


def _span(same: Iterable[dict[str, Any]], key: str, say: Callable[[Any], str]) -> str:
    return _over((layer[key] for layer in same), say)


def _over(values: Iterable[Any], say: Callable[[Any], str]) -> str:
    """One value if all agree, else the smallest and the largest."""
    known = [value for value in values if value is not None]
    if not known:
        return words.UNKNOWN
    low, high = min(known), max(known)
    return say(low) if low == high else f"{say(low)} to {say(high)}"


def _median(values: Iterable[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    # Halved first: the sum of two floats may be more than a float can hold.
    return 2 * median(value / 2 for value in known) if known else None
