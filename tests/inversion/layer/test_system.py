"""One layer's constraints, against the dense matrices W and K built column by column from torch's own convolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from rgap.inversion.layer import LayerRows, LayerSystem, Solver
from rgap.inversion.layer.dominant import DOMINANT
from rgap.nn import layers
from rgap.nn.layers import Layer

TOLERANCE = 1e-7
ROUNDING = 1e-10
"""Singular values below this fraction of the largest are zeros; those up to CLEAR are left out of the examples."""
CLEAR = 1e-4
SOLVERS = st.sampled_from(["auto", "direct", "iterative"])


@dataclass(frozen=True)
class Drawn:
    """A layer, its k and row weights, and the same constraints as dense matrices."""

    layer: Layer
    k: Tensor
    """(1, outputs, positions)"""
    row_weight: Tensor | None
    W: Tensor
    """One row per value of z."""
    K: Tensor
    """One row per weight."""

    @property
    def rows(self) -> Tensor:
        """The weight of each row of W."""
        return torch.ones(len(self.W)).double() if self.row_weight is None else self.row_weight.flatten()

    def group(self, g: int) -> tuple[Tensor, Tensor, Tensor, slice, slice, slice]:
        """The group's own W, K and row weights, and where its z, weights and inputs lie."""
        count = self.layer.groups
        z, w, x = (
            slice(g * size // count, (g + 1) * size // count) for size in (len(self.W), len(self.K), self.W.shape[1])
        )
        return self.W[z, x], self.K[w, x], self.rows[z], z, w, x

    def system(self, solver: Solver = "auto") -> LayerSystem:
        return LayerSystem(self.layer, self.k, self.row_weight, TOLERANCE, solver=solver)

    def rhs(self, z: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Flat right-hand sides as `LayerSystem.solve` takes them."""
        return z.reshape(self.k.shape), grad.reshape(1, *self.layer.weight.shape)

    def solve(self, z: Tensor, grad: Tensor, solver: Solver = "auto") -> Tensor:
        return self.system(solver).solve(*self.rhs(z, grad)).x.flatten()


def dense(
    forward: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], weight: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    """Columns of W and K: the outputs at each unit input, and autograd's gradient of the weight there."""
    units = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).reshape(-1, 1, *shape)

    def heard(w: Tensor, unit: Tensor) -> Tensor:
        z = forward(unit, w)
        return (z * k.reshape(z.shape)).sum()

    columns = torch.func.vmap(forward, in_dims=(0, None))(units, weight)
    slopes = torch.func.vmap(torch.func.grad(heard), in_dims=(None, 0))(weight, units)
    return columns.flatten(1).T, slopes.flatten(1).T


def drawn_layer(
    draw: st.DrawFn,
    generator: torch.Generator,
    groups: int,
    shape: tuple[int, int, int],
    size: float,
    weighted: bool | None,
) -> Drawn:
    """A convolution of any geometry that takes this shape, with k of about this size."""
    outputs = draw(st.integers(1, 5))
    kernel, stride, padding, dilation = (draw(st.integers(*bounds)) for bounds in ((1, 3), (1, 2), (0, 2), (1, 2)))
    assume(min(shape[1:]) + 2 * padding >= dilation * (kernel - 1) + 1)
    per_group = shape[0] // groups
    weight = torch.randn(groups * outputs, per_group, kernel, kernel, generator=generator, dtype=torch.float64)

    def forward(x: Tensor, w: Tensor) -> Tensor:
        return functional.conv2d(x, w, None, stride, padding, dilation, groups)

    layer = layers.convolution(
        "conv", weight, None, shape, (stride,) * 2, ((padding, padding),) * 2, (dilation,) * 2, groups, "weight", None
    )
    k = size * torch.randn(1, layer.outputs, layer.positions, generator=generator, dtype=torch.float64)
    # Zero, or so small that K shows some directions faintly.
    faint = torch.rand(k.shape, generator=generator) > draw(st.sampled_from([1.0, 0.6, 0.2, 0.0]))
    k = torch.where(faint, draw(st.sampled_from([0.0, 1e-4, 1e-5])) * k, k)
    row_weight = None
    if draw(st.booleans()) if weighted is None else weighted:
        row_weight = drawn_weights(draw, generator, k.shape)
    return Drawn(layer, k, row_weight, *dense(forward, shape, weight, k))


def drawn_weights(draw: st.DrawFn, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """How far each of several values is known."""
    levels = torch.tensor(draw(st.sampled_from([[0.0, 1.0], [1.0], [0.0, 0.3, 1.0], [0.0]])), dtype=torch.float64)
    return levels[torch.randint(len(levels), shape, generator=generator)]


@st.composite
def problems(draw: st.DrawFn, weighted: bool | None = None) -> Drawn:
    """A convolution (or Linear layer) of any geometry, with k of any size, partly zero, and rows partly dropped."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups, per_group = draw(st.sampled_from([1, 1, 2])), draw(st.integers(1, 2))
    shape = (groups * per_group, draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    return drawn_layer(draw, generator, groups, shape, 10.0 ** -draw(st.integers(0, 5)), weighted)


@dataclass(frozen=True)
class Several:
    """Layers that read one input, whose own values may be known, and all that as dense matrices."""

    each: tuple[Drawn, ...]
    observed_weight: Tensor | None
    """(1, channels, pixels)"""
    W: Tensor
    """The rows of one layer after the other's, then one for each value of the input."""
    K: Tensor

    @property
    def layer(self) -> Layer:
        return self.each[0].layer

    @property
    def rows(self) -> Tensor:
        own = [] if self.observed_weight is None else [self.observed_weight.flatten()]
        return torch.cat([drawn.rows for drawn in self.each] + own)

    def group(self, g: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, slice]:
        """As `Drawn.group` has it."""
        _, _, _, _, _, x = self.each[0].group(g)
        z, w, before_z, before_w = [], [], 0, 0
        for drawn in self.each:
            _, _, _, z_at, w_at, _ = drawn.group(g)
            z.append(torch.arange(before_z + z_at.start, before_z + z_at.stop))
            w.append(torch.arange(before_w + w_at.start, before_w + w_at.stop))
            before_z, before_w = before_z + len(drawn.W), before_w + len(drawn.K)
        if self.observed_weight is not None:
            z.append(torch.arange(before_z + x.start, before_z + x.stop))
        z_all, w_all = torch.cat(z), torch.cat(w)
        return self.W[z_all][:, x], self.K[w_all][:, x], self.rows[z_all], z_all, w_all, x

    def system(self, solver: Solver = "auto") -> LayerSystem:
        first, *others = self.each
        more = [LayerRows(drawn.layer, drawn.k, drawn.row_weight) for drawn in others]
        return LayerSystem(first.layer, first.k, first.row_weight, TOLERANCE, more, self.observed_weight, solver)

    def rhs(self, z: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]], Tensor | None]:
        """Flat right-hand sides as `LayerSystem.solve` takes them."""
        of_z = [len(drawn.W) for drawn in self.each]
        observed = None if self.observed_weight is None else z[sum(of_z) :].reshape(self.observed_weight.shape)
        parts = zip(
            self.each,
            torch.split(z[: sum(of_z)], of_z),
            torch.split(grad, [len(drawn.K) for drawn in self.each]),
            strict=True,
        )
        first, *others = [drawn.rhs(*side) for drawn, *side in parts]
        return *first, others, observed

    def solve(self, z: Tensor, grad: Tensor, solver: Solver = "auto") -> Tensor:
        return self.system(solver).solve(*self.rhs(z, grad)).x.flatten()


