"""The preflight: it passes every update that fits and names what does not."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import ACTIVATIONS, LOSSES, Client, clients
from torch import nn

from rgap import Target, Update, capture, data, losses, models, preflight
from rgap.checks import Preflight

HOMOGENEOUS = ["identity", "leaky_relu", "relu"]
FACTOR = st.floats(1.3, 50)
LABELS = st.sampled_from([-1.0, 1.0])


def mlp(
    activation: str = "leaky_relu", bias: bool = False, seed: int = 0, depth: int = 5, gain: float = 1.0
) -> nn.Sequential:
    """Linear layers named 0, 2, 4, ..., in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for _ in range(depth - 1):
            layers += [nn.Linear(8, 8, bias), ACTIVATIONS[activation]()]
        layers.append(nn.Linear(8, 1, bias))
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(gain)
    return model


def small_target(loss: losses.Loss | None = None, **kind: object) -> Target:
    return Target(mlp(**kind), loss or losses.Logistic(), (8,))  # type: ignore[arg-type]


def sample(seed: int = 0, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def margin(target: Target, x: torch.Tensor, label: float) -> float:
    with torch.no_grad():
        return label * float(target.model(x))


def scaled(update: Update, factor: float, only: str = "") -> Update:
    gradients = {name: g * factor if name.startswith(only) else g for name, g in update.gradients.items()}
    return Update(gradients, update.header)


def unsaid(update: Update) -> Update:
    """The same gradients from a client that says nothing of them."""
    return Update(update.gradients)


def found(result: Preflight) -> str:
    """The one finding."""
    assert len(result.findings) == 1, result
    assert not result.passed
    assert str(result) == result.findings[0]
    return result.findings[0]


# What fits passes.


@settings(max_examples=10, deadline=None)
@given(clients())
def test_an_update_that_fits_passes(client: Client) -> None:
    result = preflight(client.target, capture(client.target, client.x, client.y))
    assert result.findings == ()
    assert result.passed
    assert str(result) == "the update fits the model"


@settings(max_examples=10, deadline=None)
@given(clients())
def test_products_are_margin_times_slope(client: Client) -> None:
    """Eq. 10 with biases: the whole sum is <k_i, z_i>, and mu * dl/dmu at the last layer."""
    target, loss = client.target, client.target.loss
    update = capture(target, client.x, client.y)
    assume(update.norm > 0)
    mu = torch.tensor(margin(target, client.x, float(client.y)), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss.value(mu), mu)
    result = preflight(target, update)
    assert [name for name, _ in result.products] == [layer.name for layer in target.network.layers]
    homogeneous = (nn.LeakyReLU, nn.ReLU, nn.Identity, nn.Linear, nn.Conv2d, nn.Flatten)
    everywhere = all(isinstance(module, homogeneous) for module in target.model)
    for at, (_, product) in enumerate(result.products):
        if everywhere or at + 1 == len(target.network.layers):
            assert product == pytest.approx(float(mu.detach() * slope), rel=1e-9, abs=1e-12)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(sorted(ACTIVATIONS)), st.booleans(), st.sampled_from(LOSSES), st.integers(0, 99), LABELS,
    st.sampled_from([0.3, 1.0, 2.5]),
)  # fmt: skip
def test_large_and_small_margins_pass_in_float32(
    activation: str, bias: bool, loss: losses.Loss, seed: int, label: float, gain: float
) -> None:
    target = Target(mlp(activation, bias, seed, gain=gain).float(), loss, (8,))
    # From -16 on the slope of the logistic loss is one in float32: nothing is left of the margin.
    assume(-10 < margin(target, sample(seed).float(), label) < 30)
    result = preflight(target, capture(target, sample(seed).float(), torch.tensor([label])))
    assert result.findings == ()


