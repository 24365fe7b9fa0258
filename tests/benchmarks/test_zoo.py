"""Every family of the benchmark's architectures is what an attack takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmark import load

from rgap import Target
from rgap.nn.outputs import outputs_of

FAMILIES = load("zoo").FAMILIES


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_every_family_makes_a_target(family: Any) -> None:
    torch.manual_seed(0)
    model = family.make().eval()
    assert outputs_of(model(torch.rand(2, *family.shape))).shape[0] == 2
    target = Target(model, None, family.shape, (0.0, 1.0))  # type: ignore[arg-type]
    assert target.graph.uses, target.graph.obstacles


def test_there_are_thirty_of_different_names() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES) == 30
