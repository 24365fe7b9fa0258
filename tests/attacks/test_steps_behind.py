"""One epoch of local steps through convolutions, from the public attack."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rgap import Protocol, Target, Update, attacks, capture, losses
from rgap.attacks import Status
from rgap.attacks.result import Reconstruction
from rgap.inversion import front_steps
from rgap.protocol import Sends

SHAPE = (1, 5, 5)


def client(front: list[nn.Module], rate: float = 0.1, **more: float) -> tuple[Target, Update, Tensor, Tensor]:
    """Five samples in steps of two, float32."""
    torch.manual_seed(0)
    width = nn.Sequential(*front, nn.Flatten())(torch.zeros(1, *SHAPE)).shape[1]
    model = nn.Sequential(*front, nn.Flatten(), nn.Linear(width, 40), nn.LeakyReLU(0.2), nn.Linear(40, 10))
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.rand(5, *SHAPE, generator=generator), torch.tensor([3.0, 1.0, 4.0, 0.0, 5.0])
    protocol = Protocol(Sends.DIFFERENCE, learning_rate=rate, epochs=1, minibatch=2, **more)  # type: ignore[arg-type]
    target = Target(model, losses.CrossEntropy(10), SHAPE, (0.0, 1.0), batch_size=5)
    return target, capture(target, x, labels, protocol), x, labels


def chain(activation: type[nn.Module] = nn.LeakyReLU) -> list[nn.Module]:
    torch.manual_seed(2)
    return [nn.Conv2d(1, 6, 3, 1, 1), activation(), nn.Conv2d(6, 8, 3, 1, 1, bias=False), activation()]


def distances(found: Reconstruction, x: Tensor) -> Tensor:
    """Root mean square, from each answer to each sample."""
    return (found.inputs.flatten(1)[:, None] - x.double().flatten(1)).square().mean(2).sqrt()


@pytest.mark.parametrize("more", [{}, {"weight_decay": 5e-4}])
def test_every_sample_comes_back(more: dict[str, float]) -> None:
    target, update, x, labels = client(chain(), **more)
    found = attacks.Closed()(target, update)
    assert found.status is Status.EXACT, found.reason
    assert [len(members) for members in found.steps] == [2, 2, 1]
    off, which = distances(found, x).min(1)
    assert sorted(which.tolist()) == list(range(5))
    assert float(off.max()) < 1e-3
    assert found.labels.tolist() == labels[which].tolist()
    for sample, error in zip(found.samples, off.tolist(), strict=True):
        assert error < 5 * sample.error


def test_a_difference_of_which_a_layer_is_another_ones_is_not_certified() -> None:
    target, update, _, _ = client(chain())
    generator = torch.Generator().manual_seed(0)
    conv = update.gradients["0.weight"]
    other = torch.randn(conv.shape, generator=generator) * conv.std()
    found = attacks.Closed()(target, replace(update, gradients={**update.gradients, "0.weight": other}))
    assert found.status is not Status.EXACT
    assert not any(sample.status is Status.EXACT for sample in found.samples)


def test_behind_a_pool_labels_features_and_steps_are_what_is_told() -> None:
    target, update, x, labels = client([nn.Conv2d(1, 8, 3, 1, 1), nn.MaxPool2d(2, 1), nn.Tanh()])
    found = attacks.Closed()(target, update)
    assert found.status is Status.PARTIAL
    assert "the pool 1 is not passed" in found.reason
    assert found.features is not None
    assert sorted(found.features.labels.tolist()) == sorted(labels.tolist())
    assert [len(members) for members in found.steps] == [2, 2, 1]
    # At the weights before the first step the features of its samples are the model's own.
    model = target.model
    assert isinstance(model, nn.Sequential)
    own = model[:4](x).detach().double()
    first = found.features.values[list(found.steps[0])].flatten(1)
    assert float((first[:, None] - own).norm(dim=2).min(1).values.max() / own.norm(dim=1).mean()) < 1e-3


def test_many_steps_through_wide_layers_are_told_from_the_features_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_steps, "LARGEST", 1000)
    target, update, _, labels = client(chain())
    found = attacks.Closed()(target, update)
    assert found.status is Status.PARTIAL
    assert "billion numbers" in found.reason
    assert found.features is not None
    assert sorted(found.features.labels.tolist()) == sorted(labels.tolist())


def test_where_the_layers_behind_are_too_narrow_their_numbers_are_said() -> None:
    front = chain()
    width = nn.Sequential(*front, nn.Flatten())(torch.zeros(1, *SHAPE)).shape[1]
    model = nn.Sequential(*front, nn.Flatten(), nn.Linear(width, 6), nn.LeakyReLU(0.2), nn.Linear(6, 10))
    x, labels = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.arange(8.0)
    target = Target(model, losses.CrossEntropy(10), SHAPE, (0.0, 1.0), batch_size=8)
    protocol = Protocol(Sends.DIFFERENCE, learning_rate=0.1, epochs=1, minibatch=2)
    found = attacks.Closed()(target, capture(target, x, labels, protocol))
    assert found.bound is not None
    assert str(found.bound).startswith("from 5 on: ")
    assert "6" in str(found.bound)
