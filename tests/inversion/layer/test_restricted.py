"""Weight rows on some directions of each channel, by both ways of forming what they make, against the dense matrix."""

from __future__ import annotations

import pytest
import torch

from rgap.inversion.layer.cost import from_rows
from rgap.inversion.layer.restricted import restricted_grams
from rgap.nn import layers
from rgap.nn.layers import Layer


def convolution(groups: int, generator: torch.Generator) -> Layer:
    weight = torch.randn(6, 4 // groups, 3, 3, generator=generator, dtype=torch.float64)
    return layers.convolution("conv", weight, None, (4, 9, 8), (2, 2), ((1, 0), (1, 1)), (1, 1), groups, "weight", None)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("directions", [0, 1, 7, 72])
@pytest.mark.parametrize("way", [True, False])
def test_it_is_that_of_the_dense_matrix(
    groups: int, weighted: bool, directions: int, way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rgap.inversion.layer.restricted.from_rows", lambda *_: way)
    monkeypatch.setattr("rgap.inversion.layer.restricted.CHUNK", 1000)  # some positions at once
    generator = torch.Generator().manual_seed(directions)
    layer = convolution(groups, generator)
    rows = torch.rand(1, layer.outputs, layer.positions, generator=generator, dtype=torch.float64)
    rows[:, ::2] = 0.0  # dropped
    bases = {g: torch.randn(layer.pixels, directions, generator=generator, dtype=torch.float64) for g in range(groups)}
    unit = torch.eye(layer.unknowns, dtype=torch.float64).reshape(-1, layer.channels, layer.pixels)
    dense = layer.output(unit).flatten(1).mT
    found = restricted_grams(layer, bases, rows if weighted else None)
    assert list(found) == list(bases)
    for g, basis in bases.items():
        channels = layer.channels // groups
        own = dense[:, g * channels * layer.pixels :][:, : channels * layer.pixels]
        onto = own @ torch.block_diag(*[basis] * channels)
        expected = onto.mT @ (onto * rows.reshape(-1, 1) if weighted else onto)
        torch.testing.assert_close(found[g].tril(), expected.tril(), rtol=1e-12, atol=1e-12)


def test_few_directions_are_taken_through_the_rows_and_all_through_the_matrix() -> None:
    layer = convolution(1, torch.Generator())
    assert from_rows(layer, 1)
    assert not from_rows(layer, layer.pixels)
