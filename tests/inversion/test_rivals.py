"""Candidates that contradict the weights of a layer fall out before it is solved for."""

from __future__ import annotations

import pytest
import torch

from rgap.inversion.history import Paths
from rgap.inversion.rivals import without_contradicting
from rgap.inversion.state import State
from rgap.nn import layers
from rgap.nn.ops import Linear


def paths(outputs: int, updates: list[int]) -> tuple[Linear, Paths]:
    """Of a convolution of stride 2 on 3 x 24 x 24: what one input gives, once exactly and once as ReLU leaves it."""
    drawn = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, 3, 3, 3, generator=drawn, dtype=torch.float64)
    layer = layers.convolution("conv", weight, None, (3, 24, 24), (2, 2), ((1, 1),) * 2, (1, 1), 1, "weight", None)
    z = layer.output(torch.randn(1, 3, layer.pixels, generator=drawn, dtype=torch.float64))
    value = layer.unpack_output(torch.cat([z, z.relu()]))
    state = State(value, torch.randn(value.shape, generator=drawn, dtype=torch.float64), None, torch.zeros_like(value))
    return Linear(layer), Paths.begin(state, torch.tensor(updates), torch.zeros(2, dtype=torch.float64))


def test_of_two_candidates_of_an_update_the_one_that_no_input_gives_falls_out() -> None:
    op, both = paths(16, [0, 0])
    kept = without_contradicting(op, both, 1e-6)
    assert kept.root.tolist() == [0]
    assert torch.equal(kept.state.value, both.state.value[:1])


@pytest.mark.parametrize(("outputs", "updates"), [(16, [0, 1]), (12, [0, 0])])
def test_what_has_no_rival_or_no_spare_rows_is_kept(outputs: int, updates: list[int]) -> None:
    op, both = paths(outputs, updates)
    assert without_contradicting(op, both, 1e-6).root.tolist() == [0, 1]
