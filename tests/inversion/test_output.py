"""What is read off the last layer: the truth is among the candidates, and nothing is offered that the loss excludes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import ACTIVATIONS, LOSSES, Client, clients
from torch import Tensor, nn

from rgap import Target, capture, losses
from rgap.inversion.output import OutputCandidates, output_candidates
from rgap.nn.activations import IDENTITY
from rgap.nn.layers import Layer

PRECISION = 1e-15
NONNEGATIVE = {"relu", "sigmoid", "softplus"}


def true_head(target: Target, x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Output, margin and the gradient with respect to the output, by autograd."""
    output = target.model(x)
    (k,) = torch.autograd.grad(target.loss(output, y), output)
    return float(output.detach()), float(y) * float(output.detach()), float(k)


def of(target: Target, gradients: dict[str, Tensor], precision: float = PRECISION) -> OutputCandidates:
    """The candidates for a chain's last layer."""
    uses = target.graph.uses
    before = uses[-2].activation if len(uses) > 1 else IDENTITY
    return output_candidates(target.network.layers[-1], before, target.loss, gradients, precision)


def found(target: Target, x: Tensor, y: Tensor, precision: float = PRECISION) -> OutputCandidates:
    return of(target, dict(capture(target, x, y).gradients), precision)


def nearest(candidates: OutputCandidates, label: float, margin: float) -> int:
    """The candidate with this label and the nearest margin."""
    distance = (candidates.margins - margin).abs().masked_fill(candidates.labels != label, math.inf)
    assert len(distance), "there are no candidates"
    return int(distance.argmin())


def head_only(
    features: Tensor, loss: losses.Loss, margin: float, label: float, bias: float | None, activation: str
) -> tuple[Target, Tensor, Tensor]:
    """A network of one layer after another whose margin at the sample is as asked for."""
    count = features.shape[1]
    first, last = nn.Linear(count, count, bias=False), nn.Linear(count, 1, bias is not None)
    model = nn.Sequential(first, ACTIVATIONS[activation](), last).to(features.dtype).eval()
    with torch.no_grad():
        first.weight.copy_(torch.eye(count))
        reached = model[1](features)[0]
        last.weight.copy_(reached[None])
        wanted = label * margin - (bias or 0.0)
        last.weight.mul_(wanted / float(reached @ reached))
        if bias is not None:
            last.bias.fill_(bias)
    return Target(model, loss, (count,)), features, torch.tensor([label])


@settings(max_examples=10, deadline=None)
@given(clients())
def test_the_truth_is_a_candidate(client: Client) -> None:
    output, margin, k = true_head(client.target, client.x, client.y)
    candidates = found(client.target, client.x, client.y)
    if k == 0:
        return
    label = float(client.y)
    at = nearest(candidates, label, margin)
    assert float(candidates.labels[at]) == label
    # At the turning point of mu * dl/dmu, rounding of the product counts with its square root.
    assert float(candidates.margins[at]) == pytest.approx(margin, rel=1e-6, abs=1e-6)
    assert float(candidates.k[at]) == pytest.approx(k, rel=1e-6)
    assert float(candidates.z[at]) == pytest.approx(output, rel=1e-6, abs=1e-6)
    assert candidates.k.shape == candidates.z.shape == (len(candidates.labels), 1, 1)
    assert len(candidates.assumptions) == 1


@settings(max_examples=10, deadline=None)
@given(clients())
def test_every_candidate_is_possible(client: Client) -> None:
    """Each gives back the product, with a label and a slope of the loss; none is given twice."""
    update, last = capture(client.target, client.x, client.y), client.target.network.layers[-1]
    candidates = of(client.target, dict(update.gradients))
    weight_product = float((last.weight.flatten() * update.gradients[last.weight_name].flatten()).sum())
    bias = 0.0 if last.bias is None else float(last.bias)
    rows = list(
        zip(*(t.flatten().tolist() for t in (candidates.labels, candidates.margins, candidates.k)), strict=True)
    )
    for at, (label, margin, k) in enumerate(rows):
        assert label in client.target.loss.labels
        slope = float(client.target.loss.slope(torch.tensor(margin, dtype=torch.float64)))
        assert slope < 0
        assert k == pytest.approx(label * slope, rel=1e-6)
        assert float(candidates.z[at]) == pytest.approx(label * margin, rel=1e-12)
        assert (label * margin - bias) * k == pytest.approx(weight_product, rel=1e-6, abs=1e-12)
    assert len(set(rows)) == len(rows)


