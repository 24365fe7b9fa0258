"""One suite for every loss. A new margin loss adds one row to LOSSES."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from rgap.nn import losses
from rgap.nn.losses import BinaryCrossEntropy, CrossEntropy, Loss, MarginLoss, MeanSquaredError


@dataclass(frozen=True)
class Row:
    ours: MarginLoss
    name: str
    oracle: Callable[[Tensor], Tensor]
    """The loss of every margin."""
    attained: bool = True
    """Whether a sample can have the lowest product; a loss with a corner only comes near."""


LOSSES = [
    Row(losses.Logistic(), "logistic", lambda mu: -functional.logsigmoid(mu)),
    Row(losses.Exponential(), "exponential", lambda mu: torch.exp(-mu)),
    Row(losses.Hinge(), "hinge", lambda mu: functional.relu(1 - mu), attained=False),
    Row(losses.SquaredHinge(), "squared-hinge", lambda mu: functional.relu(1 - mu).square()),
]
WEIGHTS = (0.5, 2.0, 1.0)
SEVERAL: list[Loss] = [
    CrossEntropy(2), CrossEntropy(4), CrossEntropy(3, label_smoothing=0.2), MeanSquaredError(), MeanSquaredError(3),
    BinaryCrossEntropy(), BinaryCrossEntropy(3),
]  # fmt: skip
"""Losses of other outputs than one, and of other labels than two."""

every_loss = pytest.mark.parametrize("row", LOSSES, ids=lambda row: row.name)

STEP = 4e-3
# Shifted off the round numbers, where the hinges have their corner and where every product is zero.
GRID = torch.arange(-60, 60, STEP, dtype=torch.float64) + STEP / np.pi


def slope(row: Row, mu: Tensor) -> Tensor:
    """From autograd."""
    mu = mu.clone().requires_grad_()
    return torch.autograd.grad(row.oracle(mu).sum(), mu)[0]


def at(row: Row, mu: float) -> float:
    return float(slope(row, torch.tensor([mu], dtype=torch.float64)))


PRODUCTS = {row.name: GRID * slope(row, GRID) for row in LOSSES}
SLOPES = {row.name: slope(row, GRID) for row in LOSSES}


@every_loss
def test_the_value_is_that_of_torch(row: Row) -> None:
    # torch's softplus is linear from 20 on.
    torch.testing.assert_close(row.ours.value(GRID), row.oracle(GRID), rtol=1e-9, atol=0)


@every_loss
def test_the_slope_is_that_of_autograd(row: Row) -> None:
    torch.testing.assert_close(row.ours.slope(GRID), SLOPES[row.name], rtol=1e-12, atol=1e-15)
    assert bool((row.ours.slope(GRID) <= 0).all())


@every_loss
def test_the_slope_that_training_sees_is_the_same(row: Row) -> None:
    mu = torch.tensor([-1.5, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(row.ours.value(mu).sum(), mu)[0]
    torch.testing.assert_close(found, row.ours.slope(mu.detach()), rtol=1e-12, atol=0)


@every_loss
def test_a_batch_gives_the_mean(row: Row) -> None:
    outputs = torch.tensor([0.3, -2.0, 0.7], dtype=torch.float64)
    labels = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    expected = (
        sum(float(row.oracle(torch.tensor(y * o))) for y, o in zip(labels.tolist(), outputs.tolist(), strict=True)) / 3
    )
    for given_outputs in (outputs, outputs[:, None]):
        assert float(row.ours(given_outputs, labels)) == pytest.approx(expected, rel=1e-6)


# Roots.


@every_loss
@settings(max_examples=20, deadline=None)
@given(
    product=st.one_of(
        st.floats(-1.2, 40.0, allow_subnormal=False),
        st.floats(-1e-3, 1e-3, allow_subnormal=False),
        st.floats(-0.6, -1e-6),
    )
)
@example(product=0.0)
@example(product=1e-12)
@example(product=-1e-12)
@example(product=55.0)
def test_every_root_on_a_grid_is_found_and_no_other(row: Row, product: float) -> None:
    roots = row.ours.roots(product)
    assert list(roots) == sorted(roots)
    for mu in roots:
        assert at(row, mu) < 0
        assert mu * at(row, mu) == pytest.approx(product, rel=1e-9, abs=1e-12)
    side = (PRODUCTS[row.name] - product).sign()
    alive = SLOPES[row.name] < 0
    crossings = ((side[1:] != side[:-1]) & alive[1:] & alive[:-1]).nonzero()[:, 0]
    brackets = [(float(GRID[i]), float(GRID[i + 1])) for i in crossings.tolist()]
    for low, high in brackets:
        assert any(low - 1e-12 <= mu <= high + 1e-12 for mu in roots), (low, high, roots)
    for mu in roots:
        # Two roots within one step, or one next to the corner, cross no bracket.
        seen = any(low - 1e-12 <= mu <= high + 1e-12 for low, high in brackets)
        twin = (
            sum(abs(mu - other) < 2 * STEP for other in roots) == 2 or product < row.ours.lowest_product + 4 * STEP**2
        )
        assert seen or twin or not -60 < mu < 1 - STEP or mu > 59, (mu, brackets)


@every_loss
@settings(max_examples=20, deadline=None)
@given(mu=st.floats(-300.0, 30.0))
def test_a_margin_is_among_the_roots_of_its_product(row: Row, mu: float) -> None:
    here = at(row, mu)
    if here == 0:
        return
    roots = row.ours.roots(mu * here)
    # Where the curve is flat the rounding of the product moves the root: by its square root at the minimum.
    near = 1e-9 * (1 + abs(mu)) if abs(mu * here - row.ours.lowest_product) > 1e-3 else 1e-6
    if mu > 0:
        nearby = at(row, mu + 1e-6)
        change = abs((mu + 1e-6) * nearby - mu * here) / 1e-6
        near = max(near, 1e-15 / max(change, 1e-9))
    assert any(abs(root - mu) <= near for root in roots), roots


@every_loss
def test_the_lowest_product_is_the_minimum_of_the_grid(row: Row) -> None:
    lowest = float(PRODUCTS[row.name].min())
    # The grid misses a smooth minimum by the square of its step, a corner by the step.
    assert row.ours.lowest_product <= lowest + 1e-15
    assert row.ours.lowest_product == pytest.approx(lowest, abs=STEP**2 if row.attained else STEP)


@every_loss
def test_around_the_minimum_roots_meet_and_vanish(row: Row) -> None:
    lowest = row.ours.lowest_product
    where = float(GRID[PRODUCTS[row.name].argmin()])
    if row.attained:
        (mu,) = row.ours.roots(lowest)
        assert mu == pytest.approx(where, abs=STEP)
        # Rounding may push a product below what is possible.
        (rounded,) = row.ours.roots(lowest * (1 + 1e-8))
        assert rounded == mu
        low, high = row.ours.roots(lowest * (1 - 1e-4))
        assert low < mu < high
    else:
        assert row.ours.roots(lowest) == ()
        (mu,) = row.ours.roots(lowest * (1 - 1e-4))
        assert mu == pytest.approx(where, abs=2 * STEP)
    for factor in (1 + 1e-4, 1.5, 100.0):
        assert row.ours.roots(lowest * factor) == ()


@every_loss
def test_a_product_of_zero_with_a_gradient_is_a_margin_of_zero(row: Row) -> None:
    assert row.ours.roots(0.0) == (0.0,)


# Margins from slopes.


@every_loss
@settings(max_examples=20, deadline=None)
@given(mu=st.floats(-20.0, 20.0))
def test_margin_inverts_the_slope_where_one_margin_has_it(row: Row, mu: float) -> None:
    here = at(row, mu)
    shared = bool(((SLOPES[row.name] == here) & ((GRID - mu).abs() > 0.5)).any())
    found = row.ours.margin(here)
    if shared:
        assert found is None
    else:
        assert found is not None
        # A slope near -1 has lost the digits of its distance from it.
        curvature = abs(at(row, mu + 1e-3) - at(row, mu - 1e-3)) / 2e-3
        assert found == pytest.approx(mu, abs=1e-14 * (1 + abs(here)) / curvature + 1e-12)


@every_loss
@pytest.mark.parametrize("value", [-1e6, -3.0, -1.0, -0.5, 0.0, 1e-9, 0.5, 3.0])
def test_margin_of_a_slope_that_no_margin_has(row: Row, value: float) -> None:
    wide = torch.linspace(-6e5, 1e3, 1001, dtype=torch.float64)
    reached = slope(row, torch.cat([wide, GRID]))
    if not float(reached[reached.isfinite() & (reached < 0)].min()) < value < 0:
        found = row.ours.margin(value)
        assert found is None or at(row, found) == pytest.approx(value)


# Labels and names.


@every_loss
def test_labels_of_two_classes_are_taken(row: Row) -> None:
    row.ours.check_labels(torch.tensor([1.0, -1.0]))
    row.ours.check_labels(torch.tensor([[1], [-1]]))


@every_loss
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([2.0], "got label 2, expected -1 or 1 for the {} loss"),
        ([1.0, 0.5, 3.0], "got label 0.5, expected -1 or 1 for the {} loss; real values are for the loss mse"),
        ([1.0, 0.0], "got label 0, expected -1 or 1 for the {} loss; write class 0 as -1, or take the loss bce"),
        ([7.0, 0.0], "got label 7, expected -1 or 1 for the {} loss; write class 0 as -1, or take the loss bce"),
        ([float("nan")], "got label nan, expected -1 or 1 for the {} loss"),
    ],
)
def test_other_labels_are_refused(row: Row, labels: list[float], message: str) -> None:
    with pytest.raises(ValueError, match="got label") as refused:
        row.ours.check_labels(torch.tensor(labels))
    assert str(refused.value) == message.format(row.name)


@every_loss
def test_a_loss_is_found_by_its_name(row: Row) -> None:
    assert row.ours.name == row.name
    assert losses.by_name(row.name) == row.ours


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    known = ", ".join(sorted([*(row.name for row in LOSSES), "cross-entropy", "mse", "bce", "nll"]))
    with pytest.raises(ValueError, match="unknown loss") as refused:
        losses.by_name("Logistic")
    assert str(refused.value) == f"unknown loss 'Logistic': expected one of {known}"


def test_every_loss_is_covered() -> None:
    every = {*losses._MARGIN.values(), *losses.SEVERAL.values()}
    assert {type(row.ours) for row in LOSSES} | {type(loss) for loss in SEVERAL} | {
        losses.NegativeLogLikelihood
    } == every


# Cross-entropy.


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_cross_entropy_is_minus_the_log_of_the_labels_share(classes: int, batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = 4 * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=generator)
    shares = [np.exp(row) / np.exp(row).sum() for row in outputs.numpy()]
    expected = -np.mean([np.log(row[y]) for row, y in zip(shares, labels.tolist(), strict=True)])
    assert float(CrossEntropy(classes)(outputs, labels)) == pytest.approx(expected, rel=1e-12)
    for given_labels in (labels.float(), labels.double(), labels[:, None]):
        found = CrossEntropy(classes)(outputs, given_labels)
        assert float(found) == pytest.approx(float(functional.cross_entropy(outputs, labels)), rel=1e-14)


def test_cross_entropy_of_large_outputs_is_finite() -> None:
    outputs = torch.tensor([[1000.0, -1000.0]], dtype=torch.float64)
    assert float(CrossEntropy(2)(outputs, torch.tensor([1.0]))) == 2000.0
    assert float(CrossEntropy(2)(outputs, torch.tensor([0.0]))) == 0.0


def test_cross_entropy_of_two_classes_is_the_logistic_loss_of_the_outputs_difference() -> None:
    outputs = torch.tensor([[0.3, -1.0], [2.0, 2.5], [-4.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([1.0, 0.0, 1.0])
    expected = losses.Logistic()(outputs[:, 1] - outputs[:, 0], 2 * labels.double() - 1)
    torch.testing.assert_close(CrossEntropy(2)(outputs, labels), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_cross_entropy_has_a_label_and_an_output_for_each_class(classes: int) -> None:
    loss = CrossEntropy(classes)
    assert loss.labels == tuple(range(classes))
    assert all(type(label) is float for label in loss.labels)
    assert loss.outputs == classes
    loss.check_labels(torch.arange(classes))
    loss.check_labels(torch.arange(classes).float()[:, None])


@pytest.mark.parametrize("row", LOSSES, ids=lambda row: row.name)
def test_margin_losses_have_two_labels_and_one_output(row: Row) -> None:
    assert row.ours.labels == (-1.0, 1.0)
    assert row.ours.outputs == 1


@pytest.mark.parametrize(
    ("labels", "named"),
    [([3.0], "3"), ([0.0, -1.0, 5.0], "-1"), ([1.5], "1.5"), ([2.0, float("nan")], "nan"), ([float("inf")], "inf")],
)
def test_cross_entropy_refuses_other_labels(labels: list[float], named: str) -> None:
    with pytest.raises(ValueError, match="got label") as refused:
        CrossEntropy(3).check_labels(torch.tensor(labels))
    expected = "a whole number from 0 to 2 for cross-entropy of 3 classes"
    assert str(refused.value) == f"got label {named}, expected {expected}"


@pytest.mark.parametrize("classes", [1, 0, -2])
def test_cross_entropy_of_fewer_than_two_classes_is_refused(classes: int) -> None:
    message = f"got {classes} classes, expected 2 or more, one for each output of the model"
    for make in (CrossEntropy, lambda count: losses.by_name("cross-entropy", count)):
        with pytest.raises(ValueError, match="classes") as refused:
            make(classes)
        assert str(refused.value) == message


def test_cross_entropy_is_found_by_its_name_and_classes() -> None:
    assert losses.by_name("cross-entropy", 7) == CrossEntropy(7) != CrossEntropy(6)
    assert CrossEntropy(7).name == "cross-entropy"
    with pytest.raises(ValueError, match="cross-entropy needs the number of classes: pass classes"):
        losses.by_name("cross-entropy")


@every_loss
def test_the_number_of_classes_is_for_cross_entropy_alone(row: Row) -> None:
    assert losses.by_name(row.name, 5) == row.ours


# Labels that are not certain.

ALL = [*(row.ours for row in LOSSES), *(loss for loss in SEVERAL if loss.labels)]
of_all = pytest.mark.parametrize("loss", ALL, ids=str)


def a_batch(loss: Loss, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Outputs, and the numbers of the labels."""
    generator = torch.Generator().manual_seed(seed)
    outputs = 2 * torch.randn(batch, loss.outputs, generator=generator, dtype=torch.float64)
    return outputs, torch.randint(len(loss.labels), (batch,), generator=generator)


