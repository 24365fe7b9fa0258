"""Labels read off the last layer: the truth is never ruled out, and stands alone where the gradient says so."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import ACTIVATIONS, LOSSES, Client, clients
from torch import Tensor, nn

from rgap import Target, Update, capture, data, losses, models
from rgap.attacks.label_counts import Counts, counts, whole_numbers
from rgap.attacks.labels import Candidates, candidates, of_one, one_hot

DRAWN = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NONNEGATIVE = {"relu", "sigmoid", "softplus"}


def values(found: Candidates) -> list[list[float]]:
    return [labels.tolist() for labels in found.labels]


def classifier(classes: int, activation: str, bias: bool, seed: int, size: float = 1.0, width: int = 9) -> Target:
    """Two Linear layers for 6 values, in float64; the last weight is `size` times torch's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, width), ACTIVATIONS[activation](), nn.Linear(width, classes, bias=bias))
    with torch.no_grad():
        model[2].weight.mul_(size)
    return Target(model.double().eval(), losses.CrossEntropy(classes), (6,), (0.0, 1.0))


def convolutional(classes: int, bias: bool, seed: int = 0, size: float = 1.0) -> Target:
    """A small network with what no chain can hold: maxima and layer norm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, 1, 1), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.LayerNorm(16 * 4 * 4, elementwise_affine=False), nn.Linear(16 * 4 * 4, 40), nn.ReLU(),
            nn.Linear(40, classes, bias=bias),
        ).eval()  # fmt: skip
    with torch.no_grad():
        model[9].weight.mul_(size)
    return Target(model, losses.CrossEntropy(classes), (3, 16, 16), (0.0, 1.0))


def rand(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def right(found: Counts, y: Tensor) -> float:
    """The share of labels that are right, counted one by one."""
    left, hits = y.tolist(), 0
    for label in found.labels.tolist():
        if label in left:
            left.remove(label)
            hits += 1
    return hits / len(y)


# One sample.


@DRAWN
@given(
    st.integers(2, 7), st.sampled_from(sorted(ACTIVATIONS)), st.booleans(), st.integers(0, 2**31), st.data(),
    st.sampled_from([1.0, 10.0]),
)  # fmt: skip
def test_the_label_of_one_sample_is_read(
    classes: int, activation: str, bias: bool, seed: int, data: st.DataObject, size: float
) -> None:
    target = classifier(classes, activation, bias, seed, size)
    label = float(data.draw(st.integers(0, classes - 1)))
    x = rand(seed, 1, 6)
    found = candidates(target, capture(target, x, torch.tensor([label])))
    features = target.model[:-1](x)
    if bias or (features.any() and (classes > 2 or activation in NONNEGATIVE)):
        assert values(found) == [[label]]
    else:
        assert sorted(values(found)) == [[float(y)] for y in range(classes)]
    assert found.labels[0].dtype == torch.float64
    assert found.assumption


@DRAWN
@given(
    st.integers(2, 5), st.sampled_from(["leaky_relu", "relu", "tanh"]), st.booleans(), st.integers(0, 2**31),
    st.data(), st.sampled_from([30.0, 300.0, 3000.0]),
)  # fmt: skip
def test_a_certain_model_rules_the_truth_out_neither(
    classes: int, activation: str, bias: bool, seed: int, data: st.DataObject, size: float
) -> None:
    """Where p rounds to 0 or 1 rows of the gradient vanish, in float32 sooner than in float64."""
    target = classifier(classes, activation, bias, seed, size)
    target = Target(target.model.float(), target.loss, (6,), (0.0, 1.0))
    label = float(data.draw(st.integers(0, classes - 1)))
    found = candidates(target, capture(target, rand(seed, 1, 6), torch.tensor([label])))
    assert [label] in values(found)


@DRAWN
@given(clients())
def test_the_label_of_a_margin_loss_is_never_ruled_out(client: Client) -> None:
    target, update = client.target, capture(client.target, client.x, client.y)
    found = candidates(target, update)
    last = target.graph.uses[-1]
    before = None if last.before is None else target.graph.uses[last.before].activation
    shown = last.bias_name is not None or (before is not None and before.nonnegative)
    if shown and update.gradients[last.bias_name or last.weight_name].any():
        assert values(found) == [[float(client.y)]]
    else:
        assert values(found) == [[-1.0], [1.0]]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("label", range(4))
def test_layers_before_the_last_one_may_be_anything(label: int, bias: bool) -> None:
    target = convolutional(4, bias)
    assert target.graph.obstacles
    update = capture(target, data.photographs(1, 16).inputs, torch.tensor([float(label)]))
    assert values(candidates(target, update)) == [[float(label)]]


class Behind(nn.Module):
    """Something between the last layer and the loss."""

    def __init__(self, last) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fc(x))


@pytest.mark.parametrize("last", [torch.neg, torch.nn.Softmax(1), lambda z: z**3, lambda z: z.flip(1)])
@pytest.mark.parametrize("label", range(3))
def test_a_last_layer_that_does_not_feed_the_loss_is_not_believed(label: int, last) -> None:
    """Signs of its gradient may then belong to another label."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = Target(Behind(last).double(), losses.CrossEntropy(3), (6,))
    found = candidates(target, capture(target, rand(1, 1, 6), torch.tensor([float(label)])))
    assert values(found) == [[0.0], [1.0], [2.0]]
    assert "fc" in found.assumption


