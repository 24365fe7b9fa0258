"""What every attack must do. A new attack adds one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from certificates import may_be
from hypothesis import HealthCheck, given, settings
from networks import Client, clients
from torch import Tensor, nn

from rgap import Target, Update, UpdateError, capture, data, losses, models, score
from rgap.attacks import (
    DLG,
    IDLG,
    Attack,
    Closed,
    FeatureMatching,
    Hybrid,
    InvertingGradients,
    Modern,
    Polish,
    Reconstruction,
    Recursive,
    SeeThroughGradients,
    Status,
)
from rgap.attacks.bias import Bias

# torch's forward mode compiles formulas of its own when first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


@dataclass(frozen=True)
class Row:
    """An attack and what can be asked of it."""

    attack: Attack
    chain_only: bool
    """Whether it refuses a model that is no chain; the others end in a status."""
    exact: bool
    """Whether it may call an answer exact."""
    needs_bias: bool = False
    """Whether it has no answer on a model without biases."""
    examples: int = 6
    """How many random networks it is tried on."""


ROWS = [
    Row(Recursive(), chain_only=True, exact=True, examples=8),
    Row(Closed(), chain_only=True, exact=True, examples=8),
    Row(DLG(iterations=4), chain_only=False, exact=False),
    Row(IDLG(iterations=4), chain_only=False, exact=False),
    Row(InvertingGradients(iterations=4), chain_only=False, exact=False),
    Row(SeeThroughGradients(iterations=4), chain_only=False, exact=False, examples=4),
    Row(Modern(iterations=4), chain_only=False, exact=False, examples=4),
    Row(FeatureMatching(iterations=4, finish=0), chain_only=False, exact=False, examples=4),
    Row(Hybrid((Recursive(), DLG(iterations=4))), chain_only=False, exact=True),
    Row(Polish(Recursive(), steps=2, inner=4), chain_only=True, exact=True),
    Row(Bias(), chain_only=False, exact=True, needs_bias=True, examples=20),
]
every_attack = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.attack.name)
GOOD = (Status.EXACT, Status.AMBIGUOUS, Status.REPRODUCED)


@dataclass(frozen=True, eq=False)
class Case:
    target: Target
    x: Tensor
    update: Update


def case(target: Target, y: float = 1.0) -> Case:
    _, size, _ = target.input_shape
    x = data.photographs(1, size, channels=1).inputs.double()
    return Case(target, x, capture(target, x, torch.tensor([y])))


def seeded(*layers: nn.Module) -> nn.Module:
    """Layers that are made elsewhere, with weights from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in layers:
            for module in layer.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
    return nn.Sequential(*layers).double().eval()


@cache
def plain() -> Case:
    """A chain without biases."""
    return case(Target(models.cnn6(1, 12).double(), losses.Logistic(), (1, 12, 12), (0.0, 1.0)))


@cache
def biased() -> Case:
    """A chain with biases."""
    model = seeded(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 1))
    return case(Target(model, losses.Logistic(), (1, 8, 8), (0.0, 1.0)))


@cache
def branched(batch: int = 1) -> Case:
    """No chain: batch norm, a maximum, and several classes."""
    model = seeded(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )  # fmt: skip
    target = Target(model, losses.CrossEntropy(3), (1, 6, 6), (0.0, 1.0), batch)
    x = data.photographs(batch, 6, channels=1).inputs.double()
    return Case(target, x, capture(target, x, torch.arange(batch).float()))


@cache
def found_by(attack: Attack, here: Case) -> Reconstruction:
    """What every run of it finds, as a test of its own holds."""
    return attack(here.target, here.update)


def able(row: Row) -> list[Case]:
    """Cases on which the attack has something to say."""
    cases = [biased()]
    if not row.needs_bias:
        cases.append(plain())
    if not row.chain_only:
        cases += [branched(1), branched(2)] if not row.needs_bias else []
    return cases


def same(one: Reconstruction, other: Reconstruction, tolerance: float = 0.0) -> None:
    assert (one.attack, one.status, one.assumptions) == (other.attack, other.status, other.assumptions)
    assert len(one.answers) == len(other.answers)
    for a, b in zip(one.answers, other.answers, strict=True):
        torch.testing.assert_close(a.inputs, b.inputs, rtol=tolerance, atol=tolerance)
        assert torch.equal(a.labels, b.labels)
        # The stated error grows with the misfit, which of a float64 gradient is the last bits of an answer.
        for here, there in ((a.error, b.error), (b.error, a.error)):
            assert here == pytest.approx(there, rel=2.0 if tolerance else 0.0, nan_ok=True)


