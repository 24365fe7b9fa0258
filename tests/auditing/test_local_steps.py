"""What an audit says of updates that cannot be undone: the bound, and the numbers on both sides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rgap import Protocol, Target, Update, capture, losses
from rgap.auditing import audit_updates
from rgap.auditing.local_steps import obstacles, sent_buffers
from rgap.protocol import Optimiser, Sends
from rgap.report import render


def make_target(samples: int, *middle: nn.Module, pool: bool = False) -> Target:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        front = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)) if pool else ()
        width = 4 * 9 if pool else 64
        inner = middle or (nn.Linear(width, 20), nn.ReLU(), nn.Linear(20, 10))
        model = nn.Sequential(*front, nn.Flatten(), *inner)
    return Target(model.train(), losses.CrossEntropy(10), (1, 8, 8), None, samples)


def sent(target: Target, **fields: Any) -> Update:
    n = target.batch_size
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    protocol = Protocol(Sends.DIFFERENCE, **{"learning_rate": 0.1} | fields)
    return capture(target, x, torch.arange(n) % 10, protocol)


def told(target: Target, **fields: Any) -> str:
    return " ".join(obstacles(target, sent(target, **fields)))


@pytest.mark.parametrize(("samples", "epochs", "minibatch"), [(10, 2, 5), (20, 1, 4), (8, 5, None)])
@pytest.mark.parametrize("pool", [False, True])
def test_more_sample_passes_than_width_are_named_with_both_numbers(
    samples: int, epochs: int, minibatch: int | None, pool: bool
) -> None:
    text = told(make_target(samples, pool=pool), epochs=epochs, minibatch=minibatch)
    passes = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    assert f"{samples} samples x {passes} = {samples * epochs} against the width 20 of " in text
    assert "which takes fewer than 20" in text


@pytest.mark.parametrize(("samples", "epochs", "minibatch"), [(4, 2, 2), (19, 1, 4), (2, 9, None)])
def test_fewer_may_be_undone(samples: int, epochs: int, minibatch: int | None) -> None:
    text = told(make_target(samples), epochs=epochs, minibatch=minibatch)
    assert f"= {samples * epochs} are fewer than the width 20 of 3" in text


def test_a_single_linear_layer_is_named() -> None:
    assert "no Linear layer follows another one" in told(make_target(4, nn.Linear(64, 10)), epochs=2)


@pytest.mark.parametrize("rate", [1e-4, 1e-5, 1e-6])
def test_rounding_is_told_in_numbers(rate: float) -> None:
    text = told(make_target(2), learning_rate=rate)
    assert "the weights moved by" in text
    assert "rounded to 1.2e-07 of it" in text
    assert "the weights moved by" not in told(make_target(2), learning_rate=1.0)


@pytest.mark.parametrize("kind", [Optimiser.ADAM, Optimiser.ADAMW])
def test_adam_hides_sizes(kind: Optimiser) -> None:
    assert f"{kind.value} hides sizes" in told(make_target(2), optimiser=kind, learning_rate=0.01)
    assert "hides sizes" not in told(make_target(2))


def test_clipping_is_told() -> None:
    assert "clipped to a norm of 0.5" in told(make_target(2), clip_norm=0.5)


def test_a_gradient_and_one_plain_step_need_no_word() -> None:
    target = make_target(2)
    assert told(target) == ""
    assert list(obstacles(target, capture(target, torch.rand(2, 1, 8, 8), torch.tensor([1, 2])))) == []


@pytest.mark.parametrize("pool", [False, True])
def test_buffers_that_moved_are_a_part_of_the_leak(pool: bool) -> None:
    target = make_target(3, pool=pool)
    text = sent_buffers(target, sent(target, buffers=True))
    if pool:
        assert text is not None
        assert "3 buffers were sent that have moved: 1.running_mean, 1.running_var, 1.num_batches_tracked" in text
    else:
        assert text is None


def test_an_audit_names_bounds_and_buffers_and_claims_no_labels_of_several_steps() -> None:
    target = make_target(21, pool=True)
    found = audit_updates(target, {"one": sent(target, minibatch=7, buffers=True)}, attacks=[])
    text = str(found)
    assert "21 samples x 1 epoch = 21 against the width 20 of " in text
    assert "3 buffers were sent that have moved" in text
    assert found.read is not None
    assert found.read.labels == 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"epochs": 2, "minibatch": 2, "shuffled": False}, "in 2, 4 of the 4 that were followed"),
        ({"epochs": 9, "minibatch": 2}, "4 samples in 9 epochs leave 36 hidden vectors in 3&#39;s difference"),
        ({"epochs": 2, "minibatch": 2, "optimiser": Optimiser.ADAM}, "adam divides every gradient by its own size"),
    ],
)
def test_a_report_says_of_each_sample_its_steps_or_the_bound(fields: dict[str, Any], says: str) -> None:
    middle = (nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 22), nn.Tanh(), nn.Linear(22, 10))
    target = make_target(4, *middle)
    found = audit_updates(target, {"one": sent(target, **fields)}, attacks=["closed"])
    assert says in render(found.to_dict())


@pytest.mark.parametrize("samples", [400, 500])
def test_a_client_of_much_data_is_audited_at_once(samples: int) -> None:
    target = make_target(samples, pool=True)
    found = audit_updates(target, {"one": sent(target, minibatch=32)}, attacks=["idlg", "inverting-gradients"])
    assert found.complete
    assert all("samples in one update are not sought together" in str(run.obstacle) for run in found.attacks)
    assert f"{samples} samples x 1 epoch = {samples} against the width 20 of " in str(found)
