"""Shapes in annotations are checked as the tests run, though not at every call."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import shapes
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

import rgap
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


def test_each_kind_of_call_is_checked_once() -> None:
    seen = []
    call = shapes.thinned(lambda *args, **named: None, lambda plain: lambda *args, **named: seen.append((args, named)))
    every = [UNIT, torch.eye(3), UNIT.int(), (UNIT,), (torch.eye(3),), [UNIT], {"a": UNIT}, {"b": UNIT}, "a", "b", 1]
    for _ in range(3):
        for each in every:
            call(each)
    for each in every:
        assert sum(args[0] is each for args, _ in seen) == 1
    count = len(seen)
    call(x=UNIT)
    call(y=UNIT)
    assert len(seen) == count + 2


def test_sizes_tell_each_other_apart_and_small_ones_are_meant() -> None:
    seen = []

    def plain(a: Tensor, x: Float[Tensor, "n m"], *, y: Float[Tensor, "n"] | None = None) -> None: ...

    call = shapes.thinned(plain, lambda plain: lambda *args, **named: seen.append((args, named)))
    for known in ((3, 4), (5, 6), (4, 3)):
        call(UNIT, torch.ones(known))
        call(torch.ones(known), x=torch.ones(known))
        assert len(seen) == 1
    for new, shape in enumerate([(3, 3), (3, 1), (1, 3), (2, 3), (3,), (3, 4, 5)], 2):
        call(UNIT, torch.ones(shape))
        assert len(seen) == new
    count = len(seen)
    for new, size in enumerate([3, 4, 5], count + 1):
        call(UNIT, torch.ones(3, 4), y=torch.ones(size))
        assert len(seen) == new
    with pytest.raises(TypeError, match="plain"):
        call(UNIT, UNIT, UNIT)


def test_no_annotation_names_a_larger_size() -> None:
    texts = (path.read_text(encoding="utf-8") for path in Path(rgap.__file__).parent.rglob("*.py"))
    sizes = {size for text in texts for shape in re.findall(r'\w\[Tensor, "([^"]*)"', text) for size in shape.split()}
    assert {"n", "*shape", "...", "1"} <= sizes
    for size in sizes - {"..."}:
        assert size.removeprefix("*").isidentifier() or int(size) <= shapes.LITERAL


@pytest.mark.parametrize("before", [0, shapes.FIRST - 1, 1000, 10_000])
def test_a_wrong_argument_is_seen_soon_in_the_longest_loop(before: int) -> None:
    for _ in range(before):
        cholesky_solve(UNIT, UNIT)
    with pytest.raises(TypeCheckError):  # noqa: PT012
        for _ in range(shapes.EVERY):
            cholesky_solve(UNIT.int(), UNIT)


def test_each_test_begins_anew() -> None:
    assert not shapes.calls


@pytest.mark.parametrize("wrong", [torch.eye(3), UNIT.int(), UNIT[0], [UNIT], None], ids=str)
def test_a_wrong_result_of_arguments_that_passed_is_seen(wrong: Tensor) -> None:
    found = [UNIT, UNIT, wrong, UNIT, wrong]

    def plain(given: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
        return found.pop(0)

    call = jaxtyped(typechecker=beartype)(plain)
    for each in list(found):
        if each is not wrong:
            assert call(UNIT) is each
            continue
        with pytest.raises(TypeCheckError):
            call(UNIT)


def test_a_function_within_a_function_is_checked_as_one() -> None:
    seen = []

    def inner() -> object:
        return shapes.thinned(lambda value: None, lambda plain: seen.append)

    for _ in range(100):
        inner()(UNIT)
    assert len(seen) == 1
