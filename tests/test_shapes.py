"""Shapes in annotations are checked as the tests run, though not at every call."""

from __future__ import annotations

import pytest
import shapes
import torch
from jaxtyping import TypeCheckError

from rgap.linalg.psd import cholesky_solve

UNIT = torch.eye(2)


@pytest.mark.parametrize(
    "wrong",
    [torch.ones(2), torch.ones(3, 1), torch.ones(2, 1, dtype=torch.int64), [[1.0], [1.0]], (UNIT, UNIT), None],
    ids=["dimensions", "size", "type", "list", "tuple", "None"],
)
def test_a_wrong_argument_is_seen_after_however_many_right_ones(wrong: object) -> None:
    for _ in range(10):
        cholesky_solve(UNIT, UNIT)
    for _ in range(3):
        with pytest.raises(TypeCheckError):
            cholesky_solve(wrong, UNIT)  # type: ignore[arg-type]


def test_each_kind_of_call_is_checked_first_and_then_more_and_more_rarely() -> None:
    seen = []
    call = shapes.thinned(lambda *args, **named: None, lambda plain: lambda *args, **named: seen.append((args, named)))
    every = [UNIT, torch.eye(3), UNIT.int(), (UNIT,), (torch.eye(3),), [UNIT], {"a": UNIT}, {"b": UNIT}, "a", "b", 1]
    for each in every:
        for _ in range(100):
            call(each)
    for each in every:
        assert sum(args[0] is each for args, _ in seen) == len([1, 2, 4, 8, 16, 32, 64])
    count = len(seen)
    call(x=UNIT)
    call(y=UNIT)
    assert len(seen) == count + 2


def test_a_function_within_a_function_is_checked_as_one() -> None:
    seen = []

    def inner() -> object:
        return shapes.thinned(lambda value: None, lambda plain: seen.append)

    for _ in range(100):
        inner()(UNIT)
    assert len(seen) == len([1, 2, 4, 8, 16, 32, 64])
