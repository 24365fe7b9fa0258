"""Shapes in annotations are checked at a test's first call with arguments of such types and shapes, then more rarely.

A check takes longer than most of what it checks, and solvers call the same products ten thousand times.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import jaxtyping
import torch

calls: Counter[Hashable] = Counter()
"""Of each kind, in the test that runs: cleared before each, so that what fails hangs on no other test."""


def thin_out() -> None:
    """To be called before anything is imported that is checked."""
    every = jaxtyping.jaxtyped

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
    """The function, checked at the first, second, fourth, eighth ... call of each kind.

    Args:
        check: makes the function that checks too; it takes longer than many a test, and is called when needed.
    """
    checked = functools.cache(check)
    # A function within a function is another one each time, and of one kind.
    code = id(getattr(plain, "__code__", plain))

    @functools.wraps(plain)
    def call(*args: Any, **named: Any) -> Any:
        key = (code, *map(_kind, args), *map(_kind, named.items()))
        before = calls[key]
        result = plain(*args, **named) if before & (before + 1) else checked(plain)(*args, **named)
        calls[key] += 1
        return result

    return call


def _kind(value: Any) -> Hashable:
    """All that an annotation can speak of."""
    if isinstance(value, torch.Tensor):
        return type(value), value.dtype, value.shape
    if isinstance(value, (tuple, list)):
        return type(value), *map(_kind, value)
    if isinstance(value, dict):
        return dict, *map(_kind, value.items())
    return value if isinstance(value, (str, type)) else type(value)