@settings(max_examples=10, deadline=None)
@given(clients())
def test_the_label_is_read_where_the_bias_or_the_features_sign_shows_it(client: Client) -> None:
    target = client.target
    _, _, k = true_head(target, client.x, client.y)
    assume(k != 0)
    candidates = found(target, client.x, client.y)
    *_, before = (module for module in (nn.Identity(), *target.model[:-1]) if not isinstance(module, nn.Flatten))
    shown = type(before).__name__.lower() in NONNEGATIVE
    features = target.model[:-1](client.x).detach()
    labels = set(candidates.labels.tolist())
    if target.network.layers[-1].bias is not None:
        assert labels == {float(client.y)}
        assert len(candidates.labels) == 1
        assert candidates.assumptions == ("the label and k are read off the last layer's bias gradient",)
    elif shown and float(features.sum()) > 0:
        assert labels == {float(client.y)}
        assert "the label is read off the sign of the last gradient (" in candidates.assumptions[0]
        assert " is >= 0)" in candidates.assumptions[0]
    else:
        assert labels == {-1.0, 1.0}
        assert candidates.assumptions == ("both labels are tried, and the gradient residual decides",)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("label", [-1.0, 1.0])
@pytest.mark.parametrize("bias", [None, 0.4])
@pytest.mark.parametrize("activation", ["leaky_relu", "relu"])
@pytest.mark.parametrize("margin", [-3.0, -0.1, 0.2, 0.7, 0.999, 1.1, 2.0, 9.0])
def test_every_margin(margin: float, activation: str, bias: float | None, label: float, loss: losses.Loss) -> None:
    features = torch.linspace(0.2, 1, 5, dtype=torch.float64)[None]
    target, x, y = head_only(features, loss, margin, label, bias, activation)
    _, mu, k = true_head(target, x, y)
    assert mu == pytest.approx(margin, rel=1e-12)
    candidates = found(target, x, y)
    if k == 0:  # a hinge that is satisfied: the gradient is zero, which a margin of zero gives as well
        assert loss.name in ("hinge", "squared-hinge")
        assert all(abs(mu) < 1e-12 for mu in candidates.margins.tolist())
        return
    at = nearest(candidates, label, margin)
    assert float(candidates.margins[at]) == pytest.approx(margin, rel=1e-8)
    assert float(candidates.k[at]) == pytest.approx(k, rel=1e-8)
    # The other root, if there is one: where the product of a fine grid crosses the same value.
    grid = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    level = grid * loss.slope(grid) - mu * float(loss.slope(torch.tensor(mu, dtype=torch.float64)))
    crossings = int(((level[:-1] < 0) != (level[1:] < 0)).sum()) - (
        loss.name == "hinge" and mu > 0
    )  # its jump at 1 is no root
    labels = 1 if bias is not None or activation == "relu" else 2
    assert len(candidates.labels) == labels * (1 if bias is not None else crossings)


