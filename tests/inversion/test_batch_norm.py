"""Back through batch norm in training mode: with its running statistics, and without."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rgap import Protocol, Target, Update, UpdateError, capture, losses
from rgap.attacks import Closed, Reconstruction, Status
from rgap.models.resnet import Block
from rgap.nn.obstacles import NotAChain
from rgap.protocol import Sends

SIZE, CHANNELS = 6, 12
"""Of the picture, and behind the first layer."""
SENT = {
    "gradient": Protocol(buffers=True),
    "difference": Protocol(Sends.DIFFERENCE, learning_rate=0.1, buffers=True),
}


def make_target(samples: int, *inner: nn.Module, momentum: float | None = 0.1) -> Target:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, CHANNELS, 3, 2, 1), nn.BatchNorm2d(CHANNELS, momentum=momentum), nn.LeakyReLU(0.2), *inner,
            nn.Flatten(), nn.Linear(CHANNELS * SIZE**2 // 4, 10),
        ).double()  # fmt: skip
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
                module.momentum = momentum
    return Target(model.train(), losses.CrossEntropy(10), (2, SIZE, SIZE), (0.0, 1.0), samples)


def attacked(target: Target, protocol: Protocol) -> tuple[Reconstruction, Tensor, Update]:
    samples = target.batch_size
    x = torch.rand(samples, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    update = capture(target, x, torch.arange(samples), protocol)
    return Closed()(target, update), x, update


@pytest.mark.parametrize("sent", SENT)
@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_with_statistics_every_sample_comes_back(samples: int, sent: str, momentum: float | None) -> None:
    found, x, _ = attacked(make_target(samples, momentum=momentum), SENT[sent])
    assert found.status is Status.EXACT, found
    near = torch.cdist(found.inputs.flatten(1), x.flatten(1)).min(0)
    assert float(near.values.max()) < 1e-5
    assert found.labels[near.indices].tolist() == list(range(samples))


@pytest.mark.parametrize(("samples", "sent"), [(1, "gradient"), (2, "difference"), (4, "gradient")])
def test_a_residual_block_is_passed(samples: int, sent: str) -> None:
    block = Block(CHANNELS, CHANNELS, activation=lambda: nn.LeakyReLU(0.2))
    found, x, _ = attacked(make_target(samples, block), SENT[sent])
    assert found.status is Status.EXACT, found
    near = torch.cdist(found.inputs.flatten(1), x.flatten(1)).min(0)
    assert float(near.values.max()) < 1e-5
    assert found.labels[near.indices].tolist() == list(range(samples))


@pytest.mark.parametrize("samples", [1, 2])
def test_in_a_block_the_rounding_of_running_statistics_does_not_count(samples: int) -> None:
    """Those of an untrained network in float32 tell a variance to four digits; the values tell it themselves."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = Block(CHANNELS, CHANNELS, activation=lambda: nn.LeakyReLU(0.2))
        model = nn.Sequential(
            *(nn.Conv2d(2, CHANNELS, 3, 2, 1), nn.LeakyReLU(0.2), block),
            *(nn.Flatten(), nn.Linear(CHANNELS * SIZE**2 // 4, 10)),
        )
        nn.init.uniform_(model[0].weight, -0.02, 0.02)
    target = Target(model.train(), losses.CrossEntropy(10), (2, SIZE, SIZE), (0.0, 1.0), samples)
    x = torch.rand(samples, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    update = capture(target, x, torch.arange(samples), SENT["gradient"])
    told = max(each.precision for each in target.batch_statistics(update.buffers, samples).values())
    found = Closed()(target, update)
    assert found.status is Status.EXACT, found
    near = torch.cdist(found.inputs.flatten(1), x.double().flatten(1)).min(0)
    error = float(near.values.max()) / x[0].numel() ** 0.5
    assert error < told / 100, (error, told)
    assert found.answers[0].error < told / 10


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_without_statistics_contrast_and_brightness_are_counted_as_free(samples: int) -> None:
    found, _, _ = attacked(make_target(samples), Protocol())
    assert found.status not in (Status.EXACT, Status.REPRODUCED)
    free = f"mean and size of {CHANNELS} channels free, {2 * CHANNELS} dimensions"
    assert f"batch_norm in training mode leaves {free}" in found.reason


@pytest.mark.parametrize("protocol", [SENT["gradient"], SENT["difference"]])
def test_a_file_keeps_the_buffers(protocol: Protocol, tmp_path: Path) -> None:
    target = make_target(2)
    _, _, update = attacked(target, protocol)
    update.save(tmp_path / "u")
    read = Update.load(tmp_path / "u", target)
    assert set(read.buffers) == {f"1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert all(torch.equal(read.buffers[name], t) for name, t in update.buffers.items())
    assert set(read.gradients) == set(target.parameters)
    assert read.header == update.header


@pytest.mark.parametrize("name", ["extra", "1.running_var", "0.weight"])
def test_buffers_of_another_model_are_refused(name: str) -> None:
    target = make_target(1)
    gradients = {each: torch.ones_like(p) for each, p in target.parameters.items()}
    with pytest.raises(UpdateError, match=rf"{name}: got a buffer of shape \(3,\), expected"):
        Update(gradients, buffers={name: torch.ones(3)}).check(target)


@pytest.mark.parametrize("fields", [{"steps": 2}, {"epochs": 3}, {"minibatch": 1, "epochs": 1}, {"clients": 2}])
def test_statistics_of_several_batches_are_not_taken_for_those_of_one(fields: dict[str, int]) -> None:
    target = make_target(2)
    protocol = Protocol(Sends.DIFFERENCE, learning_rate=0.1, buffers=True, **fields)  # type: ignore[arg-type]
    x = torch.rand(4 if "clients" in fields else 2, 2, SIZE, SIZE, dtype=torch.float64)
    update = capture(target, x, torch.arange(len(x)), protocol)
    assert set(update.buffers) == set(target.buffers)
    plain, _ = update.to_gradient(target)
    assert plain.with_batch(target) is target


ORDERS = {
    "norm first": lambda width, f: [nn.BatchNorm1d(width), f()],
    "activation first": lambda width, f: [f(), nn.BatchNorm1d(width)],
}


def table(
    samples: int, order: str, activation: Callable[[], nn.Module], sent: bool = True
) -> tuple[Target, Update, Tensor]:
    """Rows of a table, a perceptron with two batch norms, and what a client sends after a step in float32."""
    widths, between = (12, 40, 24), ORDERS[order]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = [[nn.Linear(*pair), *between(pair[1], activation)] for pair in itertools.pairwise(widths)]
        model = nn.Sequential(*itertools.chain(*inner), nn.Linear(24, 12)).train()
        x = torch.randn(samples, 12)
    target = Target(model, losses.CrossEntropy(12), (12,), batch_size=samples)
    return target, capture(target, x, torch.arange(samples), Protocol(buffers=sent)), x.double()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, lambda: nn.LeakyReLU(0.2)], ids=["relu", "tanh", "leaky"])
def test_rows_of_a_table_come_back(order: str, activation: Callable[[], nn.Module]) -> None:
    target, update, x = table(samples := 4, order, activation)
    found = Closed()(target, update)
    assert found.status is Status.EXACT, found
    near = torch.cdist(found.inputs, x).min(0)
    assert found.labels[near.indices].tolist() == list(range(samples))
    stated = max(sample.error for sample in found.samples)
    assert float(near.values.max()) / 12**0.5 < min(1e-3, 5 * stated)


def test_rows_of_which_some_are_the_same_stop_nothing() -> None:
    target, _, x = table(3, "norm first", nn.Tanh)
    same = x[[0, 0, 1]].float()
    found = Closed()(target, capture(target, same, torch.tensor([0, 0, 1]), Protocol(buffers=True)))
    assert found.status is not Status.EXACT
    assert found.features is not None
    assert "mixes all samples" in found.reason


def test_without_statistics_no_row_of_a_table_is_exact() -> None:
    target, update, _ = table(4, "norm first", nn.ReLU, sent=False)
    assert target.obstacles
    with pytest.raises(NotAChain, match="training mode"):
        Closed()(target, update)


@pytest.mark.parametrize(("samples", "bias"), [(1, True), (1, False), (2, True)])
def test_relu_behind_a_norm_hides_no_cotangent(samples: int, bias: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 12, 3, 2, 1, bias=bias), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 24, 3, 2, 1, bias=bias), nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten(),
            nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 10),
        ).train()  # fmt: skip
        x = torch.rand(samples, 2, 8, 8)
    target = Target(model, losses.CrossEntropy(10), (2, 8, 8), (0.0, 1.0), samples)
    found = Closed()(target, capture(target, x, torch.arange(samples), Protocol(buffers=True)))
    assert found.status is Status.EXACT, found
    assert float(torch.cdist(found.inputs.flatten(1), x.double().flatten(1)).min(0).values.max()) < 1e-3
