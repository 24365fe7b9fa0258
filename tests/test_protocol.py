"""Protocols: what the server undoes is the gradient, and where it cannot be, that is said."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rgap import Protocol, Target, Update, UpdateError, capture, losses, models, score
from rgap.attacks import Closed, Status
from rgap.attacks.base import gradient_residual
from rgap.data import photographs
from rgap.protocol import Optimiser, Sends
from rgap.update import Header

DIFFERENCE = Sends.DIFFERENCE
MAKERS: dict[Optimiser, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    Optimiser.SGD: lambda weights, rate: torch.optim.SGD(weights, lr=rate),
    Optimiser.MOMENTUM: lambda weights, rate: torch.optim.SGD(weights, lr=rate, momentum=0.9),
    Optimiser.ADAM: lambda weights, rate: torch.optim.Adam(weights, lr=rate),
    Optimiser.ADAMW: lambda weights, rate: torch.optim.AdamW(weights, lr=rate, weight_decay=0.0),
}
ADAMS = (Optimiser.ADAM, Optimiser.ADAMW)
every_optimiser = pytest.mark.parametrize("optimiser", list(Optimiser), ids=lambda optimiser: optimiser.value)


def make_target(batch_size: int = 1) -> Target:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))
    return Target(model.double().eval(), losses.Logistic(), (1, 3, 3), (0.0, 1.0), batch_size)


def batch(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, torch.tensor([1.0, -1.0] * count)[:count]


def gradients(target: Target, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of the mean loss, by the model itself."""
    model = copy.deepcopy(target.model)
    target.loss(model(x), y).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(found: Update, expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert list(found.gradients) == list(expected)
    for name, g in expected.items():
        torch.testing.assert_close(found.gradients[name], g, rtol=tolerance, atol=tolerance * float(g.abs().max()))


# What is sent.


@every_optimiser
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_difference_is_that_of_a_training_loop(optimiser: Optimiser, summed: bool, steps: int) -> None:
    target, (x, y) = make_target(), batch(3)
    model = copy.deepcopy(target.model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimise = MAKERS[optimiser](list(model.parameters()), 0.05)
    for _ in range(steps):
        optimise.zero_grad()
        loss = torch.nn.functional.softplus(-y * model(x)[:, 0])
        (loss.sum() if summed else loss.mean()).backward()
        optimise.step()
    sent = capture(target, x, y, Protocol(DIFFERENCE, steps, 0.05, optimiser, summed))
    close(sent, {name: (p - before[name]).detach() for name, p in model.named_parameters()})


def test_a_summed_gradient_is_the_mean_times_the_batch() -> None:
    target, (x, y) = make_target(3), batch(3)
    sent = capture(target, x, y, Protocol(summed=True))
    close(sent, {name: 3 * g for name, g in gradients(target, x, y).items()})


@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(clients=3),
        Protocol(DIFFERENCE, 2, 0.1, clients=3),
        Protocol(DIFFERENCE, 1, 0.1, summed=True, clients=3),
    ],
)
def test_the_server_sees_the_mean_over_clients(protocol: Protocol) -> None:
    target, (x, y) = make_target(2), batch(6)
    alone = Protocol(protocol.sends, protocol.steps, protocol.learning_rate, protocol.optimiser, protocol.summed)
    each = [capture(target, x[at : at + 2], y[at : at + 2], alone) for at in (0, 2, 4)]
    sent = capture(target, x, y, protocol)
    close(sent, {name: sum(u.gradients[name] for u in each) / 3 for name in sent.gradients})  # type: ignore[misc]
    assert sent.header.batch_size == 2
    assert sent.samples(target) == 6


def test_samples_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 4 samples for 3 clients, expected the same number for each"):
        capture(make_target(), *batch(4), Protocol(clients=3))


