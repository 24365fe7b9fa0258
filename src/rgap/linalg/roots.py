"""All roots of a function of one number that a grid of it shows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

STEPS = 60
"""Halvings of an interval: what is left of it is less than its rounding."""

Function = Callable[[Float[Tensor, " r"]], Float[Tensor, " r"]]


def find_roots(
    function: Function, grid: Float[Tensor, " n"], near: float = 0.0
) -> tuple[Float[Tensor, " roots"], Float[Tensor, " extrema"]]:
    """Where the function changes its sign, and where it has an extremum near to zero: rounding may hide a root there.

    Two roots between neighbouring points of the grid are found where the function is near zero there. A change of sign
    may be a jump.

    Args:
        function: of many numbers at once; NaN counts as negative.
        grid: ascending, or descending.
        near: how near, at a point of the grid.
    """
    value = function(grid).nan_to_num(nan=-1.0)
    below = value < 0
    crossed = (below[:-1] != below[1:]).nonzero().flatten()
    low, high = grid[crossed], grid[crossed + 1]
    # The least |value| on one side of zero: two roots may lie between the grid's points, or have met there.
    inner, side = value[1:-1], torch.where(below, -1.0, 1.0).to(value)[1:-1]
    size, before, after = inner.abs(), value[:-2].abs(), value[2:].abs()
    extremal = (size <= before) & (size <= after) & (size <= near)
    extremal &= (below[:-2] == below[1:-1]) & (below[2:] == below[1:-1])
    at = extremal.nonzero().flatten()
    left, right, side = grid[at], grid[at + 2], side[at]
    extremum = minimise(lambda x: side * function(x), left, right)
    through = side * function(extremum) < 0
    low = torch.cat([low, left[through], extremum[through]])
    high = torch.cat([high, extremum[through], right[through]])
    extremum = extremum[~through]
    return bisect(lambda x: function(x) < 0, low, high), extremum


def bisect(
    holds: Callable[[Float[Tensor, " r"]], Bool[Tensor, " r"]], low: Float[Tensor, " r"], high: Float[Tensor, " r"]
) -> Float[Tensor, " r"]:
    """Where it no longer holds what holds at the one end of each interval alone."""
    first = holds(low)
    for _ in range(STEPS if len(low) else 0):
        middle = (low + high) / 2
        same = holds(middle) == first
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    return (low + high) / 2


def minimise(function: Function, low: Float[Tensor, " r"], high: Float[Tensor, " r"]) -> Float[Tensor, " r"]:
    """The least value of a function that falls and rises on each interval, by golden section."""
    ratio = (5**0.5 - 1) / 2
    for _ in range(STEPS if len(low) else 0):
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        before = function(first) < function(second)
        low, high = torch.where(before, low, first), torch.where(before, second, high)
    return (low + high) / 2
