"""What is followed once in the tests is what would be followed again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import tracing
from torch import nn

from rgap.nn.trace import follow

X = torch.zeros(1, 2, 4, 4)


def network(activation: nn.Module | None = None, bias: bool = True, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3, stride, bias=bias), activation or nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))


def made(**options: object) -> nn.Sequential:
    model = network(**options)  # type: ignore[arg-type]
    model(X)
    return model


def shared() -> nn.Sequential:
    layer = nn.Conv2d(2, 2, 3, padding=1)
    return nn.Sequential(layer, layer)


def frozen() -> nn.Sequential:
    model = made()
    model[0].weight.requires_grad_(False)
    return model


def test_networks_of_one_structure_have_one_key_whatever_their_weights() -> None:
    assert tracing.structure(made(), X) == tracing.structure(made(), X)


@pytest.mark.parametrize(
    "other",
    [
        lambda: made(activation=nn.LeakyReLU(0.1)),
        lambda: made(activation=nn.LeakyReLU(0.10001)),
        lambda: made(bias=False),
        lambda: made().double(),
        lambda: made().eval(),
        frozen,
        shared,
        lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)),
    ],
)
def test_networks_that_differ_have_keys_that_differ(other: Callable[[], nn.Module]) -> None:
    keys = [tracing.structure(each, X) for each in (made(), made(stride=2), made(activation=nn.LeakyReLU()), other())]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert tracing.structure(made(), X) != tracing.structure(made(), X[..., :3])


class Own(nn.Sequential):
    """May do anything."""


def hooked() -> nn.Module:
    model = made()
    model[0].register_forward_hook(lambda *given: None)
    return model


def patched() -> nn.Module:
    model = made()
    model.forward = lambda x: x  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("model", [lambda: Own(made()), hooked, patched], ids=["class", "hook", "forward"])
def test_what_may_do_anything_is_followed_each_time(model: Callable[[], nn.Module]) -> None:
    assert tracing.structure(model(), X) is None


def test_a_structure_met_again_gives_the_same_network_and_its_own() -> None:
    models, x = [made().double(), made().double()], torch.ones_like(X, dtype=torch.float64)
    graphs = [follow(model, (2, 4, 4), 2) for model in models]
    assert repr(graphs[0].uses) == repr(graphs[1].uses)
    programs = [graph.program for graph in graphs if graph.program is not None]
    assert str(programs[0].exported.graph) == str(programs[1].exported.graph)
    assert programs[0].exported.graph is not programs[1].exported.graph
    for model, program in zip(models, programs, strict=True):
        network = program.network(dict(model.named_parameters()), frozenset(dict(model.named_parameters())))
        torch.testing.assert_close(network.forward(x)[-1], model(x))
