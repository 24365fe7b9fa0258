"""Shapes in annotations are checked once in a process for each kind of call: of arguments and result, types and shapes.

A check takes longer than most of what it checks, and solvers call the same products ten thousand times. Whether it
passes hangs on the kind alone, and so on no other test: what did not pass is checked again at the next call. Calls with
the same sizes in the same places are of one kind. To see of what kind a call is takes its time too: no more is seen
of an argument than its annotation speaks of, and behind the first hundred calls of a function in a test it is one call
in sixteen.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
from types import CodeType, FunctionType
from typing import Any

import jaxtyping
import torch
from beartype._check.code import codemain

passed: set[int] = set()
"""Hashes of kinds of calls, and of those that are alike: of kinds themselves there would be too much to keep."""


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
    # A function within a function is another one each time, and of one kind.
    code = getattr(plain, "__code__", plain)
    key = id(code)

    def checked(run: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if key not in checks:
            checks[key] = check(_next(plain))
        waiting.append(run)
        count = len(waiting)
        try:
            return checks[key](*args, **named)
        finally:
            del waiting[count - 1 :]  # not taken where an argument is wrong

    @functools.wraps(plain)
    def call(*args: Any, **named: Any) -> Any:
        calls[key] = count = calls.get(key, 0) + 1
        if count > FIRST and count % EVERY:
            return plain(*args, **named)
        try:
            kinds = (spoken.get(key) or _spoken(plain, code))(*args, **named)
        except TypeError:  # one argument too many, or too few
            return plain(*args, **named)
        given = hash(kinds)
        known = given in passed or hash(_alike(kinds, {})) in passed
        result = plain(*args, **named) if known else checked(plain, args, named)
        kind = (result.dtype, result.shape) if type(result) is torch.Tensor else _kind(result)
        whole = hash((given, kind))
        if whole not in passed:
            alike = hash(_alike((kinds, kind), {}))
            if known and alike not in passed:
                checked(lambda *args, **named: result, args, named)
            passed.update((given, hash(_alike(kinds, {})), whole, alike))
        return result

    return call


checks: dict[int, Callable[..., Any]] = {}
"""Of each function's code, by its place in memory: what checks, and runs what is waiting between the two."""
waiting: list[Callable[..., Any]] = []


def _next(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the annotations of another, which mean what they mean there, that runs the last one waiting."""
    take = waiting.pop  # what is global to it is so to the other one

    def run(*args: Any, **named: Any) -> Any:
        return take()(*args, **named)

    return functools.update_wrapper(FunctionType(run.__code__, plain.__globals__, closure=run.__closure__), plain)


LITERAL = 2
"""Sizes up to this one are meant where an annotation names them; others only tell each other apart."""


def _alike(kind: Hashable, sizes: dict[int, int]) -> Hashable:
    """The same for all kinds of which the sizes are the same in the same places."""
    if isinstance(kind, torch.Size):  # from -2 downwards: the hashes of -1 and -2 are the same
        return tuple(each if each <= LITERAL else -2 - sizes.setdefault(each, len(sizes)) for each in kind)
    if isinstance(kind, tuple):
        return tuple(_alike(each, sizes) for each in kind)
    return kind


spoken: dict[int, Callable[..., tuple[Hashable, ...]]] = {}
"""Of each function's code, by its place in memory: what there is to see of its arguments."""


def _spoken(plain: Callable[..., Any], code: Any) -> Callable[..., tuple[Hashable, ...]]:
    """A function of the same arguments: the type of each that is annotated, and what else its annotation speaks of."""
    key, kept = id(code), {"kept_": code, "Tensor_": torch.Tensor, "kind_": _kind}  # the code stays in its place
    if not isinstance(code, CodeType) or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
        taken, seen = ["*args", "**named"], ["*map(kind_, args)", "*named", "*map(kind_, named.values())"]
    else:
        count, told = code.co_argcount, plain.__annotations__
        names = code.co_varnames[: count + code.co_kwonlyargcount]
        taken = [f"{name}=None" for name in names]
        taken[count:count] = ["*"] if len(names) > count else []
        seen = [_look(told[name], plain.__globals__).format(name) for name in names if name in told]
    spoken[key] = eval(f"lambda {', '.join(taken)}: ({', '.join([str(key), *seen])},)", kept)
    return spoken[key]


TYPE = "type({0})"
ALL = "({0}.dtype, {0}.shape) if type({0}) is Tensor_ else kind_({0})"


def _look(annotation: object, known: dict[str, Any]) -> str:
    """What there is to see of a value: its type, if its annotation names types without shapes, or all there is."""

    def plain(part: object) -> bool:
        if isinstance(part, str):
            first, *others = part.strip().split(".")
            if first == "None":
                return True
            part = known.get(first, getattr(builtins, first, ...))
            part = functools.reduce(lambda each, name: getattr(each, name, ...), others, part)
        return part in (None, Any) or (isinstance(part, type) and not issubclass(part, jaxtyping.AbstractArray))

    parts = annotation.split("|") if isinstance(annotation, str) else [annotation]
    return TYPE if all(map(plain, parts)) else ALL


def _kind(value: Any) -> Hashable:
    """All that an annotation can speak of."""
    kind = type(value)
    if kind is torch.Tensor:
        return value.dtype, value.shape
    look = looks[kind]
    return look(value) if look else kind


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
