"""Twin data: two inputs with one gradient."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from rgap import Target, capture, losses, models
from rgap.attacks.base import gradient_residual
from rgap.reproductions import figure4
from rgap.reproductions.base import Options, reproduce
from rgap.reproductions.figure4 import PICTURE, TWIN, Figure4, Network, between, flipped, moderate, twin_factor

TURNS = {losses.Logistic(): 1.2785, losses.Exponential(): 1.0, losses.SquaredHinge(): 0.5}
"""Where mu * dl/dmu is least: the two margins meet, and twins are one and the same."""


@st.composite
def scaling(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """A small network that scales, and an input."""
    kinds = {"leaky": lambda: nn.LeakyReLU(0.2), "relu": nn.ReLU, "identity": nn.Identity}
    activation = kinds[draw(st.sampled_from(sorted(kinds)))]
    channels, size = draw(st.integers(1, 3)), draw(st.integers(4, 6))
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 2**31)))
        layers: list[nn.Module] = []
        width, side = channels, size
        for _ in range(draw(st.integers(0, 2))):
            layers += [nn.Conv2d(width, 4, 3, padding=1, stride=draw(st.integers(1, 2)), bias=False), activation()]
            width, side = 4, layers[-2](torch.zeros(1, width, side, side)).shape[-1]
        layers += [nn.Flatten(), nn.Linear(width * side**2, 5, bias=False), activation(), nn.Linear(5, 1, bias=False)]
        x = torch.rand(1, channels, size, size, dtype=torch.float64)
    return nn.Sequential(*layers).double(), x


def residual(model: nn.Module, loss: losses.MarginLoss, x: torch.Tensor, label: float, other: torch.Tensor) -> float:
    """The relative difference of the gradients at x and at another input, both taken by autograd."""
    y = torch.tensor([label])
    target = Target(model, loss, tuple(x.shape[1:]))
    return gradient_residual(target, capture(target, x, y), other, y)


@given(scaling(), st.sampled_from(sorted(TURNS, key=lambda loss: loss.name)), st.floats(0.05, 0.8), st.booleans())
@settings(max_examples=10, deadline=None)
def test_the_twin_has_the_same_gradient(
    drawn: tuple[nn.Module, torch.Tensor], loss: losses.MarginLoss, part: float, above: bool
) -> None:
    model, x = drawn
    # Below the turn, or as far above it as the loss has a slope.
    turn = TURNS[loss]
    margin = turn * (2 - part if above else part)
    with torch.no_grad():
        assume(abs(float(model(x))) > 1e-6)
    label = 1.0 if moderate(model, x, margin) > 0 else -1.0
    factor = twin_factor(loss, margin)
    assert (factor < 1) if above else (factor > 1)
    assert residual(model, loss, x, label, factor * x) <= 1e-6
    assert residual(model, loss, x, label, (1 + factor) / 2 * x) > 1e-4, "any scaled input would do"


def test_no_other_margin_no_twin() -> None:
    with pytest.raises(ValueError, match=r"hinge loss a margin of 0\.5 has no twin"):
        twin_factor(losses.Hinge(), 0.5)
    with pytest.raises(ValueError, match=r"margin of -0\.7 has no twin: expected one above 0"):
        twin_factor(losses.Logistic(), -0.7)


def test_a_bias_parts_the_twins() -> None:
    model = models.fcn3(12, (8,)).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.fc1 = nn.Linear(12, 8).double()
    x = torch.rand(1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    label = 1.0 if moderate(model, x, 0.7) > 0 else -1.0
    assert residual(model, losses.Logistic(), x, label, twin_factor(losses.Logistic(), 0.7) * x) > 1e-3


@pytest.mark.parametrize("loss", TURNS, ids=lambda loss: loss.name)
def test_with_an_uncertain_label_all_between_the_twins_has_the_same_gradient(loss: losses.MarginLoss) -> None:
    margin = 0.3
    x = torch.rand(1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = models.fcn3(12, (8,)).double()
    label = 1.0 if moderate(model, x, margin) > 0 else -1.0
    target = Target(model, loss, (12,))
    truth, gradient = target.gradient(x, torch.tensor([label])), target.gradient_function(torch.float64)
    factor = twin_factor(loss, margin)
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        scale = 1 + part * (factor - 1)
        share = between(loss, margin, scale)
        assert -1e-6 <= share <= 1 + 1e-6
        weights = torch.tensor([[1 - share, share] if label > 0 else [share, 1 - share]], dtype=torch.float64)
        found = gradient(scale * x, weights)
        for name, g in truth.items():
            torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-12)
    for scale in (0.9, factor * 1.1):
        assert not 0 <= between(loss, margin, scale) <= 1


def test_flipped_units_are_counted_in_every_hidden_layer() -> None:
    first, second, last = (nn.Linear(n, m, bias=False) for n, m in ((2, 2), (2, 2), (2, 1)))
    with torch.no_grad():
        first.weight.copy_(torch.eye(2))
        second.weight.copy_(torch.eye(2))
        last.weight.fill_(1.0)
    model = nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), last).double()
    network = Target(model, losses.Logistic(), (2,)).network
    a, b = torch.tensor([[1.0, -3.0]]).double(), torch.tensor([[2.0, 1.0]]).double()
    # The second unit of both hidden layers; the output, which changes its sign too, has no kink.
    assert flipped(network, a, b) == 2
    assert flipped(network, a, 2 * a) == 0


SMALL = Figure4(
    networks=(Network("small", lambda seed: models.fcn3(hidden=(20,), seed=seed), (1, 28, 28)),),
    deviations=(1e-4,),
    shown=1e-4,
    iterations=200,
)


def test_both_are_found_each_from_its_own_neighbourhood(tmp_path: Path) -> None:
    rows = reproduce(SMALL, Options(count=2), tmp_path)
    for row in rows.values():
        picture, twin = row.tensors[PICTURE], row.tensors[TWIN]
        torch.testing.assert_close(twin, row.values["factor"] * picture)
        assert row.values["difference"] <= 1e-6
        assert row.values["recursive"]["picture"] < 1e-6
        assert row.values["recursive"]["twin"] < 1e-6
        for one in row.values["searches"]:
            if one.get("flipped") == 0:
                assert one["arrived"], one
                assert one[f"to {one['from']}"] < 1e-4
            if one["residual"] <= 1e-6:  # whatever it started from: no third input has this gradient
                assert min(one["to picture"], one["to twin"]) < 1e-4
    found = SMALL.summary(rows)["small"]
    assert found["R-GAP finds both, the picture first"] == {"arrived": 2, "of": 2}
    assert found["no unit flipped"]["of"] > 0
    assert SMALL.table(rows).row_count > 5
    assert (tmp_path / "figure4.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "figure4.json").read_text())["result"]["small"]["pictures"] == 2


def test_the_same_seed_gives_the_same_row() -> None:
    short = replace(SMALL, iterations=3)
    one, other, another = (short.jobs(Options(seed=seed), 1)[0].run().values for seed in (3, 3, 4))
    assert one == other
    assert one["searches"] != another["searches"]


def test_the_reproduction_is_the_paper_s() -> None:
    made = figure4.Figure4()
    assert [network.name for network in made.networks] == ["CNN6", "FCN3"]
    assert len(made.jobs(Options(), 3)) == 6
    assert made.shown in made.deviations
