"""The joint solve: its normal equations, what it recovers, and what it says of what it cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from rgap import Target, capture, data, losses, models, score
from rgap.attacks import Answer, Closed, Recursive, Status, Virtual
from rgap.inversion.gauss_newton import Continuation
from rgap.inversion.joint import JointSolve
from rgap.linalg.operator import LinearOperator
from rgap.nn.obstacles import NotAChain
from tests.nn.modules import Skip, norm

LOSS = losses.Logistic()


def narrow(activation: nn.Module, bias: bool = False, seed: int = 0, size: int = 12) -> Target:
    """A network whose second convolution leaves its input open, while the image behind it is determined."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 4, 2, 2, bias=bias), activation,
            nn.Conv2d(6, 4, 3, 2, 1, bias=bias), activation,
            nn.Conv2d(4, 24, 3, 1, 1, bias=bias), activation,
            nn.Flatten(), nn.LazyLinear(1, bias=bias),
        )  # fmt: skip
        model(torch.zeros(1, 1, size, size))
    return Target(model.double(), LOSS, (1, size, size), (0.0, 1.0))


def test_a_joint_solve_goes_on_until_only_rounding_is_left() -> None:
    """The first photograph has a unit that changes its side at the last step: the gradient agrees to 2e-5 there, which
    is near enough to stop and a hundred times the rounding. The estimated error must be the true one, about."""
    target = Target(models.cnn6_d(), LOSS, (3, 32, 32), (0.0, 1.0))
    truth = data.photographs(1).inputs
    found = Virtual()(target, capture(target, truth, torch.tensor([-1.0])))
    assert found.status is Status.EXACT
    assert found.answers[0].joint is not None
    assert_tells_its_error(found.answers[0], truth)


def assert_tells_its_error(answer: Answer, truth: torch.Tensor) -> None:
    error = float((answer.inputs.double() - truth[0].double()).square().mean().sqrt())
    assert error / 3 < answer.error < 10 * error


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.2), nn.ELU(), nn.Softplus(), nn.Tanh(), nn.Sigmoid()], ids=str)
def test_what_the_recursion_leaves_open_is_recovered(activation: nn.Module, bias: bool) -> None:
    target = narrow(activation, bias)
    x = data.photographs(1, 12, channels=1).inputs.double()
    update = capture(target, x, torch.tensor([1.0]))
    alone = Recursive()(target, update)
    assert alone.status is Status.RANK_DEFICIENT
    found = Virtual()(target, update)
    assert found.status is Status.EXACT, found
    assert score(found, x).mse[0] < 1e-12 < score(alone, x).mse[0]
    joint = found.answers[0].joint
    assert joint is not None
    assert joint.free == 0
    assert joint.layers == ("0", "2")
    # A prior that was of help is told.
    assert (joint.prior is not None) == any("neighbouring values" in assumption for assumption in found.assumptions)


@pytest.mark.parametrize("seed", range(8))
def test_units_settle_on_their_sides_in_a_few_steps(seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first, second = nn.Conv2d(3, 3, 2, 1, 1, bias=False), nn.Conv2d(3, 7, 3, 2, bias=False)
        head = nn.Linear(112, 1, bias=False)
    model = nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), nn.Flatten(), head).double()
    target, x = Target(model, LOSS, (3, 9, 9), (0.0, 1.0)), data.photographs(8, 9).inputs[[seed]].double()
    found = Closed()(target, capture(target, x, torch.ones(1)))
    assert found.status is Status.EXACT, found
    assert score(found, x).mse[0] < 1e-20
    joint = found.answers[0].joint
    assert joint is not None
    assert joint.steps <= 20


def test_a_full_rank_network_is_left_to_the_recursion() -> None:
    target = Target(
        nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 1)).double(), LOSS, (1, 3, 3)
    )
    x = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    update = capture(target, x, torch.tensor([1.0]))
    assert torch.equal(Virtual()(target, update).inputs, Recursive()(target, update).inputs)


def test_free_dimensions_are_counted_and_never_called_exact() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3, 2, bias=False), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(50, 1))
    target = Target(model.double(), LOSS, (1, 12, 12), (0.0, 1.0))
    x = data.photographs(1, 12, channels=1).inputs.double()
    found = Virtual()(target, capture(target, x, torch.tensor([1.0])))
    assert found.status is Status.RANK_DEFICIENT
    # [W; K] by brute force, one column for each pixel.
    network, units = target.network, torch.eye(144, dtype=torch.float64).reshape(144, 1, 144)
    layer = network.layers[0]
    values = network.forward(x)
    cotangents = network.vjp(values, network.slopes(values), {len(values) - 1: torch.ones_like(values[-1])})
    assert cotangents[1] is not None
    k = layer.pack_output(cotangents[1])
    rows = torch.cat([layer.output(units).flatten(1), layer.grad_weight(units, k.expand(144, -1, -1)).flatten(1)], 1)
    joint = found.answers[0].joint
    assert joint is not None
    assert joint.free == 144 - int(torch.linalg.matrix_rank(rows)) > 0
    # The prior fills what is free: the answer satisfies every constraint, and looks like the sample.
    assert found.gradient_residual < 1e-6
    assert score(found, x).mse[0] < 0.05