@st.composite
def several(draw: st.DrawFn) -> Several:
    """Up to three layers on one input, its own values known or not; of a single one they are."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups, per_group = draw(st.sampled_from([1, 1, 2])), draw(st.integers(1, 2))
    shape = (groups * per_group, draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    size, count = 10.0 ** -draw(st.integers(0, 5)), draw(st.integers(1, 3))
    each = tuple(drawn_layer(draw, generator, groups, shape, size, None) for _ in range(count))
    observed_weight = None
    if count == 1 or draw(st.booleans()):
        observed_weight = drawn_weights(draw, generator, (1, shape[0], shape[1] * shape[2]))
    own = [] if observed_weight is None else [torch.eye(observed_weight.numel(), dtype=torch.float64)]
    return Several(each, observed_weight, torch.cat([one.W for one in each] + own), torch.cat([one.K for one in each]))


def equilibrated(W: Tensor, K: Tensor, rows: Tensor) -> tuple[Tensor, float]:
    """The rows of one group on top of each other, those of K scaled to the mean size of the rows of W in use."""
    weighted = rows[:, None] * W
    mean = float(weighted.square().sum()) / max(int((rows > 0).sum()), 1)
    mean_k = float(K.square().sum(1).mean())
    scale = ((mean or 1.0) / mean_k) ** 0.5 if mean_k else 1.0
    return torch.cat([weighted, scale * K]), scale


def clear(drawn: Drawn | Several) -> None:
    """Leave out what rounding could call either way: rank, and which directions are dominant."""
    for g in range(drawn.layer.groups):
        W, K, rows, *_ = drawn.group(g)
        joint, alone = (torch.linalg.svdvals(matrix) for matrix in (equilibrated(W, K, rows)[0], K))
        relative = joint / joint[0].clamp(min=1e-300)
        assume(not bool(((relative > ROUNDING) & (relative < CLEAR)).any()))
        assume(not bool(((alone / (DOMINANT * alone[0].clamp(min=1e-300)) - 1).abs() < 0.05).any()))


def trailing_directions(K: Tensor) -> Tensor:
    """An orthonormal basis, in columns, of what K shows faintly or not at all."""
    _, sigma, vh = torch.linalg.svd(K)
    sigma = functional.pad(sigma, (0, len(vh) - len(sigma)))
    return vh[(sigma < DOMINANT * sigma[0]) | (sigma == 0)].T


def by_group(
    drawn: Drawn | Several, solve: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor], *sides: Tensor
) -> Tensor:
    """A dense solution, put together from the groups, which do not share unknowns."""
    x = torch.zeros(drawn.W.shape[1], dtype=torch.float64)
    for g in range(drawn.layer.groups):
        W, K, rows, z_at, w_at, x_at = drawn.group(g)
        x[x_at] = solve(W, K, rows, sides[0][z_at], sides[1][w_at])
    return x


def minimum_norm(W: Tensor, K: Tensor, rows: Tensor, z: Tensor, grad: Tensor) -> Tensor:
    matrix, scale = equilibrated(W, K, rows)
    return torch.linalg.pinv(matrix, rtol=1e-6) @ torch.cat([rows * z, scale * grad])


def dominant_first(W: Tensor, K: Tensor, rows: Tensor, z: Tensor, grad: Tensor) -> Tensor:
    """What the module says it solves: dominant directions from the gradient alone, the trailing ones from both."""
    u, sigma, vh = torch.linalg.svd(K)
    sigma = functional.pad(sigma, (0, len(vh) - len(sigma)))
    dominant = (sigma >= DOMINANT * sigma[0]) & (sigma > 0)
    x = vh[dominant].T @ ((u.T[: len(sigma)][dominant[: len(u)]] @ grad) / sigma[dominant])
    trailing = vh[~dominant].T
    whole, scale = equilibrated(W, K, rows)
    inverse = torch.linalg.pinv(whole @ trailing, atol=1e-6 * torch.linalg.matrix_norm(whole, 2))
    return x + trailing @ (inverse @ torch.cat([rows * (z - W @ x), scale * (grad - K @ x)]))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-8) -> bool:
    return float((found - expected).norm()) <= tolerance * (float(expected.norm()) + 1e-12)


@settings(max_examples=25, deadline=None)
@given(problems(), st.integers(0, 2**31), SOLVERS)
def test_consistent_constraints_give_the_input_or_its_part_that_they_see(
    drawn: Drawn, seed: int, solver: Solver
) -> None:
    """Of full rank: the input itself. Otherwise the solution of least norm."""
    clear(drawn)
    x = torch.randn(drawn.W.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z, grad = drawn.W @ x, drawn.K @ x
    found = drawn.solve(z, grad, solver)
    assert close(found, by_group(drawn, minimum_norm, z, grad))
    used = torch.cat([drawn.W[drawn.rows > 0], drawn.K / drawn.k.abs().max().clamp(min=1e-300)])
    if torch.linalg.matrix_rank(used, rtol=1e-7) == len(x):
        assert close(found, x)


@settings(max_examples=25, deadline=None)
@given(problems())
def test_rank_is_that_of_both_kinds_of_rows_together(drawn: Drawn) -> None:
    clear(drawn)
    expected = 0
    for g in range(drawn.layer.groups):
        W, K, rows, *_ = drawn.group(g)
        expected += int(torch.linalg.matrix_rank(equilibrated(W, K, rows)[0], rtol=1e-6))
    assert drawn.system().rank == (expected,)


@settings(max_examples=25, deadline=None)
@given(problems())
def test_conjugate_gradients_see_whether_all_dimensions_are_determined(drawn: Drawn) -> None:
    """They count by a draw, but never find none open where some are, or some where none are."""
    clear(drawn)
    exact, found = drawn.system("direct"), drawn.system("iterative")
    full = drawn.layer.unknowns
    if exact.rank[0] < full:
        assert found.rank[0] < full
    elif exact.condition[0] < 1e3:  # what is recovered only after very many steps counts as open
        assert found.rank[0] == full


@settings(max_examples=25, deadline=None)
@given(problems(), st.integers(0, 2**31), st.floats(1e-6, 1.0), SOLVERS)
def test_inconsistent_constraints_are_solved_dominant_directions_first(
    drawn: Drawn, seed: int, size: float, solver: Solver
) -> None:
    clear(drawn)
    generator = torch.Generator().manual_seed(seed)
    x, z, grad = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (drawn.W.shape[1], *lengths(drawn)))
    z, grad = drawn.W @ x + size * z, drawn.K @ x + size * float(drawn.k.abs().max()) * grad
    assert close(drawn.solve(z, grad, solver), by_group(drawn, dominant_first, z, grad), 1e-6)


def lengths(drawn: Drawn | Several) -> tuple[int, int]:
    return len(drawn.W), len(drawn.K)


# Several layers that read one input, and an input whose own values are known.


@settings(max_examples=12, deadline=None)
@given(several(), st.integers(0, 2**31), SOLVERS)
def test_layers_of_one_input_give_the_input_or_its_part_that_they_see(
    drawn: Several, seed: int, solver: Solver
) -> None:
    clear(drawn)
    x = torch.randn(drawn.W.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z, grad = drawn.W @ x, drawn.K @ x
    found = drawn.solve(z, grad, solver)
    assert close(found, by_group(drawn, minimum_norm, z, grad))
    ranks = [int(torch.linalg.matrix_rank(joint_rows(drawn, g), rtol=1e-6)) for g in range(drawn.layer.groups)]
    assert drawn.system().rank == (sum(ranks),)
    if sum(ranks) == len(x):
        assert close(found, x)


def joint_rows(drawn: Several, g: int) -> Tensor:
    W, K, rows, *_ = drawn.group(g)
    return equilibrated(W, K, rows)[0]


@settings(max_examples=12, deadline=None)
@given(several(), st.integers(0, 2**31), st.floats(1e-6, 1.0), SOLVERS)
def test_layers_of_one_input_are_solved_dominant_directions_first(
    drawn: Several, seed: int, size: float, solver: Solver
) -> None:
    clear(drawn)
    generator = torch.Generator().manual_seed(seed)
    x, z, grad = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (drawn.W.shape[1], *lengths(drawn)))
    largest = max(float(each.k.abs().max()) for each in drawn.each)
    z, grad = drawn.W @ x + size * z, drawn.K @ x + size * largest * grad
    assert close(drawn.solve(z, grad, solver), by_group(drawn, dominant_first, z, grad), 1e-6)


@settings(max_examples=10, deadline=None)
@given(several(), st.integers(0, 2**31))
def test_what_is_not_known_of_several_rows_does_not_matter(drawn: Several, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(drawn.W.shape[1], generator=generator, dtype=torch.float64)
    z, grad = drawn.W @ x, drawn.K @ x
    noise = torch.randn(z.shape, generator=generator, dtype=torch.float64) * (drawn.rows == 0)
    plain, moved = (drawn.system().solve(*drawn.rhs(side, grad)) for side in (z, z + 1e3 * noise))
    assert close(moved.x, plain.x, 1e-6)
    for name in ("weight_residual", "weight_misfit"):
        assert torch.allclose(getattr(moved, name), getattr(plain, name), atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(several(), st.integers(0, 2**31))
def test_residuals_of_several_layers_are_those_of_all_their_rows(drawn: Several, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, grad = (torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths(drawn))
    found = drawn.system().solve(*drawn.rhs(z, grad))
    x, rows = found.x.flatten(), drawn.rows
    misfit, reference = rows * (drawn.W @ x - z), rows * z
    if float(reference.norm()):
        assert float(found.weight_residual) == pytest.approx(
            float(misfit.norm() / reference.norm()), rel=1e-9, abs=1e-12
        )
    assert float(found.gradient_residual) == pytest.approx(
        float((drawn.K @ x - grad).norm() / grad.norm()), rel=1e-9, abs=1e-12
    )
    count = max(int((rows > 0).sum()), 1)
    assert float(found.weight_misfit) == pytest.approx(float(misfit.norm()) / count**0.5, rel=1e-9, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(problems(weighted=True), st.integers(0, 2**31))
def test_rows_of_weight_zero_are_dropped(drawn: Drawn, seed: int) -> None:
    """Whatever stands in them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(drawn.W.shape[1], generator=generator, dtype=torch.float64)
    z, grad = drawn.W @ x, drawn.K @ x
    noise = torch.randn(z.shape, generator=generator, dtype=torch.float64) * (drawn.rows == 0)
    system = drawn.system()
    plain, moved = (system.solve(*drawn.rhs(side, grad)) for side in (z, z + 1e3 * noise))
    assert close(moved.x, plain.x, 1e-6)
    for name in ("weight_residual", "weight_misfit"):
        assert torch.allclose(getattr(moved, name), getattr(plain, name), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(problems(), st.integers(0, 2**31))
def test_determined_by_the_gradient_means_that_z_does_not_matter(drawn: Drawn, seed: int) -> None:
    clear(drawn)
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (drawn.W.shape[1], len(drawn.W)))
    z, grad = drawn.W @ x, drawn.K @ x
    system = drawn.system()
    [alone] = system.determined_by_gradient
    trailing = [trailing_directions(drawn.group(g)[1]) for g in range(drawn.layer.groups)]
    assert alone == (sum(basis.shape[1] for basis in trailing) == 0)
    plain, moved = (system.solve(*drawn.rhs(side, grad)).x.flatten() for side in (z, z + noise))
    if alone:
        assert torch.equal(moved, plain)
        assert close(plain, x)
        # The largest over the smallest singular value, in the worst of the groups.
        values = [torch.linalg.svdvals(drawn.group(g)[1]) for g in range(drawn.layer.groups)]
        assert system.condition == (pytest.approx(max(float(v[0] / v[-1]) for v in values), rel=1e-6),)
        assert system.method == ("channel",)
    else:
        # W on the trailing directions is all that can move.
        pushed = drawn.W.T @ (drawn.rows**2 * noise)
        reach = max(float((basis.T @ pushed[drawn.group(g)[-1]]).norm()) for g, basis in enumerate(trailing))
        assert (float((moved - plain).norm()) > 1e-9) == (reach > 1e-9)
        assert system.method != ("channel",)