@pytest.mark.parametrize(
    ("loss", "turn"),
    [(losses.Logistic(), 1.278464542761074), (losses.Exponential(), 1.0), (losses.SquaredHinge(), 0.5)],
)
@pytest.mark.parametrize("pushed", [-8e-6, 0.0, 8e-6])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_at_the_turning_point_does_not_lose_the_truth(
    seed: int, pushed: float, loss: losses.Loss, turn: float
) -> None:
    """There the least product is reached, and rounding may push it below."""
    grid = torch.linspace(0, 3, 300_001, dtype=torch.float64)
    assert turn == pytest.approx(float(grid[(grid * loss.slope(grid)).argmin()]), abs=1e-4)
    features = torch.rand(1, 40, generator=torch.Generator().manual_seed(seed)) + 0.1
    target, x, y = head_only(features, loss, turn, 1.0, None, "leaky_relu")
    _, mu, k = true_head(target, x, y)
    gradients = {name: g.double() * (1 + pushed) for name, g in capture(target, x, y).gradients.items()}
    candidates = of(target, gradients, 1e-5)
    at = nearest(candidates, 1.0, mu)
    assert float(candidates.margins[at]) == pytest.approx(turn, abs=2e-2)
    # It says itself how far k may be off.
    assert abs(float(candidates.k[at]) / k - 1) <= 3 * float(candidates.k_error[at]) + 1e-6


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(LOSSES), st.floats(-2, 0.95), st.sampled_from([None, 0.4]), st.integers(0, 2**31),
    st.sampled_from([1e-3, 1e-7]),
)  # fmt: skip
def test_the_error_of_k_covers_the_rounding_of_the_gradient(
    loss: losses.Loss, margin: float, bias: float | None, seed: int, precision: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(1, 30, generator=generator, dtype=torch.float64) + 0.1
    target, x, y = head_only(features, loss, margin, 1.0, bias, "leaky_relu")
    _, mu, k = true_head(target, x, y)
    gradients = {
        name: g * (1 + precision * (2 * torch.rand(g.shape, generator=generator, dtype=g.dtype) - 1))
        for name, g in capture(target, x, y).gradients.items()
    }
    candidates = of(target, gradients, precision)
    at = nearest(candidates, 1.0, mu)
    assert float(candidates.k_error[at]) >= precision
    assert abs(float(candidates.k[at]) / k - 1) <= float(candidates.k_error[at]) * (1 + 1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_a_product_that_no_margin_gives_has_no_candidates(loss: losses.Loss) -> None:
    features = torch.linspace(0.2, 1, 5, dtype=torch.float64)[None]
    target, x, y = head_only(features, loss, 0.5, 1.0, None, "leaky_relu")
    _, mu, k = true_head(target, x, y)
    grid = torch.linspace(-5, 5, 100_001, dtype=torch.float64)
    lowest = float((grid * loss.slope(grid)).min())
    factor = 1.1 * lowest / (mu * k)
    gradients = {name: g * factor for name, g in capture(target, x, y).gradients.items()}
    candidates = of(target, gradients)
    sizes = {tuple(getattr(candidates, name).shape) for name in ("labels", "margins", "k_error")}
    assert sizes == {(0,)}
    assert candidates.k.shape == candidates.z.shape == (0, 1, 1)
    assert len(candidates.one_per_direction) == 0


def test_a_bias_gradient_of_zero_has_no_candidates() -> None:
    features = torch.linspace(0.2, 1, 5, dtype=torch.float64)[None]
    target, x, y = head_only(features, losses.Hinge(), 2.0, 1.0, 0.4, "leaky_relu")
    assert len(found(target, x, y).labels) == 0


def some_heads() -> OutputCandidates:
    labels = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    margins, k_error = torch.arange(4.0, dtype=torch.float64), torch.tensor([0.3, 0.1, 0.2, 0.4], dtype=torch.float64)
    return OutputCandidates(
        labels,
        margins,
        labels.reshape(-1, 1, 1) * (margins.reshape(-1, 1, 1) + 10),
        margins.reshape(-1, 1, 1) + 20,
        k_error,
        ("a",),
    )


@pytest.mark.parametrize("index", [torch.tensor([3, 1]), torch.tensor([False, True, False, True])])
def test_select_keeps_the_columns_together(index: Tensor) -> None:
    chosen = some_heads().select(index)
    rows = {
        (float(m), float(y), float(k), float(z), float(e))
        for y, m, k, z, e in zip(
            chosen.labels, chosen.margins, chosen.k.flatten(), chosen.z.flatten(), chosen.k_error, strict=True
        )
    }
    assert rows == {(1.0, 1.0, 11.0, 21.0, 0.1), (3.0, -1.0, -13.0, 23.0, 0.4)}
    assert chosen.k.shape == (2, 1, 1)
    assert chosen.assumptions == ("a",)


def test_one_per_direction_is_the_best_known() -> None:
    """The first two have k of one sign, the others of the other."""
    assert some_heads().one_per_direction.tolist() == [1, 2]


# OutputCandidates of several outputs.


def of_several(kind: str, outputs: int, generator: torch.Generator) -> losses.Loss:
    weight = tuple((0.3 + torch.rand(outputs, generator=generator)).tolist())
    return {
        "plain": losses.CrossEntropy(outputs),
        "weighted": losses.CrossEntropy(outputs, 0.0, weight),
        "smoothed": losses.CrossEntropy(outputs, 0.1),
        "smoothed and weighted": losses.CrossEntropy(outputs, 0.2, weight),
        "bce": losses.BinaryCrossEntropy(outputs),
        "one bce": losses.BinaryCrossEntropy(1),
        "mse": losses.MeanSquaredError(outputs),
        "one mse": losses.MeanSquaredError(1),
    }[kind]


KINDS = ["plain", "weighted", "smoothed", "smoothed and weighted", "bce", "one bce", "mse", "one mse"]


def a_head(
    kind: str, outputs: int, size: float, bias: str, dtype: torch.dtype, seed: int
) -> tuple[losses.Loss, Layer, dict[str, Tensor], float, Tensor, Tensor]:
    """A Linear layer alone: its loss, the layer, its gradient, and the truth: label, k and z.

    The bias is sent, frozen or not there; the gradient is autograd's.
    """
    generator = torch.Generator().manual_seed(seed)
    loss = of_several(kind, outputs, generator)
    features = int(torch.randint(2, 30, (1,), generator=generator))
    weight = (size * torch.randn(loss.outputs, features, generator=generator) / features**0.5).to(dtype)
    offset = torch.randn(loss.outputs, generator=generator).to(dtype) * (bias != "none")
    x = torch.randn(1, features, generator=generator).to(dtype)
    known = loss.labels or (0.3, -1.7)
    label = float(known[int(torch.randint(len(known), (1,), generator=generator))])
    weight.requires_grad_()
    offset.requires_grad_()
    z = x @ weight.mT + offset
    z.retain_grad()
    loss(z, torch.tensor([label], dtype=dtype)).backward()
    layer = Layer(
        "fc", weight.detach().double()[None], None if bias == "none" else offset.detach().double(),
        torch.zeros(1, 1, dtype=torch.long), features, 1, (features,), (loss.outputs,), "w",
        "b" if bias == "sent" else None,
    )  # fmt: skip
    gradients = {"w": weight.grad} | ({"b": offset.grad} if bias == "sent" else {})
    return loss, layer, gradients, label, z.grad[0].double(), z[0].detach().double()


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(KINDS), st.integers(2, 10), st.sampled_from([0.1, 1.0, 4.0, 15.0]),
    st.sampled_from(["sent", "frozen", "none"]), st.sampled_from([torch.float64, torch.float32]), st.integers(0, 2**31),
)  # fmt: skip
def test_the_truth_of_several_outputs_is_a_candidate(
    kind: str, outputs: int, size: float, bias: str, dtype: torch.dtype, seed: int
) -> None:
    loss, layer, gradients, label, k, z = a_head(kind, outputs, size, bias, dtype, seed)
    assume(bool(gradients["w"].any()))
    precision = 4 * torch.finfo(dtype).eps
    candidates = output_candidates(layer, IDENTITY, loss, gradients, precision)
    if kind == "one mse" and bias != "sent":
        assert len(candidates.labels) == 0
        assert "without a bias" in candidates.reason
        return
    assert not candidates.reason
    exact = kind != "one mse"
    same = (candidates.labels - label).abs() <= (0.0 if exact else 100 * precision * (1 + z.abs().max() + 30 * size))
    assert bool(same.any()), "the true label is not among the candidates"
    off = ((candidates.k[..., 0] - k).norm(dim=1) / k.norm()).masked_fill(~same, math.inf)
    at = int(off.argmin())
    # Entries of a saturated k are differences from 1 in the client's own arithmetic.
    assert float(off[at]) <= 2 * float(candidates.k_error[at]) + 1e-13
    assert bool(candidates.margins.isnan().all())


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([kind for kind in KINDS if kind != "one mse"]), st.integers(2, 7), st.sampled_from([0.1, 1.0, 4.0]),
    st.sampled_from(["sent", "frozen", "none"]), st.integers(0, 2**31),
)  # fmt: skip
def test_every_candidate_of_several_outputs_gives_the_gradient(
    kind: str, outputs: int, size: float, bias: str, seed: int
) -> None:
    """By autograd at the candidate's own input, x = grad W' k / |k|^2, and label."""
    loss, layer, gradients, _, _, _ = a_head(kind, outputs, size, bias, torch.float64, seed)
    candidates = output_candidates(layer, IDENTITY, loss, gradients, 1e-15)
    assert len(candidates.labels) > 0
    for label, k, z, error in zip(
        candidates.labels, candidates.k[..., 0], candidates.z[..., 0], candidates.k_error, strict=True
    ):
        x = (gradients["w"].mT @ k / (k @ k))[None]
        weight = layer.weight[0].clone().requires_grad_()
        output = x @ weight.mT + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(output[0].detach(), z, rtol=1e-6 + 10 * float(error), atol=1e-7)
        (found,) = torch.autograd.grad(loss(output, label[None]), weight)
        assert float((found - gradients["w"]).norm()) <= (1e-7 + 100 * float(error)) * float(gradients["w"].norm())


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("margin", [-3.0, -0.4, 0.2, 1.1, 1.28, 2.0, 9.0])
@pytest.mark.parametrize("kind", ["one bce", "plain"])
def test_two_classes_without_a_bias_have_the_roots_of_the_logistic_loss(kind: str, margin: float, label: float) -> None:
    """Binary cross-entropy is that loss; two classes are it in the difference of their outputs."""
    features = torch.linspace(0.2, 1, 5, dtype=torch.float64)
    sign = 2 * label - 1
    row = sign * margin * features / (features @ features)
    weight = row[None] if kind == "one bce" else torch.stack([-row / 2, row / 2])
    loss = losses.BinaryCrossEntropy(1) if kind == "one bce" else losses.CrossEntropy(2)
    weight.requires_grad_()
    loss((features @ weight.mT)[None], torch.tensor([label])).backward()
    product = margin * float(losses.Logistic().slope(torch.tensor(margin, dtype=torch.float64)))
    expected = sorted(losses.Logistic().roots(product) * 2)  # of either label
    layer = Layer(
        "fc", weight.detach()[None], None, torch.zeros(1, 1, dtype=torch.long), 5, 1, (5,), (len(weight),), "w", None
    )
    candidates = output_candidates(layer, IDENTITY, loss, {"w": weight.grad}, 1e-15)
    z = candidates.z[..., 0]
    output = z[:, 0] if kind == "one bce" else z[:, 1] - z[:, 0]
    assert sorted(((2 * candidates.labels - 1) * output).tolist()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "one mse"])