@every_optimiser
def test_capture_leaves_model_and_random_numbers_alone(optimiser: Optimiser) -> None:
    target, (x, y) = make_target(), batch(4)
    target.model.train()  # batch statistics are gathered in training mode
    (kept, modes) = copy.deepcopy(target.model.state_dict()), [m.training for m in target.model.modules()]
    weights = list(target.model.parameters())
    outer = torch.optim.Adam(weights, lr=0.1)
    outer_state, random = copy.deepcopy(outer.state_dict()), torch.get_rng_state()
    first = capture(target, x, y, Protocol(DIFFERENCE, 3, 0.1, optimiser))
    assert all(torch.equal(kept[name], t) for name, t in target.model.state_dict().items())
    assert [m.training for m in target.model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in target.model.parameters())
    assert outer.state_dict() == outer_state
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(weights, target.model.parameters(), strict=True))
    again = capture(target, x, y, Protocol(DIFFERENCE, 3, 0.1, optimiser))
    assert all(torch.equal(first.gradients[name], g) for name, g in again.gradients.items())


# What is inverted.


@every_optimiser
@pytest.mark.parametrize("summed", [False, True])
def test_one_step_undone_is_the_gradient(optimiser: Optimiser, summed: bool) -> None:
    target, (x, y) = make_target(2), batch(2)
    sent = capture(target, x, y, Protocol(DIFFERENCE, 1, 0.1, optimiser, summed))
    plain, assumptions = sent.to_gradient(target)
    # Adam's first step all but loses the size: eight digits go into 1 - |step|.
    close(plain, gradients(target, x, y), 1e-5 if optimiser in ADAMS else 1e-9)
    assert plain.header.protocol == Protocol()
    assert plain.header.batch_size == 2
    assert (len(assumptions) > 0) is (optimiser in ADAMS)


def test_a_summed_gradient_undone_is_the_mean() -> None:
    target, (x, y) = make_target(3), batch(3)
    plain, assumptions = capture(target, x, y, Protocol(summed=True)).to_gradient(target)
    close(plain, gradients(target, x, y))
    assert assumptions == ()
    assert plain.header.protocol == Protocol()


def test_a_plain_gradient_is_given_back_as_it_is() -> None:
    target = make_target()
    sent = capture(target, *batch(1))
    assert sent.to_gradient(target) == (sent, ())


@pytest.mark.parametrize("rate", [1.0, 0.1, 0.01, 1e-3])
def test_however_coarse_a_difference_another_picture_does_not_reproduce_it(rate: float) -> None:
    """The smaller the step, the less of it the weights' rounding leaves; a picture a tenth too dark is another one."""
    target = Target(models.cnn6(), losses.Logistic(), (3, 32, 32), (0.0, 1.0))
    x, y = photographs(1).inputs, torch.tensor([-1.0])
    plain, _ = capture(target, x, y, Protocol(DIFFERENCE, 1, rate)).to_gradient(target)
    assert gradient_residual(target, plain, x, y) <= plain.tolerance < gradient_residual(target, plain, 0.9 * x, y)


def test_clients_are_still_counted_when_the_rest_is_undone() -> None:
    target, (x, y) = make_target(2), batch(4)
    plain, _ = capture(target, x, y, Protocol(DIFFERENCE, 1, 0.1, summed=True, clients=2)).to_gradient(target)
    close(plain, gradients(target, x, y))
    assert plain.header.protocol == Protocol(clients=2)
    assert plain.samples(target) == 4


@settings(max_examples=15, deadline=None)
@given(
    optimiser=st.sampled_from(list(Optimiser)),
    steps=st.integers(1, 12),
    rate=st.sampled_from([1e-3, 0.03, 1.0]),
    summed=st.booleans(),
    size=st.integers(1, 4),
    values=st.lists(st.floats(-2, 2).filter(lambda v: v == 0 or abs(v) > 1e-3), min_size=1, max_size=4),
)
def test_equal_gradients_are_undone_exactly(
    optimiser: Optimiser, steps: int, rate: float, summed: bool, size: int, values: list[float]
) -> None:
    """A loss that is linear in the weights has the same gradient at every step."""
    mean = torch.tensor(values, dtype=torch.float64)
    weight = nn.Parameter(torch.zeros_like(mean))
    optimise = MAKERS[optimiser]([weight], rate)
    for _ in range(steps):
        weight.grad = size * mean if summed else mean.clone()
        optimise.step()
    found, assumptions = Protocol(DIFFERENCE, steps, rate, optimiser, summed).undo({"w": weight.detach()}, size)
    torch.testing.assert_close(found["w"], mean, rtol=1e-4 if optimiser in ADAMS else 1e-9, atol=1e-9)
    assert any(f"{steps} local steps" in line for line in assumptions) is (steps > 1)


