"""What every defence must do, and what each does. A new defence adds one row to the conformance suite."""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from networks import Client, clients
from scipy.optimize import brentq
from scipy.special import log_ndtr

from rgap import Protocol, Target, Update, attacks, capture, data, defences, losses, models, score
from rgap.attacks import Status
from rgap.defences import (
    ALL,
    DPSGD,
    Clip,
    Compose,
    Defence,
    DropBias,
    Freeze,
    GaussianNoise,
    LaplaceNoise,
    Quantise,
    Sign,
    Soteria,
    TopK,
    by_name,
    gradient_error,
)  # fmt: skip
from rgap.protocol import Sends
from rgap.update import Header


@dataclass(frozen=True)
class Row:
    """A defence, and the strength at which it changes next to nothing; None if it has none."""

    defence: Defence
    harmless: float | None


ROWS = [
    Row(GaussianNoise(), 1e-9),
    Row(GaussianNoise(relative=False), 1e-9),
    Row(LaplaceNoise(), 1e-9),
    Row(LaplaceNoise(relative=False), 1e-9),
    Row(Clip(), 1e9),
    Row(DPSGD(norm=1e6), 1e-15),
    Row(TopK(), 1.0),
    Row(Sign(), None),
    Row(Quantise(), 32.0),
    Row(Quantise(stochastic=True), 32.0),
    Row(Freeze(), 0.0),
    Row(DropBias(), None),
    Row(Soteria(), 0.0),
    Row(Compose((Clip(), Quantise(8, stochastic=True), TopK())), None),
]
every_defence = pytest.mark.parametrize("row", ROWS, ids=lambda row: repr(row.defence))
DTYPES = [torch.float16, torch.float32, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = {
    "conv1.weight": (4, 3, 3, 3),
    "conv1.bias": (4,),
    "norm1.weight": (4,),
    "conv2.weight": (5, 4, 3, 3),
    "fc1.weight": (7, 20),
    "fc1.bias": (7,),
    "fc2.weight": (2, 7),
    "scale": (),
}
HEADER = Header(3, "logistic", (3, 8, 8), "f" * 64, False, Protocol(Sends.DIFFERENCE, 1, 0.1, clients=2))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some(dtype: torch.dtype = torch.float64, scale: float = 1.0, seed: int = 1) -> Update:
    generator = seeded(seed)
    gradients = {
        name: (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for name, shape in SHAPES.items()
    }
    return Update(gradients, HEADER)


def flat(update: Update) -> torch.Tensor:
    return torch.cat([g.flatten() for g in update.gradients.values()])


# Conformance


@every_defence
@every_dtype
def test_nothing_but_the_values_changes_and_never_the_input(row: Row, dtype: torch.dtype) -> None:
    update = some(dtype)
    before = {name: g.clone() for name, g in update.gradients.items()}
    state = torch.get_rng_state()
    after = row.defence(update, seeded())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], g) for name, g in update.gradients.items())
    assert list(after.gradients) == list(before)
    assert after.header == HEADER
    for name, g in after.gradients.items():
        assert g.dtype == dtype
        assert g.shape == before[name].shape
        assert g.isfinite().all()
        assert g.data_ptr() != update.gradients[name].data_ptr()


@every_defence
def test_the_same_generator_gives_the_same_and_another_only_if_it_is_random(row: Row) -> None:
    update = some()
    first, second, other = (flat(row.defence(update, seeded(seed))) for seed in (7, 7, 8))
    assert torch.equal(first, second)
    assert torch.equal(first, other) != row.defence.random


@every_defence
def test_a_random_defence_asks_for_its_generator(row: Row) -> None:
    if row.defence.random:
        with pytest.raises(ValueError, match=r"is random: got no generator, expected a torch\.Generator"):
            row.defence(some())
    else:
        assert torch.equal(flat(row.defence(some())), flat(row.defence(some(), seeded())))


@every_defence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_harmless_strength_changes_next_to_nothing(row: Row, dtype: torch.dtype) -> None:
    if row.harmless is not None:
        update = some(dtype)
        assert gradient_error(update, row.defence.with_strength(row.harmless)(update, seeded())) <= 1e-8


@every_defence
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_stronger_costs_more(row: Row, seed: int, scale: float) -> None:
    update = some(scale=scale, seed=seed)
    errors = [
        gradient_error(update, row.defence.with_strength(level)(update, seeded(seed))) for level in row.defence.levels
    ]
    assert all(weak <= strong for weak, strong in itertools.pairwise(errors))