@pytest.mark.parametrize("size", [14.0, 16.0, 20.0, 40.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sample_far_on_the_wrong_side_passes(dtype: torch.dtype, size: float) -> None:
    """The slope of the logistic loss is then -1 but for rounding, and tells no margin."""
    model = mlp(bias=True)
    with torch.no_grad():
        model[-1].bias.fill_(size)
    target = Target(model.to(dtype), losses.Logistic(), (8,))
    update = capture(target, sample().to(dtype), torch.tensor([-1.0]))
    assert preflight(target, update).findings == ()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("label", [-1.0, 1.0])
def test_no_false_alarm_on_photographs_in_float32(label: float, bias: bool, loss: losses.Loss) -> None:
    target = Target(models.cnn6(bias=bias), loss, (3, 32, 32), (0.0, 1.0))
    for x in data.photographs(3).inputs:
        result = preflight(target, capture(target, x[None], torch.tensor([label])))
        assert result.findings == ()
        assert len(result.products) == 7


def test_a_zero_gradient_passes() -> None:
    target = small_target()
    result = preflight(target, Update({name: torch.zeros_like(p) for name, p in target.parameters.items()}))
    assert result == Preflight((), ())


def test_a_model_that_is_no_chain_is_checked_by_its_header_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 1))
    target = Target(model, losses.Logistic(), (1, 5, 5))
    update = capture(target, torch.rand(1, 1, 5, 5), torch.tensor([1.0]))
    assert preflight(target, update) == Preflight((), ())
    said = Update(update.gradients, dataclasses.replace(update.header, loss="hinge"))
    assert "the client used the hinge loss" in found(preflight(target, said))


# One layer changed.


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(HOMOGENEOUS), st.booleans(), st.integers(0, 99), LABELS, st.integers(0, 3),
    FACTOR | FACTOR.map(lambda f: 1 / f) | st.just(0.0) | st.just(-1.0),
)  # fmt: skip
def test_one_scaled_layer_is_named(
    activation: str, bias: bool, seed: int, label: float, at: int, factor: float
) -> None:
    target = small_target(activation=activation, bias=bias, seed=seed)
    update = capture(target, sample(seed), torch.tensor([label]))
    name = f"{2 * at}"
    weights = target.parameters[f"{name}.weight"] * update.gradients[f"{name}.weight"]
    mu = torch.tensor(margin(target, sample(seed), label), dtype=torch.float64)
    agreed = float(mu * losses.Logistic().slope(mu))
    # Where the product is zero anyway, scaling does not show.
    assume(abs(float(weights.sum()) * (factor - 1)) > 2e-3 * abs(agreed) + 1e-9)
    finding = found(preflight(target, scaled(update, factor, f"{name}.weight")))
    value = agreed + (factor - 1) * float(weights.sum())
    start = re.escape(f"<W, grad W> of {name} (")
    match = re.match(rf"{start}(\S+)\) does not fit the other layers \((\S+)\): this layer's weights or", finding)
    assert match, finding
    assert float(match[1]) == pytest.approx(value, rel=6e-3, abs=1e-8)
    assert float(match[2]) == pytest.approx(agreed, rel=6e-3, abs=1e-8)


def test_a_scaled_last_layer_is_named() -> None:
    target = small_target()
    update = capture(target, sample(), torch.tensor([-1.0]))
    assert "<W, grad W> of 8 (" in found(preflight(target, scaled(update, 0.5, "8.weight")))


def test_one_layers_own_weights_are_named() -> None:
    """Fine-tuned: the gradient comes from a model with one other layer before the point where the others agree."""
    model = mlp(depth=7)
    target = Target(model, losses.Logistic(), (8,))
    other = mlp(depth=7)
    with torch.no_grad():
        other[4].weight.mul_(1.5)  # homogeneous: all products but this layer's own stay those of one sample
    update = capture(Target(other, losses.Logistic(), (8,)), sample(), torch.tensor([1.0]))
    assert "<W, grad W> of 4 (" in found(preflight(target, unsaid(update)))


