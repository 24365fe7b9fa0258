"""What rounding the weights at every step does to each value of a difference, against weights that are rounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rgap import Protocol, Target, capture, losses
from rgap.attacks.local_steps import client_of, plan_of
from rgap.inversion.walk import Difference, Plan, Walk
from rgap.inversion.weight_rounding import rounded_by, spacing
from rgap.models.chains import chain
from rgap.protocol import Sends

EPS = float(torch.finfo(torch.float32).eps)
COUNT = 50_000


def test_a_unit_in_the_last_place_is_the_distance_to_the_next_number() -> None:
    values = torch.cat([torch.tensor([1.0, 0.5, -0.75, 3e-5, 0.0]), torch.randn(50, generator=_generator())])
    after = torch.nextafter(values.abs(), torch.tensor(torch.inf))
    wanted = (after.double() - values.abs().double()).where(values != 0, 0.0)
    assert torch.equal(spacing(values.double(), EPS), wanted)


@pytest.mark.parametrize("apart", [0.0, 0.02, 0.3, 5.7])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_errors_are_as_large_as_those_of_weights_that_are_rounded(apart: float, steps: int) -> None:
    """Equal increments are off by the same error every time, changing ones by errors of their own."""
    generator = _generator()
    start = 0.2 * (torch.rand(COUNT, generator=generator) - 0.5)
    unit, first = spacing(start.double(), EPS), 3e-7 * torch.randn(COUNT, generator=generator, dtype=torch.float64)
    rounded, exact, trail = start, start.double(), [{"w": start.double()}]
    for step in range(steps):
        increment = first + step * apart * unit * torch.rand(COUNT, generator=generator, dtype=torch.float64)
        rounded, exact = (rounded.double() + increment).float(), exact + increment
        trail.append({"w": exact})
    std = rounded_by(trail, {"w": rounded.double() - start.double()}, EPS, 0.0)["w"]
    off = (rounded.double() - exact) / std
    assert 0.95 < float(off.square().mean().sqrt()) < 1.05
    small = start.abs() < 0.01
    assert 0.9 < float(off[small].square().mean().sqrt()) < 1.1
    assert float(std[small].mean()) < 0.2 * float(std[~small].mean())


@pytest.mark.parametrize("rate", [0.1, 0.01, 1e-3, 1e-4])
@pytest.mark.parametrize("more", [{}, {"momentum": 0.9}], ids=str)
def test_a_client_s_own_steps_are_one_rounding_off(rate: float, more: dict[str, float]) -> None:
    torch.manual_seed(0)
    model = chain(((6, 3, 1, 1), (8, 3, 2, 1)), 3, 6, 4, nn.Tanh, bias=True)
    target = Target(model, losses.CrossEntropy(4), (3, 6, 6), (0.0, 1.0))
    x, label = torch.rand(1, 3, 6, 6, generator=_generator()), torch.ones(1)
    told = Protocol(Sends.DIFFERENCE, learning_rate=rate, steps=6, **more)  # type: ignore[arg-type]
    sent = {name: d.double() for name, d in capture(target, x, label, told).gradients.items()}
    client = client_of(target)
    walk = Walk(client, plan_of(told, 1)).all(x.double(), label.double(), ((0,),) * 6)
    difference = Difference.of(sent, client.weights, EPS, EPS, 6).along(walk)
    for name, d in sent.items():
        if d.numel() < 50:  # too few to tell
            continue
        off = (walk.end[name] - d) / difference.units(name)
        # At the largest rate some gradients' own rounding is more than the weights', and it is taken for a little much.
        assert (0.3 if rate == 0.1 else 0.5) < float(off.square().mean().sqrt()) < 1.2, name
    assert difference.misfit(walk) < 2


def test_what_never_moved_from_zero_has_a_rounding_too() -> None:
    """Where terms cancel, as in front of a dead unit, single precision has zero and the simulation next to nothing."""
    sent, first = {"w": _values(1e-3), "zero": _values(0.0)}, {"w": _values(1.0), "zero": _values(0.0)}
    difference = Difference.of(sent, first, EPS, EPS, 1)
    assert difference.misfit(_ending({**sent, "zero": _values(1e-14)})) < 1
    assert difference.misfit(_ending({**sent, "zero": _values(1e-6)})) > 100


def test_where_nothing_moved_anything_else_is_no_answer() -> None:
    nothing = {"w": _values(0.0)}
    difference = Difference.of(nothing, nothing, EPS, EPS, 1)
    assert difference.misfit(_ending(nothing)) == 0
    assert difference.misfit(_ending({"w": _values(1.0)})) == torch.inf


def _values(size: float) -> Tensor:
    return torch.full((4,), size, dtype=torch.float64)


def _ending(difference: dict[str, Tensor]) -> Walk:
    """One step that moves weights by so much."""
    target = Target(nn.Linear(2, 2), losses.CrossEntropy(2), (2,), (0.0, 1.0))
    client = replace(client_of(target), weights={name: torch.zeros_like(d) for name, d in difference.items()})
    return Walk(client, Plan((1,), 1, ((0.0, ()), (0.0, (1.0,)))), (difference,))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