@every_defence
@every_dtype
def test_a_zero_gradient_survives(row: Row, dtype: torch.dtype) -> None:
    zero = Update({name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}, HEADER)
    after = row.defence(zero, seeded())
    assert flat(after).isfinite().all()
    absolute = isinstance(row.defence, DPSGD) or (row.defence.random and not getattr(row.defence, "relative", True))
    assert gradient_error(zero, after) == (math.inf if absolute else 0.0)


@every_defence
@settings(deadline=None, max_examples=10)
@given(
    dtype=st.sampled_from(DTYPES), strengths=st.integers(0, 10), exponent=st.integers(-45, 38), zeros=st.integers(0, 4)
)
def test_never_nan_however_large_or_small_the_gradient(
    row: Row, dtype: torch.dtype, strengths: int, exponent: int, zeros: int
) -> None:
    limits = torch.finfo(dtype)
    largest = (some(scale=10.0**exponent).gradients[name].clamp(limits.min, limits.max).to(dtype) for name in SHAPES)
    update = Update({n: g * 0 if at < zeros else g for at, (n, g) in enumerate(zip(SHAPES, largest, strict=True))})
    levels = row.defence.levels
    after = row.defence.with_strength(levels[strengths % len(levels)])(update, seeded())
    assert flat(after).isfinite().all()
    assert not math.isnan(gradient_error(update, after))


@every_defence
def test_squares_that_overflow_do_no_harm(row: Row) -> None:
    after = row.defence(some(scale=1e305), seeded())
    assert flat(after).isfinite().all()
    assert flat(after).any()


@every_defence
def test_says_what_it_is(row: Row) -> None:
    defence = row.defence
    assert defence.name
    assert defence.about.endswith(".")
    assert all(defence.with_strength(level).strength == level for level in defence.levels)
    assert defence.with_strength(defence.strength) == defence
    assert type(defence.with_strength(defence.levels[0])) is type(defence)
    if defence.strength_name:
        assert defence.strength == getattr(defence, defence.strength_name)
        assert len(set(defence.levels)) == len(defence.levels) >= 4
        with pytest.raises(FrozenInstanceError):
            setattr(defence, defence.strength_name, 1)
    else:
        assert (defence.strength, defence.levels) == (1.0, (1.0,))
        with pytest.raises(ValueError, match=r"either on or off: got strength 0\.5, expected 1"):
            defence.with_strength(0.5)


def test_every_defence_has_its_row() -> None:
    kinds = {kind for kind in vars(defences).values() if isinstance(kind, type) and issubclass(kind, Defence)}
    made = {kind for kind in kinds if not inspect.isabstract(kind)}
    assert {type(row.defence) for row in ROWS} == made
    assert set(ALL) == made - {Compose}


# The oracle of each


def moments(found: torch.Tensor) -> tuple[float, float, float]:
    return float(found.mean()), float(found.square().mean().sqrt()), float(found.pow(4).mean())


