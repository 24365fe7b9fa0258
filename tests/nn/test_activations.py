"""One suite for every activation. A new one adds one row to ACTIVATIONS."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from rgap.nn.activation import Activation
from rgap.nn.activations import (
    ELU,
    HARDSIGMOID,
    SELU,
    Hardtanh,
    Identity,
    LeakyReLU,
    LogSigmoid,
    PReLU,
    ReLU,
    Sigmoid,
    Softplus,
    Tanh,
)

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Row:
    ours: Activation
    oracle: Callable[[Tensor], Tensor]
    text: str
    ends: tuple[float, ...] = ()
    """The finite ends of the range of outputs, approached without being reached."""
    bounds: bool = False
    """Whether outputs stop at the ends of the range, as they are reached."""
    sides: bool = False
    """Whether the kink at 0 has two slopes that tell its side."""
    jump: float = 0.0
    """How far apart two inputs with one output can be: torch's softplus turns linear with a small step."""


ACTIVATIONS = [
    Row(Identity(), lambda z: z * 1.0, "identity"),
    Row(LeakyReLU(), functional.leaky_relu, "leaky_relu(0.01)", sides=True),
    Row(LeakyReLU(0.2), lambda z: functional.leaky_relu(z, 0.2), "leaky_relu(0.2)", sides=True),
    Row(LeakyReLU(1.5), lambda z: functional.leaky_relu(z, 1.5), "leaky_relu(1.5)", sides=True),
    Row(ReLU(), functional.relu, "relu"),
    Row(Hardtanh(), functional.hardtanh, "hardtanh(-1, 1)", bounds=True),
    Row(Hardtanh(-0.5, 2.0), lambda z: functional.hardtanh(z, -0.5, 2.0), "hardtanh(-0.5, 2)", bounds=True),
    Row(Hardtanh(0.0, 6.0), functional.relu6, "relu6", bounds=True),
    Row(Sigmoid(), torch.sigmoid, "sigmoid", ends=(0.0, 1.0)),
    Row(Tanh(), torch.tanh, "tanh", ends=(-1.0, 1.0)),
    Row(Softplus(), functional.softplus, "softplus", ends=(0.0,), jump=math.log1p(math.exp(-20))),
    Row(Softplus(3.0, 25.0), lambda z: functional.softplus(z, 3.0, 25.0), "softplus", (0.0,), jump=math.exp(-25)),
    Row(ELU(), functional.elu, "elu(1)", ends=(-1.0,)),
    Row(ELU(0.5), lambda z: functional.elu(z, 0.5), "elu(0.5)", ends=(-0.5,)),
    Row(ELU(2.0), lambda z: functional.elu(z, 2.0), "elu(2)", ends=(-2.0,)),
    Row(ELU(0.5, 1.0, 2.0), lambda z: functional.celu(z, 0.5), "celu(0.5)", ends=(-0.5,)),
    Row(ELU(2.0, 1.0, 0.5), lambda z: functional.celu(z, 2.0), "celu(2)", ends=(-2.0,)),
    Row(LogSigmoid(), functional.logsigmoid, "logsigmoid", ends=(0.0,)),
    Row(HARDSIGMOID, functional.hardsigmoid, "hardsigmoid", bounds=True),
    Row(SELU, functional.selu, "selu", ends=(-1.6732632423543772848170429916717 * 1.0507009873554804934193349852946,)),
]
every_activation = pytest.mark.parametrize("row", ACTIVATIONS, ids=lambda row: f"{type(row.ours).__name__}-{row.text}")

# Around the kink, into saturation, and the kink itself; none of float64's subtleties beyond.
VALUES = torch.cat(
    [torch.linspace(-60, 60, 2401, dtype=torch.float64), torch.tensor([1e-9, -1e-9, 1e-3, -1e-3], dtype=torch.float64)]
)[None, None]
EXACT = torch.zeros(1, dtype=torch.float64)


