"""Numbers and names as people read them."""

# ruff: noqa: RUF001, RUF002 - minus signs and dashes are what this file is for

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

NAME = 60
"""Characters of a name that are shown; the middle of a longer one is left out."""
UNKNOWN = "–"
"""A value that was not measured."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Number = int | float


def name(text: str, longest: int = NAME) -> str:
    """A name in one short line: its two ends tell more than its start alone."""
    text = " ".join(text.split())
    if not text:
        return "(no name)"
    if len(text) <= longest:
        return text
    tail = longest // 3
    return f"{text[: longest - tail - 1]}…{text[-tail:]}"


def count(value: Number | None) -> str:
    """3,072"""
    return UNKNOWN if value is None else _minus(f"{int(value):,}")


def number(value: Number | None, digits: int = 3) -> str:
    """A measured value: 0.3, 12.5, 6 × 10⁻¹⁰"""
    if value is None:
        return UNKNOWN
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        rounded = float(f"{value:.{digits}g}")
        return _minus(f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:,.{digits}g}")
    mantissa, exponent = f"{value:.1e}".split("e")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
    mantissa = _minus(mantissa.removesuffix(".0"))
    return mantissa.removesuffix("1") + power if mantissa in ("1", "−1") else f"{mantissa} × {power}"


def power(value: Number) -> str:
    """A power of ten: 0, 1, 10⁻³"""
    if value in (0, 1):
        return f"{value:.0f}"
    return "10" + str(round(math.log10(value))).translate(_SUPERSCRIPTS)


def likeness(value: Number | None) -> str:
    """An SSIM."""
    return UNKNOWN if value is None else _minus(f"{value:.2f}")


def decibels(value: Number | None, mse: Number | None = None) -> str:
    """A PSNR. Without any difference it is infinite, which JSON cannot say."""
    if value is None:
        return "∞ dB" if mse == 0 else UNKNOWN
    return _minus(f"{value:.1f} dB") if abs(value) < 1e5 else f"{number(value)} dB"


def share(value: Number | None) -> str:
    """75%"""
    if value is None:
        return UNKNOWN
    # A few of very many are neither none nor all.
    rounded = min(max(round(100 * value), math.ceil(min(value, 0.01))), 100 if value == 1 else 99)
    return f"{rounded}%"


def _minus(text: str) -> str:
    # A hyphen is too short beside digits.
    return text.replace("-", "−")


def seconds(value: Number | None) -> str:
    """12 s, 3 min 5 s, 2 h 10 min"""
    if value is None:
        return UNKNOWN
    if value < 60:
        return f"{number(value, 2 if value < 10 else 3)} s"
    if value >= 1e9:
        return f"{number(value)} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def day(text: str) -> str:
    """25 November 2026, 03:00 UTC; a date that is not ISO 8601 as it is."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return name(text)
    zone = f" {when.tzname()}" if when.tzinfo else ""
    return f"{when.day} {when:%B %Y, %H:%M}{zone}"


def shape(sizes: Sequence[int]) -> str:
    """3 × 32 × 32"""
    return " × ".join(count(size) for size in sizes) or "a single number"


def labels(values: Sequence[Number | None] | None) -> str:
    """The labels of a batch."""
    return ", ".join(UNKNOWN if value is None else _minus(f"{value:g}") for value in values) if values else UNKNOWN


def several(number: int, one: str, many: str = "") -> str:
    """1 picture, 2 pictures"""
    return f"{count(number)} {one if number == 1 else many or one + 's'}"


def protocol(spec: dict[str, Any], batch_size: int) -> str:
    """What leaves the client, in a sentence or two."""
    batch = several(batch_size, "sample")
    if spec["sends"] == "gradient":
        text = f"Each client sends the gradient of one batch of {batch}."
    else:
        rate = "" if spec["learning_rate"] is None else f" with a learning rate of {number(spec['learning_rate'])}"
        optimiser = name(spec["optimiser"])
        size, epochs = spec.get("minibatch"), max(spec["steps"], spec.get("epochs", 1))
        if size is None:
            steps, where = several(epochs, "step"), "on a batch" if epochs == 1 else "each on the same batch"
        else:
            steps, where = several(epochs, "epoch"), f"in minibatches of {count(size)} out of"
        text = (
            f"Each client sends how far its weights have moved after {steps} of {optimiser}{rate}, {where} "
            f"{'of ' if size is None else ''}{batch}."
        )
        others = [
            f"{label} {number(spec[key])}"
            for key, label in (
                ("momentum", "momentum"), ("weight_decay", "weight decay"), ("proximal", "a proximal term of"),
                ("clip_norm", "gradients clipped to a norm of"),
            )
            if spec.get(key)
        ]  # fmt: skip
        if others:
            text += f" Its steps have {', '.join(others)}."
    if spec["summed"]:
        text += " The loss is summed over the batch, not averaged."
    if spec["clients"] > 1:
        text += f" The server sees only the average over {several(spec['clients'], 'client')}."
    return text