@pytest.mark.parametrize(
    ("kind", "kurtosis", "eighth"),
    [(GaussianNoise, 3.0, 105.0), (LaplaceNoise, 6.0, 2520.0)],
    ids=["gauss", "laplace"],
)
def test_noise_has_the_moments_of_its_distribution(kind: type[Defence], kurtosis: float, eighth: float) -> None:
    # Even moments of a distribution of deviation 1: normal 1, 3, 105 for powers 2, 4, 8; Laplace 1, 6, 2520, as
    # E x^n = n! / 2^(n/2). Each mean of n values lies within 5 of its own standard deviations.
    n, deviation = 200_000, 0.25
    update = Update({"a.weight": torch.full((n // 2,), 3.0), "b.weight": torch.full((n // 2,), -4.0)})
    update = Update({name: g.double() for name, g in update.gradients.items()})
    wanted = deviation * math.sqrt((9 + 16) / 2)
    noise = (flat(kind(deviation)(update, seeded())) - flat(update)) / wanted
    mean, width, fourth = moments(noise)
    assert abs(mean) <= 5 / math.sqrt(n)
    assert abs(width**2 - 1) <= 5 * math.sqrt((kurtosis - 1) / n)
    assert abs(fourth - kurtosis) <= 5 * math.sqrt((eighth - kurtosis**2) / n)
    # Neighbours and the two tensors are independent.
    assert abs(float((noise[1:] * noise[:-1]).mean())) <= 5 / math.sqrt(n)
    assert abs(float((noise[: n // 2] * noise[n // 2 :]).mean())) <= 5 / math.sqrt(n // 2)
    # What the docstring promises of the cost: the noise's length over the update's.
    assert gradient_error(update, kind(deviation)(update, seeded())) == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize("kind", [GaussianNoise, LaplaceNoise])
def test_absolute_noise_does_not_depend_on_the_gradient(kind: type[Defence]) -> None:
    absolute = kind(0.5, relative=False)
    small, large = some(scale=1e-3), some(scale=1e3)
    noise = [flat(absolute(update, seeded())) - flat(update) for update in (small, large)]
    torch.testing.assert_close(noise[0], noise[1], atol=1e-9, rtol=0)
    assert float(noise[0].square().mean().sqrt()) == pytest.approx(0.5, rel=0.2)


def test_noise_is_the_same_in_every_type() -> None:
    double = flat(GaussianNoise(0.5, relative=False)(some(scale=0.0), seeded()))
    single = flat(GaussianNoise(0.5, relative=False)(some(torch.float32, scale=0.0), seeded()))
    assert torch.equal(single, double.float())


@given(norm=st.floats(1e-6, 1e6), scale=st.floats(1e-6, 1e6))
@settings(deadline=None, max_examples=15)
def test_clip_scales_to_the_norm_and_leaves_shorter_updates(norm: float, scale: float) -> None:
    update = some(scale=scale)
    after = Clip(norm)(update)
    if update.norm <= norm:
        assert torch.equal(flat(after), flat(update))
    else:
        assert after.norm == pytest.approx(norm, rel=1e-12)
        torch.testing.assert_close(flat(after) / norm, flat(update) / update.norm)


def test_dpsgd_is_clipping_and_noise_in_the_unit_of_the_norm() -> None:
    update = some(scale=100.0)
    noise = (flat(DPSGD(2.0, 0.5)(update, seeded())) - flat(Clip(2.0)(update))) / (0.5 * 2.0)
    expected = flat(GaussianNoise(1.0, relative=False)(some(scale=0.0), seeded()))
    torch.testing.assert_close(noise, expected)
    assert torch.equal(flat(DPSGD(2.0, 0.0)(update, seeded())), flat(Clip(2.0)(update)))


@given(keep=st.floats(0.001, 1.0), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=15)
def test_top_k_keeps_what_sorting_puts_first(keep: float, seed: int) -> None:
    update = some(seed=seed)
    values = flat(update).tolist()
    count = max(1, round(keep * len(values)))
    chosen = set(sorted(range(len(values)), key=lambda at: (-abs(values[at]), at))[:count])
    assert flat(TopK(keep)(update)).tolist() == [v if at in chosen else 0.0 for at, v in enumerate(values)]


def test_top_k_keeps_as_many_among_equals() -> None:
    update = Update({"a.weight": torch.tensor([[1.0, -2.0], [2.0, -2.0]]), "a.bias": torch.tensor([2.0, 0.0])})
    assert flat(TopK(0.5)(update)).tolist() == [0.0, -2.0, 2.0, -2.0, 0.0, 0.0]
    assert flat(TopK(0.01)(update)).tolist() == [0.0, -2.0, 0.0, 0.0, 0.0, 0.0]


def test_sign_keeps_signs_and_the_mean_magnitude_of_each_tensor() -> None:
    update = Update({"a.weight": torch.tensor([[1.0, -2.0], [0.0, 5.0]]), "a.bias": torch.tensor([-3.0])})
    assert flat(Sign()(update)).tolist() == [2.0, -2.0, 0.0, 2.0, -3.0]


@given(bits=st.integers(2, 7), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=12)
def test_quantise_takes_the_nearest_of_its_values(bits: int, seed: int) -> None:
    update = some(seed=seed)
    after = Quantise(bits)(update)
    for name, g in update.gradients.items():
        n, largest = 2 ** (bits - 1) - 1, float(g.abs().max())
        grid = torch.tensor([k * largest / n for k in range(-n, n + 1)], dtype=torch.float64)
        assert len(grid) == 2**bits - 1
        nearest = grid[(g.reshape(-1, 1) - grid).abs().argmin(1)].reshape(g.shape)
        torch.testing.assert_close(after.gradients[name], nearest, atol=1e-14, rtol=1e-14)


def test_stochastic_rounding_goes_to_a_neighbour_and_is_right_on_average() -> None:
    n, value = 100_000, 0.3
    update = Update({"a.weight": torch.tensor([1.0, *[value] * n], dtype=torch.float64)})
    found = flat(Quantise(3, stochastic=True)(update, seeded()))[1:]
    low, high = 0.0, 1 / 3  # of {-1, -2/3, -1/3, 0, 1/3, 2/3, 1}
    up = (value - low) / (high - low)
    assert ((found - low).abs().minimum((found - high).abs()) < 1e-15).all()
    assert abs(float(found.mean()) - value) <= 5 * (high - low) * math.sqrt(up * (1 - up) / n)


def test_freeze_zeroes_the_first_layers_and_no_others() -> None:
    update = some()
    for count, frozen in [(0, []), (1, ["conv1."]), (2, ["conv1.", "norm1."]), (3, ["conv1.", "norm1.", "conv2."])]:
        for name, g in Freeze(count)(update).gradients.items():
            wanted = torch.zeros_like(g) if name.startswith(tuple(frozen)) else update.gradients[name]
            assert torch.equal(g, wanted)
    assert not flat(Freeze(9)(update)).any()


def test_freeze_takes_the_order_it_is_told() -> None:
    update = Update({name: torch.ones(2, 2) for name in ("a10.weight", "a2.weight", "b.weight")})
    after = Freeze(1, order=("a2", "a10", "b"))(update)
    assert [name for name, g in after.gradients.items() if not g.any()] == ["a2.weight"]
    with pytest.raises(ValueError, match="holds no layer c; expected some of a10, a2, b"):
        Freeze(1, order=("a2", "c"))(update)


def test_drop_bias_zeroes_names_and_vectors() -> None:
    after = DropBias()(some())
    assert [name for name, g in after.gradients.items() if not g.any()] == ["conv1.bias", "norm1.weight", "fc1.bias"]
    assert all(torch.equal(g, some().gradients[name]) for name, g in after.gradients.items() if g.any())


@given(share=st.floats(0, 1), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=12)
def test_soteria_hides_the_columns_with_the_largest_norms(share: float, seed: int) -> None:
    update = some(seed=seed)
    for defence, name in [(Soteria(share), "fc1.weight"), (Soteria(share, layer="fc2"), "fc2.weight")]:
        after, columns = defence(update).gradients, update.gradients[name].T.tolist()
        ranked = sorted(range(len(columns)), key=lambda i: -math.sqrt(sum(v * v for v in columns[i])))
        hidden = set(ranked[: round(share * len(columns))])
        wanted = [[0.0] * len(column) if i in hidden else column for i, column in enumerate(columns)]
        assert after[name].T.tolist() == wanted
        assert all(torch.equal(after[other], g) for other, g in update.gradients.items() if other != name)


def test_soteria_of_one_sample_hides_its_largest_features() -> None:
    model = models.fcn3(12, (6, 5)).double()
    target = Target(model, losses.Logistic(), (12,))
    x = torch.rand(1, 12, generator=seeded(), dtype=torch.float64)
    update = capture(target, x, torch.tensor([1.0]))
    features = model[:3](x)[0]  # what fc2 reads
    after = Soteria(1 / 3, layer="fc2")(update).gradients["fc2.weight"]
    hidden = (after == 0).all(0).nonzero().flatten().tolist()
    assert hidden == sorted(features.abs().argsort(descending=True)[:2].tolist())


def test_compose_is_one_after_the_other() -> None:
    first, second, third = Clip(1.0), GaussianNoise(0.1), TopK(0.5)
    update, generator = some(), seeded(3)
    expected = third(second(first(update), generator))
    assert torch.equal(flat(Compose((first, second, third))(update, seeded(3))), flat(expected))
    assert Compose((first, second)).name == "Clip + GaussianNoise"
    assert not Compose((first, third)).random


def test_gradient_error_by_hand() -> None:
    before = Update({"a.weight": torch.tensor([3.0, 0.0]), "b.weight": torch.tensor([4.0])})
    after = Update({"a.weight": torch.tensor([3.0, 1.0]), "b.weight": torch.tensor([2.0])})
    assert gradient_error(before, after) == pytest.approx(math.sqrt(1 + 4) / 5)
    assert gradient_error(before, before) == 0.0
    zero = Update({name: torch.zeros_like(g) for name, g in before.gradients.items()})
    assert gradient_error(before, zero) == 1.0
    assert gradient_error(zero, zero) == 0.0
    assert gradient_error(zero, before) == math.inf
    with pytest.raises(ValueError, match="as before the defence"):
        gradient_error(before, some())


def test_by_name() -> None:
    assert by_name("TopK") == by_name("top-k") == by_name("TOP_K") == TopK()
    assert by_name("dp-sgd", 0.5) == DPSGD(multiplier=0.5)
    assert [type(by_name(kind.__name__)) for kind in ALL] == list(ALL)
    with pytest.raises(ValueError, match=r"got the defence 'noise', expected one of GaussianNoise, LaplaceNoise, Clip"):
        by_name("noise")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianNoise(-1.0), r"got deviation=-1\.0, expected 0 or more, and finite"),
        (lambda: LaplaceNoise(math.nan), "got deviation=nan"),
        (lambda: Clip(0.0), r"got norm=0\.0, expected more than 0, and finite"),
        (lambda: DPSGD(math.inf), "got norm=inf"),
        (lambda: DPSGD(1.0, -1.0), r"got multiplier=-1\.0"),
        (lambda: TopK(0.0), r"got keep=0\.0, expected a share above 0 and up to 1"),
        (lambda: TopK(math.nan), "got keep=nan"),
        (lambda: Quantise(1), "got bits=1, expected a whole number from 2 to 32; for one bit use Sign"),
        (lambda: Quantise().with_strength(2.5), r"got bits=2\.5 for Quantise, expected a whole number"),
        (lambda: Freeze(-1), "got layers=-1"),
        (lambda: Freeze().with_strength(math.inf), "got layers=inf for Freeze, expected a whole number"),
        (lambda: Soteria(1.5), r"got share=1\.5, expected a share from 0 to 1"),
        (lambda: Soteria(layer="conv1")(some()), "weight gradient of the layer 'conv1': got fc1.weight, fc2.weight"),
        (
            lambda: Soteria()(Update({"a.bias": torch.ones(3)})),
            "a Linear layer: got none with two dimensions",
        ),
        (lambda: Compose(()), "got no defences to compose"),
        (lambda: DPSGD().epsilon(1.5, 1, 1e-5), r"got rate=1\.5, steps=1, delta=1e-05: expected 0 < rate <= 1"),
        (lambda: DPSGD().epsilon(1.0, 1, 0.0), r"delta=0\.0"),
    ],
)
def test_refusals_say_what_was_expected(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_defence_that_loses_a_tensor_is_refused() -> None:
    @dataclass(frozen=True)
    class Lossy(Defence):
        def run(self, gradients: dict[str, torch.Tensor], generator: Any) -> dict[str, torch.Tensor]:
            return {name: g[:1] for name, g in gradients.items()}

    with pytest.raises(ValueError, match=r"Lossy changed names or shapes: got .*\(1,\).* expected .*\(2,\)"):
        Lossy()(Update({"a.weight": torch.ones(2)}))


def test_a_defence_that_writes_in_place_leaves_the_update_alone() -> None:
    @dataclass(frozen=True)
    class InPlace(Defence):
        def run(self, gradients: dict[str, torch.Tensor], generator: Any) -> dict[str, torch.Tensor]:
            return {name: g.zero_() for name, g in gradients.items()}

    update = some()
    assert not flat(InPlace()(update)).any()
    assert torch.equal(flat(update), flat(some()))


# Differential privacy


def exact_epsilon(multiplier: float, steps: int, delta: float) -> float:
    """Of the Gaussian mechanism without sampling: the epsilon at which delta is reached.

    Many steps are one with the multiplier / sqrt(steps); delta = F(1/2s - es) - exp(e) F(-1/2s - es) (Balle and Wang,
    *Improving the Gaussian Mechanism for Differential Privacy*, ICML 2018, Theorem 8).
    """
    s = multiplier / math.sqrt(steps)

    def missing(epsilon: float) -> float:
        first, second = 1 / (2 * s) - epsilon * s, -1 / (2 * s) - epsilon * s
        return math.exp(log_ndtr(first)) - math.exp(epsilon + log_ndtr(second)) - delta

    return float(brentq(missing, 0.0, 1e5))


def renyi_epsilon(multiplier: float, steps: int, delta: float) -> float:
    """The least a * steps / 2s^2 + log(1/delta) / (a - 1) over all orders a > 1 (Mironov 2017), in closed form."""
    rho = steps / (2 * multiplier**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


@pytest.mark.parametrize("multiplier", [0.2, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("steps", [1, 10, 100])
def test_epsilon_lies_between_the_exact_one_and_the_plain_renyi_bound(multiplier: float, steps: int) -> None:
    found = DPSGD(1.0, multiplier).epsilon(1.0, steps, 1e-5)
    exact, bound = exact_epsilon(multiplier, steps, 1e-5), renyi_epsilon(multiplier, steps, 1e-5)
    assert exact <= found <= bound
    assert found <= 1.2 * exact


def test_epsilon_falls_with_noise_and_rate_and_does_not_depend_on_the_norm() -> None:
    epsilon = [DPSGD(1.0, m).epsilon(1.0, 10, 1e-5) for m in DPSGD.levels]
    assert epsilon == sorted(epsilon, reverse=True)
    rates = [DPSGD(1.0, 1.0).epsilon(rate, 10, 1e-5) for rate in (0.01, 0.1, 1.0)]
    assert rates == sorted(rates)
    assert DPSGD(7.0, 1.0).epsilon(1.0, 10, 1e-5) == DPSGD(1.0, 1.0).epsilon(1.0, 10, 1e-5)
    assert DPSGD(1.0, 0.0).epsilon(1.0, 1, 1e-5) == math.inf
    assert DPSGD(1.0, 1e6).epsilon(0.01, 1, 0.1) == 0.0
    assert DPSGD().epsilon(1.0, 0, 1e-5) == 0.0


def test_epsilon_without_opacus_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *rest: object) -> object:
        raise ModuleNotFoundError(f"No module named {name.split('.')[0]!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ImportError, match=r"epsilon needs opacus \(No module .*pip install 'rgap\[dp\]'"):
        DPSGD().epsilon(1.0, 1, 1e-5)


# The point of it


@pytest.fixture(scope="module")
def photograph() -> tuple[Target, torch.Tensor, Update]:
    target = Target(models.cnn6(1, 12), losses.Logistic(), (1, 12, 12), (0.0, 1.0))
    x = data.photographs(1, 12, channels=1).inputs
    return target, x, capture(target, x, torch.tensor([1.0]))


def test_without_a_defence_the_photograph_is_recovered(photograph: tuple[Target, torch.Tensor, Update]) -> None:
    target, x, update = photograph
    found = attacks.Recursive()(target, update)
    assert found.status is Status.EXACT
    assert score(found, x).mse[0] < 1e-6


STRONG = [
    GaussianNoise(1.0), LaplaceNoise(1.0), DPSGD(0.01, 1.0), TopK(0.01), Sign(), Quantise(2), Freeze(4), Soteria(0.8),
]  # fmt: skip


@pytest.mark.parametrize("defence", STRONG, ids=repr)
def test_with_a_strong_one_it_is_not(defence: Defence, photograph: tuple[Target, torch.Tensor, Update]) -> None:
    target, x, update = photograph
    found = attacks.Recursive()(target, defence(update, seeded()))
    assert found.status not in (Status.EXACT, Status.AMBIGUOUS)
    # Grey, the middle of the range, is a better guess.
    if found.answers:
        assert score(found, x).mse[0] > score(torch.full_like(x, 0.5), x).mse[0]


def test_clipping_alone_gives_the_photograph_dimmed(photograph: tuple[Target, torch.Tensor, Update]) -> None:
    target, x, update = photograph
    found = attacks.Recursive()(target, Clip(0.5 * update.norm)(update))
    shape, truth = found.inputs.flatten().double(), x.flatten().double()
    assert float(shape @ truth / (shape.norm() * truth.norm())) > 1 - 1e-6
    assert float(shape.norm() / truth.norm()) < 0.9


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(client=clients(), data=st.data())
def test_exact_is_never_said_of_a_wrong_picture_under_any_defence(client: Client, data: st.DataObject) -> None:
    # One layer is left out: there every vector is the gradient of some input, with a bias too under a hinge loss.
    assume(len(client.target.network.layers) > 1)
    kind = data.draw(st.sampled_from(ALL))
    defence = kind().with_strength(data.draw(st.sampled_from(kind.levels)))
    found = attacks.Recursive()(client.target, defence(capture(client.target, client.x, client.y), seeded()))
    if found.status is Status.EXACT:
        x, truth = found.inputs.flatten(), client.x.flatten()
        if isinstance(defence, Clip | DPSGD):
            # A scaled gradient is the gradient of the scaled picture, if there are no biases: see Clip.
            x = x * (x @ truth) / (x @ x)
        assert float((x - truth).square().mean()) <= 1e-8