@settings(max_examples=20, deadline=None)
@given(problems(), st.integers(0, 2**31))
def test_residuals_are_those_of_the_dense_matrices(drawn: Drawn, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, grad = (torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths(drawn))
    rows = drawn.rows
    found = drawn.system().solve(*drawn.rhs(z, grad))
    x = found.x.flatten()
    misfit = rows * (drawn.W @ x - z)
    if float((rows * z).norm()):
        assert float(found.weight_residual) == pytest.approx(
            float(misfit.norm() / (rows * z).norm()), rel=1e-9, abs=1e-12
        )
    assert float(found.gradient_residual) == pytest.approx(
        float((drawn.K @ x - grad).norm() / grad.norm()), rel=1e-9, abs=1e-12
    )
    count = max(int((rows > 0).sum()), 1)
    assert float(found.weight_misfit) == pytest.approx(float(misfit.norm()) / count**0.5, rel=1e-9, abs=1e-12)


def test_right_hand_sides_of_zero_give_zero() -> None:
    drawn = fixed(torch.ones(1, 2, 4, dtype=torch.float64))
    found = drawn.system().solve(*drawn.rhs(torch.zeros(8).double(), torch.zeros(8).double()))
    assert not found.x.any()
    assert [float(v) for v in (found.weight_residual, found.gradient_residual, found.weight_misfit)] == [0, 0, 0]


def fixed(k: Tensor, row_weight: Tensor | None = None) -> Drawn:
    """One channel of 3 x 3 pixels, two kernels of 2 x 2."""
    weight = torch.tensor([[[[1.0, 2], [3, 5]]], [[[-2.0, 1], [0, 4]]]], dtype=torch.float64)
    layer = layers.convolution("conv", weight, None, (1, 3, 3), (1, 1), ((0, 0),) * 2, (1, 1), 1, "weight", None)
    matrices = dense(lambda x, w: functional.conv2d(x, w), (1, 3, 3), weight, k)
    return Drawn(layer, k, row_weight, *matrices)


def test_without_a_gradient_only_weight_rows_count() -> None:
    drawn = fixed(torch.zeros(1, 2, 4, dtype=torch.float64))
    rank = int(torch.linalg.matrix_rank(drawn.W))
    assert drawn.system().rank == (rank,)
    z = torch.arange(8.0).double()
    assert close(drawn.solve(z, torch.zeros(8).double()), torch.linalg.pinv(drawn.W) @ z)


def test_without_any_row_nothing_is_known() -> None:
    none = torch.zeros(1, 2, 4, dtype=torch.float64)
    drawn = fixed(none, none)
    system = drawn.system()
    found = system.solve(*drawn.rhs(torch.ones(8).double(), torch.zeros(8).double()))
    assert found.rank == (0,)
    assert not found.x.any()
    assert system.determined_by_gradient == [False]


@settings(max_examples=15, deadline=None)
@given(problems(), st.integers(2, 4), st.integers(0, 2**31))
def test_several_systems_at_once_equal_each_alone(drawn: Drawn, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = drawn.layer

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # Sizes of k, zeros in it and dropped rows differ from system to system.
    k = normal(count, *drawn.k.shape[1:]) * 10.0 ** -torch.arange(count)[:, None, None]
    k[0] = drawn.k[0]
    k[-1] *= torch.rand(k[-1].shape, generator=generator) < 0.3
    rows = None if drawn.row_weight is None else (normal(*k.shape) > -0.5).double()
    x = normal(count, layer.channels, layer.pixels)
    z, grad = layer.output(x), layer.grad_weight(x, k)
    batch = LayerSystem(layer, k, rows, TOLERANCE)
    found = batch.solve(z, grad)
    assert found.x.shape == x.shape
    for s in range(count):
        one = slice(s, s + 1)
        single = LayerSystem(layer, k[one], None if rows is None else rows[one], TOLERANCE)
        alone = single.solve(z[one], grad[one])
        assert found.rank[s] == alone.rank[0] == batch.rank[s]
        assert found.condition[s] == pytest.approx(alone.condition[0], rel=0.3)  # estimates, maybe of two solvers
        assert batch.determined_by_gradient[s] == single.determined_by_gradient[0]
        if alone.condition[0] < 1e5:
            assert close(found.x[s], alone.x[0], 1e-6)
            for name in ("weight_residual", "gradient_residual", "weight_misfit"):
                assert torch.allclose(getattr(found, name)[one], getattr(alone, name), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("leading", [(), (3,), (2, 2)])
@pytest.mark.parametrize("outputs", [2, 7])
def test_linear_layers(leading: tuple[int, ...], outputs: int) -> None:
    """On several positions K has one row for each weight, summed over the positions."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(outputs, 4, generator=generator, dtype=torch.float64)
    shape = (*leading, 4)
    layer = layers.linear("fc", weight, None, shape, "weight", None)
    k = torch.randn(1, *leading, outputs, generator=generator, dtype=torch.float64)
    W, K = dense(functional.linear, shape, weight, k)
    x = torch.randn(1, *shape, generator=generator, dtype=torch.float64)
    z, grad = (W @ x.flatten()).reshape(1, *leading, outputs), (K @ x.flatten()).reshape(1, outputs, 4)
    system = LayerSystem(layer, layer.pack_output(k), None, TOLERANCE)
    scale = float(W.square().mean() / K.square().mean()) ** 0.5
    matrix = torch.cat([W, scale * K])
    assert system.rank == (int(torch.linalg.matrix_rank(matrix, rtol=1e-9)),)
    found = layer.unpack_input(system.solve(layer.pack_output(z), layer.pack_weight(grad)).x)
    expected = torch.linalg.pinv(matrix, rtol=1e-9) @ torch.cat([W @ x.flatten(), scale * K @ x.flatten()])
    assert found.shape == x.shape
    assert close(found.flatten(), expected)


def test_errors_of_z_reach_only_the_trailing_directions() -> None:
    """k is nearly exact where z carries the errors of all later layers."""
    drawn = fixed(torch.tensor([[[1.0, 0, 0, 0], [0, 0, 0, 0]]], dtype=torch.float64) * 1e-4)
    x = torch.arange(1.0, 10.0).double()
    z, grad = drawn.W @ x, drawn.K @ x
    noise = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, 1], dtype=torch.float64)
    moved = drawn.solve(z + noise, grad).reshape(3, 3) - drawn.solve(z, grad).reshape(3, 3)
    # This k shows the four pixels of the first position as they are.
    assert float(moved[:2, :2].abs().max()) < 1e-10
    assert float(moved.abs().max()) > 1e-2


def test_a_layer_too_large_for_memory_is_refused_before_anything_is_made() -> None:
    weight = torch.zeros(4, 3, 3, 3)
    layer = layers.convolution("conv1", weight, None, (3, 224, 224), (1, 1), ((0, 0),) * 2, (1, 1), 1, "w", None)
    k = torch.ones(1, 4, layer.positions, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"conv1 has an input of 3 x 50176 values.*169 GiB.*'auto' or 'iterative'"):
        LayerSystem(layer, k, None, 1e-9, solver="direct")
