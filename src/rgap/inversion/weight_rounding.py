"""How far rounding the weights at every step moves each value of a weight difference.

A step adds its increment to a weight and rounds the sum to the type's grid, whose spacing there is one unit in the last
place. The error is the increment's distance to the grid. Increments that stay the same are off by the same error every
time; those that change by more than the spacing are off by errors that have nothing to do with each other. With
increments d units apart two errors have the covariance

    unit^2 / 12 (1 - 6 f + 6 f^2),    f = d - floor(d),

which is that of a sawtooth with itself, shifted by d. So a small weight is known much more precisely than a large one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

SUMS = 3
"""A gradient is a sum over positions, each rounded: it is off by up to about so many roundings of its size."""
LEAST = 1 / 48
"""Of a unit squared: no sum of errors is taken for less than that of one value to the nearest half unit."""


def spacing(weights: Tensor, eps: float) -> Tensor:
    """One unit in the last place of each weight, in a type of the given epsilon; of a zero zero."""
    exponent = torch.frexp(weights)[1]
    return torch.where(weights == 0, 0.0, torch.ldexp(torch.full_like(weights, eps / 2), exponent))


def rounded_by(
    weights: Sequence[Mapping[str, Tensor]], sent: Mapping[str, Tensor], eps: float, own: float
) -> dict[str, Tensor]:
    """The standard deviation of each value of a weight difference, by parameter.

    Args:
        weights: before the first step, between the steps, and after the last, as far as they are known.
        sent: the difference.
        eps: relative rounding of the weights.
        own: relative rounding of what was sent, and of the gradients that the steps were made of.
    """
    found = {}
    for name, d in sent.items():
        first = weights[0][name]
        unit = spacing(first.abs().maximum((first + d).abs()), eps)
        whole = unit.clamp(min=torch.finfo(unit.dtype).tiny)
        steps = [(after[name] - before[name]) / whole for before, after in pairwise(weights)]
        of_size = SUMS * own * float(d.square().mean().sqrt())
        found[name] = (unit.square() * _variance(steps) + of_size**2).sqrt()
    return found


def _variance(steps: Sequence[Float[Tensor, " *w"]]) -> Float[Tensor, " *w"]:
    """Of the sum of all steps' errors, in units squared; from their increments in units."""
    total = torch.full_like(steps[0], len(steps) / 12)
    for at, step in enumerate(steps):
        for later in steps[at + 1 :]:
            f = (later - step).remainder(1.0)
            total += (1 - 6 * f * (1 - f)) / 6
    return total.clamp(min=LEAST)
