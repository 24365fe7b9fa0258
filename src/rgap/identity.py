"""What a thing is, in a text that is the same in every process: stores of results go on where it is the same."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

PLAIN = (int, float, complex, str, bytes, type(None), Tensor, np.ndarray)
"""Values around a function that belong to it."""


def identity(thing: Any) -> str:
    """Its repr without addresses, with the values of tensors, and with the code of functions and what they hold:
    captured values, defaults, and the numbers and functions of their module that they use."""
    return _told(thing, set())


def _told(thing: Any, met: set[int]) -> str:
    if isinstance(thing, (Tensor, np.ndarray)):
        values = torch.as_tensor(thing).detach().cpu().contiguous()
        return f"tensor({values.dtype}, {tuple(values.shape)}, {_digest(values.reshape(-1).view(torch.uint8).numpy())})"
    if isinstance(thing, Mapping):
        return f"({', '.join(f'{_told(name, met)}: {_told(each, met)}' for name, each in thing.items())})"
    if isinstance(thing, (list, tuple, Set)):
        parts = [_told(each, met) for each in thing]
        return f"({', '.join(sorted(parts) if isinstance(thing, Set) else parts)})"
    if isinstance(thing, (*PLAIN, Enum)):
        return repr(thing)
    if id(thing) in met:
        return "again"
    met.add(id(thing))
    if isinstance(thing, FunctionType):
        return f"{thing.__qualname__}{_told(_behind(thing), met)}"
    if isinstance(thing, MethodType):
        return _told((thing.__func__, thing.__self__), met)
    if isinstance(thing, partial):
        return f"partial{_told((thing.func, thing.args, thing.keywords), met)}"
    if isinstance(thing, type):
        return thing.__qualname__
    if is_dataclass(thing):
        shown = {each.name: getattr(thing, each.name) for each in fields(thing) if each.repr}
        return f"{type(thing).__qualname__}{_told(shown, met)}"
    if not hasattr(thing, "__dict__"):
        return re.sub(r" (?:object )?at 0x[0-9a-f]+", "", repr(thing))
    foreign = type(thing).__module__.partition(".")[0] in ("torch", "numpy")
    methods = {} if foreign else {n: each for n, each in vars(type(thing)).items() if isinstance(each, FunctionType)}
    return f"{type(thing).__qualname__}{_told((vars(thing), methods), met)}"


def _behind(function: FunctionType) -> tuple[Any, ...]:
    """What a function does, and with which values."""
    code, around = function.__code__, function.__globals__
    captured = [_content(cell) for cell in function.__closure__ or ()]
    used = {name: around[name] for name in _names(code) if name in around}
    own = {
        name: each
        for name, each in used.items()
        if isinstance(each, PLAIN) or (isinstance(each, FunctionType) and each.__module__ == function.__module__)
    }
    return _digest(_text(code).encode()), function.__defaults__, function.__kwdefaults__, captured, own


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is filled later
        return None


def _names(code: CodeType) -> list[str]:
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    return [*code.co_names, *(name for each in inner for name in _names(each))]


def _text(code: CodeType) -> str:
    """Its instructions and constants, without lines and places of files."""
    constants = [_text(each) if isinstance(each, CodeType) else identity(each) for each in code.co_consts]
    return repr((code.co_code, code.co_names, code.co_varnames, constants))


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
