from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from rgap import metrics


def noise(seed: int, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def pair(seed: int, *shape: int, low: float = 0.0, high: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Something smooth, and the same with noise: SSIM well away from 0 and from 1."""
    smooth = torch.linspace(low, high, math.prod(shape)).reshape(shape)
    return smooth, smooth + 0.2 * (high - low) * (noise(seed, *shape) - 0.5)


def ssim_by_definition(a: np.ndarray, b: np.ndarray, span: float) -> float:
    """Wang et al. 2004, Eq. 13 to 16, on one channel: every whole 11 x 11 window, one after the other."""
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            cov = (weights * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def ssim_by_filtering(a: np.ndarray, b: np.ndarray, span: float) -> float:
    """The same by whole-picture filters, kept where the window lies inside the picture."""

    def mean(picture: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(picture, 1.5, radius=5)[5:-5, 5:-5]

    mx, my = mean(a), mean(b)
    vx, vy, cov = mean(a * a) - mx**2, mean(b * b) - my**2, mean(a * b) - mx * my
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    return float(np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))))


@given(st.integers(1, 3), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 1000))
def test_mse_and_psnr_by_formula(batch, shape, seed):
    a, b = noise(seed, batch, *shape, low=-1), noise(seed + 1, batch, *shape, low=-1)
    x, y = a.double().numpy(), b.double().numpy()
    errors = [np.mean((x[i] - y[i]) ** 2) for i in range(batch)]
    assert metrics.mse(a, b) == pytest.approx(errors, rel=1e-12)
    expected = [10 * np.log10(2.0**2 / error) for error in errors]
    assert metrics.psnr(a, b, (-1.0, 1.0)) == pytest.approx(expected, rel=1e-9)


def test_psnr_of_a_known_error():
    a = torch.zeros(1, 1, 2, 2)
    assert metrics.psnr(a, a + 0.1) == pytest.approx((20.0,), rel=1e-6)
    assert metrics.psnr(a, a + 0.1, (0.0, 10.0)) == pytest.approx((40.0,), rel=1e-6)


def test_mse_is_taken_in_double_precision():
    a = torch.ones(1, 3)
    b = a.double() + 1e-9
    assert metrics.mse(a.double(), b) == pytest.approx((1e-18,), rel=1e-6)
    assert metrics.mse(a, b) == pytest.approx((1e-18,), rel=1e-6)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_ssim_against_its_definition(low, high):
    a, b = pair(0, 2, 3, 14, 12, low=low, high=high)
    expected = [
        np.mean([ssim_by_definition(x, y, high - low) for x, y in zip(p, q, strict=True)])
        for p, q in zip(a.double().numpy(), b.double().numpy(), strict=True)
    ]
    assert all(0.01 < value < 0.99 for value in expected)
    assert metrics.ssim(a, b, (low, high)) == pytest.approx(expected, abs=1e-9)


@given(st.integers(11, 40), st.integers(11, 40), st.integers(1, 3), st.integers(0, 1000))
def test_ssim_against_filters_at_any_size(height, width, channels, seed):
    a, b = pair(seed, 1, channels, height, width)
    channelwise = zip(a[0].double().numpy(), b[0].double().numpy(), strict=True)
    expected = np.mean([ssim_by_filtering(x, y, 1.0) for x, y in channelwise])
    assert metrics.ssim(a, b) == pytest.approx((expected,), abs=1e-9)


def test_an_exact_match():
    a = noise(0, 2, 3, 16, 16)
    found = metrics.score(a, a.clone())
    assert found.mse == (0.0, 0.0)
    assert found.psnr == (math.inf, math.inf)
    assert found.ssim == pytest.approx((1.0, 1.0))
    assert found.mean_psnr == math.inf


def test_inputs_are_not_clipped():
    a = torch.full((1, 1, 12, 12), 5.0)
    assert metrics.mse(a, torch.ones_like(a)) == (16.0,)


@pytest.mark.parametrize("shape", [(2, 1, 10, 32), (2, 1, 32, 10), (2, 144), (2, 12, 12), (2, 1, 12, 12, 12)])
def test_ssim_is_nan_where_it_is_not_defined(shape):
    a, b = noise(0, *shape), noise(1, *shape)
    assert all(math.isnan(value) for value in metrics.ssim(a, b))
    assert len(metrics.ssim(a, b)) == 2
    assert all(math.isfinite(value) for value in metrics.score(a, b).psnr)


def test_the_smallest_picture_has_an_ssim():
    a, b = pair(0, 1, 1, 11, 11)
    expected = ssim_by_definition(a[0, 0].double().numpy(), b[0, 0].double().numpy(), 1.0)
    assert metrics.ssim(a, b) == pytest.approx((expected,), abs=1e-9)


def test_nan_spoils_only_its_own_input():
    a, b = noise(0, 2, 1, 12, 12), noise(1, 2, 1, 12, 12)
    a[0, 0, 3, 3] = math.nan
    found = metrics.score(a, b)
    for values in (found.mse, found.psnr, found.ssim):
        assert math.isnan(values[0])
        assert math.isfinite(values[1])
    assert math.isnan(found.mean_mse)


def test_infinite_and_huge_values_do_not_crash():
    b = noise(1, 1, 1, 12, 12)
    infinite = metrics.score(torch.full_like(b, math.inf), b)
    assert infinite.mse == (math.inf,)
    assert infinite.psnr == (-math.inf,)
    assert math.isnan(infinite.ssim[0])
    huge = metrics.score(1e200 * b.double(), b)
    assert huge.psnr == (-math.inf,)


@dataclass
class Found:
    inputs: torch.Tensor


def test_score_takes_tensors_and_anything_with_inputs():
    a, b = pair(0, 3, 1, 12, 12)
    expected = metrics.Score(metrics.mse(a, b), metrics.psnr(a, b), metrics.ssim(a, b))
    assert metrics.score(a, b) == expected
    assert metrics.score(Found(a), truth=b) == expected
    assert metrics.score(Found(a), Found(b)) == expected
    assert expected.mean_mse == pytest.approx(np.mean(expected.mse))
    assert expected.mean_psnr == pytest.approx(np.mean(expected.psnr))
    assert expected.mean_ssim == pytest.approx(np.mean(expected.ssim))


def test_score_passes_on_the_value_range():
    a, b = pair(0, 1, 1, 12, 12)
    found = metrics.score(a, b, (-1.0, 1.0))
    assert found.psnr == metrics.psnr(a, b, (-1.0, 1.0)) != metrics.psnr(a, b)
    assert found.ssim == metrics.ssim(a, b, (-1.0, 1.0)) != metrics.ssim(a, b)


def test_tensors_that_require_gradients_are_scored():
    a = noise(0, 1, 1, 12, 12).requires_grad_()
    assert metrics.score(a, a.detach()).mse == (0.0,)


@pytest.mark.parametrize("measure", [metrics.mse, metrics.psnr, metrics.ssim, metrics.score])
def test_other_shapes_are_refused(measure):
    with pytest.raises(ValueError, match=r"got shapes \(2, 3\) and \(2, 4\): expected the same shape"):
        measure(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"got inputs of shape \(0, 3\): expected \(batch, ...\)"):
        measure(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"give a single input its batch dimension"):
        measure(torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("measure", [metrics.psnr, metrics.ssim, metrics.score])
@pytest.mark.parametrize("value_range", [(1.0, 1.0), (1.0, 0.0), (math.nan, 1.0)])
def test_an_empty_value_range_is_refused(measure, value_range):
    a = torch.zeros(1, 1, 12, 12)
    with pytest.raises(ValueError, match=r"expected \(low, high\) with low < high"):
        measure(a, a, value_range)
