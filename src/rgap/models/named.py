"""Networks by name: those of this package, and functions of your own that make one."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from rgap.models.chains import cnn6, cnn6_d, fcn3, lenet, strided, vgg11
from rgap.models.resnet import residual, resnet20
from rgap.models.vit import vit_tiny
from rgap.nn.models import in_mode

Shape = tuple[int, ...]

BUILT_IN: dict[str, Callable[..., nn.Module]] = {
    "cnn6": lambda shape, **sizes: cnn6(shape[0], shape[1], **sizes),
    "cnn6-d": lambda shape, **sizes: (cnn6 if "width" in sizes else cnn6_d)(shape[0], shape[1], **sizes),
    "fcn3": lambda shape, seed: fcn3(math.prod(shape), seed=seed),
    "residual": lambda shape, **sizes: residual(shape[0], shape[1], **sizes),
    "lenet": lambda shape, seed: lenet(shape[0], shape[1], seed=seed),
    "vgg11": lambda shape, **sizes: vgg11(shape[0], shape[1], **sizes),
    "resnet20": lambda shape, **sizes: resnet20(shape[0], shape[1], **sizes),
    "strided": lambda shape, seed: strided(shape[0], shape[1], seed=seed),
    "vit-tiny": lambda shape, **sizes: vit_tiny(shape[0], shape[1], **sizes),
}
"""From one sample's shape, a seed, and, where it takes one, a width."""
ONE_WIDTH = ("fcn3", "lenet", "strided")


class ModelError(ValueError):
    """A name that makes no model; says what was got and what was expected."""


def built_in(name: str, input_shape: Shape, seed: int = 0, width: int | None = None) -> nn.Module:
    """A network of this package by its name on the command line.

    Args:
        width: channels of its first layers, as the network's own argument; None: its own.

    Raises:
        ModelError: an unknown name, a shape that it does not take, or a width for a network that has one only.
    """
    if name not in BUILT_IN:
        raise ModelError(f"got the model {name!r}, expected {', '.join(BUILT_IN)}, or PKG.MOD:FACTORY")
    if name != "fcn3" and (len(input_shape) != 3 or input_shape[1] != input_shape[2]):
        raise ModelError(f"{name} takes square pictures such as 3,32,32, got {input_shape}")
    if width is None:
        return BUILT_IN[name](input_shape, seed=seed)
    if name in ONE_WIDTH:
        wide = ", ".join(each for each in BUILT_IN if each not in ONE_WIDTH)
        raise ModelError(f"{name} has one width: got width {width}, expected none; {wide} take one")
    return BUILT_IN[name](input_shape, seed=seed, width=width)


def imported(path: str, what: str) -> Any:
    """What lies under PKG.MOD:NAME, importable from the present folder, or installed. Importing it runs its code.

    Args:
        what: it is to be, for messages.

    Raises:
        ModelError: there is no such thing.
    """
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ModelError(f"{what} {path}: cannot import {module} from here ({error})") from error
    except Exception as error:  # of someone else's code
        raise ModelError(f"{what} {path}: {module} cannot be imported: {_told(error)}") from error
    if not hasattr(found, name):
        raise ModelError(f"{what} {path}: {module} has no {name}")
    return getattr(found, name)


def own(path: str, **arguments: int) -> nn.Module:
    """What the function PKG.MOD:FACTORY makes, in evaluation mode; a module by that name is taken as it is.

    Args:
        path: importable from the present folder, or installed. Importing it runs its code. It may be a call with
            constants, such as mynet:Net(classes=10).
        arguments: those that the function has parameters for are passed on.

    Raises:
        ModelError: there is no such function, it fails, or it makes no torch.nn.Module.
    """
    module, colon, factory = path.partition(":")
    if not colon or not module or not factory:
        known = ", ".join(BUILT_IN)
        raise ModelError(f"got the model {path!r}, expected {known}, or PKG.MOD:FACTORY such as mynet:make_model")
    name, given = _called(path)
    made = imported(name, "model")
    if not isinstance(made, nn.Module):
        made = _make(name, made, given, arguments)
    if not isinstance(made, nn.Module):
        raise ModelError(f"model {path}: got {type(made).__name__}, expected a torch.nn.Module")
    return in_mode(made, training=False)


def _called(path: str) -> tuple[str, dict[str, Any]]:
    """PKG.MOD:FACTORY and the constants that it is called with, of PKG.MOD:FACTORY(NAME=VALUE, ...)."""
    name, bracket, _ = path.partition("(")
    if not bracket:
        return path, {}
    try:
        call = ast.parse(path.partition(":")[2], mode="eval").body
        if isinstance(call, ast.Call) and not call.args:
            return name, {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ModelError(f"got the model {path!r}, expected constants by their names, such as {name}(classes=10)")


def _make(path: str, factory: Any, given: Mapping[str, Any], arguments: Mapping[str, int]) -> Any:
    """What a function of someone else's makes; whatever goes wrong in it is said in a line."""
    takes: Mapping[str, inspect.Parameter] = {}
    with contextlib.suppress(TypeError, ValueError):  # it is none, or is not written in Python
        takes = inspect.signature(factory).parameters
    missing = [
        name
        for name, each in takes.items()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD) and name not in given
    ]
    own = {name: value for name, value in arguments.items() if name in takes}
    if set(missing) - set(own):
        raise ModelError(f"model {path}: it takes {', '.join(missing)}; expected all, as {path}({missing[0]}=...)")
    try:
        return factory(**{**own, **given})
    except Exception as error:
        raise ModelError(f"model {path}: {_told(error)}") from error


def _told(error: Exception) -> str:
    """What went wrong in code of someone else's, and where, in one line."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}, line {where.lineno})"
