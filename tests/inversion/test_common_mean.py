"""The one move of a batch's inputs that a batch norm behind a layer hides, from the norm in front of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rgap import Protocol, Target, capture, losses
from rgap.inversion.common_mean import WithMean, common_mean, norm_before
from rgap.inversion.jacobian import Jacobian
from rgap.inversion.state import State
from rgap.inversion.system import ConstraintSystem
from rgap.nn.activation import Activation
from rgap.nn.activations import ELU, IDENTITY, LeakyReLU, PReLU, ReLU, Sigmoid, Softplus, Tanh
from rgap.nn.batch_norm import BatchNorm

ACTIVATIONS = [IDENTITY, ReLU(), LeakyReLU(0.2), PReLU(torch.tensor([0.1])), Tanh(), Sigmoid(), Softplus(), ELU(0.7)]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@settings(max_examples=20)
@given(samples=st.integers(2, 9), seed=st.integers(0, 1000), beta=st.floats(-3, 3))
def test_a_move_of_all_samples_is_undone(activation: Activation, samples: int, seed: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    y = y - y.mean(0) + beta  # ReLU's units are all active, some of them active, or none
    x = activation(y)
    moved = x + 2 * torch.randn(1, 6, generator=generator, dtype=torch.float64)
    one = torch.ones(1, 6, dtype=torch.float64)
    found = common_mean(moved, torch.zeros(1, dtype=torch.float64), BatchNorm("norm", one, one, beta=beta), activation)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def of_batch(*layers: nn.Module, samples: int = 4) -> Target:
    """A target whose norms are told by the running statistics of one batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*layers).double().train()
        x = torch.randn(samples, 3, dtype=torch.float64)
    target = Target(model, losses.CrossEntropy(2), (3,), batch_size=samples)
    update = capture(target, x, torch.zeros(samples), Protocol(buffers=True))
    return target.of_batch(update.buffers, update.gradients, samples)


@pytest.mark.parametrize(
    ("between", "behind", "told"),
    [
        ([nn.BatchNorm1d(5), nn.ReLU()], nn.BatchNorm1d(4), True),
        ([nn.BatchNorm1d(5)], nn.BatchNorm1d(4), True),
        ([nn.ReLU(), nn.BatchNorm1d(5)], nn.BatchNorm1d(4), True),
        ([nn.BatchNorm1d(5), nn.GELU()], nn.BatchNorm1d(4), False),
        ([nn.BatchNorm1d(5), nn.Hardtanh()], nn.BatchNorm1d(4), False),
        ([nn.BatchNorm1d(5), nn.ReLU()], nn.Tanh(), False),
        ([nn.ReLU()], nn.BatchNorm1d(4), False),
    ],
)
def test_only_a_norm_in_front_tells_what_one_behind_hides(
    between: list[nn.Module], behind: nn.Module, told: bool
) -> None:
    target = of_batch(nn.Linear(3, 5), *between, nn.Linear(5, 4), behind, nn.Linear(4, 2))
    node = next(at for at, each in enumerate(target.network.nodes) if each.op.name == str(1 + len(between)))
    assert (norm_before(target.network, node, 4) is not None) == told
    assert norm_before(target.network, node, 3) is None


def test_with_the_mean_nothing_is_open() -> None:
    target = of_batch(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), samples=3)
    generator = torch.Generator().manual_seed(1)
    x, k = (torch.randn(3, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    z = target.network.forward(x)[1]
    u = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
    sums = {**target.parameters, "1.weight": (k * u).sum(0), "1.bias": k.sum(0)}  # what the norm's cotangents hang on
    after = {"1.running_mean": 0.1 * z.mean(0), "1.running_var": 0.9 + 0.1 * z.var(0)}
    network = target.of_batch(after, sums, 3).network.up_to(2)
    values = network.forward(x)
    assert network.cotangents(values, {}, k)[1].sum(0).abs().max() < 1e-12  # type: ignore[union-attr]
    system = ConstraintSystem(network, State(values[2], k, None, torch.zeros_like(k)), sums, 1e-9)
    plain = Jacobian(system, system.linearise(x), {})
    both = WithMean(plain)
    matrices = [each.to_dense() for each in (plain, both)]
    rows = torch.randn(1, len(matrices[1]), generator=generator, dtype=torch.float64)
    torch.testing.assert_close(both.rmv(rows).flatten(), matrices[1].mT @ rows[0])
    # Of three inputs two outputs see two directions, of each sample, and the gradient the third's differences.
    assert [int(torch.linalg.matrix_rank(each, rtol=1e-9)) for each in matrices] == [8, 9]