def certified(found: Reconstruction, target: Target, update: Update) -> None:
    """Every residual is that of the plain model, in its own type, at the answer."""
    model = target.model
    for answer in found.answers:
        loss = target.loss(model(answer.inputs), answer.labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        assert may_be(answer.gradient_residual, gradients, update)


# Random networks.


@pytest.mark.search
@every_attack
def test_what_is_said_of_an_answer_is_true(row: Row) -> None:
    """Exact is never said of a wrong answer, and the certificate is the distance of the recomputed gradient."""

    @settings(max_examples=row.examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(client=clients())
    def check(client: Client) -> None:
        update = capture(client.target, client.x, client.y)
        found = row.attack(client.target, update)
        if found.status is Status.EXACT:
            assert row.exact
            assert score(found, client.x).mse[0] <= 1e-12
            assert float(found.labels[0]) == float(client.y[0])
        if found.status in GOOD:
            assert found.gradient_residual <= found.tolerance
        if found.status is Status.GRADIENT_ZERO:
            assert found.answers == ()
        certified(found, client.target, update)

    check()


# Answers.


@every_attack
def test_the_certificate_of_a_model_that_is_no_chain(row: Row) -> None:
    if not row.chain_only:
        for batch in (1, 2):
            here = branched(batch)
            certified(found_by(row.attack, here), here.target, here.update)


@every_attack
def test_the_same_update_gives_the_same_answer_and_nothing_is_changed(row: Row) -> None:
    for here in able(row):
        model = here.target.model
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        gradients = {name: g.clone() for name, g in here.update.gradients.items()}
        state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
        found = row.attack(here.target, here.update)
        assert found.answers
        same(found, found_by(row.attack, here))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
        assert all(torch.equal(gradients[name], g) for name, g in here.update.gradients.items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert [module.training for module in model.modules()] == modes


@every_attack
def test_answers_have_the_inputs_shape_and_every_aid_is_listed(row: Row) -> None:
    for here in able(row):
        found = found_by(row.attack, here)
        assert found.answers
        for answer in found.answers:
            assert answer.inputs.shape == here.x.shape
            assert answer.labels.shape == (len(here.x),)
            assert answer.inputs.dtype is answer.labels.dtype is torch.float64
            assert set(answer.labels.tolist()) <= set(here.target.loss.labels)
            assert not answer.inputs.requires_grad
        assert found.assumptions
        assert found.reason
        assert found.seconds > 0
        assert found.attack == row.attack.name
        assert str(found).startswith(f"{row.attack.name}: {found.status.value}, ")
        assert all(f"assumed: {assumption}" in str(found) for assumption in found.assumptions)


@every_attack
def test_exact_is_said_by_those_who_may(row: Row) -> None:
    here = biased() if row.needs_bias else plain()
    found = found_by(row.attack, here)
    if row.exact:
        assert found.status is Status.EXACT, found
        assert score(found, here.x).mse[0] <= 1e-12
    else:
        assert found.status in (Status.REPRODUCED, Status.AMBIGUOUS, Status.NOT_CONVERGED)


@every_attack
def test_many_updates_give_what_each_gives(row: Row) -> None:
    for here in able(row):
        others = here.x.flip(-1), torch.full((len(here.x),), here.target.loss.labels[0])
        other = capture(here.target, *others)
        first, second, third = row.attack.many(here.target, [here.update, other, here.update])
        same(first, found_by(row.attack, here), tolerance=1e-4)
        same(second, row.attack(here.target, other), tolerance=1e-4)
        same(third, found_by(row.attack, here), tolerance=1e-4)
        assert row.attack.many(here.target, []) == ()


# Refusals.


@every_attack
def test_an_update_that_does_not_fit_is_refused(row: Row) -> None:
    attack, here = row.attack, plain()
    gradients = dict(here.update.gradients)
    first, grad = next(iter(gradients.items()))
    extra, other_shape = {**gradients, "more": torch.ones(2)}, {**gradients, first: grad[..., :-1]}
    missing = {name: g for name, g in gradients.items() if name != first}
    with pytest.raises(UpdateError, match="unknown more"):
        attack(here.target, Update(extra))
    with pytest.raises(UpdateError, match=f"{first}: got a gradient of shape"):
        attack(here.target, Update(other_shape))
    if attack.partial:
        assert isinstance(attack(here.target, Update(missing)).status, Status)
    else:
        with pytest.raises(UpdateError, match=f"missing {first}"):
            attack(here.target, Update(missing))
    other = Target(models.cnn6(1, 12, seed=5).double(), losses.Logistic(), (1, 12, 12))
    with pytest.raises(UpdateError, match="another model or another checkpoint"):
        attack(other, here.update)
    with pytest.raises(UpdateError, match="another model or another checkpoint"):
        attack.many(other, [Update(gradients), here.update])


@every_attack
@pytest.mark.parametrize("classes", [1, 3])
def test_a_model_that_is_no_chain_ends_in_a_status(row: Row, classes: int) -> None:
    model = seeded(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.GELU(), nn.Flatten(), nn.Linear(2, classes))
    loss = losses.Logistic() if classes == 1 else losses.CrossEntropy(classes)
    target = Target(model, loss, (1, 4, 4), (0.0, 1.0))
    update = capture(target, data.photographs(1, 4, channels=1).inputs, torch.tensor([1.0]))
    found = row.attack(target, update)
    assert found.status in (*GOOD, Status.NOT_CONVERGED, Status.RANK_DEFICIENT)
    assert found.reason


@every_attack
@pytest.mark.parametrize("batch", [1, 2])
def test_batch_norm_a_maximum_and_several_classes(row: Row, batch: int) -> None:
    here = branched(batch)
    found = found_by(row.attack, here)
    assert found.status in (Status.REPRODUCED, Status.AMBIGUOUS, Status.NOT_CONVERGED, Status.RANK_DEFICIENT)
    assert found.reason


# Gradients that tell nothing.


@every_attack
@pytest.mark.parametrize("make", [plain, biased])
def test_a_gradient_of_nothing_but_noise_ends_in_a_status(row: Row, make: Callable[[], Case]) -> None:
    here, generator = make(), torch.Generator().manual_seed(0)
    noise = {
        name: torch.randn(g.shape, generator=generator, dtype=g.dtype) * g.norm() / g.numel() ** 0.5
        for name, g in here.update.gradients.items()
    }
    found = row.attack(here.target, Update(noise))
    assert found.status not in GOOD
    assert found.reason


@every_attack
@pytest.mark.parametrize("make", [plain, biased, branched])
def test_a_gradient_of_zero_has_no_answer(row: Row, make: Callable[[], Case]) -> None:
    here = make()
    zero = Update({name: torch.zeros_like(g) for name, g in here.update.gradients.items()}, here.update.header)
    found = row.attack(here.target, zero)
    assert found.answers == ()
    assert found.reason
    # What finds no layer to read says that first.
    allowed = {Status.GRADIENT_ZERO, Status.NOT_CONVERGED} if row.needs_bias else {Status.GRADIENT_ZERO}
    assert found.status in allowed
    if make is biased:
        assert found.status is Status.GRADIENT_ZERO
    with pytest.raises(LookupError, match=row.attack.name):
        _ = found.inputs


# Updates in which a layer is missing.


def without(here: Case, *missing: str) -> Update:
    kept = {name: g for name, g in here.update.gradients.items() if name.rsplit(".", 1)[0] not in missing}
    assert len(kept) < len(here.update.gradients)
    return Update(kept, here.update.header)


@every_attack
@pytest.mark.parametrize("make", [biased, branched])
def test_a_missing_layer_is_refused_or_left_out_of_the_certificate(row: Row, make: Callable[[], Case]) -> None:
    here = make()
    layer = "1" if make is biased else "0"
    update = without(here, layer)
    if not row.attack.partial:
        with pytest.raises(UpdateError, match=rf"needs .* missing {layer}\.weight, {layer}\.bias; .* bias, or one"):
            row.attack(here.target, update)
        return
    found = row.attack(here.target, update)
    assert found.reason
    model = here.target.model
    for answer in found.answers:
        loss = here.target.loss(model(answer.inputs), answer.labels)
        names = [name for name, _ in model.named_parameters()]
        every = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        assert may_be(answer.gradient_residual, [every[name] for name in update.gradients], update)


@pytest.mark.parametrize("attack", [DLG(iterations=40), IDLG(iterations=40)], ids=lambda attack: attack.name)
def test_matching_asks_nothing_of_a_layer_that_is_missing(attack: Attack) -> None:
    """What the other parameters tell is matched, whatever the missing one would have told."""
    here = biased()
    spoilt = {name: 100 * g if name.startswith("3.") else g for name, g in here.update.gradients.items()}
    one = attack(here.target, without(here, "3"))
    other = attack(here.target, without(replace(here, update=Update(spoilt, here.update.header)), "3"))
    same(one, other)
    assert one.status in (Status.REPRODUCED, Status.AMBIGUOUS, Status.NOT_CONVERGED)
    assert one.answers


def test_matching_finds_the_input_without_the_last_layer() -> None:
    here = biased()
    found = IDLG(iterations=300)(here.target, without(here, "3"))
    assert found.status is Status.REPRODUCED, found
    assert found.gradient_residual <= found.tolerance
    assert score(found, here.x).mse[0] < 1e-6


def test_updates_with_different_layers_missing_are_attacked_in_one_go() -> None:
    here, attack = biased(), IDLG(iterations=5)
    updates = [without(here, "3"), here.update, without(here, "1"), without(here, "3")]
    for update, found in zip(updates, attack.many(here.target, updates), strict=True):
        same(found, attack(here.target, update), tolerance=1e-4)


def test_unknown_names_are_refused_in_partial_updates_too() -> None:
    here = biased()
    with pytest.raises(UpdateError, match="unknown more"):
        IDLG(iterations=1)(here.target, Update({**without(here, "3").gradients, "more": torch.ones(2)}))