def test_small_steps_are_nearly_the_gradient() -> None:
    """The estimate is as good as the steps are small."""
    target, (x, y) = make_target(), batch(1)
    truth = gradients(target, x, y)
    errors = []
    for rate in (1e-1, 1e-2, 1e-3):
        plain, _ = capture(target, x, y, Protocol(DIFFERENCE, 5, rate)).to_gradient(target)
        apart = sum(float((plain.gradients[name] - g).square().sum()) for name, g in truth.items())
        errors.append(math.sqrt(apart / sum(float(g.square().sum()) for g in truth.values())))
    assert errors[0] > 5 * errors[1] > 25 * errors[2] > 0


# Attacks.


@pytest.mark.parametrize("optimiser", [Optimiser.SGD, Optimiser.MOMENTUM], ids=lambda optimiser: optimiser.value)
def test_the_closed_form_reads_a_picture_out_of_a_weight_difference(optimiser: Optimiser) -> None:
    model = models.cnn6(1, 8).double()
    target = Target(model, losses.Logistic(), (1, 8, 8), (0.0, 1.0))
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = Closed()(target, capture(target, x, torch.ones(1), Protocol(DIFFERENCE, 1, 0.1, optimiser)))
    assert found.status is Status.EXACT, found
    assert score(found, x).mse[0] < 1e-10
    assert not any("local steps" in note for note in found.assumptions)


@every_optimiser
def test_several_steps_end_in_a_status_that_names_what_was_assumed(optimiser: Optimiser) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 1)).double().eval()
    target, (x, y) = Target(model, losses.Logistic(), (1, 3, 3), (0.0, 1.0)), batch(1)
    found = Closed()(target, capture(target, x, y, Protocol(DIFFERENCE, 5, 0.5, optimiser)))
    if optimiser in ADAMS:
        assert "the 5 local steps are taken for 5 times the first" in found.assumptions
        assert found.status is not Status.EXACT
    else:
        assert any("the local steps are as the protocol says: 5 steps" in note for note in found.assumptions)
        assert found.status is Status.EXACT, found.reason
        assert score(found, x).mse[0] < 1e-8
    assert any("Adam" in note for note in found.assumptions) is (optimiser in ADAMS)


# What makes no sense.

