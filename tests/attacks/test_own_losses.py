"""Losses that rgap does not know, each one class here, through capture and every kind of attack."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import rgap
from rgap import attacks, losses
from rgap.attacks import Status


@dataclass(frozen=True)
class Huber(losses.Loss):
    """Of one output and any real label."""

    delta: float = 1.0
    outputs = 1
    labels = ()

    def per_sample(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.huber_loss(outputs[:, 0], labels.to(outputs), reduction="none", delta=self.delta)


@dataclass(frozen=True)
class Poisson(losses.Loss):
    """Counts of 1 for the class and 0 for all others, whose logarithms the model gives."""

    outputs: int = 3

    @property
    def labels(self) -> tuple[float, ...]:
        return tuple(map(float, range(self.outputs)))

    def per_sample(self, outputs: Tensor, labels: Tensor) -> Tensor:
        wanted = torch.eye(self.outputs, dtype=outputs.dtype, device=outputs.device)[labels.long()]
        return (outputs.exp() - wanted * outputs).mean(1)


@dataclass(frozen=True)
class MultiMargin(losses.Loss):
    """Every other class is to stay behind the right one by 1."""

    outputs = 4
    labels = (0.0, 1.0, 2.0, 3.0)

    def per_sample(self, outputs: Tensor, labels: Tensor) -> Tensor:
        own = torch.eye(4, dtype=outputs.dtype, device=outputs.device)[labels.long()]
        behind = 1 - (own * outputs).sum(1, keepdim=True) + outputs
        return ((1 - own) * behind.clamp(min=0) ** 2).sum(1) / 4


@dataclass(frozen=True)
class ModifiedHuber(losses.MarginLoss):
    """The squared hinge, straight below -1."""

    def value(self, mu: Tensor) -> Tensor:
        return torch.where(mu < -1, -4 * mu, (1 - mu).clamp(min=0) ** 2)


OWN: dict[str, tuple[losses.Loss, float]] = {
    "huber": (Huber(), 0.3), "poisson": (Poisson(), 1.0), "multi-margin": (MultiMargin(), 2.0),
    "modified-huber": (ModifiedHuber(), -1.0),
}  # fmt: skip
every_loss = pytest.mark.parametrize("name", OWN)
with_and_without = pytest.mark.parametrize("bias", [True, False])


def client(name: str, bias: bool, dtype: torch.dtype = torch.float64) -> tuple[rgap.Target, rgap.Update, Tensor]:
    """A convolution and a Linear layer, and the gradient of one sample."""
    loss, label = OWN[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(96, loss.outputs, bias=bias)
        )
        x = torch.rand(1, 1, 6, 6, dtype=dtype)
    target = rgap.Target(model.to(dtype).eval(), loss, (1, 6, 6), (0.0, 1.0))
    return target, rgap.capture(target, x, torch.tensor([label])), x


@every_loss
def test_a_loss_is_called_by_its_class(name: str) -> None:
    target, update, _ = client(name, bias=True)
    assert target.loss.name == update.header.loss == name
    assert rgap.preflight(target, update).passed


@every_loss
@with_and_without
@pytest.mark.parametrize("attack", [attacks.Recursive(), attacks.Closed()], ids=lambda attack: attack.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_closed_form_is_exact(name: str, bias: bool, attack: attacks.Attack, dtype: torch.dtype) -> None:
    target, update, x = client(name, bias, dtype)
    found = attack(target, update)
    if name == "huber" and not bias:
        assert found.status is Status.NOT_CONVERGED
        assert "under the huber loss" in found.reason
        return
    assert found.status is Status.EXACT, found.reason
    torch.testing.assert_close(found.inputs, x.double(), rtol=0, atol=1e-9 if dtype == torch.float64 else 1e-2)
    assert float(found.labels[0]) == pytest.approx(OWN[name][1], abs=1e-4)


@every_loss
def test_a_bias_behind_the_input_gives_it_away(name: str) -> None:
    loss, label = OWN[name]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, loss.outputs)).eval()
        x = torch.rand(1, 1, 6, 6)
    target = rgap.Target(model, loss, (1, 6, 6), (0.0, 1.0))
    found = attacks.Bias()(target, rgap.capture(target, x, torch.tensor([label])))
    assert found.status is Status.EXACT, found.reason
    torch.testing.assert_close(found.inputs, x.double(), rtol=0, atol=1e-5)


@every_loss
def test_an_attack_by_optimisation_comes_near(name: str) -> None:
    target, update, _ = client(name, bias=True)
    attack = attacks.IDLG(iterations=60, restarts=1)
    if name == "huber":
        assert "huber" in str(attack.obstacle(target, 1)) or float(attack(target, update).labels[0]) == pytest.approx(
            0.3
        )
        return
    found = attack(target, update)
    assert float(found.labels[0]) == OWN[name][1]
    assert found.gradient_residual < 0.5


def test_a_label_that_the_gradient_leaves_open_is_said_to_be_one_of_several() -> None:
    """Far from the output the slope of Huber's loss is the same for all labels; the input is found all the same."""
    target, _, x = client("huber", bias=True)
    found = attacks.Recursive()(target, rgap.capture(target, x, torch.tensor([9.0])))
    torch.testing.assert_close(found.inputs, x, rtol=0, atol=1e-9)
    assert any("one of several" in said for said in found.assumptions)
    here = attacks.Recursive()(*client("huber", bias=True)[:2])
    assert not any("one of several" in said for said in here.assumptions)
