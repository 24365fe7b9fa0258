"""Attacks by optimisation: their distances against plain formulas, their answers against the truth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rgap import Target, Update, capture, losses, score
from rgap.attacks import DLG, IDLG, LBFGS, Adam, InvertingGradients, Matching, Reconstruction, Status
from rgap.attacks.base import gradient_residual
from rgap.attacks.distance import cosine, squared, total_variation
from rgap.attacks.labels import candidates
from rgap.attacks.minimise import Minima, Minimiser, Objective, Project, Termination, Watch
from rgap.attacks.start import Near, Normal, Start, Uniform

PICTURE, VECTOR = (1, 6, 6), (6,)
STILL = Adam(rate=1e-14)
"""Leaves every start where it is."""


def picture_net(activation: type[nn.Module] = nn.Tanh, outputs: int = 3, seed: int = 0, bias: bool = True) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = (nn.Conv2d(1, 4, 3, bias=bias), activation(), nn.Flatten(), nn.Linear(64, outputs, bias=bias))
        return nn.Sequential(*layers).double()


def vector_net(outputs: int = 3, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 12), nn.Sigmoid(), nn.Linear(12, outputs)).double()


def inputs_of(count: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """The truth; no start is drawn from the same numbers."""
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed + 1000), dtype=torch.float64)


def pictures(
    model: nn.Module | None = None, loss: losses.Loss | None = None, label: float = 1.0
) -> tuple[Target, Tensor, Update]:
    """A small network without kinks, one picture, and its update."""
    loss = losses.CrossEntropy(3) if loss is None else loss
    model = picture_net(outputs=loss.outputs) if model is None else model
    target, x = Target(model, loss, PICTURE, (0.0, 1.0)), inputs_of(1, PICTURE)
    return target, x, capture(target, x, torch.tensor([label]))


def vectors(labels: list[float]) -> tuple[Target, Tensor, Update]:
    """The same of a batch of vectors."""
    target, x = Target(vector_net(), losses.CrossEntropy(3), VECTOR, (0.0, 1.0)), inputs_of(len(labels), VECTOR)
    return target, x, capture(target, x, torch.tensor(labels))


def far(found: Tensor, truth: Tensor) -> float:
    """Mean squared distance to the truth in its best order."""
    orders = itertools.permutations(range(len(truth)))
    return min(float((found[list(order)] - truth).square().mean()) for order in orders)


# Distances.


def flat(gradients: Mapping[str, Tensor], names: list[str]) -> np.ndarray:
    return np.concatenate([gradients[name].numpy().ravel() for name in names])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_distances_are_those_of_all_entries_in_one_vector(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    found, known = (
        {n: torch.randn(*s, generator=generator, dtype=torch.float64) for n, s in (("a", (2, 3)), ("b", (4,)))}
        for _ in range(2)
    )
    f, g = flat(found, ["a", "b"]), flat(known, ["a", "b"])
    assert float(squared(found, known)) == pytest.approx(np.sum((f - g) ** 2) / np.sum(g**2), rel=1e-12)
    angle = np.arccos(f @ g / np.sqrt((f @ f) * (g @ g)))
    assert float(cosine(found, known)) == pytest.approx(1 - np.cos(angle), rel=1e-9, abs=1e-12)
    longer = {name: 7 * g for name, g in found.items()}
    assert float(cosine(longer, known)) == pytest.approx(float(cosine(found, known)), abs=1e-12)
    assert float(squared(known, known)) == 0
    assert float(cosine(known, known)) == pytest.approx(0, abs=1e-12)
    assert float(cosine({name: -g for name, g in known.items()}, known)) == pytest.approx(2)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(2, 5), st.integers(2, 5), st.integers(0, 2**31))
def test_total_variation_is_the_mean_over_neighbours(b: int, c: int, h: int, w: int, seed: int) -> None:
    x = torch.randn(b, c, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    down, across = [], []
    for s, k, i, j in itertools.product(range(b), range(c), range(h), range(w)):
        if i + 1 < h:
            down.append(abs(float(x[s, k, i + 1, j] - x[s, k, i, j])))
        if j + 1 < w:
            across.append(abs(float(x[s, k, i, j + 1] - x[s, k, i, j])))
    expected = sum(down) / len(down) + sum(across) / len(across)
    assert float(total_variation(x)) == pytest.approx(expected, rel=1e-12)


# Starts.


@pytest.mark.parametrize("start", [Uniform(), Normal(), Normal(3.0, 0.5)], ids=str)
def test_starts_depend_on_the_generator_alone(start: Start) -> None:
    target, _, _ = pictures()
    state = torch.get_rng_state()
    first, again, other = (start.draw((2, *PICTURE), target, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.shape, first.dtype) == ((2, *PICTURE), torch.float64)


@pytest.mark.parametrize(
    ("start", "value_range", "mean", "deviation"),
    [
        (Uniform(), (0.0, 1.0), 0.5, 1 / math.sqrt(12)),
        (Uniform(), (-3.0, 1.0), -1.0, 4 / math.sqrt(12)),
        (Uniform(), None, 0.5, 1 / math.sqrt(12)),
        (Normal(), (0.0, 1.0), 0.5, 0.25),
        (Normal(), (-3.0, 1.0), -1.0, 1.0),
        (Normal(), None, 0.0, 1.0),
        (Normal(2.0, 0.1), (0.0, 1.0), 2.0, 0.1),
        (Normal(0.0, 0.0), (0.0, 1.0), 0.0, 0.0),
    ],
)
def test_starts_are_spread_as_they_say(
    start: Start, value_range: tuple[float, float] | None, mean: float, deviation: float
) -> None:
    target = Target(nn.Linear(4, 1), losses.Logistic(), (4,), value_range)
    drawn = start.draw((5000, 4), target, torch.Generator().manual_seed(0))
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.05 * deviation)
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.05)
    if isinstance(start, Uniform):
        low, high = value_range or (0.0, 1.0)
        assert low <= float(drawn.min()) < float(drawn.max()) <= high


def test_a_start_near_an_input_is_that_input_with_noise() -> None:
    target, x, _ = pictures()
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(Near(x.float()).draw((1, *PICTURE), target, generator), x.float().double())
    noise = Near(x, 0.1).draw((1, *PICTURE), target, generator) - x
    assert 0.05 < float(noise.std()) < 0.2


def test_a_start_of_another_shape_is_refused() -> None:
    target, x, update = pictures()
    with pytest.raises(ValueError, match="got a start") as refused:
        IDLG(start=Near(x[0]))(target, update)
    assert str(refused.value) == "got a start of shape (1, 6, 6), expected (1, 1, 6, 6)"


# Answers are the truth.


@pytest.mark.parametrize("attack", [DLG(tolerance=1e-10), IDLG(tolerance=1e-10)], ids=lambda attack: attack.name)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid])
@pytest.mark.parametrize(("loss", "label"), [(losses.CrossEntropy(3), 2.0), (losses.Logistic(), -1.0)])
def test_networks_without_kinks_give_their_input_away(
    attack: Matching, activation: type[nn.Module], loss: losses.Loss, label: float
) -> None:
    target, x, update = pictures(picture_net(activation, loss.outputs), loss, label)
    found = attack(target, update)
    assert score(found, x).mse[0] < 1e-12, found
    assert found.labels.tolist() == [label]
    assert found.status is Status.REPRODUCED
    assert found.gradient_residual <= found.tolerance
    assert found.twins == ()


def test_what_reached_its_goal_reproduces_the_gradient() -> None:
    """The loss at which a search ends must not be larger than what counts as reproduced."""
    for dtype in (torch.float32, torch.float64):
        target, x, update = pictures(picture_net(nn.Sigmoid).to(dtype))
        found = IDLG()(target, update)
        assert "reached the value asked for" in found.reason
        assert score(found, x).mse[0] < 1e-6
        assert found.status is Status.REPRODUCED, (dtype, str(found))


def test_inverting_gradients_finds_the_input() -> None:
    target, x, update = pictures()
    found = InvertingGradients(variation=0.0, iterations=300)(target, update)
    assert score(found, x).mse[0] < 1e-3, found
    assert found.labels.tolist() == [1.0]


@pytest.mark.parametrize("attack", [DLG(restarts=3), IDLG()], ids=lambda attack: attack.name)
@pytest.mark.parametrize("labels", [[0.0, 2.0], [1.0, 1.0]])
def test_a_pair_is_found_up_to_its_order(attack: Matching, labels: list[float]) -> None:
    target, x, update = vectors(labels)
    found = replace(attack, tolerance=1e-9)(target, update)
    assert found.inputs.shape == x.shape
    assert sorted(found.labels.tolist()) == labels
    assert found.gradient_residual < 1e-4
    assert far(found.inputs, x) < 1e-5, found
    nearest = [int((each - x).square().sum(1).argmin()) for each in found.inputs]
    assert found.labels.tolist() == [labels[at] for at in nearest], "each label stays with its input"


def test_frozen_parameters_are_not_missed() -> None:
    model = picture_net(nn.Sigmoid)
    model[0].bias.requires_grad_(False)
    target, x, update = pictures(model)
    assert "0.bias" not in update.gradients
    assert score(IDLG()(target, update), x).mse[0] < 1e-6


# Restarts.


@dataclass(frozen=True)
class From(Start):
    """These starts, by the seed of each."""

    points: tuple[Tensor, ...]

    def draw(self, shape: tuple[int, ...], target: Target, generator: torch.Generator) -> Tensor:
        return self.points[generator.initial_seed() % len(self.points)].reshape(shape).clone()


def test_the_best_start_by_its_loss_is_the_answer() -> None:
    target, _, update = pictures()
    one = IDLG(iterations=5, start=Uniform())
    alone = [replace(one, seed=seed)(target, update) for seed in (3, 4, 5, 6)]

    def distance(found: Reconstruction) -> float:
        here = target.gradient(found.inputs, found.labels)
        return sum(float((here[name] - g).square().sum()) for name, g in update.gradients.items()) / update.norm**2

    best = min(alone, key=distance)
    assert len({each.gradient_residual for each in alone}) == 4
    together = replace(one, seed=3, restarts=4)(target, update)
    torch.testing.assert_close(together.inputs, best.inputs, rtol=1e-7, atol=1e-9)
    assert together.gradient_residual == pytest.approx(best.gradient_residual, rel=1e-6)
    assert f"loss {distance(best):.1e}" in together.reason


@dataclass(frozen=True)
class Told(Minimiser):
    """Another minimiser; tells what it was asked to do."""

    calls: list[tuple[Tensor, Termination, Minima]]
    inner: Minimiser = LBFGS()  # noqa: RUF009

    def __call__(
        self, f: Objective, x: Tensor, stop: Termination, watch: Watch, project: Project | None = None
    ) -> Minima:
        found = self.inner(f, x, stop, watch, project)
        self.calls.append((x, stop, found))
        return found


def test_scouting_keeps_one_start_for_each_update() -> None:
    target, _, update = pictures()
    other = capture(target, inputs_of(1, PICTURE, seed=9), torch.tensor([2.0]))
    told: list[tuple[Tensor, Termination, Minima]] = []
    attack = IDLG(minimiser=Told(told), restarts=4, scout=6, iterations=9)
    found = attack.many(target, [update, other])
    (all_starts, scouting, scouts), (kept, rest, minima) = told
    assert (len(all_starts), scouting.iterations) == (8, 6)
    assert (len(kept), rest.iterations) == (2, 9)
    for owner in range(2):
        own = slice(4 * owner, 4 * owner + 4)
        assert torch.equal(kept[owner], scouts.x[own][scouts.value[own].argmin()])
        assert torch.equal(found[owner].inputs.reshape(-1), minima.x[owner])
        assert found[owner].assumptions[-1] == "the best of 4 starts by its loss"
    told.clear()
    alone = attack(target, update)
    assert [len(starts) for starts, _, _ in told] == [4, 1]
    torch.testing.assert_close(alone.inputs, found[0].inputs, rtol=1e-6, atol=1e-8)


def test_one_start_is_not_scouted() -> None:
    target, _, update = pictures()
    told: list[tuple[Tensor, Termination, Minima]] = []
    IDLG(minimiser=Told(told), scout=6, iterations=9)(target, update)
    assert [(len(x), stop.iterations) for x, stop, _ in told] == [(1, 9)]


def test_a_start_that_is_not_finite_does_not_win() -> None:
    target, x, update = pictures()
    broken = torch.full_like(x, math.nan)
    for scout in (0, 3):
        attack = IDLG(restarts=3, scout=scout, start=From((broken, x + 0.1, broken)))
        found = attack(target, update)
        assert score(found, x).mse[0] < 1e-6
        assert found.twins == ()


# Several answers.


def odd() -> tuple[Target, Tensor, Update]:
    """Without biases a network of tanh is odd: x with label 1 and -x with label -1 have the same gradient."""
    target = Target(picture_net(outputs=1, bias=False), losses.Logistic(), PICTURE)
    x = inputs_of(1, PICTURE)
    return target, x, capture(target, x, torch.tensor([1.0]))


@pytest.mark.parametrize("restarts", [1, 3])
def test_inputs_with_the_same_gradient_are_all_told_once(restarts: int) -> None:
    target, x, update = odd()
    found = IDLG(restarts=restarts, tolerance=1e-10)(target, update)
    assert found.status is Status.AMBIGUOUS
    assert found.reason.startswith("2 inputs reproduce the gradient")
    signs = {float(answer.labels[0]): answer.inputs for answer in found.answers}
    assert len(found.answers) == 2
    for sign in (-1.0, 1.0):
        torch.testing.assert_close(signs[sign], sign * x, rtol=0, atol=1e-5)
    for answer in found.answers:
        expected = gradient_residual(target, update, answer.inputs, answer.labels)
        assert answer.gradient_residual == pytest.approx(expected, rel=1e-9)
        assert expected <= found.tolerance


def test_another_order_of_the_batch_is_not_another_answer() -> None:
    target, x, update = vectors([1.0, 1.0])
    found = IDLG(restarts=2, start=From((x, x.flip(0))))(target, update)
    assert found.status is Status.REPRODUCED, found
    assert len(found.answers) == 1


def test_what_reproduces_the_gradient_comes_before_what_does_not() -> None:
    """A prior can prefer an input that does not."""
    target, x, update = pictures()
    flat = torch.full_like(x, 0.5)
    attack = IDLG(minimiser=STILL, variation=1e3, restarts=2, iterations=1, start=From((x, flat)))
    found = attack(target, update)
    reproduced = [answer.gradient_residual <= found.tolerance for answer in found.answers]
    assert all(reproduced) or len(found.answers) == 1, [answer.gradient_residual for answer in found.answers]


# Several updates.


def test_many_updates_give_what_each_gives() -> None:
    """Of different batch sizes, and one that is zero."""
    target, _, first = vectors([2.0])
    pair = capture(target, inputs_of(2, VECTOR, seed=1), torch.tensor([0.0, 1.0]))
    last = capture(target, inputs_of(1, VECTOR, seed=2), torch.tensor([0.0]))
    zero = Update({name: torch.zeros_like(g) for name, g in first.gradients.items()}, first.header)
    updates = [first, pair, zero, last]
    for attack in (DLG(iterations=8, restarts=2), IDLG(iterations=8), InvertingGradients(iterations=8)):
        together = attack.many(target, updates)
        for update, found in zip(updates, together, strict=True):
            alone = attack(target, update)
            assert found.status is alone.status
            assert found.assumptions == alone.assumptions
            assert len(found.answers) == len(alone.answers)
            if alone.answers:
                torch.testing.assert_close(found.inputs, alone.inputs, rtol=1e-4, atol=1e-5)
                assert torch.equal(found.labels, alone.labels)
        assert together[2].status is Status.GRADIENT_ZERO
        assert together[1].inputs.shape == (2, *VECTOR)
    assert DLG().many(target, []) == ()


def test_how_many_are_evaluated_at_once_changes_nothing() -> None:
    target, _, update = vectors([2.0, 0.0])
    found = [DLG(restarts=5, iterations=10, at_once=at_once)(target, update) for at_once in (1, 2, 5, 32)]
    for each in found[1:]:
        torch.testing.assert_close(each.inputs, found[0].inputs, rtol=1e-6, atol=1e-8)


# Ends.


@pytest.mark.parametrize("attack", [DLG(), IDLG(), InvertingGradients(boxed=False)], ids=lambda attack: attack.name)
def test_a_loss_that_is_never_finite_ends_in_a_status(attack: Matching) -> None:
    target, x, update = pictures()
    for start in (Near(torch.full_like(x, math.nan)), Normal(0.0, 1e308)):
        found = replace(attack, start=start, iterations=5, restarts=2)(target, update)
        assert found.status is Status.NOT_CONVERGED
        assert found.reason == "the loss was never finite, after 0 iterations: diverged"
        assert found.answers == ()
        assert found.assumptions


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


def test_a_search_that_leaves_the_finite_keeps_its_best_guess() -> None:
    """The square root of what is negative is no number."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(Root(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    target = Target(model, losses.CrossEntropy(3), VECTOR, (0.0, 1.0))
    x = inputs_of(1, VECTOR)
    update = capture(target, x, torch.tensor([1.0]))
    found = IDLG(minimiser=Adam(rate=0.5), iterations=50)(target, update)
    assert "diverged" in found.reason
    assert bool(found.inputs.isfinite().all())
    assert math.isfinite(found.gradient_residual)
    assert score(IDLG()(target, update), x).mse[0] < 1e-6, "L-BFGS turns back"


