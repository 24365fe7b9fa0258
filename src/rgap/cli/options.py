"""Options that several commands share, and what they name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import safetensors
from safetensors.torch import load_file
from torch import nn

from rgap import losses, models
from rgap.attacks import Attack, Closed, Recursive
from rgap.target import Target

BUILT_IN: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "cnn6": lambda shape, seed: models.cnn6(shape[0], shape[1], seed=seed),
    "cnn6-d": lambda shape, seed: models.cnn6_d(shape[0], shape[1], seed=seed),
    "fcn3": lambda shape, seed: models.fcn3(_product(shape), seed=seed),
}

F = TypeVar("F", bound=Callable[..., Any])


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _shape(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in value.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise click.BadParameter(f"got {value!r}, expected positive sizes with commas, such as 3,32,32", ctx, param)
    return sizes


def _range(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, float] | None:
    if value == "none":
        return None
    try:
        low, high = (float(part) for part in value.split(","))
    except ValueError:
        message = f"got {value!r}, expected two numbers with a comma, such as 0,1, or none"
        raise click.BadParameter(message, ctx, param) from None
    return low, high


def target_options(command: F) -> F:
    """The options that say what is attacked."""
    for option in reversed(
        (
            click.option(
                "--model",
                default="cnn6",
                show_default=True,
                help=f"{', '.join(BUILT_IN)}, or PKG.MOD:FACTORY, called without arguments for a torch module. "
                "Importing it is the only code of yours that runs.",
            ),
            click.option(
                "--weights", type=click.Path(path_type=Path), help="safetensors file with the model's state dict."
            ),
            click.option(
                "--loss",
                default="logistic",
                show_default=True,
                type=click.Choice(["exponential", "hinge", "logistic", "squared-hinge"]),
            ),
            click.option(
                "--input-shape",
                callback=_shape,
                metavar="SIZES",
                default="3,32,32",
                show_default=True,
                help="One sample's, no batch.",
            ),
            click.option(
                "--value-range",
                callback=_range,
                metavar="LOW,HIGH",
                default="0,1",
                show_default=True,
                help="Of an input's values, or none.",
            ),
            click.option(
                "--seed", type=int, default=0, show_default=True, help="Of a built-in model's initial weights."
            ),
        )
    ):
        command = option(command)
    return command


ATTACKS: dict[str, Callable[[], Attack]] = {"closed": Closed, "recursive": Recursive}


def attack_option(command: F) -> F:
    """Which attack runs."""
    return click.option(
        "--attack",
        "attack",
        default="closed",
        show_default=True,
        type=click.Choice(sorted(ATTACKS)),
        help="recursive: layer by layer, as in the paper; closed: and where a layer leaves its input open, several "
        "layers together.",
    )(command)


def make_target(
    model: str,
    weights: Path | None,
    loss: str,
    input_shape: tuple[int, ...],
    value_range: tuple[float, float] | None,
    seed: int,
) -> Target:
    """The target the options describe."""
    module = _module(model, input_shape, seed)
    if weights is not None:
        _load(module, weights)
    return Target(module, losses.by_name(loss), input_shape, value_range)


def _module(model: str, input_shape: tuple[int, ...], seed: int) -> nn.Module:
    if model in BUILT_IN:
        if model != "fcn3" and (len(input_shape) != 3 or input_shape[1] != input_shape[2]):
            raise click.BadParameter(f"{model} takes square pictures such as 3,32,32, got {input_shape}")
        return BUILT_IN[model](input_shape, seed)
    path, colon, factory = model.partition(":")
    if not colon or not path or not factory:
        known = ", ".join(BUILT_IN)
        raise click.BadParameter(
            f"got --model {model!r}, expected {known}, or PKG.MOD:FACTORY such as mynet:make_model"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(path), factory)
    except ImportError as error:
        raise click.BadParameter(f"--model {model}: cannot import {path} from here ({error})") from error
    except AttributeError as error:
        raise click.BadParameter(f"--model {model}: {path} has no {factory}") from error
    module = made if isinstance(made, nn.Module) else made()
    if not isinstance(module, nn.Module):
        raise click.BadParameter(f"--model {model}: got {type(module).__name__}, expected a torch.nn.Module")
    return module.eval()


def _load(module: nn.Module, weights: Path) -> None:
    if not weights.is_file():
        raise ValueError(f"{weights}: no such file; expected a safetensors file with the model's state dict")
    try:
        module.load_state_dict(load_file(weights))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights}: not a whole safetensors file ({error})") from error
    except RuntimeError as error:
        raise ValueError(f"{weights}: does not fit the model: {error}") from error
