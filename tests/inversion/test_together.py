"""A block's input from all its constraints at once, without a matrix: against the dense rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, capture, losses
from rgap.attacks import Recursive, Status
from rgap.inversion import together
from rgap.inversion.state import Observation, State
from rgap.inversion.together import Constraints
from rgap.nn.network import Network
from tests.nn.modules import Shifted, Skip, norm

EPS = torch.finfo(torch.float64).eps


def conv(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, 1)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "one channel inside": lambda: Skip(nn.Sequential(conv(4, 1), nn.LeakyReLU(0.2), conv(1, 4)), act=nn.LeakyReLU(0.2)),
    "no activation inside": lambda: Skip(nn.Sequential(conv(4, 2), conv(2, 4)), act=nn.ELU()),
    "three layers inside": lambda: Skip(
        nn.Sequential(conv(4, 2), nn.Tanh(), conv(2, 2), nn.Tanh(), conv(2, 4)), act=nn.LeakyReLU(0.2)
    ),
    "batch norm in front": lambda: Skip(nn.Sequential(norm(4), nn.ELU(), conv(4, 2), nn.ELU(), conv(2, 4))),
    "gelu inside": lambda: Skip(nn.Sequential(conv(4, 2), nn.GELU(), conv(2, 4))),
    "a 1 x 1 shortcut": lambda: Skip(nn.Sequential(conv(4, 2), nn.ELU(), conv(2, 5)), nn.Conv2d(4, 5, 1)),
    "constants on the way around": lambda: Skip(nn.Sequential(conv(4, 1), nn.ELU(), conv(1, 4)), Shifted(4, 4, 4)),
    "a narrow block in a block": lambda: Skip(Skip(nn.Sequential(conv(4, 1), nn.ELU(), conv(1, 4))), act=nn.ELU()),
}
every_block = pytest.mark.parametrize("name", BLOCKS)


class Case:
    """A block between a convolution and a Linear layer, one sample, and what is known of the block's output."""

    def __init__(self, block: Callable[[], nn.Module], head: int = 3):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = block()
            count = made(torch.zeros(1, 4, 4, 4)).numel()
            stem = nn.Sequential(nn.Conv2d(2, 4, 3, 1, 1), nn.LeakyReLU(0.2))
            model = nn.Sequential(stem, made, nn.Flatten(), nn.Linear(count, head)).double().eval()
        self.x = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.target = Target(model, losses.CrossEntropy(head), (2, 4, 4), (0.0, 1.0))
        self.update = capture(self.target, self.x, torch.tensor([1.0]))
        gradients = {name: grad.double()[None] for name, grad in self.update.gradients.items()}
        self.given = Observation(gradients, EPS, 1e-9)
        whole = self.target.network
        segment = next(each for each in whole.segments if each.block)
        values = whole.forward(self.x)
        label = torch.tensor([1.0], dtype=torch.float64)
        k = self.target.loss.output_gradient(values[-1], label)
        ks = whole.vjp(values, whole.slopes(values), {len(values) - 1: k})
        self.inside: Network = whole.part([segment])
        self.truth = values[segment.entry]
        known = ks[segment.exit]
        assert known is not None
        y = values[segment.exit]
        self.front = State(y, known, None, torch.full_like(y, 1e-15))

    def rows(self, with_gradients: bool = True) -> Constraints:
        return Constraints(self.inside, self.given, self.front, with_gradients)


@every_block
@pytest.mark.parametrize("with_gradients", [True, False])
def test_adjoint_is_that_of_forward(name: str, with_gradients: bool) -> None:
    case = Case(BLOCKS[name])
    rows = case.rows(with_gradients)
    generator = torch.Generator().manual_seed(2)
    rows.at(torch.randn(case.truth.shape, generator=generator, dtype=torch.float64))
    move = torch.randn(case.truth.shape, generator=generator, dtype=torch.float64)
    side = torch.randn(len(rows.misses()), generator=generator, dtype=torch.float64)
    pushed, pulled = rows.forward(move), rows.adjoint(side)
    assert pulled.shape == move.shape
    torch.testing.assert_close(pushed @ side, (move * pulled).sum(), rtol=1e-10, atol=1e-10 * float(pushed.norm()))


