"""Conditions on an audit, such as ``psnr>20``, for pipelines that must stop when something leaks."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rgap.auditing import Case

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_FIGURES = ("psnr", "ssim", "exact", "recognisable")


@dataclass(frozen=True)
class Condition:
    """A figure of the audit against a number.

    Args:
        figure: ``psnr`` in dB and ``ssim`` are those of the sample that came back best; ``exact`` and ``recognisable``
            are shares of the samples, the exact ones counted in both.
        sign: how it is compared.
        bound: with what.
    """

    figure: str
    sign: str
    bound: float

    def holds(self, cases: Sequence[Case]) -> bool:
        value = self.value(cases)
        return not math.isnan(value) and _OPERATORS[self.sign](value, self.bound)

    def value(self, cases: Sequence[Case]) -> float:
        """The figure; NaN if no attack gave one."""
        from rgap.auditing import Level

        if self.figure in ("exact", "recognisable"):
            least = Level(self.figure).rank
            return sum(case.level.rank >= least for case in cases) / len(cases)
        best = [getattr(result, self.figure) for case in cases for result in case.results]
        return max((value for value in best if not math.isnan(value)), default=math.nan)

    def __str__(self) -> str:
        return f"{self.figure}{self.sign}{self.bound:g}"


def condition(ctx: click.Context, param: click.Parameter, value: str | None) -> Condition | None:
    """What the option says.

    Raises:
        click.BadParameter: it is no condition; says what one looks like.
    """
    if value is None:
        return None
    found = re.fullmatch(r"\s*([a-z]+)\s*(>=|<=|>|<)\s*([-+0-9.eE]+)\s*", value)
    if found is not None and found[1] in _FIGURES:
        try:
            return Condition(found[1], found[2], float(found[3]))
        except ValueError:
            pass
    expected = f"one of {', '.join(_FIGURES)}, then >, >=, < or <=, then a number"
    raise click.BadParameter(f"got {value!r}, expected {expected}", ctx, param)