LOCAL: dict[str, object] = {"sends": DIFFERENCE, "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *[({name: 0}, f"got {name}=0, expected a whole number from 1 on") for name in ("steps", "clients", "epochs")],
        *[
            ({**LOCAL, name: value}, f"got {name}={value}, expected a whole number from 1 on")
            for name in ("steps", "clients", "epochs", "minibatch")
            for value in (0, -1, -99)
        ],
        *[
            ({**LOCAL, name: value}, f"got {name}={value}, expected a finite number from 0 on")
            for name in ("momentum", "weight_decay", "proximal")
            for value in (-0.1, math.nan, math.inf)
        ],
        *[
            ({**LOCAL, "clip_norm": value}, f"got {value} in schedule or as clip_norm")
            for value in (0.0, -1.0, math.nan)
        ],
        *[({**LOCAL, "schedule": (value,)}, f"got {value} in schedule or as") for value in (0.0, -1.0, math.inf)],
        *[
            ({name: value}, f"got {name}=.*takes no local steps")
            for name, value in (("epochs", 2), ("minibatch", 4), ("weight_decay", 0.1), ("schedule", (1.0,)))
        ],
        ({**LOCAL, "schedule": (1.0, 0.1)}, "got a schedule of 2 factors, expected 1"),
        ({**LOCAL, "epochs": 3, "schedule": (1.0, 0.1)}, "got a schedule of 2 factors, expected 3"),
        ({**LOCAL, "steps": 2, "epochs": 2}, "got steps=2 with epochs or minibatches"),
        ({**LOCAL, "steps": 2, "minibatch": 2}, "got steps=2 with epochs or minibatches"),
        ({**LOCAL, "nesterov": True}, "nesterov=True without momentum"),
        ({**LOCAL, "drop_last": True}, "drop_last=True without minibatches"),
        *[({**LOCAL, "optimiser": adam, "momentum": 0.9}, "which has its own") for adam in ADAMS],
        *[({"sends": DIFFERENCE, "learning_rate": value}, "needs a positive one") for value in (math.inf, -math.inf)],
        ({"steps": 2}, "takes no local steps"),
        ({"learning_rate": 0.1}, "takes no local steps"),
        ({"sends": DIFFERENCE}, "got learning_rate=None"),
        ({"sends": DIFFERENCE, "learning_rate": 0.0}, "got learning_rate=0.0"),
        ({"sends": DIFFERENCE, "learning_rate": -0.1}, "needs a positive one"),
        ({"sends": DIFFERENCE, "learning_rate": math.nan}, "needs a positive one"),
        ({"sends": DIFFERENCE, "learning_rate": 0.1, "steps": 0}, "got steps=0"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Protocol(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "samples"), [(4, 3), (100, 99), (2, 1), (None, 0)])
def test_a_minibatch_has_no_more_samples_than_the_client(size: int | None, samples: int) -> None:
    protocol = Protocol(DIFFERENCE, learning_rate=0.1, minibatch=size)
    with pytest.raises(ValueError, match=r"expected as many or fewer"):
        protocol.minibatches(samples)
    if samples > 1:
        with pytest.raises(ValueError, match=rf"got minibatch={size} for a client of {samples} samples"):
            Header(samples, protocol=protocol)


@pytest.mark.parametrize("fields", [{"epochs": 10**6, "minibatch": 2}, {"steps": 10**12}, {"epochs": 10**9}])
def test_more_steps_than_anyone_takes_are_refused_at_once(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"local steps, expected 1000000 at the most"):
        Protocol(DIFFERENCE, learning_rate=0.1, **fields).minibatches(4)  # type: ignore[arg-type]


# In a file.

FULL = Protocol(
    DIFFERENCE, 1, 0.1, epochs=3, minibatch=4, shuffled=False, drop_last=True, momentum=0.8, nesterov=True,
    weight_decay=1e-4, proximal=0.1, clip_norm=2.0, schedule=(1.0, 0.5, 0.1),
)  # fmt: skip
protocols = st.one_of(
    st.builds(Protocol, summed=st.booleans(), clients=st.integers(1, 99)),
    st.builds(
        Protocol,
        st.just(DIFFERENCE),
        st.integers(1, 99),
        st.floats(1e-9, 1e3),
        st.sampled_from(list(Optimiser)),
        st.booleans(),
        st.integers(1, 99),
    ),
)


@settings(max_examples=15, deadline=None)
@given(protocol=protocols, size=st.integers(1, 99))
@example(protocol=FULL, size=10)
def test_a_file_keeps_the_protocol(protocol: Protocol, size: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "protocol.safetensors"
    Update({"w": torch.ones(2)}, Header(size, protocol=protocol)).save(path)
    assert Update.load(path).header == Header(size, protocol=protocol)


def test_a_file_with_a_protocol_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "update.safetensors"
    Update({"w": torch.ones(2)}, Header(8, protocol=Protocol(DIFFERENCE, 2, 0.5))).save(path)
    written = path.read_bytes()
    for old, new in (
        (b'\\"steps\\": 2', b'\\"steps\\": 0'),
        (b'\\"optimiser\\": \\"sgd\\"', b'\\"optimiser\\": \\"sgx\\"'),
        (b'\\"epochs\\": 1', b'\\"epochs\\":-1'),
        (b'\\"minibatch\\": null', b'\\"minibatch\\": 9999'),
        (b'\\"momentum\\": 0.0', b'\\"momentum\\": NaN'),
        (b'\\"schedule\\": []', b'\\"schedule\\": 12'),
    ):
        assert old in written
        path.write_bytes(written.replace(old, new))
        with pytest.raises(UpdateError, match=r"update\.safetensors"):
            Update.load(path)