@of_all
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**31))
def test_a_certain_label_gives_the_loss_itself(loss: Loss, batch: int, seed: int) -> None:
    outputs, which = a_batch(loss, batch, seed)
    weights = torch.eye(len(loss.labels), dtype=torch.float64)[which]
    labels = torch.tensor(loss.labels, dtype=torch.float64)[which]
    torch.testing.assert_close(loss.expected(outputs, weights), loss(outputs, labels), rtol=1e-12, atol=1e-15)


@of_all
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**31))
def test_an_uncertain_label_gives_the_mean_over_labels(loss: Loss, batch: int, seed: int) -> None:
    """Sample by sample and label by label."""
    outputs, _ = a_batch(loss, batch, seed)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(batch, len(loss.labels), generator=generator, dtype=torch.float64).softmax(1)
    total = sum(
        float(weights[at, number]) * float(loss(outputs[at : at + 1], torch.tensor([label], dtype=torch.float64)))
        for at in range(batch)
        for number, label in enumerate(loss.labels)
    )
    assert float(loss.expected(outputs, weights)) == pytest.approx(total / batch, rel=1e-9, abs=1e-12)


@of_all
def test_the_mean_over_labels_is_linear_in_their_weights(loss: Loss) -> None:
    outputs, _ = a_batch(loss, 3, 0)
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(3, len(loss.labels), generator=generator, dtype=torch.float64) for _ in range(2))
    both = loss.expected(outputs, 2 * first - 3 * second)
    apart = 2 * loss.expected(outputs, first) - 3 * loss.expected(outputs, second)
    torch.testing.assert_close(both, apart, rtol=1e-10, atol=1e-12)