@pytest.mark.parametrize("factor", [0.3, 3.0])
@pytest.mark.parametrize("label", [-1.0, 1.0])
@pytest.mark.parametrize("at", ["0", "2"])
def test_of_two_layers_neither_is_blamed_alone(at: str, label: float, factor: float) -> None:
    """With two layers nothing tells which of them was changed."""
    target = small_target(depth=2, seed=3)
    update = capture(target, sample(), torch.tensor([label]))
    finding = preflight(target, scaled(update, factor, f"{at}.weight")).findings[-1]
    named = re.findall(r"\b([02]) \(", finding)
    assert named == ["0", "2"] or at in named, finding


# All changed.


@settings(max_examples=10, deadline=None)
@given(st.booleans(), st.integers(0, 99), LABELS)
def test_other_weights_are_told(bias: bool, seed: int, label: float) -> None:
    target = small_target(bias=bias, seed=seed)
    update = capture(small_target(bias=bias, seed=seed + 1000), sample(seed), torch.tensor([label]))
    assume(update.norm > 1e-3)
    result = preflight(target, unsaid(update))
    assert not result.passed
    assert "the gradient was probably taken at other weights, such as a later checkpoint" in str(result)


def test_a_local_step_is_told() -> None:
    model = mlp(depth=7, bias=True)
    target = Target(model, losses.Logistic(), (8,))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    losses.Logistic()(model(sample(1, 4)), torch.tensor([1.0, -1.0, 1.0, -1.0])).backward()
    optimiser.step()
    update = capture(Target(model, losses.Logistic(), (8,)), sample(), torch.tensor([1.0]))
    assert "after a local step" in str(preflight(target, unsaid(update)))


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(sorted(ACTIVATIONS)), st.integers(0, 99), LABELS, FACTOR | FACTOR.map(lambda f: 1 / f),
    st.sampled_from(LOSSES),
)  # fmt: skip
def test_a_scaled_gradient_is_told_by_the_last_bias(
    activation: str, seed: int, label: float, factor: float, loss: losses.Loss
) -> None:
    """Weight and bias of the last layer tell one margin each: the output as it is, and the root of dl/dmu = k."""
    target = small_target(loss, activation=activation, bias=True, seed=seed)
    update = capture(target, sample(seed), torch.tensor([label]))
    assume(update.norm > 0)
    mu = margin(target, sample(seed), label)
    slope = factor * float(loss.slope(torch.tensor(mu, dtype=torch.float64)))
    told = loss.margin(slope)
    finding = found(preflight(target, scaled(update, factor)))
    if told is None:
        assert finding.startswith(f"the gradient of 8.bias is {-slope:.4g}, which no single sample gives under the")
    else:
        assert finding.startswith("the weight and bias gradients of 8 tell two margins, ")
        first, second = (float(v) for v in re.findall(r"-?[\d.]+(?:e[-+]\d+)?", finding.split("margins,")[1])[:2])
        assert first == pytest.approx(mu, rel=1e-3, abs=1e-6)
        assert second == pytest.approx(told, rel=1e-3, abs=1e-6)
    assert "it is scaled (a sum" in finding or "the gradient is scaled (a sum" in finding


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_a_sum_is_told_without_bias_where_it_leaves_the_losss_range(loss: losses.Loss) -> None:
    target = small_target(loss, gain=1.5)
    label = math.copysign(1.0, margin(target, sample(), 1.0))
    mu = margin(target, sample(), label)
    assert 0 < mu < 1, "a positive margin makes the product negative"
    update = capture(target, sample(), torch.tensor([label]))
    # The least product by search, not by formula.
    grid = torch.linspace(-5, 5, 200_001, dtype=torch.float64)
    lowest = float((grid * loss.slope(grid)).min())
    product = mu * float(loss.slope(torch.tensor(mu, dtype=torch.float64)))
    assert preflight(target, scaled(update, 0.99 * lowest / product)).passed
    factor = 1.02 * lowest / product
    finding = found(preflight(target, scaled(update, factor)))
    assert finding.startswith(f"<W, grad W> of 8 is {factor * product:.4g}, below {lowest:.4g}, the least that the")
    assert f"the {loss.name} loss can give: the gradient is scaled up (a sum over several samples" in finding
    assert "a learning rate) or belongs to another loss" in finding


