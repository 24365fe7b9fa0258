"""Where everything in a chart goes. The template draws it.

Across, a place is a percentage of the width; down, it is in pixels. So text keeps its size while a chart takes
whatever width there is, on a phone as on paper, without a script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rgap.report import words

BARS = 30
"""Layers in the chart; the table has them all."""
BAR_SCALE = 2.0
"""Constraints for each unknown at the right end of a bar chart; a longer bar is cut off."""

RECOGNISABLE = 20.0
"""PSNR in dB from which on a picture counts as recognisable."""
_LEFT, _RIGHT = 12.0, 96.0
_TOP, _BOTTOM = 16.0, 196.0
_LOWEST, _HIGHEST = 0.0, 100.0
_CLOSE = 9.0
"""Per cent of the width that two labels under an axis need between them."""


@dataclass(frozen=True)
class Piece:
    """One part of a bar, in per cent of the width."""

    kind: str
    start: float
    width: float


@dataclass(frozen=True)
class Bar:
    """One layer's constraints, measured against its unknowns."""

    name: str
    text: str
    free: str
    """What the rank leaves open; nothing if it is not known."""
    open: bool
    pieces: tuple[Piece, ...]
    missing: float
    """Width up to the unknowns that no constraint fills."""
    cut: bool
    """Whether there are more constraints than fit."""


@dataclass(frozen=True)
class Tick:
    """A label on an axis: in per cent across, in pixels down."""

    at: float
    text: str


@dataclass(frozen=True)
class Dot:
    """One point of a curve."""

    x: float
    y: float
    recognised: bool


