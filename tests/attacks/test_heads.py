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
from rgap.attacks.heads import Heads, heads
from rgap.nn.activations import IDENTITY

PRECISION = 1e-15
NONNEGATIVE = {"relu", "sigmoid", "softplus"}


def true_head(target: Target, x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Output, margin and the gradient with respect to the output, by autograd."""
    output = target.model(x)
    (k,) = torch.autograd.grad(target.loss(output, y), output)
    return float(output.detach()), float(y) * float(output.detach()), float(k)


def of(target: Target, gradients: dict[str, Tensor], precision: float = PRECISION) -> Heads:
    """The candidates for a chain's last layer."""
    chain = target.chain
    before = chain[-2].activation if len(chain) > 1 else IDENTITY
    return heads(chain[-1], before, target.loss, gradients, precision)


def found(target: Target, x: Tensor, y: Tensor, precision: float = PRECISION) -> Heads:
    return of(target, dict(capture(target, x, y).gradients), precision)


def nearest(candidates: Heads, label: float, margin: float) -> int:
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


@settings(max_examples=60, deadline=None)
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


@settings(max_examples=60, deadline=None)
@given(clients())
def test_every_candidate_is_possible(client: Client) -> None:
    """Each gives back the product, with a label and a slope of the loss; none is given twice."""
    update, last = capture(client.target, client.x, client.y), client.target.chain[-1]
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


@settings(max_examples=60, deadline=None)
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
    if target.chain[-1].bias is not None:
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


@settings(max_examples=60, deadline=None)
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


def some_heads() -> Heads:
    labels = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    margins, k_error = torch.arange(4.0, dtype=torch.float64), torch.tensor([0.3, 0.1, 0.2, 0.4], dtype=torch.float64)
    return Heads(
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