# Those of several outputs, against torch.


def torchs(loss: Loss, outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss as torch has it."""
    if isinstance(loss, CrossEntropy):
        weight = None if loss.weight is None else torch.tensor(loss.weight, dtype=outputs.dtype)
        return functional.cross_entropy(outputs, labels.long(), weight, label_smoothing=loss.label_smoothing)
    if isinstance(loss, MeanSquaredError):
        wanted = labels[:, None] if loss.outputs == 1 else functional.one_hot(labels.long(), loss.outputs)
        return functional.mse_loss(outputs, wanted.to(outputs))
    assert isinstance(loss, BinaryCrossEntropy)
    rows = [[float(f"{int(y):b}".zfill(loss.outputs)[-1 - at]) for at in range(loss.outputs)] for y in labels]
    return functional.binary_cross_entropy_with_logits(outputs, torch.tensor(rows, dtype=outputs.dtype))


WEIGHTED = [*SEVERAL, CrossEntropy(3, weight=WEIGHTS), CrossEntropy(3, label_smoothing=0.1, weight=WEIGHTS)]


def drawn_labels(loss: Loss, batch: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if not loss.labels:
        return torch.randn(batch, generator=generator, dtype=torch.float64)
    which = torch.randint(len(loss.labels), (batch,), generator=generator)
    return torch.tensor(loss.labels, dtype=torch.float64)[which]


@pytest.mark.parametrize("loss", WEIGHTED, ids=str)
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**31))
def test_a_loss_of_several_outputs_is_torchs(loss: Loss, batch: int, seed: int) -> None:
    outputs = 2 * torch.randn(batch, loss.outputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = drawn_labels(loss, batch, seed)
    torch.testing.assert_close(loss(outputs, labels), torchs(loss, outputs, labels), rtol=1e-12, atol=1e-15)
    if loss.labels:
        certain = (labels[:, None] == torch.tensor(loss.labels, dtype=torch.float64)).double()
        torch.testing.assert_close(loss.expected(outputs, certain), loss(outputs, labels), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", [*WEIGHTED, *(row.ours for row in LOSSES)], ids=str)
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_the_output_gradient_is_autograds_of_each_sample_alone(loss: Loss, seed: int) -> None:
    outputs = 2 * torch.randn(3, loss.outputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = drawn_labels(loss, 3, seed)
    found = loss.output_gradient(outputs, labels)
    for at in range(3):
        leaf = outputs[at : at + 1].clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf, labels[at : at + 1]), leaf)
        torch.testing.assert_close(found[at : at + 1], slope, rtol=1e-10, atol=1e-14)


def test_one_number_stands_for_several_binary_labels() -> None:
    loss = BinaryCrossEntropy(3)
    digits = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1]])
    assert loss.label(digits).tolist() == [0, 1, 6, 7]
    assert loss.digits(loss.label(digits)).tolist() == digits.tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossEntropy(3, label_smoothing=1.0), "label_smoothing 1, expected 0 or more and less than 1"),
        (lambda: CrossEntropy(3, weight=(1.0, 2.0)), "expected 3 positive numbers"),
        (lambda: CrossEntropy(2, weight=(1.0, 0.0)), "expected 2 positive numbers"),
        (lambda: MeanSquaredError(0), "got 0 outputs, expected 1 or more"),
        (lambda: BinaryCrossEntropy(17), "got 17 outputs, expected 1 to 16"),
        (lambda: losses.by_name("mse"), "mse needs the number of classes"),
        (lambda: MeanSquaredError().check_labels(torch.tensor([math.nan])), "expected a number"),
        (lambda: MeanSquaredError(3).check_labels(torch.tensor([3.0])), "a whole number from 0 to 2 for the mse loss"),
        (lambda: BinaryCrossEntropy(2).check_labels(torch.tensor([4.0])), "a whole number from 0 to 3 for the bce"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("loss", SEVERAL, ids=str)
def test_a_loss_of_several_outputs_is_found_by_its_name(loss: Loss) -> None:
    assert type(losses.by_name(loss.name, loss.outputs)) is type(loss)
    assert losses.by_name(loss.name, loss.outputs).outputs == loss.outputs


@pytest.mark.parametrize("far", [50.0, 200.0])
def test_a_certain_and_right_model_leaves_a_small_gradient_and_not_nothing(far: float) -> None:
    """1 - p is exp(-far) there, which the difference of p and 1 loses."""
    label = torch.tensor([1.0], dtype=torch.float64)
    outputs = torch.tensor([[0.0, far]], dtype=torch.float64)
    small = np.exp(-far)
    assert CrossEntropy(2).output_gradient(outputs, label)[0].tolist() == pytest.approx([small, -small], rel=1e-12)
    found = BinaryCrossEntropy(1).output_gradient(outputs[:, 1:], label)
    assert float(found) == pytest.approx(-small, rel=1e-12)


# A loss of one's own says its value, and the rest is found.


@dataclass(frozen=True)
class OfValue(MarginLoss):
    """One of the package's, of which only the value is known."""

    of: MarginLoss

    def value(self, mu: Tensor) -> Tensor:
        return self.of.value(mu)


@dataclass(frozen=True)
class OfSamples(Loss):
    """One of the package's, of which only labels, outputs and the value are known."""

    of: Loss

    @property
    def labels(self) -> tuple[float, ...]:
        return self.of.labels

    @property
    def outputs(self) -> int:
        return self.of.outputs

    def per_sample(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.of.per_sample(outputs, labels)


@every_loss
@settings(max_examples=15, deadline=None)
@given(product=st.one_of(st.floats(-1.2, 40.0, allow_subnormal=False), st.floats(-0.6, -1e-6)))
@example(product=-0.9921875)  # next to the corner of the hinge
def test_roots_of_a_value_alone_are_those_in_closed_form(row: Row, product: float) -> None:
    lowest = row.ours.lowest_product
    if abs(product / lowest - 1) < 1e-6 or abs(product) < 1e-8:  # where two roots meet, and at the corner of a hinge
        return
    assert OfValue(row.ours).roots(product) == pytest.approx(row.ours.roots(product), rel=1e-6, abs=1e-9)


@every_loss
def test_a_value_alone_has_the_lowest_product_and_slopes_and_margins(row: Row) -> None:
    own = OfValue(row.ours)
    assert own.lowest_product == pytest.approx(row.ours.lowest_product, rel=1e-8)
    torch.testing.assert_close(own.slope(GRID), SLOPES[row.name], rtol=1e-12, atol=1e-8)  # torch's softplus
    for slope_ in (-3.0, -1.0, -0.6, -0.01, 0.0, 0.5):
        wanted = row.ours.margin(slope_)
        assert own.margin(slope_) == (None if wanted is None else pytest.approx(wanted, rel=1e-9, abs=1e-12))


@pytest.mark.parametrize("loss", SEVERAL, ids=str)
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_what_a_loss_says_beyond_its_value_is_what_its_value_says(loss: Loss, seed: int) -> None:
    own, generator = OfSamples(loss), torch.Generator().manual_seed(seed)
    outputs = 2 * torch.randn(3, loss.outputs, generator=generator, dtype=torch.float64)
    labels = drawn_labels(loss, 3, seed)
    torch.testing.assert_close(own(outputs, labels), loss(outputs, labels))
    k = loss.output_gradient(outputs, labels)
    torch.testing.assert_close(own.output_gradient(outputs, labels), k, rtol=1e-9, atol=1e-14)
    weights = torch.randn(3, len(loss.labels) or 1, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(own.expected(outputs, weights), loss.expected(outputs, weights), rtol=1e-9, atol=1e-12)
    assert bool((k.norm(dim=1) <= loss.gradient_bound).all())
    # Labels from outputs and k.
    for each in (own, loss):
        told = each.label_from(outputs, k)
        assert (told is None) == bool(loss.labels) or each is loss
        if told is not None:
            torch.testing.assert_close(told, labels, rtol=1e-7, atol=1e-7)
    for label, direction in zip(labels, torch.nn.functional.normalize(k, dim=1), strict=True):
        for sign in (1, -1):
            assert float(label) in own.possible_labels(sign * direction, 1e-7) or not loss.labels
            assert float(label) in loss.possible_labels(sign * direction, 1e-7) or not loss.labels
        # The projection does not lose k.
        along = loss.projection(direction, label)
        assert float(along @ direction) > 0


@pytest.mark.parametrize("loss", WEIGHTED, ids=str)
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-7, 1e-3]), st.sampled_from([1.0, 30.0]))
def test_rounding_explains_what_moved_outputs_do_to_k(loss: Loss, seed: int, precision: float, size: float) -> None:
    """Outputs that rounding has moved give a k within the slack of what it is said to explain."""
    generator = torch.Generator().manual_seed(seed)
    outputs = size * torch.randn(3, loss.outputs, generator=generator, dtype=torch.float64)
    labels, shift = drawn_labels(loss, 3, seed), precision * outputs.abs().amax(1)
    k = loss.output_gradient(outputs, labels)
    noise = 2 * torch.rand(outputs.shape, generator=generator, dtype=torch.float64) - 1
    moved = (loss.output_gradient(outputs + shift[:, None] * noise, labels) - k).abs()
    for own in (loss, OfSamples(loss)):
        explained = own.gradient_rounding(outputs, labels, shift, precision)
        assert explained.shape == k.shape
        assert bool((moved <= 20 * (explained + precision * k.norm(dim=1, keepdim=True)) + 1e-300).all())


def test_a_name_is_made_of_the_class() -> None:
    class SmoothL1Loss(OfSamples):
        pass

    class MSELike(OfSamples):
        name = "mine"

    assert (OfSamples(CrossEntropy(2)).name, SmoothL1Loss.name, MSELike.name) == (
        "of-samples",
        "smooth-l1-loss",
        "mine",
    )


@pytest.mark.parametrize(
    ("loss", "label", "message"),
    [
        (OfSamples(CrossEntropy(3)), 3.0, "got label 3, expected one of 0, 1, 2 for the of-samples loss"),
        (OfSamples(MeanSquaredError()), math.nan, "got label nan, expected a number for the of-samples loss"),
    ],
)
def test_a_loss_of_ones_own_refuses_other_labels(loss: Loss, label: float, message: str) -> None:
    with pytest.raises(ValueError, match="got label") as refused:
        loss.check_labels(torch.tensor([label]))
    assert str(refused.value) == message