@every_block
def test_forward_is_how_the_outputs_and_gradients_move(name: str) -> None:
    """But for k, which is held: the gradient rows are linear in what the layers read."""
    case = Case(BLOCKS[name])
    rows = case.rows(False)
    generator = torch.Generator().manual_seed(3)
    at, move = (torch.randn(case.truth.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    rows.at(at)
    _, expected = torch.func.jvp(lambda x: case.inside.forward(x)[-1], (at,), (move,))
    torch.testing.assert_close(rows.forward(move), expected.flatten(), rtol=1e-10, atol=1e-10)


@every_block
def test_nothing_is_missed_at_the_true_input(name: str) -> None:
    case = Case(BLOCKS[name])
    rows = case.rows()
    rows.at(case.truth)
    assert rows.misfit() < 1e-10
    wrong = case.rows()
    wrong.at(case.truth + 0.1)
    assert wrong.misfit() > 1e-3


@every_block
def test_narrow_blocks_are_recovered_from_near_by(name: str) -> None:
    case = Case(BLOCKS[name])
    found = together.solve(case.inside, case.given, case.front, case.truth + 0.01)
    assert isinstance(found, together.Found), found
    assert float((found.x - case.truth).abs().max()) < 1e-8
    assert 0 < float(found.error) < 1e-8
    assert {report.name for report in found.reports.values()} <= {layer.name for layer in case.inside.layers}
    for report in found.reports.values():
        assert report.method == "together"
        assert max(report.weight_residual, report.gradient_residual) < 1e-8


@every_block
def test_narrow_blocks_are_recovered_by_the_attack_or_it_is_said_why(name: str) -> None:
    case = Case(BLOCKS[name])
    found = Recursive()(case.target, case.update)
    if found.status is Status.EXACT:
        assert float((found.inputs - case.x).abs().max()) < 1e-6
    else:
        assert found.reason


def test_what_contradicts_the_block_is_not_taken_for_an_input() -> None:
    case = Case(BLOCKS["one channel inside"])
    y = case.front.value + torch.randn(
        case.front.value.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    front = State(y, case.front.cotangent, None, case.front.std)
    found = together.solve(case.inside, case.given, front, case.truth)
    assert isinstance(found, str)
    assert "was not found from all its constraints together, misfit" in found


def test_values_that_are_not_known_do_not_matter() -> None:
    case = Case(BLOCKS["one channel inside"])
    weight = torch.ones_like(case.front.value)
    weight[0, 0, 0, 0] = 0.0
    y = torch.where(weight > 0, case.front.value, 1e3)
    rows = Constraints(case.inside, case.given, State(y, case.front.cotangent, weight, case.front.std), True)
    rows.at(case.truth)
    assert rows.misfit() < 1e-10


def dense(rows: Constraints, like: Tensor) -> Tensor:
    """The rows, column by column."""
    units = torch.eye(like.numel(), dtype=torch.float64).reshape(-1, *like.shape)
    return torch.stack([rows.forward(unit) for unit in units], 1)


def test_directions_that_no_row_sees_are_not_called_determined() -> None:
    """Behind a stride the output has a quarter of the values, and a 1 x 1 shortcut reads a quarter of the input."""
    block = lambda: Skip(nn.Sequential(nn.Conv2d(4, 1, 1), conv(1, 4, 2)), nn.Conv2d(4, 4, 1, 2))  # noqa: E731
    case = Case(block)
    rows = case.rows()
    rows.at(case.truth)
    matrix = dense(rows, case.truth)
    assert int(torch.linalg.matrix_rank(matrix / matrix.norm(dim=1, keepdim=True).clamp(min=1e-300))) < 64
    found = together.refine(rows, case.truth)
    assert isinstance(found, str)
    assert "leave directions of its input open" in found


def test_an_input_that_is_not_determined_is_not_called_exact() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(20)
        inner = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 3, 3, 2, 1))
        model = nn.Sequential(Skip(inner, nn.Conv2d(3, 3, 1, 2)), nn.Flatten(), nn.Linear(12, 4)).double()
    x = torch.rand(1, 3, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = Target(model, losses.CrossEntropy(4), (3, 3, 3), (0.0, 1.0))
    found = Recursive()(target, capture(target, x, torch.tensor([1.0])))
    assert found.status is not Status.EXACT or float((found.inputs - x).abs().max()) < 1e-6
