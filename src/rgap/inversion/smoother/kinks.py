"""A kinked activation at a value that is known as a normal distribution: moments, and the best straight line.

    f(z) = z for z > 0, b z otherwise;    z normal with mean m and standard deviation s

With P = Phi(m / s), the probability of the upper side, the regression of f(z) on z has the slope E f' = b + (1 - b) P
(Stein's lemma) and leaves a variance of its own. That is statistical linearisation, as in iterated posterior
linearisation smoothers (Garcia-Fernandez, Svensson and Sarkka 2017).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Passed:
    """What comes out of the activation."""

    mean: Tensor
    upper: Tensor
    """The probability that z > 0."""
    slope: Tensor
    """Expected."""
    slope_variance: Tensor
    residual: Tensor
    """The variance of what the straight line leaves."""


def passed(mean: Tensor, std: Tensor, below: Tensor) -> Passed:
    """f(z) of a normal z.

    Args:
        below: b, the slope below zero.
    """
    upper, density = _normal(mean / std)
    positive = mean * upper + std * density
    square = (mean.square() + std.square()) * upper + mean * std * density
    rise = 1 - below
    covariance = upper * std.square()
    whole = (
        (below * std).square() + 2 * below * rise * covariance + rise.square() * (square - positive.square())
    )  # of f(z) = b z + (1 - b) max(z, 0)
    slope = below + rise * upper
    residual = (whole - (slope * std).square()).clamp(min=0.0)
    return Passed(below * mean + rise * positive, upper, slope, rise.square() * upper * (1 - upper), residual)


def unpassed(mean: Tensor, std: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of z where x = f(z) is normal; b > 0.

    z = x - (1 / b - 1) max(-x, 0).
    """
    lower, density = _normal(-mean / std)
    negative = -mean * lower + std * density
    square = (mean.square() + std.square()) * lower - mean * std * density
    rise = 1 / below - 1
    variance = std.square() * (1 + 2 * rise * lower) + rise.square() * (square - negative.square())
    return mean - rise * negative, variance.clamp(min=torch.finfo(mean.dtype).tiny).sqrt()


def _normal(z: Tensor) -> tuple[Tensor, Tensor]:
    """Distribution and density of a standard normal variable."""
    return torch.special.ndtr(z), torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