def test_a_solve_too_large_for_memory_is_left_with_its_size() -> None:
    target = narrow(nn.Sigmoid())  # near its bounds virtual constraints tell nothing
    x = data.photographs(1, 12, channels=1).inputs.double()
    update = capture(target, x, torch.tensor([1.0]))
    found = Virtual(solver="direct", joint=JointSolve(largest=100))(target, update)
    assert found.status is Status.RANK_DEFICIENT
    assert "dense matrices of 144 unknowns" in found.reason
    assert "more than is solved (largest=100)" in found.reason
    assert torch.equal(found.inputs, Recursive()(target, update).inputs)


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.2), nn.Tanh()])
def test_both_solvers_lead_to_the_picture(activation: nn.Module) -> None:
    target = narrow(activation, size=8)
    truth = data.photographs(1, 8, channels=1).inputs.double()
    update = capture(target, truth, torch.tensor([1.0]))
    for solver in ("direct", "iterative"):
        found = Closed(solver=solver)(target, update)  # type: ignore[arg-type]
        assert found.status is Status.EXACT, found
        assert score(found, truth).mse[0] < 1e-14
        joint = found.answers[0].joint
        assert joint is not None
        assert joint.rank == 64


def test_what_all_rows_leave_free_is_counted_by_a_factor() -> None:
    """Drawn directions that do not come back only say that something is free."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 2, 4, 2, 2, bias=False), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(98, 1, bias=False)
        )
    target = Target(model.double(), LOSS, (1, 12, 12), (0.0, 1.0))
    truth = data.photographs(1, 12, channels=1).inputs.double()
    update = capture(target, truth, torch.tensor([1.0]))
    exact = Closed(solver="direct")(target, update)
    few = Continuation(max_steps=3)  # linearisations: what is free does not depend on how far they come
    counted = Closed(solver="iterative", joint=JointSolve(few))(target, update)
    drawn = Closed(solver="iterative", joint=JointSolve(few, counted=0))(target, update)
    joints = [found.answers[0].joint for found in (exact, counted, drawn)]
    ranks = [joint.rank for joint in joints if joint is not None]
    # Not the same inputs: a unit on its other side is a row or two more.
    assert abs(ranks[0] - ranks[1]) <= 2
    assert max(ranks) < 144
    assert {found.status for found in (exact, counted, drawn)} == {Status.RANK_DEFICIENT}


def forbid_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    def gram(self: LinearOperator) -> torch.Tensor:
        raise AssertionError("a dense matrix was formed")

    monkeypatch.setattr(LinearOperator, "gram", gram)


def test_a_large_chain_is_solved_jointly_without_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_matrices(monkeypatch)
    target = Target(models.cnn6_d(1, 32), LOSS, (1, 32, 32), (0.0, 1.0))
    truth = data.photographs(1, 32, channels=1).inputs
    found = Closed(solver="iterative")(target, capture(target, truth, torch.tensor([1.0])))
    assert found.status is Status.EXACT, found
    assert score(found, truth).mse[0] < 1e-8
    assert_tells_its_error(found.answers[0], truth)


def test_a_chain_with_batch_norm_is_solved_jointly_without_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_matrices(monkeypatch)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 4, 2, 2, bias=False), norm(6), nn.LeakyReLU(0.2),
            nn.Conv2d(6, 4, 3, 2, 1, bias=False), norm(4), nn.LeakyReLU(0.2),
            nn.Conv2d(4, 24, 3, 1, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(216, 1),
        ).double().eval()  # fmt: skip
    target = Target(model, LOSS, (1, 8, 8), (0.0, 1.0))
    truth = data.photographs(1, 8, channels=1).inputs.double()
    update = capture(target, truth, torch.tensor([1.0]))
    assert Recursive()(target, update).status is Status.RANK_DEFICIENT
    found = Closed(solver="iterative")(target, update)
    assert found.status is Status.EXACT, found
    assert score(found, truth).mse[0] < 1e-12


def test_a_rank_deficient_residual_block_is_solved_with_a_prior_and_without_a_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its own constraints leave its input open; with those of the layer in front and the prior a picture comes out."""
    forbid_matrices(monkeypatch)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = Skip(nn.Sequential(nn.Conv2d(4, 2, 3, 2, 1), nn.ELU()), nn.Conv2d(4, 2, 1, 2), nn.LeakyReLU(0.2))
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, 1, 1), nn.LeakyReLU(0.2), block, nn.Flatten(), nn.Linear(2 * 16, 4)
        ).double()
    target = Target(model, losses.CrossEntropy(4), (1, 8, 8), (0.0, 1.0))
    across = torch.linspace(0, 3, 8, dtype=torch.float64)
    truth = (0.5 + 0.4 * torch.sin(across)[:, None] * torch.cos(across))[None, None]
    update = capture(target, truth, torch.tensor([2.0]))
    assert Recursive()(target, update).answers == ()
    found = Closed(solver="iterative", joint=JointSolve(counted=0))(target, update)
    [answer] = found.answers
    assert answer.joint is not None
    assert "neighbouring values" in answer.joint.prior
    assert found.gradient_residual < 1e-6
    assert score(found, truth).mse[0] < 0.02


