"""What is followed once in the tests is what would be followed again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import tracing
from torch import nn

from rgap import models
from rgap.nn.trace import follow
from tests.nn.modules import Written

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


class Own(nn.Module):
    """A function of one's own as a module."""

    def __init__(self, what: object):
        super().__init__()
        self.what = what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert callable(self.what)
        value: torch.Tensor = self.what(x)
        return value


class Counting(Own):
    """Its second call is another than its first."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class OfAll(Counting):
    """The same, and whichever of them is called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        OfAll.calls += 1
        return Own.forward(self, x) * OfAll.calls


def times(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * factor


def hooked() -> nn.Module:
    model = made()
    model[0].register_forward_hook(lambda *given: None)
    return model


def patched() -> nn.Module:
    model = made()
    model.forward = times(2.0)  # type: ignore[method-assign, assignment]
    return model


def inner() -> nn.Module:
    factors = [2.0]

    class Inner(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * factors[0]

    return Inner(None)


MAY_DO_ANYTHING = {
    "hook": hooked,
    "forward": patched,
    "closure": lambda: Own(times(2.0)),
    "list": lambda: Own([2.0]),
    "tensor": lambda: Own(X),
    "class within a function": inner,
}


@pytest.mark.parametrize("name", MAY_DO_ANYTHING)
def test_what_may_do_anything_is_followed_each_time(name: str) -> None:
    assert tracing.structure(MAY_DO_ANYTHING[name](), X) is None


def test_modules_of_ones_own_have_the_key_of_their_code() -> None:
    functions = [lambda x: x + 1, lambda x: x + 2, lambda x, more=1: x + more, lambda x, more=2: x + more, torch.relu]
    keys = [tracing.structure(Own(each), X) for each in functions]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert keys == [tracing.structure(Own(each), X) for each in functions]


def test_what_keeps_something_for_its_next_call_is_followed_each_time() -> None:
    models = [Counting(torch.relu), Counting(torch.relu), OfAll(torch.relu), OfAll(torch.relu)]
    calls = []
    for model in models:
        assert follow(model, (2, 4, 4), None).program is not None
        calls.append(model.calls)
    assert 0 < calls[0] == calls[1]
    assert 0 < 2 * calls[2] == calls[3]


def test_the_models_of_the_package_are_followed_once() -> None:
    made = [models.resnet20(seed=seed) for seed in range(2)]
    keys = {tracing.structure(model, torch.zeros(1, 3, 32, 32)) for model in made}
    assert len(keys) == 1
    assert keys != {None}


@pytest.mark.parametrize("part", ["halves", "one row", "added"])
def test_what_is_taken_apart_further_is_so_each_time(part: str) -> None:
    """What is written through views is; a second time, from what is known of it."""
    graphs = [follow(Written(part), (4, 6, 6), None) for _ in range(2)]
    programs = [graph.program for graph in graphs if graph.program is not None]
    assert str(programs[0].exported.graph) == str(programs[1].exported.graph)
    assert programs[0].exported.graph is not programs[1].exported.graph


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
