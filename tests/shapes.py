"""Shapes in annotations are checked once in a process for each kind of call: of arguments and result, types and shapes.

A check takes longer than most of what it checks, and solvers call the same products ten thousand times. Whether it
passes hangs on the kind alone, and so on no other test: what did not pass is checked again at the next call. To see of
what kind a call is takes its time too: behind the first hundred of a function in a test it is one call in sixteen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import jaxtyping
import torch
from beartype._check.code import codemain

passed: set[int] = set()
"""Hashes of kinds of calls: of kinds themselves there would be too much to keep."""


FIRST, EVERY = 100, 16
calls: dict[int, int] = {}
"""Of each function, in this test; to be cleared before the next."""


def thin_out() -> None:
    """To be called before anything is imported that is checked."""
    every = jaxtyping.jaxtyped
    # Of a list one item is looked at: not any, or what a test draws would hang on what was checked before it.
    codemain.getrandbits = lambda bits: 2654435769

    def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
        check = every(typechecker=typechecker)

        def decorate(plain: Any) -> Any:
            if not isinstance(plain, type):
                return thinned(plain, check)
            if dataclasses.is_dataclass(plain) and "__init__" in vars(plain):
                plain.__init__ = thinned(plain.__init__, check)
            return plain

        return decorate

    jaxtyping.jaxtyped = jaxtyped


def thinned(plain: Callable[..., Any], check: Callable[[Any], Callable[..., Any]]) -> Callable[..., Any]:
    """The function, checked at the first call of each kind.

    Args:
        check: makes the function that checks too; it takes longer than many a test, and is called when needed.
    """
    checked = functools.cache(check)
    results: list[Any] = []
    taken = functools.cache(functools.partial(_returning, results))
    # A function within a function is another one each time, and of one kind.
    code = id(getattr(plain, "__code__", plain))

    @functools.wraps(plain)
    def call(*args: Any, **named: Any) -> Any:
        calls[code] = count = calls.get(code, 0) + 1
        if count > FIRST and count % EVERY:
            return plain(*args, **named)
        kinds: list[Hashable] = [code, *named]
        for value in (*args, *named.values()):
            look = looks[type(value)]
            kinds.append(look(value) if look else type(value))
        given = hash(tuple(kinds))
        known = given in passed
        result = plain(*args, **named) if known else checked(plain)(*args, **named)
        whole = hash((given, _kind(result)))
        if whole not in passed:
            if known:
                results.append(result)
                checked(taken(plain))(*args, **named)
            passed.update((given, whole))
        return result

    return call


def _returning(results: list[Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the annotations of another, which mean what they mean there, that only returns its result."""

    def take(*args: Any, **named: Any) -> Any:
        return results.pop()

    return functools.update_wrapper(FunctionType(take.__code__, plain.__globals__, closure=take.__closure__), plain)


def _kind(value: Any) -> Hashable:
    """All that an annotation can speak of."""
    look = looks[type(value)]
    return look(value) if look else type(value)


class Looks(dict[type, Callable[[Any], Hashable] | None]):
    """What there is to see of values beyond their type; of texts, enough to tell literals apart."""

    def __missing__(self, kind: type) -> Callable[[Any], Hashable] | None:
        known: dict[type, Callable[[Any], Hashable]] = {
            torch.Tensor: lambda value: (kind, value.dtype, value.shape),
            tuple: lambda value: (kind, *map(_kind, value)),
            list: lambda value: (kind, *map(_kind, value)),
            dict: lambda value: (kind, *value, *map(_kind, value.values())),
            str: lambda value: (kind, value[:16]),
            type: lambda value: value,
        }
        self[kind] = next((look for each, look in known.items() if issubclass(kind, each)), None)
        return self[kind]


looks = Looks()
