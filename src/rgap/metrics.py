"""How near a reconstruction comes to the truth. Nothing here may be used by an attack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor

_WINDOW = 11  # of SSIM, in pixels: Wang et al. 2004, section III-C


@runtime_checkable
class HasInputs(Protocol):
    """A reconstruction, or a set of images."""

    @property
    def inputs(self) -> Tensor: ...


@dataclass(frozen=True)
class Score:
    """How near each input comes to the truth, in the order of the batch. The means are over the batch."""

    mse: tuple[float, ...]
    """In squared units of the inputs; 0 for an exact match."""
    psnr: tuple[float, ...]
    """In decibels; inf for an exact match."""
    ssim: tuple[float, ...]
    """-1 to 1, 1 for an exact match; nan for what SSIM is not defined for, see `ssim`."""

    @property
    def mean_mse(self) -> float:
        return _mean(self.mse)

    @property
    def mean_psnr(self) -> float:
        return _mean(self.psnr)

    @property
    def mean_ssim(self) -> float:
        return _mean(self.ssim)


def score(
    found: Tensor | NDArray[Any] | HasInputs,
    truth: Tensor | NDArray[Any] | HasInputs,
    value_range: tuple[float, float] = (0.0, 1.0),
) -> Score:
    """All three measures of each input. Inputs are compared in the order given, and not clipped to the range.

    Args:
        found: (batch, ...), an array too, or anything with such `inputs`, as a Reconstruction.
        truth: the same shape.
        value_range: the lowest and the highest value an input can have: sets the scale of PSNR and SSIM.

    Raises:
        ValueError: the shapes differ or hold no input, or value_range is not (low, high).
    """
    found, truth = _inputs(found), _inputs(truth)
    return Score(mse(found, truth), psnr(found, truth, value_range), ssim(found, truth, value_range))


def mse(a: Tensor, b: Tensor) -> tuple[float, ...]:
    """The mean of (a - b)^2 over each input, in float64. Both are (batch, ...).

    Raises:
        ValueError: the shapes differ or hold no input.
    """
    _check_shapes(a, b)
    difference = a.detach().cpu().double() - b.detach().cpu().double()
    return tuple(difference.flatten(1).square().mean(1).tolist())


def psnr(a: Tensor, b: Tensor, value_range: tuple[float, float] = (0.0, 1.0)) -> tuple[float, ...]:
    """The peak signal-to-noise ratio of each input, 10 log10((high - low)^2 / mse), in decibels.

    Both are (batch, ...). Inf for an exact match, nan where an input holds nan.

    Raises:
        ValueError: the shapes differ or hold no input, or value_range is not (low, high).
    """
    span = _span(value_range)
    return tuple(_decibels(span, error) for error in mse(a, b))


def ssim(a: Tensor, b: Tensor, value_range: tuple[float, float] = (0.0, 1.0)) -> tuple[float, ...]:
    """The mean structural similarity of each picture: over its channels, and over all whole windows.

    Both are (batch, channels, height, width).
    The settings are those of Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment", IEEE
    Transactions on Image Processing 13, 2004: a Gaussian window of 11 x 11 pixels with a standard deviation of 1.5,
    population covariances, K1 = 0.01, K2 = 0.03.

    Nan where it is not defined: inputs of another number of dimensions, pictures smaller than the window,
    pictures with nan or inf in them.

    Raises:
        ValueError: the shapes differ or hold no input, or value_range is not (low, high).
    """
    _check_shapes(a, b)
    span = _span(value_range)
    if a.ndim != 4 or min(a.shape[2:]) < _WINDOW:
        return (math.nan,) * len(a)
    return tuple(_ssim_of_one(x, y, span) for x, y in zip(a, b, strict=True))


def _ssim_of_one(a: Tensor, b: Tensor, span: float) -> float:
    x, y = a.detach().cpu().double().numpy(), b.detach().cpu().double().numpy()
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return math.nan
    with np.errstate(over="ignore", invalid="ignore"):  # a failed attack's values can overflow when squared
        similarity = structural_similarity(
            x, y, data_range=span, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    return float(similarity)


def _decibels(span: float, error: float) -> float:
    if error == 0:
        return math.inf
    # Two logarithms rather than that of a quotient, which overflows for an error near zero.
    return 20 * math.log10(span) - 10 * math.log10(error)


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _inputs(given: Tensor | NDArray[Any] | HasInputs) -> Tensor:
    return given.inputs if hasattr(given, "inputs") else torch.as_tensor(given)


def _check_shapes(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"got shapes {tuple(a.shape)} and {tuple(b.shape)}: expected the same shape twice, (batch, ...)"
        )
    if a.ndim < 2 or a.numel() == 0:
        raise ValueError(
            f"got inputs of shape {tuple(a.shape)}: expected (batch, ...) with at least one value; "
            "give a single input its batch dimension with [None]"
        )


def _span(value_range: tuple[float, float]) -> float:
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range is {value_range}: expected (low, high) with low < high")
    return high - low
