"""Options that several commands share, and what they name."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from torch import nn

from rgap import losses
from rgap.attacks import Attack
from rgap.attacks.named import BY_NAME, by_name
from rgap.attacks.progress import Tick, watching
from rgap.models.named import BUILT_IN, ModelError, built_in, own
from rgap.protocol import Optimiser, Protocol, Sends
from rgap.reading import load_weights
from rgap.target import Target

F = TypeVar("F", bound=Callable[..., Any])


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
                "--weights",
                type=click.Path(path_type=Path),
                help="The model's state dict: safetensors, npz, or tensors alone as torch.save writes them.",
            ),
            click.option(
                "--loss",
                type=click.Choice(["bce", "cross-entropy", "exponential", "hinge", "logistic", "mse", "squared-hinge"]),
                help="By default logistic for a model of one output, cross-entropy for one of several. bce: labels are "
                "numbers whose binary digits are the outputs'; mse: a real label, or a class for several outputs; the "
                "others but cross-entropy take labels -1 and 1.",
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


def attack_options(default: str | None) -> Callable[[F], F]:
    """The options that say which attack runs, as `make_attack` takes them; several attacks, if there is no default."""
    names = click.Choice(list(BY_NAME))
    about = (
        "closed: R-GAP, and where a layer leaves its input open, several layers together; recursive: layer by layer, "
        "as in the paper; bias: a Linear layer with a bias; dlg, idlg, inverting-gradients: by optimisation; hybrid: "
        "recursive and dlg, the smoother answer of the two."
    )
    which = (
        click.option("--attack", multiple=True, type=names, help=f"Default: all that apply. {about}")
        if default is None
        else click.option("--attack", default=default, show_default=True, type=names, help=about)
    )
    options = (
        which,
        click.option("--iterations", type=click.IntRange(min=1), help="Of attacks by optimisation."),
        click.option("--restarts", type=click.IntRange(min=1), help="Starts of attacks by optimisation; default: 1."),
        click.option("--polish", is_flag=True, help="Go on from the answer by Gauss-Newton on the gradient residual."),
    )

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def make_attack(attack: str, iterations: int | None, restarts: int | None, polish: bool) -> Attack:
    """The attack that the options describe.

    Raises:
        click.BadParameter: sizes for an attack that has none.
    """
    try:
        return by_name(attack, iterations, restarts, polish)
    except ValueError as error:
        raise click.BadParameter(f"--iterations and --restarts: {error}") from error


def protocol_options(command: F) -> F:
    """The options that say what a client does between its data and what it sends, as `make_protocol` takes them."""
    for option in reversed(
        (
            click.option(
                "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Of one client."
            ),
            click.option(
                "--sends",
                type=click.Choice([sends.value for sends in Sends]),
                default=Sends.GRADIENT.value,
                show_default=True,
                help="A gradient, or the difference of its weights after local steps.",
            ),
            click.option("--local-steps", type=click.IntRange(min=1), default=1, show_default=True),
            click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), help="Of the local steps."),
            click.option(
                "--optimiser",
                type=click.Choice([optimiser.value for optimiser in Optimiser]),
                default=Optimiser.SGD.value,
                show_default=True,
                help="Of the local steps.",
            ),
            click.option("--summed", is_flag=True, help="The loss is summed over a batch, not averaged."),
            click.option(
                "--clients",
                type=click.IntRange(min=1),
                default=1,
                show_default=True,
                help="Averaged by the server.",
            ),
        )
    ):
        command = option(command)
    return command


def make_protocol(named: dict[str, Any]) -> Protocol:
    """The protocol that the options describe, which are taken out of ``named`` but for the batch size.

    Raises:
        click.BadParameter: the options contradict each other.
    """
    fields = {
        "sends": Sends(named.pop("sends")),
        "steps": named.pop("local_steps"),
        "learning_rate": named.pop("learning_rate"),
        "optimiser": Optimiser(named.pop("optimiser")),
        "summed": named.pop("summed"),
        "clients": named.pop("clients"),
    }
    try:
        return Protocol(**fields)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def config_option(command: F) -> F:
    """``--config FILE``: a TOML file with the command's own options, by the same names."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_configured,
        help="TOML file with these options by the same names, such as batch-size = 4; the command line wins.",
    )(command)


def _configured(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    if value is None:
        return
    if not value.is_file():
        raise click.BadParameter(f"{value}: no such file", ctx, param)
    try:
        entries = tomllib.loads(value.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{value}: not TOML ({error})", ctx, param) from error
    names = {name.lstrip("-"): each.name for each in ctx.command.params for name in each.opts if name.startswith("--")}
    unknown = [name for name in entries if name not in names or name == "config"]
    if unknown:
        known = ", ".join(sorted(set(names) - {"config"}))
        raise click.BadParameter(f"{value}: unknown {', '.join(unknown)}; expected some of {known}", ctx, param)
    whole = {each.name for each in ctx.command.params if isinstance(each.type, click.types.IntParamType)}
    for name, entry in entries.items():
        if names[name] in whole and isinstance(entry, (bool, float)):
            raise click.BadParameter(f"{value}: got --{name} {entry!r}, expected a whole number", ctx, param)
    ctx.default_map = {str(names[name]): entry for name, entry in entries.items()}


@contextmanager
def shown(console: Console) -> Iterator[None]:
    """Show how far an attack has come, for as long as it runs."""
    with console.status("attacking") as status, watching(lambda tick: status.update(tick_line(tick))):
        yield


def tick_line(tick: Tick) -> str:
    """One line of progress."""
    if math.isnan(tick.loss):
        return f"{tick.what} {tick.done}/{tick.total}"
    return f"{tick.what} {tick.done}/{tick.total}, loss {tick.loss:.1e}, {tick.rate:.0f}/s, {tick.left:.0f} s left"


def make_target(
    model: str,
    weights: Path | None,
    loss: str | None,
    input_shape: tuple[int, ...],
    value_range: tuple[float, float] | None,
    seed: int,
    batch_size: int = 1,
) -> Target:
    """The target the options describe."""
    module = _module(model, input_shape, seed)
    if weights is not None:
        load_weights(module, weights)
    return Target(module, losses.for_model(module, input_shape, loss), input_shape, value_range, batch_size)


def _module(model: str, input_shape: tuple[int, ...], seed: int) -> nn.Module:
    try:
        return own(model) if ":" in model else built_in(model, input_shape, seed)
    except ModelError as error:
        raise click.BadParameter(f"--model: {error}") from error
