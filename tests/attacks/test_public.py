"""What an author of an attack needs is in `rgap.attacks`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from rgap import Target, Update, attacks, capture, losses
from rgap.attacks import Answer, Attack, BatchAttack, Outcome, Status, candidates, gradient_residual


@dataclass(frozen=True, eq=False)
class Guess(Attack):
    """An input of the server's own."""

    x: torch.Tensor

    def run(self, target: Target, update: Update) -> Outcome:
        labels = candidates(target, update)
        residual = gradient_residual(target, update, self.x, labels.labels[0])
        answer = Answer(self.x, labels.labels[0], math.nan, residual, math.nan)
        status = Status.REPRODUCED if residual <= update.tolerance else Status.NOT_CONVERGED
        return Outcome(status, f"gradient residual {residual:.1e}", (answer,), (labels.assumption,))


class Counting(BatchAttack):
    """Gives up on all updates at once."""

    def run_many(self, target: Target, updates: list[Update]) -> list[Outcome]:
        return [Outcome(Status.NOT_CONVERGED, f"one of {len(updates)}") for _ in updates]


@pytest.fixture
def case() -> tuple[Target, torch.Tensor, Update]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    target = Target(model, losses.Logistic(), (4,), (0.0, 1.0))
    x = torch.rand(1, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return target, x, capture(target, x, torch.tensor([1.0]))


def test_the_base_class_completes_an_outcome(case: tuple[Target, torch.Tensor, Update]) -> None:
    target, x, update = case
    right, wrong = Guess(x)(target, update), Guess(1 - x)(target, update)
    assert (right.status, wrong.status) == (Status.REPRODUCED, Status.NOT_CONVERGED)
    assert right.attack == "Guess"
    assert right.tolerance == update.tolerance
    assert right.value_range == (0.0, 1.0)
    assert right.preflight.passed
    assert right.seconds > 0
    assert torch.equal(right.inputs, x)


def test_an_attack_on_a_batch_of_updates_is_called_once(case: tuple[Target, torch.Tensor, Update]) -> None:
    target, _, update = case
    found = Counting().many(target, [update] * 3)
    assert [each.reason for each in found] == ["one of 3"] * 3
    assert len({each.seconds - found[0].seconds for each in found}) == 1
    assert Counting()(target, update).reason == "one of 1"
    assert Counting().many(target, []) == ()


def test_every_public_name_is_there() -> None:
    for name in attacks.__all__:
        assert getattr(attacks, name) is not None