@pytest.mark.parametrize("norm", [True, False])
def test_the_sign_of_features_is_taken_from_a_chain_alone(norm: bool) -> None:
    """Batch norm after a ReLU makes them negative, and the graph looks through it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 9), nn.ReLU(), nn.BatchNorm1d(9) if norm else nn.Identity(), nn.Linear(9, 1, bias=False)
        )
    if norm:
        model[2].running_mean.fill_(5.0)
    target = Target(model.double().eval(), losses.Logistic(), (6,))
    found = of_one(target, capture(target, rand(1, 1, 6), torch.tensor([1.0])))
    assert values(found) == ([[-1.0], [1.0]] if norm else [[1.0]])


def test_without_a_gradient_of_the_last_layer_all_labels_are_tried() -> None:
    target = classifier(3, "relu", True, 0)
    target.model[2].requires_grad_(False)
    frozen = Target(target.model, target.loss, (6,))
    found = candidates(frozen, capture(frozen, rand(0, 1, 6), torch.tensor([2.0])))
    assert values(found) == [[0.0], [1.0], [2.0]]
    assert "2, the last layer, is no Linear layer whose gradient is shared" in found.assumption
    target = Target(nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()), losses.CrossEntropy(3), (1, 4, 4))
    found = candidates(target, capture(target, torch.rand(1, 1, 4, 4), torch.tensor([2.0])))
    assert values(found) == [[0.0], [1.0], [2.0]]


@pytest.mark.parametrize("bias", [False, True])
def test_a_gradient_of_zero_tells_no_label(bias: bool) -> None:
    target = classifier(3, "tanh", bias, 0)
    update = Update({name: torch.zeros_like(p) for name, p in target.parameters.items()})
    found = candidates(target, update)
    assert values(found) == [[0.0], [1.0], [2.0]]
    assert "is zero" in found.assumption
    with pytest.raises(ValueError, match="is zero"):
        counts(target, update)


@pytest.mark.parametrize("loss", [losses.CrossEntropy(3), losses.Logistic()], ids=lambda loss: loss.name)
@pytest.mark.parametrize("sent", ["zeros", "nothing"])
def test_a_bias_gradient_that_is_withheld_is_not_read(sent: str, loss: losses.Loss) -> None:
    """Of a sample it is zero only where the weight's gradient is zero too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, loss.outputs)).double()
    target = Target(model, loss, (6,), (0.0, 1.0))
    for label in loss.labels:
        gradients = dict(capture(target, rand(0, 1, 6), torch.tensor([label])).gradients)
        bias = gradients.pop("2.bias")
        if sent == "zeros":
            gradients["2.bias"] = torch.zeros_like(bias)
        found = of_one(target, Update(gradients))
        assert values(found) == ([[label]] if loss.outputs > 1 else [[-1.0], [1.0]])
        del gradients["2.weight"]
        assert values(of_one(target, Update(gradients))) == [[y] for y in loss.labels]


@pytest.mark.parametrize("bias", [False, True])
def test_in_noise_the_largest_row_is_taken_and_said_to_be(bias: bool) -> None:
    target = classifier(6, "tanh", bias, 0)
    clean = capture(target, rand(0, 1, 6), torch.tensor([4.0]))
    generator = torch.Generator().manual_seed(3)
    noise = {n: 0.2 * torch.randn(g.shape, generator=generator, dtype=g.dtype) for n, g in clean.gradients.items()}
    update = Update({name: g + noise[name] for name, g in clean.gradients.items()})
    found = candidates(target, update)
    assert values(found) == [[4.0]]
    assert "one sample" in found.assumption


# Several samples.


def test_one_hot() -> None:
    for loss, labels in [(losses.CrossEntropy(4), [3.0, 0.0, 3.0]), (losses.Hinge(), [1.0, -1.0, 1.0])]:
        found = one_hot(loss, torch.tensor(labels))
        for row, label in zip(found.tolist(), labels, strict=True):
            assert row == [1.0 if label == each else 0.0 for each in loss.labels]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-0.3, 1.0), min_size=2, max_size=4).filter(lambda s: sum(s) > 0.1), st.integers(1, 6))
