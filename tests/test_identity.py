"""What a thing is, told the same in every process, and otherwise for other code and other values."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgap import losses
from rgap.identity import identity

Make = Callable[[float], Any]
EXPONENT = 2.0


def power(outputs: Tensor, targets: Tensor, exponent: float = 2.0) -> Tensor:
    return ((outputs - targets).abs() ** exponent).mean()


def of_module(outputs: Tensor, targets: Tensor) -> Tensor:
    return power(outputs, targets, EXPONENT)


def with_default(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    def own(outputs: Tensor, targets: Tensor, *, exponent: float = value) -> Tensor:
        return power(outputs, targets, exponent)

    return own


def nested(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    inner = captured(value)
    return lambda outputs, targets: 2 * inner(outputs, targets)


def captured(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, targets: power(outputs, targets, value)


def tensor(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    weight = torch.full((3,), value)
    return lambda outputs, targets: (weight * (outputs - targets) ** 2).mean()


class Own:
    def __init__(self, exponent: float):
        self.exponent = exponent

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return power(outputs, targets, self.exponent)

    def method(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self(outputs, targets)


class Module(nn.Module):
    def __init__(self, delta: float):
        super().__init__()
        self.inner = nn.HuberLoss(delta=delta)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = self.inner(outputs, targets)
        return found


MAKES: dict[str, Make] = {
    "lambda": captured,
    "closure of a closure": nested,
    "default": with_default,
    "partial": lambda value: partial(power, exponent=value),
    "partial of a closure": lambda value: partial(captured(value)),
    "tensor": tensor,
    "object": Own,
    "method": lambda value: Own(value).method,
    "module": Module,
    "smoothing": lambda value: losses.CrossEntropy(3, value / 10),
    "list": lambda value: [{"a": (value,)}],
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_other_values_are_other_things(make: Make) -> None:
    wrapped = [losses.OfFunction(each, 3) if callable(each) else each for each in map(make, (2.0, 2.0, 3.0))]
    own, again, other = map(identity, wrapped)
    assert own == again
    assert own != other
    assert "0x" not in own


def test_other_code_is_another_thing() -> None:
    functions = [lambda o, t: (o - t).mean(), lambda o, t: (o + t).mean(), lambda o, t: (o - t).sum(), torch.dist]
    assert len(set(map(identity, functions))) == 4


def test_what_a_function_uses_of_its_module_belongs_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(of_module)
    monkeypatch.setitem(globals(), "EXPONENT", 3.0)
    changed = identity(of_module)
    monkeypatch.setitem(globals(), "EXPONENT", 2.0)
    assert identity(of_module) == before != changed
    monkeypatch.setitem(globals(), "power", lambda outputs, targets, exponent: outputs.mean())
    assert identity(of_module) != before


def test_what_goes_round_in_a_circle_ends() -> None:
    one, other = Own(2.0), Own(3.0)
    one.exponent, other.exponent = other, one  # type: ignore[assignment]
    assert identity(one)

    def never(o: Tensor, t: Tensor) -> Tensor:
        return later(o, t)

    assert identity(never)  # with a place that nothing was put into yet
    later = power


def test_it_is_the_same_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of sets and the addresses of objects there."""
    (tmp_path / "loss_of_mine.py").write_text(
        "def loss(o, t, of={'a', 'b', 'c'}):\n    return o.mean() if 'sum' not in {'mean', 'sum', 'no'} else t.abs()\n"
    )
    code = "from loss_of_mine import loss; from rgap.identity import identity; print(identity(loss))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    run = partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    printed = run([sys.executable, "-c", code]).stdout
    monkeypatch.syspath_prepend(str(tmp_path))
    assert printed.strip() == identity(importlib.import_module("loss_of_mine").loss)