@pytest.mark.parametrize(("used", "assumed"), [(a, b) for a in LOSSES for b in LOSSES if a != b])
def test_another_loss_is_told_without_the_header(used: losses.Loss, assumed: losses.Loss) -> None:
    kind = {"bias": True, "seed": 5}
    theirs, mine = small_target(used, **kind), small_target(assumed, **kind)
    x = sample(3)
    # A margin far from those at which two of the slopes agree.
    label = -math.copysign(1.0, margin(theirs, x, 1.0))
    update = capture(theirs, x, torch.tensor([label]))
    assert "another loss" in found(preflight(mine, unsaid(update)))
    both = preflight(mine, update)
    assert both.findings[0] == f"the client used the {used.name} loss, the target has {assumed.name}"
    assert len(both.findings) == 2


# What the client says.


@pytest.mark.parametrize(
    ("module", "warned"),
    [
        (nn.Dropout(0.5), True),
        (nn.AlphaDropout(0.5), True),
        (nn.BatchNorm1d(8), True),
        (nn.SyncBatchNorm(8), True),
        (nn.LayerNorm(8), False),
        (nn.Identity(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("said", [True, False, None])
def test_training_mode_is_warned_of_where_it_matters(module: nn.Module, warned: bool, said: bool | None) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(), nn.Sequential(module), nn.Linear(8, 1)).eval()
    target = Target(model, losses.Logistic(), (8,))
    update = capture(target, sample().float(), torch.tensor([1.0]))
    update = Update(update.gradients, dataclasses.replace(update.header, training=said))
    result = preflight(target, update)
    expected = (
        "the client was in training mode: dropout may have changed its gradient; the target is in evaluation mode, "
        "make it of a model in the client's (model.train() or eval(), --training)"
    )
    if isinstance(module, nn.modules.batchnorm._NormBase):
        expected = expected.replace("dropout", "batch norm")
    assert result.findings == ((expected,) if warned and said else ())
    if said is not None:
        other = preflight(Target(model.train(), losses.Logistic(), (8,)), update).findings
        assert any("was in evaluation mode" in finding for finding in other) is (warned and not said)
        draws = warned and said and "Dropout" in type(module).__name__
        assert any("dropout draws" in finding for finding in other) is draws


@pytest.mark.parametrize(("said", "expected"), [(4, 1), (1, 4), (2, 3)])
def test_another_batch_size_is_told(said: int, expected: int) -> None:
    target = Target(mlp(), losses.Logistic(), (8,), batch_size=expected)
    update = capture(target, sample(count=said), torch.ones(said))
    message = f"the client averaged over {said} sample(s), the target expects {expected}; a sum in place of a mean"
    assert preflight(target, update).findings[0].startswith(message)
    same = Target(mlp(), losses.Logistic(), (8,), batch_size=said)
    assert not any("averaged over" in finding for finding in preflight(same, update).findings)


# Coarse types.


@pytest.mark.parametrize(
    ("dtype", "name", "eps", "least"),
    [(torch.float16, "float16", "1e-03", "6e-05"), (torch.bfloat16, "bfloat16", "8e-03", "1e-38")],
    ids=["float16", "bfloat16"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_coarse_type_is_noted_with_its_zeros(bias: bool, dtype: torch.dtype, name: str, eps: str, least: str) -> None:
    target = small_target(bias=bias)
    update = capture(target, sample(), torch.tensor([1.0]))
    gradients = {n: g.to(dtype) for n, g in update.gradients.items()}
    gradients["0.weight"][0, 0] = gradients["0.weight"][2, 5] = 0.0
    count = sum(p.numel() for p in target.parameters.values())
    expected = (
        f"the gradient is in {name}: values are rounded to {eps} of their size, and 2 of {count} are zero, which may "
        f"be values below {least} that were lost; expect a coarse answer or none"
    )
    assert expected in preflight(target, Update(gradients)).findings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_coarse_tensor_is_enough_for_the_note(dtype: torch.dtype) -> None:
    target = small_target()
    gradients = dict(capture(target, sample(), torch.tensor([1.0])).gradients)
    gradients["4.weight"] = gradients["4.weight"].to(dtype)
    assert f"the gradient is in {str(dtype)[6:]}: " in found(preflight(target, Update(gradients)))


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([torch.float16, torch.bfloat16]), st.sampled_from(sorted(ACTIVATIONS)), st.booleans(),
    st.sampled_from(LOSSES), st.integers(0, 99), LABELS,
)  # fmt: skip
def test_rounding_to_a_coarse_type_is_no_other_finding(
    dtype: torch.dtype, activation: str, bias: bool, loss: losses.Loss, seed: int, label: float
) -> None:
    target = small_target(loss, activation=activation, bias=bias, seed=seed)
    update = capture(target, sample(seed), torch.tensor([label]))
    result = preflight(target, Update({n: g.to(dtype) for n, g in update.gradients.items()}, update.header))
    assert "the gradient is in" in found(result)


@pytest.mark.parametrize("factor", [8.0, 65536.0, 0.1, -1.0, 1.9])
def test_a_factor_of_several_outputs_is_said(factor: float) -> None:
    """Weight and bias gradient of the last layer tell what it puts out, and so how long the gradient must be."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 5)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-0.3, 0.3, generator=generator)
    target = Target(model, losses.CrossEntropy(5), (1, 4, 4), (0.0, 1.0))
    for label in range(5):
        update = capture(target, torch.rand(1, 1, 4, 4, generator=generator), torch.tensor([float(label)]))
        assert preflight(target, update).passed
        scaled = Update({name: factor * g for name, g in update.gradients.items()})
        (finding,) = preflight(target, scaled).findings
        assert f"{factor:.4g} times that of one sample" in finding


@pytest.mark.parametrize(
    ("loss", "outputs", "labels"),
    [
        (losses.CrossEntropy(2), 2, 2),
        (losses.BinaryCrossEntropy(1), 1, 2),
        (losses.BinaryCrossEntropy(2), 2, 4),
        (losses.CrossEntropy(3), 3, 3),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_no_label_is_blamed_for_the_length_that_another_explains(loss: losses.Loss, outputs: int, labels: int) -> None:
    """With two classes, or one output, all labels give the same direction, at other lengths."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, outputs)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-2.0, 2.0, generator=generator)
    target = Target(model, loss, (6,))
    for label in range(labels):
        for _ in range(4):
            x = 2 * torch.rand(1, 6, generator=generator)
            assert preflight(target, capture(target, x, torch.tensor([float(label)]))).passed


@pytest.mark.parametrize("share", [0.5, 0.1, 1e-3])
def test_a_gradient_of_two_samples_that_are_told_as_one_is_seen(share: float) -> None:
    """One sample's gradient of a Linear layer is an outer product."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 5)).eval()
    target = Target(model, losses.CrossEntropy(5), (1, 4, 4), (0.0, 1.0))
    x, y = torch.rand(2, 1, 4, 4, generator=generator), torch.tensor([1.0, 3.0])
    one, other = (capture(target, x[at : at + 1], y[at : at + 1]).gradients for at in (0, 1))
    assert preflight(target, Update(dict(one))).passed
    mean = Update({name: (1 - share) * g + share * other[name] for name, g in one.items()})
    assert any("3.weight" in each and "not of rank one" in each for each in preflight(target, mean).findings)
    told = Update(dict(mean.gradients), replace(mean.header, batch_size=2))
    assert not any("rank one" in each for each in preflight(target, told).findings)
