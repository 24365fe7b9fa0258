"""What every constraint system must hold, on chains and graphs, for one sample and for several whose gradients add up.

The oracles are slow and obvious: central differences of the rows themselves, and dense matrices. A network joins by one
line of `NETWORKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, losses
from rgap.inversion.jacobian import Jacobian
from rgap.inversion.pattern import Pattern, changed_sides, least_certain
from rgap.inversion.prior import Prior
from rgap.inversion.state import State
from rgap.inversion.system import ConstraintSystem, Linearisation, Rows
from rgap.linalg.least_squares import Direct, Iterative, Regulariser
from tests.nn.modules import Skip, norm

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 3, 2, bias=False)),
    "strided chain": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, groups=3), nn.Tanh(), nn.Conv2d(6, 4, 2)),
    "chain with batch norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), norm(4), nn.ELU(), nn.Conv2d(4, 3, 2)),
    "a skip": lambda: Skip(
        nn.Sequential(nn.Conv2d(3, 2, 3, 1, 1), nn.ELU(), nn.Conv2d(2, 3, 1)), act=nn.LeakyReLU(0.2)
    ),
    "a pool": lambda: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 1), nn.Tanh()),
    "norms": lambda: nn.Sequential(norm(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.GELU()),
    "side by side": lambda: Skip(nn.Conv2d(3, 2, 3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.Softplus(), cat=True),
}
every_system = pytest.mark.parametrize(
    ("name", "samples"), [(name, samples) for name in NETWORKS for samples in (1, 3)]
)
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Case:
    """All that is in front of a last layer whose inputs are known, and the network's true inputs."""

    system: ConstraintSystem
    x: Tensor

    def near(self) -> Linearisation:
        """Not at the truth."""
        return self.system.linearise(self.x + 0.1 * self.draw(*self.x.shape, seed=2))

    @staticmethod
    def draw(*shape: int, seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def in_doubt(self, at: Linearisation) -> Pattern:
        """The unit of the first activation whose slope moves most, in the last sample."""
        node = next(iter(at.slopes))
        after = at.cotangents[node + 1]
        assert after is not None
        mask = torch.zeros_like(after, dtype=torch.bool)
        mask[-1].view(-1)[int(after[-1].abs().argmax())] = True
        return {node: mask}


@cache
def case(name: str, samples: int) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = NETWORKS[name]()
        count = inner(torch.zeros(2, 3, 4, 4))[0].numel()
        stem = nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), nn.LeakyReLU(0.2))
        model = nn.Sequential(stem, inner, nn.Flatten(), nn.Linear(count, 3)).double().eval()
    x = torch.rand(samples, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.arange(samples, dtype=torch.float64) % 3
    target = Target(model, losses.CrossEntropy(3), (2, 4, 4), (0.0, 1.0), samples)
    whole = target.network
    values = whole.forward(x)
    k = target.loss.output_gradient(values[-1], labels) / samples  # of a mean
    at = whole.segments[-1].entry
    cotangent = whole.vjp(values, whole.slopes(values), {len(values) - 1: k})[at]
    assert cotangent is not None
    known = State(values[at], cotangent, None, torch.zeros_like(values[at]))
    gradients = {name: grad.double() for name, grad in target.gradient(x, labels).items()}
    return Case(ConstraintSystem(whole.part(whole.segments[:-1]), known, gradients, EPS), x)


def rows_at(of: ConstraintSystem, at: Linearisation, x: Tensor) -> Rows:
    """Outputs and gradients at inputs near by, with all cotangents as they are at the point."""
    values = of.network.forward(x)
    gradient = []
    for node, layer in zip(of.nodes, of.layers, strict=True):
        read = layer.pack_input(values[of.network.nodes[node].reads[0]])
        each = [layer.grad_weight(read[b : b + 1], of.k(at, node)[b : b + 1]) for b in range(of.samples)]
        gradient.append(torch.stack(each).sum(0))
    return Rows(values[-1][None], tuple(gradient))


@every_system
@pytest.mark.parametrize("doubt", ["nothing", "a unit", "all"])
def test_the_adjoint_is_that_of_the_product(name: str, samples: int, doubt: str) -> None:
    of = case(name, samples)
    at = of.near()
    uncertain = {"nothing": {}, "a unit": of.in_doubt(at), "all": None}[doubt]
    jacobian = Jacobian(of.system, at, uncertain)
    x = of.draw(2, *of.x.shape, seed=3)
    rows = jacobian.mv(x)
    other = of.draw(*rows.shape, seed=4)
    left, right = (rows * other).sum(1), (x * jacobian.rmv(other)).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9 * float(rows.norm() * other.norm()))