def derivative(row: Row, z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(row.oracle(z).sum(), z)[0]


@every_activation
def test_the_value_is_that_of_torch(row: Row) -> None:
    torch.testing.assert_close(row.ours(VALUES), row.oracle(VALUES), rtol=1e-14, atol=1e-15)


@every_activation
def test_the_slope_is_that_of_autograd(row: Row) -> None:
    # Where the function bends, a slope taken from the output carries the output's rounding.
    torch.testing.assert_close(row.ours.slope(VALUES), derivative(row, VALUES), rtol=1e-7, atol=4 * EPS)


@every_activation
@settings(max_examples=15, deadline=None)
@given(
    # What is nearly as small as float64's least is a zero too.
    z=st.lists(st.floats(-1e3, 1e3).filter(lambda v: v == 0 or abs(v) > 1e-290), min_size=1, max_size=4),
    exponent=st.floats(-6, 0),
)
def test_inversion_gives_back_what_the_output_tells(row: Row, z: list[float], exponent: float) -> None:
    given_z = torch.tensor(z, dtype=torch.float64)[None, None] * 10**exponent
    x = row.oracle(given_z)
    found = row.ours.invert(x, EXACT)
    known = torch.ones_like(x, dtype=torch.bool) if found.weight is None else found.weight > 0
    # The output's last bit moves z by that bit over the slope.
    size = 1 + max((abs(end) for end in row.ends), default=0.0)
    bound = 64 * EPS * (given_z.abs() + (x.abs() + size) / derivative(row, given_z).clamp(min=1e-300))
    bound = bound + 2 * row.jump + 1e-8 * EPS
    assert bool(((found.z - given_z).abs() <= bound)[known].all()), (found.z, given_z)
    assert bool((found.z[~known] == 0).all())
    torch.testing.assert_close(found.slope, derivative(row, given_z), rtol=1e-7, atol=32 * EPS)


@every_activation
def test_every_output_but_saturated_ones_is_known(row: Row) -> None:
    """An output tells its input if inputs a step away give visibly different ones, and only then."""
    here, below, above = (row.oracle(VALUES + d) for d in (0.0, -0.05, 0.05))
    told = ((here - below).abs() > 1e-9) & ((above - here).abs() > 1e-9)
    lost = (here == row.oracle(VALUES - 2)) & (here == row.oracle(VALUES + 2))
    weight = row.ours.invert(here, EXACT).weight
    if weight is None:
        assert not bool(lost.any())
    else:
        assert bool((weight[told] > 0).all())
        assert bool((weight[lost] == 0).all())


@every_activation
def test_rows_are_weighted_by_the_slope_where_it_says_how_well_they_are_known(row: Row) -> None:
    inverse = row.ours.invert(row.oracle(VALUES), EXACT)
    if inverse.weight is not None:
        known = inverse.weight > 0
        assert torch.equal(inverse.weight[known], inverse.slope[known])


@every_activation
def test_outputs_at_and_beyond_the_ends_are_not_known(row: Row) -> None:
    if row.bounds:
        return  # tested below
    limits = [float(row.oracle(torch.tensor(z, dtype=torch.float64))) for z in (-1e3, 1e3)]
    assert sorted(row.ends) == pytest.approx([v for v in limits if abs(v) < 10 and (v or row.ends)], abs=1e-12)
    for end in row.ends:
        outward = -1.0 if end == min(limits) else 1.0
        # One rounding short of the end, z could still be half a unit or more away, or anything beyond.
        values = [end - outward * EPS, end, end + outward * 1e-3, end + outward]
        x = torch.tensor(values, dtype=torch.float64)[None, None]
        found = row.ours.invert(x, EXACT)
        assert found.weight is not None
        assert bool((found.weight == 0).all())
        assert bool((found.z == 0).all())
        assert bool(((found.slope >= 0) & (found.slope < 1e-12)).all())
        inside = row.ours.invert(x[..., 1:2] - outward * 0.01, EXACT)
        assert inside.weight is not None
        assert float(inside.weight) > 0


@every_activation
def test_inversion_never_gives_nonsense(row: Row) -> None:
    """Recovered outputs carry errors: any number may come."""
    found = row.ours.invert(VALUES * 10, EXACT)
    for tensor in (found.z, found.slope, VALUES if found.weight is None else found.weight):
        assert bool(tensor.isfinite().all())
    assert bool((found.slope >= 0).all())


@every_activation
def test_the_precision_is_kept(row: Row) -> None:
    z = torch.linspace(-3, 3, 31)[None, None]
    found = row.ours.invert(row.oracle(z), torch.zeros(1))
    tensors = [row.ours(z), row.ours.slope(z), found.z, found.slope]
    assert {t.dtype for t in [*tensors, z if found.weight is None else found.weight]} == {torch.float32}
    known = torch.ones_like(z, dtype=torch.bool) if found.weight is None else found.weight > 0
    torch.testing.assert_close(found.z[known], z[known], rtol=1e-4, atol=1e-4)


# Flags, by their definitions.


@every_activation
def test_homogeneous_means_that_a_scaled_input_scales_the_output(row: Row) -> None:
    holds = all(torch.allclose(row.oracle(a * VALUES), a * row.oracle(VALUES), rtol=1e-12) for a in (0.3, 2.0, 7.0))
    assert row.ours.homogeneous == holds


@every_activation
def test_nonnegative_means_that_no_output_is_below_zero(row: Row) -> None:
    assert row.ours.nonnegative == bool((row.oracle(VALUES) >= 0).all())


@every_activation
def test_the_other_side_of_a_kink(row: Row) -> None:
    z = VALUES[VALUES != 0]
    slope = row.ours.slope(z)
    expected = row.ours.slope(-z) if row.sides else slope
    assert torch.equal(row.ours.other_side(slope), expected)
    assert torch.equal(row.ours.other_side(row.ours.other_side(slope)), slope)


@every_activation
def test_text(row: Row) -> None:
    assert str(row.ours) == row.text


# A zero output of ReLU comes back as noise.


def test_relu_takes_outputs_within_the_error_for_zero() -> None:
    x = torch.tensor([[[0.0, 1e-4, -1e-4, 2.0]], [[0.0, 1e-4, -1e-4, 2.0]]], dtype=torch.float64)
    found = ReLU().invert(x, torch.tensor([1e-4, 1e-9], dtype=torch.float64))
    active = torch.tensor([[[0.0, 0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0, 1.0]]], dtype=torch.float64)
    assert found.weight is not None
    assert torch.equal(found.weight, active)
    assert torch.equal(found.slope, active)
    assert torch.equal(found.z, x * active)


def test_prelu_has_a_slope_for_each_channel() -> None:
    z = torch.linspace(-2, 2, 48, dtype=torch.float64).reshape(2, 3, 4, 2).requires_grad_()
    slopes = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)
    ours, theirs = PReLU(slopes), functional.prelu(z, slopes)
    (slope,) = torch.autograd.grad(theirs.sum(), z)
    found = ours.invert(theirs.detach(), EXACT)
    torch.testing.assert_close(ours(z), theirs)
    torch.testing.assert_close(ours.slope(z), slope)
    torch.testing.assert_close(found.z, z.detach())
    torch.testing.assert_close(found.slope, slope)
    torch.testing.assert_close(ours.other_side(slope), ours.slope(-z))


def test_equal_activations_are_equal() -> None:
    assert LeakyReLU(0.2) == LeakyReLU(0.2) != LeakyReLU(0.3)
    assert ELU(SELU.alpha, SELU.scale) == SELU


# A bound comes back as noise around it, from either side.


def test_hardtanh_takes_outputs_within_the_error_for_the_bounds() -> None:
    values = [-1.0, -1 + 1e-4, -1 - 1e-4, 0.3, 1 - 1e-4, 1.0, 1 + 1e-4]
    x = torch.tensor([[values], [values]], dtype=torch.float64)
    found = Hardtanh().invert(x, torch.tensor([1e-4, 1e-9], dtype=torch.float64))
    active = torch.tensor([[[0.0, 0, 0, 1, 0, 0, 0]], [[0.0, 1, 0, 1, 1, 0, 0]]], dtype=torch.float64)
    assert found.weight is not None
    assert torch.equal(found.weight, active)
    assert torch.equal(found.slope, active)
    assert torch.equal(found.z, x * active)