def test_several_samples_without_a_bias_are_no_candidate(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    loss = of_several(kind, 4, generator)
    weight = torch.randn(loss.outputs, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    labels = torch.tensor([loss.labels[at % len(loss.labels)] for at in range(6)], dtype=torch.float64)
    loss(x @ weight.mT, labels).backward()
    layer = Layer(
        "fc", weight.detach()[None], None, torch.zeros(1, 1, dtype=torch.long), 9, 1, (9,), (loss.outputs,), "w", None
    )
    candidates = output_candidates(layer, IDENTITY, loss, {"w": weight.grad}, 1e-15)
    if loss.outputs > 1:
        assert len(candidates.labels) == 0
        assert "rank one" in candidates.reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", ["sent", "none"])
def test_a_gradient_of_zero_says_so(kind: str, bias: str) -> None:
    loss, layer, gradients, *_ = a_head(kind, 3, 1.0, bias, torch.float64, 0)
    candidates = output_candidates(layer, IDENTITY, loss, {name: 0 * g for name, g in gradients.items()}, 1e-15)
    assert len(candidates.labels) == 0
    assert candidates.k.shape == candidates.z.shape == (0, loss.outputs, 1)
    assert "zero" in candidates.reason
    assert candidates.one_per_direction.tolist() == []


def test_a_gradient_that_was_scaled_leads_to_the_nearest_label_and_says_so() -> None:
    loss, layer, gradients, label, k, _ = a_head("plain", 5, 1.0, "sent", torch.float64, 3)
    candidates = output_candidates(layer, IDENTITY, loss, {name: 0.3 * g for name, g in gradients.items()}, 1e-15)
    assert candidates.labels.tolist() == [label]
    assert "nearest" in candidates.assumptions[0]
    torch.testing.assert_close(candidates.k[0, :, 0], 0.3 * k)