@every_system
def test_there_is_no_more_rank_than_is_counted(name: str, samples: int) -> None:
    of = case(name, samples)
    jacobian = Jacobian(of.system, of.near(), {})
    assert int(torch.linalg.matrix_rank(jacobian.to_dense())) <= of.system.rank_at_most <= of.system.unknowns


@every_system
def test_products_are_central_differences_of_the_rows(name: str, samples: int) -> None:
    of = case(name, samples)
    at, step = of.near(), 1e-6
    jacobian = Jacobian(of.system, at, {})
    x = of.draw(3, *of.x.shape, seed=3)

    def difference(move: Tensor) -> Tensor:
        ends = [jacobian.weighted(rows_at(of.system, at, at.x + sign * step * move)) for sign in (1, -1)]
        return (ends[0] - ends[1])[0] / (2 * step)

    found = jacobian.mv(x)
    expected = torch.stack([difference(move) for move in x])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(found.abs().max()))


@every_system
@pytest.mark.parametrize("doubt", ["nothing", "a unit", "all"])
def test_products_in_float32_are_the_same_but_for_its_rounding(
    name: str, samples: int, doubt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rgap.inversion.jacobian.MANY", 0)
    of = case(name, samples)
    at = of.near()
    jacobian = Jacobian(of.system, at, {"nothing": {}, "a unit": of.in_doubt(at), "all": None}[doubt])
    x = of.draw(2, *of.x.shape, seed=3)
    single = jacobian.single
    assert single is not None
    for ours, theirs in ((single.mv, jacobian.mv), (single.normal, jacobian.normal)):
        found, expected = ours(x.float()), theirs(x)
        assert found.dtype == torch.float32
        assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


@every_system
def test_the_gram_matrix_is_that_of_the_dense_rows(name: str, samples: int) -> None:
    of = case(name, samples)
    jacobian = Jacobian(of.system, of.near(), {})
    dense = jacobian.to_dense()
    gram = dense.T @ dense
    torch.testing.assert_close(jacobian.gram(), gram, rtol=1e-9, atol=1e-12 * float(gram.abs().max()))
    assert jacobian.mean_diagonal == pytest.approx(float(gram.diagonal().mean()), rel=0.7)
    assert jacobian.unknowns == of.x.numel() == len(gram)


@every_system
def test_at_the_true_inputs_nothing_is_missed(name: str, samples: int) -> None:
    of = case(name, samples)
    at = of.system.linearise(of.x)
    missed = of.system.residual(at)
    assert float(missed.weight.abs().max()) < 1e-12
    for miss, grad in zip(missed.gradient, of.system.gradients, strict=True):
        assert float(miss.norm()) <= 1e-12 * float(grad.norm())
    assert of.system.distance(at) < 1e-12
    assert of.system.distance(of.near()) > 1e-4


@every_system
def test_a_unit_in_doubt_does_not_move_the_rows(name: str, samples: int) -> None:
    """What its slope puts into the gradients is projected out: whatever it is, the same right-hand side comes of it."""
    of = case(name, samples)
    at = of.system.linearise(of.x)
    uncertain = of.in_doubt(at)
    [(node, mask)] = uncertain.items()
    slope = torch.where(mask, -3.0 * at.slopes[node], at.slopes[node])
    turned = of.system.with_slopes(at, {**at.slopes, node: slope})
    wrong = of.system.residual(turned)
    assert sum(float(each.norm()) for each in wrong.gradient) > 1e-4
    seen = Jacobian(of.system, at, {}).weighted(wrong)
    blind = Jacobian(of.system, at, uncertain).weighted(wrong)
    assert float(blind.norm()) < 1e-8 * float(seen.norm())


@every_system
def test_what_is_in_doubt_does_not_make_the_rest_weigh_more(name: str, samples: int) -> None:
    """Of many rows a few are left, which say as little of the input as they did among the others."""
    of = case(name, samples)
    at = of.system.linearise(of.x)
    without, some = (Jacobian(of.system, at, least_certain(of.system, at, count)).scale for count in (0, 20))
    assert all(a <= (1 + 1e-12) * b for a, b in zip(some, without, strict=True))


@every_system
def test_without_the_gradient_rows_that_slopes_may_move_the_others_stay(name: str, samples: int) -> None:
    of = case(name, samples)
    jacobian = Jacobian(of.system, of.near(), None)
    curved = [of.system.curved_after(node) for node in of.system.nodes]
    rows = jacobian.mv(of.draw(1, *of.x.shape, seed=3))[0]
    parts = torch.split(rows[of.system.output.value.numel() :], [grad.numel() for grad in of.system.gradients])
    assert [not bool(part.any()) for part in parts] == curved
    assert of.system.movable_rows == sum(
        layer.gradient_rows for layer, moves in zip(of.system.layers, curved, strict=True) if moves
    )


@every_system
def test_a_dense_factor_and_products_take_the_same_step(name: str, samples: int) -> None:
    of = case(name, samples)
    at = of.near()
    jacobian = Jacobian(of.system, at, {})
    residual = jacobian.weighted(of.system.residual(at))
    by = Regulariser(Prior((2, 4, 4), 0.5), 0.5, 1e-2, last=False)
    dense = Direct().step(jacobian, residual, at.x, by)
    found = Iterative(rtol=1e-12, max_steps=3000).step(jacobian, residual, at.x, by)
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-6)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", ["chain", "a skip", "strided chain"])
def test_both_solvers_tell_the_rank_and_the_error_of_the_dense_rows(name: str, samples: int) -> None:
    of = case(name, samples)
    jacobian = Jacobian(of.system, of.system.linearise(of.x), {})
    dense = jacobian.to_dense()
    noise = of.draw(1, len(dense), seed=5)
    sigma = torch.linalg.svdvals(dense)
    rank = int((sigma > 1e-6 * sigma[0]).sum())
    moved = torch.linalg.pinv(dense, rtol=1e-6) @ noise[0]
    direct = Direct(1e-6).determine(jacobian, noise)
    assert direct.rank == rank
    assert direct.std == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-3)
    iterative = Iterative(rtol=1e-9, probe_rtol=1e-10).determine(jacobian, noise)
    assert (iterative.rank == jacobian.unknowns) == (rank == jacobian.unknowns)
    if rank == jacobian.unknowns:
        assert iterative.std == pytest.approx(direct.std, rel=1e-2)
        assert iterative.condition == pytest.approx(float(sigma[0] / sigma[-1]), rel=0.2)


