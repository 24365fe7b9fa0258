"""How near a reconstruction comes to the truth: the only place that ever sees both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from skimage.metrics import structural_similarity
from torch import Tensor

_SIGMA = 1.5
_WINDOW = 11
"""Wang's Gaussian window: sigma 1.5 cut off at 11 pixels."""


class HasInputs(Protocol):
    """Anything with reconstructed inputs, such as a `Reconstruction` or one of its answers."""

    @property
    def inputs(self) -> Tensor: ...


@dataclass(frozen=True)
class Score:
    """One figure per sample."""

    mse: tuple[float, ...]
    """Mean squared error over the values of a sample."""
    psnr: tuple[float, ...]
    """Peak signal-to-noise ratio in dB; infinite for an exact match."""
    ssim: tuple[float, ...]
    """Structural similarity (Wang et al. 2004); NaN for samples that are no pictures of 11 x 11 pixels or more."""


def mse(found: Float[Tensor, "b ..."], truth: Float[Tensor, "b ..."]) -> tuple[float, ...]:
    """Mean squared error of each sample."""
    return tuple((found.double() - truth.double()).square().flatten(1).mean(1).tolist())


def psnr(
    found: Float[Tensor, "b ..."], truth: Float[Tensor, "b ..."], value_range: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, ...]:
    """Peak signal-to-noise ratio of each sample in dB, the peak being the width of the value range."""
    peak = value_range[1] - value_range[0]
    return tuple(math.inf if e == 0 else 10 * math.log10(peak**2 / e) for e in mse(found, truth))


def ssim(
    found: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"], value_range: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, ...]:
    """Structural similarity of each picture, with the settings of Wang et al. 2004; NaN below 11 x 11 pixels."""
    if found.dim() != 4 or min(found.shape[-2:]) < _WINDOW:
        return (math.nan,) * len(found)
    pairs = zip(found.double().cpu().numpy(), truth.double().cpu().numpy(), strict=True)
    return tuple(
        float(
            structural_similarity(
                a,
                b,
                data_range=value_range[1] - value_range[0],
                channel_axis=0,
                gaussian_weights=True,
                sigma=_SIGMA,
                use_sample_covariance=False,
            )
        )
        if np.isfinite(a).all()
        else math.nan
        for a, b in pairs
    )


def score(found: HasInputs | Tensor, truth: Tensor, value_range: tuple[float, float] = (0.0, 1.0)) -> Score:
    """Compare a reconstruction with the truth.

    Args:
        found: a reconstruction or a tensor of inputs, (b, *input_shape).
        truth: the true inputs, of the same shape.
        value_range: sets the peak of PSNR and the scale of SSIM.

    Raises:
        ValueError: the shapes differ.
    """
    inputs = found if isinstance(found, Tensor) else found.inputs
    if inputs.shape != truth.shape:
        raise ValueError(f"got a reconstruction of shape {tuple(inputs.shape)}, expected {tuple(truth.shape)} as truth")
    with torch.no_grad():
        return Score(mse(inputs, truth), psnr(inputs, truth, value_range), ssim(inputs, truth, value_range))
