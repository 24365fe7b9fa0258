"""Noise on the gradient, against width."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rgap import Target, Update, capture, losses, models
from rgap.reproductions import figure5
from rgap.reproductions.base import Options, reproduce
from rgap.reproductions.figure5 import (
    Figure5,
    Network,
    apart_from_brightness,
    averaged,
    noisy,
    straight_cnn6,
    wide_cnn6,
    wide_fcn3,
)

SMALL = Figure5(
    networks=(
        Network(
            "small", lambda width, seed: models.fcn3(hidden=(round(50 * width),), seed=seed), (1, 28, 28), (1.0, 4.0)
        ),
    ),
    levels=(0.0, 1e-6, 1e-5, 1e-4),
    small=1e-5,
)


def test_width_one_is_the_paper_s_network() -> None:
    for made, paper in ((wide_cnn6(1.0, 7), models.cnn6(seed=7)), (wide_fcn3(1.0, 7), models.fcn3(seed=7))):
        assert str(made) == str(paper)
        ours = made.state_dict()
        assert all(torch.equal(ours[name], weight) for name, weight in paper.state_dict().items())


def test_without_kinks_the_network_is_linear() -> None:
    made, x = straight_cnn6(1.0, 7).double(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(made(x[:1] - x[1:]), made(x[:1]) - made(x[1:]))


def test_a_wider_network_has_more_channels_and_takes_the_same_pictures() -> None:
    state = torch.get_rng_state()
    wide = wide_cnn6(1.5, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [wide.get_submodule(f"conv{n}").out_channels for n in range(1, 7)] == [18, 54, 54, 54, 96, 192]
    assert wide(torch.zeros(2, 3, 32, 32)).shape == (2, 1)
    assert wide_fcn3(0.25, 0)(torch.zeros(2, 1, 28, 28)).shape == (2, 1)


@pytest.fixture(scope="module")
def update() -> Update:
    target = Target(models.fcn3(), losses.Logistic(), (1, 28, 28))
    x = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return capture(target, x, torch.tensor([1.0]))


def test_noise_is_relative_to_each_parameter_s_gradient(update: Update) -> None:
    found = noisy(update, 0.1, torch.Generator().manual_seed(1))
    assert found.header == update.header
    for name, g in update.gradients.items():
        noise = found.gradients[name] - g
        assert float(noise.std()) == pytest.approx(0.1 * math.sqrt(float(g.square().mean())), rel=0.2), name
    again = noisy(update, 0.1, torch.Generator().manual_seed(1))
    assert all(torch.equal(found.gradients[name], g) for name, g in again.gradients.items())


def test_no_noise_changes_nothing(update: Update) -> None:
    found = noisy(update, 0.0, torch.Generator().manual_seed(1))
    assert all(torch.equal(found.gradients[name], g) for name, g in update.gradients.items())


def test_apart_from_brightness_is_the_best_of_all_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, found = torch.rand(2, 1, 3, 4, 4, generator=generator, dtype=torch.float64)
    tried = min(float((f * found - truth).square().mean()) for f in torch.linspace(0, 2, 20001).tolist())
    assert apart_from_brightness(found, truth) == pytest.approx(tried, rel=1e-6)
    assert apart_from_brightness(5 * truth, truth) == pytest.approx(0, abs=1e-30)
    assert apart_from_brightness(0 * truth, truth) == pytest.approx(float(truth.square().mean()))


def test_noise_averages_over_the_units_of_a_linear_layer() -> None:
    # One Linear layer behind known k: x = grad W' k / |k|^2, written out, against the formula.
    generator = torch.Generator().manual_seed(0)
    x, k = torch.rand(4000, generator=generator), torch.randn(50, generator=generator)
    grad = torch.outer(k, x)
    noise = grad.square().mean().sqrt() * torch.randn(grad.shape, generator=generator)
    measured = float(((grad + noise).T @ k / k.square().sum() - x).square().mean())
    assert averaged(x, 50) == pytest.approx(measured, rel=0.1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return reproduce(SMALL, Options(count=3), tmp_path_factory.mktemp("figure5"))


def test_without_noise_the_picture_is_exact_and_more_noise_is_more_error(rows: dict[str, Any]) -> None:
    assert len(rows) == 6
    for row in rows.values():
        mse = [one["mse"] for one in row.values["levels"]]
        assert mse[0] < 1e-10
        assert row.values["levels"][0]["status"] == "exact"
        # Noise ten times as strong is a hundred times the squared error, as long as no unit changes its side.
        assert mse[2] > 20 * mse[1]
        assert mse[3] > 20 * mse[2]
        assert all(one["apart"] <= one["mse"] for one in row.values["levels"])


def test_apart_from_brightness_the_noise_averages_as_computed(rows: dict[str, Any]) -> None:
    network = SMALL.networks[0]
    for row in rows.values():
        small = row.values["levels"][2]
        assert small["apart"] / 1e-5**2 == pytest.approx(row.values["averaged"], rel=0.5)
    # The pictures are the same at both widths, and a median over them is one of them.
    (exponent,) = SMALL.exponents(rows, network, "apart")
    assert exponent == pytest.approx(-1, abs=0.2)
    narrow, wide = SMALL.theory(rows, network) or (0.0, 0.0)
    assert narrow == pytest.approx(4 * wide)


def test_figures_that_are_reported(rows: dict[str, Any], tmp_path: Path) -> None:
    network = SMALL.networks[0]
    own = sorted(row.values["levels"][1]["mse"] for row in rows.values() if row.values["width"] == 4)
    assert SMALL.median(rows, network, 4.0, 1e-6) == own[1]
    assert SMALL.recovered(rows, network, 4.0, 0.0) == 1.0
    assert SMALL.table(rows).row_count == 2
    assert len(SMALL.remarks(rows)) > 3
    assert SMALL.draw(rows).get_axes()
    found = json.loads(json.dumps(SMALL.summary(rows)))["small"]["widths"]["4"]
    assert found["levels"]["1e-06"]["median MSE"] == own[1]


def test_no_answer_counts_as_infinite(rows: dict[str, Any]) -> None:
    network = SMALL.networks[0]
    levels = [{"level": level, "status": "not converged"} for level in SMALL.levels]
    lost = {key: type(row)({**row.values, "levels": levels}) for key, row in rows.items()}
    assert SMALL.median(lost, network, 4.0, 1e-6) == math.inf
    assert SMALL.recovered(lost, network, 4.0, 1e-6) == 0.0
    assert all(math.isnan(exponent) for exponent in SMALL.exponents(lost, network))
    assert SMALL.draw(lost).get_axes()


def test_the_same_seed_gives_the_same_row() -> None:
    def values(seed: int) -> list[dict[str, Any]]:
        row = SMALL.jobs(Options(seed=seed), 1)[0].run()
        return [{name: value for name, value in one.items() if name != "seconds"} for one in row.values["levels"]]

    assert values(1) == values(1)
    assert values(1) != values(2)


def test_cnn6_without_noise_is_exact() -> None:
    made = Figure5(networks=(figure5.NETWORKS[0],), levels=(0.0, 1e-5))
    exact, noise = made.jobs(Options(), 1)[0].run().values["levels"]
    assert exact["mse"] < 1e-8
    assert noise["mse"] > 100 * exact["mse"]