@every_system
def test_the_least_certain_units_are_those_nearest_to_their_kinks(name: str, samples: int) -> None:
    of = case(name, samples)
    at = of.near()
    found = least_certain(of.system, at, 5)
    assert sum(int(mask.sum()) for mask in found.values()) == 5
    distances, chosen = [], []
    for node, mask in found.items():
        z = at.values[of.system.network.nodes[node].reads[0]]
        assert mask.shape == z.shape
        distances.append((z.abs() / z.square().mean().sqrt()).flatten())
        chosen.append(mask.flatten())
    every, taken = torch.cat(distances), torch.cat(chosen)
    assert float(every[taken].max()) <= float(every[~taken].min())
    assert changed_sides(of.system, at, at) == 0
    turned = {node: torch.where(found[node], 1.2 - slope, slope) if node in found else slope
              for node, slope in at.slopes.items()}  # fmt: skip
    assert 0 < changed_sides(of.system, at, of.system.with_slopes(at, turned)) <= 5


@every_system
def test_a_value_that_is_not_known_has_no_row(name: str, samples: int) -> None:
    of = case(name, samples)
    output = of.system.output
    weight = torch.ones_like(output.value)
    weight.view(-1)[:2] = 0.0
    gradients = dict(zip((layer.weight_name for layer in of.system.layers), of.system.gradients, strict=True))
    system = ConstraintSystem(
        of.system.network, State(output.value, output.cotangent, weight, output.std), gradients, EPS
    )
    rows = Jacobian(system, system.linearise(of.x), {}).mv(of.draw(1, *of.x.shape, seed=3))
    assert not bool(rows[0, :2].any())
    assert system.weight_rows == output.value.numel() - 2