@pytest.mark.parametrize("attack", [DLG(), IDLG(), InvertingGradients()], ids=lambda attack: attack.name)
def test_a_gradient_of_zero_is_named(attack: Matching) -> None:
    target = Target(picture_net(outputs=1), losses.Hinge(), PICTURE)
    x = inputs_of(1, PICTURE)
    target.model[3].bias.data.fill_(9.0)
    target = Target(target.model, losses.Hinge(), PICTURE)
    update = capture(target, x, torch.tensor([1.0]))
    assert update.norm == 0
    found = attack(target, update)
    assert (found.status, found.answers, found.reason) == (Status.GRADIENT_ZERO, (), "all gradients are zero")
    assert found.attack == attack.name


def test_a_model_in_training_mode_ends_in_a_status() -> None:
    """Its batch norm writes to its buffers at every call."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Sigmoid(), nn.Flatten(), nn.Linear(48, 3)).train()
    target = Target(model, losses.CrossEntropy(3), PICTURE, (0.0, 1.0))
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    update = capture(target, inputs_of(1, PICTURE), torch.tensor([1.0]))
    model.load_state_dict(kept)
    for attack in (DLG(iterations=3), IDLG(iterations=3, restarts=2)):
        assert isinstance(attack(target, update).status, Status)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


# The value range.


def test_boxed_guesses_stay_in_the_value_range() -> None:
    target, _, update = pictures()
    wide = InvertingGradients(iterations=20, start=Normal(0.5, 3.0))
    inside = wide(target, update).inputs
    assert 0.0 <= float(inside.min()) <= float(inside.max()) <= 1.0
    outside = replace(wide, boxed=False)(target, update).inputs
    assert float(outside.min()) < -1
    assert float(outside.max()) > 2
    unknown = Target(target.model, target.loss, PICTURE)
    free = wide(unknown, update).inputs
    assert float(free.min()) < -1


def test_boxes_are_for_the_input_and_not_for_the_labels() -> None:
    target, _, update = pictures()
    told: list[tuple[Tensor, Termination, Minima]] = []
    attack = DLG(minimiser=Told(told, Adam()), boxed=True, iterations=3, start=Normal(0.5, 3.0))
    attack(target, update)
    (_, _, minima), values = told[0], math.prod(PICTURE)
    assert 0 <= float(minima.x[0, :values].min()) <= float(minima.x[0, :values].max()) <= 1
    assert not 0 <= float(minima.x[0, values:].min()) <= float(minima.x[0, values:].max()) <= 1


def test_lbfgs_refuses_a_box() -> None:
    target, _, update = pictures()
    with pytest.raises(ValueError, match="use Adam, or boxed=False"):
        IDLG(boxed=True)(target, update)
    IDLG(boxed=True, iterations=1)(Target(target.model, target.loss, PICTURE), update)


# What is taken for granted.

SAYS = "a distribution over labels is optimised"
SIMILAR = "neighbouring values of the input are similar (total variation)"


def test_every_assumption_is_listed_and_no_other() -> None:
    target, _, update = pictures()
    read = candidates(target, update).assumption
    assert DLG(iterations=1)(target, update).assumptions == (SAYS, "one start")
    assert IDLG(iterations=1)(target, update).assumptions == (read, "one start")
    assert InvertingGradients(iterations=1)(target, update).assumptions == (read, SIMILAR, "one start")
    several = InvertingGradients(iterations=1, restarts=3, variation=0.0)(target, update)
    assert several.assumptions == (read, "the best of 3 starts by its loss")
    ambiguous, _, other = odd()
    assert len(candidates(ambiguous, other).labels) == 2
    tried = IDLG(iterations=1, restarts=3)(ambiguous, other)
    assert tried.assumptions == (candidates(ambiguous, other).assumption, "the best of 6 starts by its loss")


@pytest.mark.parametrize("shape", [(6,), (1, 1, 6), (2, 3)])
def test_the_variation_of_what_is_no_picture_counts_nothing(shape: tuple[int, ...]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    target = Target(model, losses.CrossEntropy(3), shape, (0.0, 1.0))
    update = capture(target, inputs_of(1, shape), torch.tensor([1.0]))
    heavy, none = (InvertingGradients(variation=v, iterations=5)(target, update) for v in (1e6, 0.0))
    assert torch.equal(heavy.inputs, none.inputs)
    assert SIMILAR not in heavy.assumptions


def test_a_heavy_variation_flattens_pictures() -> None:
    target, _, update = pictures()
    heavy, none = (InvertingGradients(variation=v, iterations=60)(target, update) for v in (1e3, 0.0))
    assert float(total_variation(heavy.inputs)) < 0.1 * float(total_variation(none.inputs))


# Settings.


@pytest.mark.parametrize("setting", ["restarts", "iterations", "at_once"])
@pytest.mark.parametrize("value", [0, -2])
@pytest.mark.parametrize("attack", [Matching, DLG, IDLG, InvertingGradients])
def test_impossible_settings_are_refused(attack: type[Matching], setting: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{setting} is {value}: expected 1 or more$"):
        attack(**{setting: value})


def test_attacks_have_the_names_of_their_papers() -> None:
    assert [attack().name for attack in (DLG, IDLG, InvertingGradients)] == ["DLG", "iDLG", "InvertingGradients"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_search_is_in_the_type_asked_for(dtype: torch.dtype) -> None:
    target, x, update = pictures(picture_net(nn.Sigmoid))
    told: list[tuple[Tensor, Termination, Minima]] = []
    found: Reconstruction = IDLG(dtype=dtype, minimiser=Told(told))(target, update)
    assert told[0][0].dtype is dtype
    assert found.inputs.dtype is torch.float64
    assert score(found, x).mse[0] < (1e-4 if dtype is torch.float32 else 1e-6)


def test_any_distance_can_be_matched() -> None:
    """The largest difference of an entry: with kinks, and small nowhere else."""

    def largest(found: Mapping[str, Tensor], given_: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([(found[name] - g).abs().max() for name, g in given_.items()]).max()

    target, x, update = pictures()
    start = Near(x, 0.1)
    adam = Adam(0.01, decay=(0.5,))
    found = Matching(distance=largest, optimise_label=False, minimiser=adam, start=start, iterations=100)
    before = start.draw(x.shape, target, torch.Generator().manual_seed(0))
    assert score(found(target, update), x).mse[0] < 0.3 * float((before - x).square().mean())


def test_patience_ends_a_search_that_stands_still() -> None:
    target, _, update = pictures()
    found = IDLG(minimiser=STILL, patience=4)(target, update)
    assert "after 4 iterations: did not fall by a tenth in 4 iterations" in found.reason
