"""The simulated client against a plain training loop of torch, bit for bit; and what its steps add up to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rgap import Protocol, Target, capture, losses
from rgap.protocol import Optimiser, Sends

FRACTIONS = {"sgd": 0.05, "momentum": 0.05, "adam": 0.01, "adamw": 0.01}


def make_target(training: bool = True) -> Target:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 8), nn.Tanh(), nn.Linear(8, 4)
        )
    return Target(model.train(training), losses.CrossEntropy(4), (1, 5, 5), None, 7)


def batch(count: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 5, 5, generator=generator), torch.randint(4, (count,), generator=generator)


def by_hand(target: Target, x: Tensor, y: Tensor, fields: dict[str, Any]) -> dict[str, Tensor]:
    """What people write: a loop over epochs and a DataLoader with torch's optimiser, scheduler and clipping."""
    model = copy.deepcopy(target.model)
    before = [p.detach().clone() for p in model.parameters()]
    name, rate, decay = fields.get("optimiser", "sgd"), 0.05, fields.get("weight_decay", 0.0)
    optimiser: torch.optim.Optimizer
    if name in ("sgd", "momentum"):
        momentum = 0.9 if name == "momentum" else fields.get("momentum", 0.0)
        optimiser = torch.optim.SGD(
            model.parameters(), rate, momentum, weight_decay=decay, nesterov=fields.get("nesterov", False)
        )
    else:
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        optimiser = kind(model.parameters(), rate, weight_decay=decay)
    schedule = fields.get("schedule")
    factors = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda epoch: schedule[epoch] if schedule else 1.0)
    minibatch = fields.get("minibatch")
    loader = DataLoader(
        TensorDataset(x, y), minibatch or len(x), shuffle=minibatch is not None and fields.get("shuffled", True),
        drop_last=fields.get("drop_last", False), generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    for epoch in range(fields.get("epochs", 1)):
        for inputs, labels in loader:
            optimiser.zero_grad()
            loss = nn.CrossEntropyLoss(reduction="sum" if fields.get("summed") else "mean")(model(inputs), labels)
            if "proximal" in fields:
                apart = [(p - p0).square().sum() for p, p0 in zip(model.parameters(), before, strict=True)]
                loss = loss + fields["proximal"] / 2 * torch.stack(apart).sum()
            loss.backward()
            if "clip_norm" in fields:
                nn.utils.clip_grad_norm_(model.parameters(), fields["clip_norm"])
            optimiser.step()
        if schedule is None or epoch + 1 < len(schedule):
            factors.step()
    return {n: p.detach() - p0 for (n, p), p0 in zip(model.named_parameters(), before, strict=True)}


SETTINGS: list[dict[str, Any]] = [
    *[{"optimiser": kind, "epochs": 2, "minibatch": 3} for kind in ("sgd", "momentum", "adam", "adamw")],
    *[{"optimiser": kind, "epochs": 3, "weight_decay": 0.1} for kind in ("sgd", "momentum", "adam", "adamw")],
    *[{"minibatch": size, "drop_last": drop} for size in (1, 2, 7) for drop in (False, True)],
    {"epochs": 3, "minibatch": 3, "shuffled": False, "drop_last": True},
    {"epochs": 2, "minibatch": 2, "momentum": 0.5, "nesterov": True, "weight_decay": 0.01},
    {"epochs": 3, "minibatch": 3, "schedule": (1.0, 0.5, 0.1)},
    {"optimiser": "adam", "epochs": 3, "schedule": (0.1, 1.0, 2.0)},
    {"epochs": 2, "minibatch": 3, "clip_norm": 0.5},
    {"epochs": 2, "minibatch": 3, "clip_norm": 100.0, "proximal": 0.3},
    {"epochs": 3, "minibatch": 4, "proximal": 1.0, "momentum": 0.9, "weight_decay": 5e-4},
    {"epochs": 2, "minibatch": 3, "summed": True, "optimiser": "adamw"},
]


def named(fields: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())


def make_protocol(fields: dict[str, Any]) -> Protocol:
    return Protocol(
        Sends.DIFFERENCE, learning_rate=0.05, **fields | {"optimiser": Optimiser(fields.get("optimiser", "sgd"))}
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fields", SETTINGS, ids=named)
def test_a_client_trains_as_torch_does_bit_for_bit(fields: dict[str, Any], training: bool) -> None:
    if training and fields.get("minibatch") == 1:
        fields = fields | {"minibatch": 2}
    target, (x, y) = make_target(training), batch()
    sent = capture(target, x, y, make_protocol(fields), torch.Generator().manual_seed(5))
    for name, expected in by_hand(target, x, y, fields).items():
        assert torch.equal(sent.gradients[name], expected), name


def test_a_parameter_without_a_gradient_stays_as_torch_leaves_it() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.used(x)
            return found

    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = Target(Partly(), losses.CrossEntropy(3), (4,), None)
    protocol = Protocol(Sends.DIFFERENCE, 2, 0.1, weight_decay=0.1)
    sent = capture(target, torch.randn(2, 4), torch.tensor([0, 1]), protocol)
    assert float(sent.gradients["idle.weight"].norm()) == 0 < float(sent.gradients["used.weight"].norm())


LINEAR = [fields for fields in SETTINGS if fields.get("optimiser", "sgd") in ("sgd", "momentum")]


@pytest.mark.parametrize("fields", LINEAR, ids=named)
def test_the_expansion_is_what_the_steps_add_up_to(fields: dict[str, Any]) -> None:
    """Quadratic losses of one weight vector: each step's gradient is known, and torch takes the steps."""
    protocol, samples = make_protocol(fields), 7
    generator = torch.Generator().manual_seed(2)
    first = torch.randn(5, generator=generator, dtype=torch.float64)
    weight, gradients, passed = nn.Parameter(first.clone()), [], [first.clone()]
    optimiser = torch.optim.SGD(
        [weight], 1.0, protocol.momentum, weight_decay=protocol.weight_decay, nesterov=protocol.nesterov
    )
    for rate in protocol.rates(samples):
        own = torch.randn(5, generator=generator, dtype=torch.float64)
        pull = protocol.proximal * (weight.detach() - first)
        weight.grad = own + pull
        if protocol.clip_norm is not None:
            nn.utils.clip_grad_norm_([weight], protocol.clip_norm)
            own = weight.grad.clone()
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        gradients.append(own)
        passed.append(weight.detach().clone())
    assert len(gradients) == len(protocol.minibatches(samples))
    for before in (*range(len(passed)), None):
        decay, coefficients = protocol.expansion(samples, before)
        moved = decay * first + sum((c * g for c, g in zip(coefficients, gradients, strict=False)), torch.zeros(5))
        torch.testing.assert_close(moved, passed[-1 if before is None else before] - first, rtol=1e-10, atol=1e-12)


def test_adam_has_no_expansion() -> None:
    for kind in ("adam", "adamw"):
        with pytest.raises(ValueError, match=f"sends a difference by {kind}, expected a weight difference by sgd"):
            make_protocol({"optimiser": kind}).expansion(4)
    with pytest.raises(ValueError, match="sends a gradient by sgd"):
        Protocol().expansion(4)


@pytest.mark.parametrize(
    ("fields", "samples", "sizes"),
    [
        ({"epochs": 2}, 5, (5, 5)),
        ({"minibatch": 2, "epochs": 2}, 5, (2, 2, 1, 2, 2, 1)),
        ({"minibatch": 2, "drop_last": True}, 5, (2, 2)),
        ({"minibatch": 5}, 5, (5,)),
    ],
)
def test_minibatches_come_in_this_order(fields: dict[str, Any], samples: int, sizes: tuple[int, ...]) -> None:
    assert make_protocol(fields).minibatches(samples) == sizes


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "optimiser": "adam"},
        {"weight_decay": 0.1, "optimiser": "adamw"},
        {"weight_decay": 0.01, "momentum": 0.9, "nesterov": True, "proximal": 0.5},
        {"schedule": (0.3,), "summed": True},
        {"clip_norm": 1e6},
    ],
    ids=named,
)
def test_one_step_undone_is_the_gradient_whatever_else_the_step_does(fields: dict[str, Any]) -> None:
    target, (x, y) = make_target(training=False), batch()
    target = Target(target.model.double(), target.loss, target.input_shape, None, 7)
    sent = capture(target, x.double(), y, make_protocol(fields))
    plain, assumptions = sent.to_gradient(target)
    truth = target.gradient(x.double(), y)
    for name, g in plain.gradients.items():
        loose = 1e-4 if "optimiser" in fields else 1e-9
        torch.testing.assert_close(g, truth[name], rtol=loose, atol=loose * float(truth[name].abs().max()))
    assert not any("clipped" in line or "local steps" in line for line in assumptions)


@pytest.mark.parametrize("clip", [1e-3, 0.1, 0.2])
def test_a_clipped_gradient_is_told_up_to_its_size(clip: float) -> None:
    target, (x, y) = make_target(training=False), batch()
    target = Target(target.model.double(), target.loss, target.input_shape, None, 7)
    truth = target.gradient(x.double(), y)
    plain, assumptions = capture(target, x.double(), y, make_protocol({"clip_norm": clip})).to_gradient(target)
    assert any("clipped" in line for line in assumptions)
    factors = [float(plain.gradients[name].norm() / g.norm()) for name, g in truth.items() if float(g.norm()) > 1e-6]
    assert max(factors) - min(factors) < 1e-6 * max(factors)