def test_whole_numbers_are_the_nearest_with_their_sum(shares: list[float], b: int) -> None:
    exact = [b * max(0.0, s) / sum(max(0.0, t) for t in shares) for s in shares]

    def distance(numbers: tuple[int, ...]) -> float:
        return sum((n - e) ** 2 for n, e in zip(numbers, exact, strict=True))

    every = [numbers for numbers in itertools.product(range(b + 1), repeat=len(shares)) if sum(numbers) == b]
    found = tuple(whole_numbers(torch.tensor(shares, dtype=torch.float64), b).tolist())
    assert found in every
    assert distance(found) == pytest.approx(min(map(distance, every)), abs=1e-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("make", [convolutional, lambda classes, bias: classifier(classes, "tanh", bias, 1)])
def test_counts_of_an_untrained_network(make, bias: bool) -> None:
    """Measured: every label right."""
    target = make(5, bias)
    pictures = data.photographs(25, 16).inputs
    generator = torch.Generator().manual_seed(0)
    shares = []
    for b in (2, 4, 8) * 3:
        x = pictures[torch.randperm(25, generator=generator)[:b]] if len(target.input_shape) == 3 else rand(b, b, 6)
        y = torch.randint(5, (b,), generator=generator).double()
        found = counts(target, capture(target, x, y))
        assert sum(found.counts.values()) == b
        assert set(found.counts) == set(target.loss.labels)
        assert found.labels.tolist() == sorted(found.labels.tolist())
        shares.append(right(found, y))
        assert 0 <= found.accuracy <= 1
    assert sum(shares) / len(shares) >= 0.9  # labels at random come out right about half of the time


@pytest.mark.search
@pytest.mark.parametrize("times", [1, 2])
def test_labels_in_equal_numbers_on_a_model_that_tells_them_apart(times: int, first_seed: int) -> None:
    """mean(g) is then next to nothing, and so is what it tells of the features."""
    last = nn.Linear(6, 6)
    with torch.no_grad():
        last.weight.copy_(3 * torch.eye(6))
        last.bias.zero_()
    target = Target(nn.Sequential(nn.ReLU(), last).double(), losses.CrossEntropy(6), (6,), (0.0, 1.0))
    y = torch.arange(6).repeat(times)
    for seed in range(first_seed, first_seed + 5):
        x = 0.3 * rand(seed, 6 * times, 6) + 0.5 * nn.functional.one_hot(y, 6)
        assert right(counts(target, capture(target, x, y.double())), y.double()) >= 0.8


@pytest.mark.parametrize(("bias", "size", "b"), [(True, 30.0, 8), (False, 30.0, 8), (False, 4.0, 16), (True, 1.0, 4)])
def test_the_stated_accuracy_is_that_on_noise(bias: bool, size: float, b: int) -> None:
    target = classifier(5, "leaky_relu", bias, 3, size, width=20)
    generator = torch.Generator().manual_seed(7)
    shares = []
    for _ in range(20):
        x = torch.rand(b, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(5, (b,), generator=generator).double()
        found = counts(target, capture(target, x, y))
        shares.append(right(found, y))
    assert found.accuracy == pytest.approx(sum(shares) / len(shares), abs=0.1)


def test_cross_entropy_of_a_batch_has_one_candidate() -> None:
    target = convolutional(10, True)
    y = torch.tensor([7.0, 2.0, 2.0, 9.0])
    found = candidates(target, capture(target, data.photographs(4, 16).inputs, y))
    assert values(found) == [[2.0, 2.0, 7.0, 9.0]]
    assert "estimated" in found.assumption
    assert "% of the labels come out right" in found.assumption


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("ones", [0, 2, 3])
def test_margin_losses_of_a_batch(ones: int, loss: losses.Loss) -> None:
    """Of a hinge, two samples of each label give a bias gradient of zero, and so does a client that withholds it."""
    y = torch.tensor([1.0] * ones + [-1.0] * (4 - ones))
    for bias in (False, True):
        target = Target(models.fcn3(6, (9, 7), bias=bias).double(), loss, (6,), (0.0, 1.0))
        found = candidates(target, capture(target, rand(0, 4, 6), y))
        every = sorted({tuple(sorted(each)) for each in itertools.product([-1.0, 1.0], repeat=4)})
        told = bias and (ones != 2 or loss.name != "hinge")
        assert sorted(map(tuple, values(found))) == ([tuple(sorted(y.tolist()))] if told else every)


def test_label_vectors_are_tried_only_where_they_are_few() -> None:
    target = Target(nn.Sequential(nn.Conv2d(1, 10, 4), nn.Flatten()), losses.CrossEntropy(10), (1, 4, 4))
    update = capture(target, torch.rand(3, 1, 4, 4), torch.tensor([2.0, 0.0, 2.0]))
    found = candidates(target, update)
    assert len(found.labels) == math.comb(12, 3)
    assert [0.0, 2.0, 2.0] in values(found)
    with pytest.raises(ValueError, match="is no Linear layer whose gradient is shared"):
        counts(target, update)
    update = capture(target, torch.rand(8, 1, 4, 4), torch.zeros(8))
    with pytest.raises(ValueError, match=r"24310 ways to label 8 samples, expected 1000 or fewer[\s\S]*optimises"):
        candidates(target, update)


def test_the_random_state_and_the_model_stay_as_they_were() -> None:
    """Dropout in training mode draws from the global state, and changes the gradient each time."""
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 3)).train()
    target = Target(model, losses.CrossEntropy(3), (6,))
    one = capture(target, torch.rand(1, 6), torch.tensor([1.0]))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    assert values(candidates(target, one)) in ([[1.0]], [[0.0], [1.0], [2.0]])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
