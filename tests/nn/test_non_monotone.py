"""One suite for every activation that falls and rises. A new one adds one row to NON_MONOTONE."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rgap.nn.non_monotone import GELU, Hardswish, Mish, NonMonotone, SiLU

EPS = torch.finfo(torch.float64).eps
EXACT = torch.zeros(1, dtype=torch.float64)

NON_MONOTONE: list[tuple[NonMonotone, Callable[[Tensor], Tensor], str]] = [
    (GELU(), functional.gelu, "gelu"),
    (GELU("tanh"), lambda z: functional.gelu(z, approximate="tanh"), "gelu"),
    (SiLU(), functional.silu, "silu"),
    (Mish(), functional.mish, "mish"),
    (Hardswish(), functional.hardswish, "hardswish"),
]
every_non_monotone = pytest.mark.parametrize(("ours", "oracle", "text"), NON_MONOTONE)
HEIGHTS = torch.cat([torch.linspace(-35, 60, 1901, dtype=torch.float64), torch.tensor([0.0, 1e-9, -1e-9])])[None, None]


@every_non_monotone
def test_non_monotone_values_and_slopes_are_those_of_torch(
    ours: NonMonotone, oracle: Callable[[Tensor], Tensor], text: str
) -> None:
    z = HEIGHTS.clone().requires_grad_()
    x = oracle(z)
    torch.testing.assert_close(ours(HEIGHTS), x.detach(), rtol=1e-14, atol=1e-15)
    (slope,) = torch.autograd.grad(x.sum(), z)
    torch.testing.assert_close(ours.slope(HEIGHTS), slope, rtol=1e-12, atol=1e-14)
    assert (ours.non_monotone, ours.homogeneous, ours.nonnegative, ours.kinked, str(ours)) == (
        True,
        False,
        False,
        False,
        text,
    )


@every_non_monotone
def test_the_argmin_is_where_the_slope_changes_its_sign(
    ours: NonMonotone, oracle: Callable[[Tensor], Tensor], text: str
) -> None:
    argmin = torch.tensor([ours.argmin], dtype=torch.float64)
    assert float(ours.slope(argmin).abs()) < 1e-12
    assert float(ours.slope(argmin - 1e-3)) < 0 < float(ours.slope(argmin + 1e-3))
    assert float(oracle(HEIGHTS).min()) >= float(oracle(argmin))


@every_non_monotone
def test_both_inputs_give_the_output_and_one_of_them_is_the_true_one(
    ours: NonMonotone, oracle: Callable[[Tensor], Tensor], text: str
) -> None:
    x = oracle(HEIGHTS)
    upper, lower = ours.invert(x, EXACT), ours.lower(x)
    assert bool((upper.z >= ours.argmin).all())
    assert bool((lower <= ours.argmin).all())
    torch.testing.assert_close(oracle(upper.z), x, rtol=1e-13, atol=1e-15)
    below = x < 0
    torch.testing.assert_close(oracle(lower[below]), x[below], rtol=1e-13, atol=1e-15)
    assert bool((lower[~below] == ours.argmin).all())
    # An output's rounding moves an input by that over the slope, near the minimum by the root of it; far below, outputs
    # are zero to float64.
    bound = 64 * EPS * (1 + HEIGHTS.abs() + 1 / ours.slope(HEIGHTS).abs().clamp(min=EPS))
    bound = torch.where((HEIGHTS - ours.argmin).abs() < 1e-3, 1e-7, bound)
    told = bound < 1e-3
    assert int(told.sum()) > 1200
    apart = torch.minimum((upper.z - HEIGHTS).abs(), (lower - HEIGHTS).abs())
    assert bool((apart <= bound)[told].all())
    assert upper.weight is not None
    assert torch.equal(upper.weight, upper.slope.clamp(0.0, 1.0))
    torch.testing.assert_close(upper.slope, ours.slope(upper.z))


@every_non_monotone
def test_outputs_that_a_non_monotone_activation_never_gives_make_no_nonsense(
    ours: NonMonotone, oracle: Callable[[Tensor], Tensor], text: str
) -> None:
    """Below the minimum the nearest that it gives is the minimum itself, where nothing is known."""
    x = torch.tensor([[[-1.0, -0.5, -1e3, 1e3]]], dtype=torch.float64)
    found, lower = ours.invert(x, EXACT), ours.lower(x)
    assert found.weight is not None
    for tensor in (found.z, found.slope, found.weight, lower):
        assert bool(tensor.isfinite().all())
    torch.testing.assert_close(found.z[..., :3], torch.full((1, 1, 3), ours.argmin, dtype=torch.float64))
    assert bool((found.weight[..., :3] < 1e-6).all())
    torch.testing.assert_close(lower[..., :3], torch.full((1, 1, 3), ours.argmin, dtype=torch.float64))


@every_non_monotone
def test_non_monotone_activations_keep_the_precision(
    ours: NonMonotone, oracle: Callable[[Tensor], Tensor], text: str
) -> None:
    z = torch.linspace(-3, 3, 31)[None, None]
    found = ours.invert(oracle(z), torch.zeros(1))
    assert {t.dtype for t in (ours(z), ours.slope(z), found.z, found.slope, ours.lower(z))} == {torch.float32}
