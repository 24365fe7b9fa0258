"""A dataclass's fields as JSON Schema: what each type takes, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest

from rgap.schema import of_fields, validator


class Colour(Enum):
    RED = "red"


@dataclass
class Kinds:
    text: str
    flag: bool
    count: int
    size: float
    maybe: float | None
    label: str | None
    sizes: tuple[float, ...]
    names: tuple[str, ...]
    counts: tuple[int, ...] | None
    colour: Colour


GOOD: dict[str, list[Any]] = {
    "text": ["", "a"],
    "flag": [True, False],
    "count": [0, -3, 100],
    "size": [0, 0.5, -1e300],
    "maybe": [None, 1.5],
    "label": [None, "a"],
    "sizes": [[], [1, 0.5]],
    "names": [[], ["a", "b"]],
    "counts": [None, [], [1, 2]],
    "colour": ["anything", 1, None],
}
BAD: dict[str, list[Any]] = {
    "text": [None, 1, ["a"]],
    "flag": [None, 0, "true"],
    "count": [None, 2.0, True, "1", 101],
    "size": [None, True, "1", float("nan"), float("inf")],
    "maybe": [True, "1", [1.5]],
    "label": [1, ["a"]],
    "sizes": [None, 1.0, ["1"], [None]],
    "names": [None, "ab", [1]],
    "counts": [[1.5], [101], 1],
}
CASES = [(name, value, True) for name, values in GOOD.items() for value in values]
CASES += [(name, value, False) for name, values in BAD.items() for value in values]


@pytest.mark.parametrize(("name", "value", "valid"), CASES)
def test_each_field_takes_the_values_of_its_type(name: str, value: Any, valid: bool) -> None:
    schema = validator({"properties": of_fields(Kinds, maximum=100)})
    assert schema.is_valid({name: value}) is valid
    assert schema.is_valid({})


@pytest.mark.parametrize(("name", "value"), [("size", None), ("maybe", None), ("sizes", [1.0, None])])
def test_null_stands_for_nan_where_that_is_asked_for(name: str, value: Any) -> None:
    assert validator({"properties": of_fields(Kinds, nan=True)}).is_valid({name: value})
    assert not validator({"properties": of_fields(Kinds, nan=True)}).is_valid({"count": None})