@pytest.mark.parametrize(
    "pool",
    [nn.AvgPool2d(2), nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ELU(), nn.AvgPool2d(2)), nn.AvgPool2d(3, 2, 1)],
)
def test_a_smooth_picture_behind_a_pool_is_recovered(pool: nn.Module) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stem = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.ELU(), pool)
        model = nn.Sequential(stem, nn.Flatten(), nn.Linear(8 * 16, 4)).double()
    across = torch.linspace(0, 3, 8, dtype=torch.float64)
    x = (0.5 + 0.4 * torch.sin(across)[:, None] * torch.cos(across))[None, None]
    target = Target(model, losses.CrossEntropy(4), (1, 8, 8), (0.0, 1.0))
    update = capture(target, x, torch.tensor([2.0]))
    assert Recursive()(target, update).answers == ()
    found = Closed()(target, update)
    assert found.status is Status.EXACT, found
    assert float((found.inputs - x).abs().max()) <= 1e-6
    [answer] = found.answers
    assert answer.joint is not None
    assert answer.joint.free == 0


class Behind(nn.Module):
    """Something of its own behind the last layer."""

    def __init__(self, end: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(6, 9), nn.Linear(9, 3), nn.Parameter(torch.tensor(1.5))
        self.end = end

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.last(torch.tanh(self.first(x))), self.scale)


@pytest.mark.parametrize(
    "end", [lambda z, s: s.exp() * z, lambda z, s: z / 0.07, lambda z, s: 2.5 * z, lambda z, s: z + 0.5 * s]
)
def test_what_scales_the_outputs_is_named_as_the_cause(
    end: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    target = Target(Behind(end).eval(), losses.CrossEntropy(3), (6,))
    update = capture(target, torch.rand(1, 6), torch.tensor([1.0]))
    with pytest.raises(NotAChain, match="scales or shifts a layer's outputs belongs into its weights") as refused:
        Closed()(target, update)
    assert "the recursion passes it" not in str(refused.value)
    assert "belongs into its weights" in str(Closed().obstacle(target, 1))


def of_slopes(slopes: list[float]) -> nn.PReLU:
    part = nn.PReLU(len(slopes))
    with torch.no_grad():
        part.weight.copy_(torch.tensor(slopes))
    return part


@pytest.mark.parametrize(
    "part",
    [
        lambda: of_slopes([0.25]),
        lambda: of_slopes([0.05] * 8),
        lambda: of_slopes([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0, 1.5]),
        lambda: nn.RReLU(),
    ],
)
def test_prelu_and_rrelu_are_passed(part: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    front = (nn.Conv2d(1, 8, 3, 2, 1), part(), nn.Conv2d(8, 8, 3, 1, 1), part())
    target = Target(nn.Sequential(*front, nn.Flatten(), nn.Linear(128, 3)).eval(), losses.CrossEntropy(3), (1, 8, 8))
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = Recursive()(target, capture(target, x, torch.tensor([1.0])))
    assert found.status is Status.EXACT
    torch.testing.assert_close(found.inputs.float(), x, rtol=0, atol=1e-4)


def test_prelu_is_passed_with_layers_solved_jointly() -> None:
    torch.manual_seed(0)
    front = (nn.Conv2d(1, 6, 3, 2, 1), of_slopes([0.2, 0.3, 0.4, 0.5, 0.6, 0.7]), nn.Conv2d(6, 2, 3, 2, 1))
    behind = (of_slopes([0.2, 0.3]), nn.Flatten(), nn.Linear(8, 3))
    target = Target(nn.Sequential(*front, *behind).eval(), losses.CrossEntropy(3), (1, 8, 8))
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = Closed()(target, capture(target, x, torch.tensor([1.0])))
    assert found.status is Status.EXACT
    assert found.answers[0].joint is not None
    torch.testing.assert_close(found.inputs.float(), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("slopes", [[0.1, 0.2, 0.3, 0.4], [-0.2], [0.0], [0.1, -0.2, 0.3, 0.4]])
def test_prelu_computes_what_torch_does(slopes: list[float]) -> None:
    """With slopes that keep no order too, which no closed form passes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), of_slopes(slopes), nn.Linear(4, 3)).eval()
    target, x = Target(model, losses.CrossEntropy(3), (6,)), torch.randn(5, 6)
    torch.testing.assert_close(target.network.forward(x.double())[-1].flatten(1), model(x).double(), rtol=0, atol=1e-5)
    assert "prelu" in str(target.obstacles[0])