@dataclass(frozen=True)
class Curve:
    """The leak against the strength of a defence, or against what it costs."""

    title: str
    description: str
    across: str
    """What the horizontal axis shows."""
    dots: tuple[Dot, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    threshold: float
    closes: Tick | None
    top: float = _TOP
    bottom: float = _BOTTOM

    @property
    def segments(self) -> tuple[tuple[Dot, Dot], ...]:
        """Neighbouring points."""
        return tuple(zip(self.dots, self.dots[1:], strict=False))


def bars(layers: Sequence[dict[str, Any]]) -> tuple[Bar, ...]:
    """One bar for each of the first layers of the audit's ``rank``."""
    return tuple(_bar(layer) for layer in layers[:BARS])


def _bar(layer: dict[str, Any]) -> Bar:
    unknowns = max(layer["unknowns"], 1)
    full = 100 / BAR_SCALE
    pieces, at = [], 0.0
    for kind in ("weight", "gradient", "virtual"):
        end = min(at + full * layer[f"{kind}_rows"] / unknowns, 100.0)
        if end > at:
            pieces.append(Piece(kind, at, end - at))
        at = end
    constraints = rows(layer)
    text = f"{words.several(layer['unknowns'], 'unknown')}, {words.several(constraints, 'constraint')}"
    free = "" if layer["free"] is None else f"{words.count(layer['free'])} stay free" if layer["free"] else "none free"
    return Bar(
        name=words.name(layer["name"], 24),
        text=text,
        free=free,
        open=bool(layer["free"]),
        pieces=tuple(pieces),
        missing=max(full - at, 0.0),
        cut=constraints > BAR_SCALE * unknowns,
    )


def rows(layer: dict[str, Any]) -> int:
    """All constraints on one layer's input."""
    return int(layer["gradient_rows"] + layer["weight_rows"] + layer["virtual_rows"])


def curves(defence: dict[str, Any]) -> tuple[Curve, ...]:
    """The leak against strength, against the gradient's error, and against epsilon where there is one."""
    title, strength = words.name(defence["name"], 40), words.name(defence["strength"], 30)
    asked = (
        ("strength", strength, f"Leak against strength ({strength}): {title}"),
        ("gradient_error", "error of the gradient (cost)", f"Leak against cost, the error of the gradient: {title}"),
        ("epsilon", "epsilon (smaller is stricter)", f"Leak against the privacy budget epsilon: {title}"),
    )
    found = (_curve(defence, key, across, title) for key, across, title in asked)
    return tuple(curve for curve in found if curve is not None)


def closing(defence: dict[str, Any]) -> dict[str, Any] | None:
    """The point from which on nothing leaks; None if there is none among the points."""
    at = defence["closes_at"]
    if at is None:
        return None
    near = (point for point in defence["points"] if math.isclose(point["strength"], at, rel_tol=1e-6))
    return next(near, None)


def _curve(defence: dict[str, Any], key: str, across: str, title: str) -> Curve | None:
    points = sorted((p for p in defence["points"] if p[key] is not None), key=lambda point: point["strength"])
    if not points:
        return None
    axis = _Axis([point[key] for point in points])
    best: words.Number = max((p["median_psnr"] for p in points if p["median_psnr"] is not None), default=_LOWEST)
    highest = max(40.0, 20.0 * math.ceil(min(best, _HIGHEST) / 20))

    def down(psnr: words.Number | None) -> float:
        # Where nothing came back there is no PSNR; such a point is as low as any.
        return _BOTTOM - (_BOTTOM - _TOP) * min(max(float(psnr or _LOWEST), _LOWEST), highest) / highest

    dots = tuple(Dot(axis.place(p[key]), down(p["median_psnr"]), bool(p["recovered"])) for p in points)
    end = closing(defence)
    closes = None
    if end is not None and end[key] is not None:
        closes = Tick(axis.place(end[key]), f"closes at {words.number(end[key])}")
    first, last = points[0], points[-1]
    description = (
        f"Median PSNR goes from {_level(first)} at {words.number(first[key])} "
        f"to {_level(last)} at {words.number(last[key])}. "
        + (f"The leak {closes.text}. " if closes else "The leak does not close at any point tried. ")
        + "The table below has every point."
    )
    return Curve(
        title,
        description,
        across,
        dots,
        axis.ticks(),
        tuple(Tick(down(level), f"{level} dB") for level in range(0, int(highest) + 1, 20)),
        down(RECOGNISABLE),
        closes,
    )


def _level(point: dict[str, Any]) -> str:
    return "nothing" if point["median_psnr"] is None else words.decibels(point["median_psnr"])


class _Axis:
    """A horizontal axis, logarithmic if the values go over more than one power of ten; 0 then has its own place."""

    def __init__(self, values: Sequence[words.Number]) -> None:
        positive = [value for value in values if value > 0]
        self.log = bool(positive) and min(values) >= 0 and max(positive) >= 10 * min(positive)
        self.zero = self.log and min(values) == 0
        # Scaled by a power of ten first, since the difference of two floats may be more than a float can hold.
        largest = max(abs(value) for value in values)
        # The least numbers there are have no power of ten below them.
        self.scale = (10.0 ** math.floor(math.log10(largest)) or largest) if largest else 1.0
        steps = [self._step(value) for value in values if value > 0 or not self.log]
        self.low, self.high = min(steps), max(steps)
        self.left = _LEFT + 10 if self.zero else _LEFT

    def _step(self, value: words.Number) -> float:
        return math.log10(value) if self.log else value / self.scale

    def place(self, value: words.Number) -> float:
        """Where a value goes, in per cent of the width."""
        if self.zero and value == 0:
            return _LEFT
        if self.high == self.low:
            return (self.left + _RIGHT) / 2
        return self.left + (_RIGHT - self.left) * (self._step(value) - self.low) / (self.high - self.low)

    def ticks(self) -> tuple[Tick, ...]:
        """Labels at round values, no closer to each other than they can be read."""
        if self.log:
            first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
            stride = max(1, math.ceil((last - first + 1) / 6))
            values = [0.0] * self.zero + [10.0**power for power in range(first, last + 1, stride)]
        elif self.high == self.low:
            values = [self.low * self.scale]
        else:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2))
            step = next(step * k for k in (1, 2, 5, 10) if (self.high - self.low) / (step * k) <= 5)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            values = [k * step * self.scale for k in range(first, last + 1)]
        found: list[Tick] = []
        for value in values:
            at = min(max(self.place(value), _LEFT), _RIGHT)
            if not found or at - found[-1].at >= _CLOSE:
                found.append(Tick(at, words.power(value) if self.log and self.low < -3 else words.number(value)))
        return tuple(found)
