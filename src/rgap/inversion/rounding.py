"""How far rounding may have moved a gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DISTINCT = 16
"""Fewer magnitudes than that may be round numbers by chance, such as the cotangents 1 and -1 of a hinge."""
AMONG = 10_000
"""The first so many values are looked at for that."""
NEAREST = 0.25
"""To the nearest number values move by about so much of the step between two of them, root mean square."""
MANTISSA = 53
"""Bits of a float64."""


def rounding(grad: Tensor, eps: float) -> Tensor:
    """The standard deviation of each value of a gradient: of its own size, and a little of the largest's.

    Args:
        eps: relative rounding.
    """
    return eps * (grad.abs() + 0.1 * grad.abs().amax())


@dataclass(frozen=True)
class Precision:
    """How far a tensor's values may have been rounded as they were stored."""

    relative: float
    """The relative rounding."""
    certain: bool
    """Whether it is that: a few values may be round numbers by chance."""
    step: float = 0.0
    """The last bit that any value uses; 0 where there is none."""


def stored_precision(values: Tensor) -> Precision:
    """The relative rounding of a tensor's values: its type's, or that of a coarser one that they were rounded to.

    Values of float16 that are stored as float32 use no more than 11 bits each, those of bfloat16 8. And none is finer
    than the last bit that any of them uses, as where small values of float16 underflow.
    """
    limits = torch.finfo(values.dtype)
    size = float(values.double().square().mean().sqrt()) if values.numel() else 0.0
    # Below its least normal number a type rounds to one unit.
    own = limits.eps * max(1.0, limits.smallest_normal / size if size else 0.0)
    mantissa, exponent = torch.frexp(values.detach().double().flatten())
    known = mantissa != 0
    if not bool(known.any()):
        return Precision(own, False)
    digits = (mantissa[known].abs() * 2.0**MANTISSA).long()
    last = digits & -digits
    used = digits // last  # without the zeros behind them
    coarse = 2.0 ** -float(torch.log2(used.double()).floor().max())
    unit = float(torch.ldexp(last.double() * 2.0**-MANTISSA, exponent[known]).min())
    rounded = NEAREST * max(coarse, unit / size if size else 0.0)
    return Precision(max(own, rounded), len(torch.unique(used[:AMONG])) >= DISTINCT, unit)
