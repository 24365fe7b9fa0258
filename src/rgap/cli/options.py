"""Options that several commands share, and what they name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rgap.cli.console import say
from rgap.protocol import Optimiser, Protocol, Sends

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rgap.attacks import Attack
    from rgap.target import Target


class Number(click.FloatRange):
    """A number, and so neither NaN nor infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found: float = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"got {found}, expected a finite number", param, ctx)
        return found


F = TypeVar("F", bound=Callable[..., Any])

# torch takes seconds to import. What is named in --help stands here, and a test holds it against what there is.
MODELS = ("cnn6", "cnn6-d", "fcn3", "residual", "lenet", "vgg11", "resnet20", "strided", "vit-tiny")
ATTACKS = (
    "closed", "recursive", "bias", "dlg", "idlg", "inverting-gradients", "see-through-gradients", "modern",
    "feature-matching", "hybrid",
)  # fmt: skip
LOSSES = ("bce", "cross-entropy", "exponential", "hinge", "logistic", "mse", "nll", "squared-hinge")
TORCH_LOSSES = (
    "CrossEntropyLoss", "NLLLoss", "MSELoss", "BCEWithLogitsLoss", "BCELoss", "SoftMarginLoss",
)  # fmt: skip
ABOUT_ATTACKS = (
    "closed: R-GAP, and where a layer leaves its input open, several layers together; recursive: layer by layer, "
    "as in the paper; bias: a Linear layer with a bias; dlg, idlg, inverting-gradients, see-through-gradients, modern "
    "(breaching's), feature-matching: by optimisation; hybrid: recursive and dlg, the smoother answer of the two."
)
PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
POSITIVE = Number(min=0)
SEED = click.IntRange(-(2**63), 2**63 - 1)


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator; --help lists them in this order."""

    def decorate(command: F) -> F:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def _numbers(ctx: click.Context, param: click.Parameter, value: str, expected: str) -> tuple[float, ...]:
    """All of them finite."""
    try:
        found = tuple(float(part) for part in value.split(","))
        if all(map(math.isfinite, found)):
            return found
    except ValueError:
        pass
    raise click.BadParameter(f"got {value!r}, expected {expected}", ctx, param)


class InputShape(tuple[int, ...]):
    """Of the input that is attacked, with its name and the shapes of the others where the model has several."""

    name: str = ""
    others: Mapping[str, tuple[int, ...]] = MappingProxyType({})


def _shape(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> InputShape:
    found: dict[str, tuple[int, ...]] = {}
    for value in values:
        name, _, text = value.rpartition("=")
        try:
            sizes = tuple(int(part) for part in text.split(","))
        except ValueError:
            sizes = ()
        if not sizes or min(sizes) < 1:
            raise click.BadParameter(f"got {value!r}, expected positive sizes with commas, such as 3,32,32", ctx, param)
        if name in found or (len(values) > 1 and not name.isidentifier()):
            expected = "expected a name for each of several, such as x=3,32,32 and meta=4"
            raise click.BadParameter(f"got {' and '.join(values)}, {expected}", ctx, param)
        found[name] = sizes
    shape = InputShape(next(iter(found.values())))
    shape.name, *others = found
    shape.others = {name: found[name] for name in others}
    return shape


def _factors(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    return _numbers(ctx, param, value, "numbers with commas, such as 1,0.5,0.1") if value else ()


def _range(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, float] | None:
    if value == "none":
        return None
    expected = "two numbers with a comma, the smaller first, such as 0,1, or none"
    found = _numbers(ctx, param, value, expected)
    if len(found) != 2 or not found[0] < found[1] or not math.isfinite(found[1] - found[0]):
        raise click.BadParameter(f"got {value!r}, expected {expected}", ctx, param)
    return found[0], found[1]


def _channels(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    expected = "a number for each channel, with commas, such as 0.485,0.456,0.406"
    return None if value is None else _numbers(ctx, param, value, expected)


def _loss(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is None or ":" in value or value in (*LOSSES, *TORCH_LOSSES):
        return value
    known = ", ".join((*LOSSES, *TORCH_LOSSES))
    raise click.BadParameter(f"{value!r} is not one of {known}, nor PKG.MOD:LOSS", ctx, param)


target_options = options(
    click.option(
        "--model",
        default="cnn6",
        show_default=True,
        help=f"{', '.join(MODELS)}, or PKG.MOD:FACTORY, called for a torch module, without arguments or with "
        "constants such as mynet:Net(classes=10). Importing and calling it is the only code of yours that runs.",
    ),
    click.option(
        "--weights",
        type=PATH,
        help="The model's state dict: safetensors, npz, or tensors alone as torch.save writes them.",
    ),
    click.option(
        "--ignore",
        multiple=True,
        metavar="NAME",
        help="Beginning of names in --weights that belong to no part of the model; may be given several times.",
    ),
    click.option(
        "--loss",
        callback=_loss,
        metavar="NAME",
        help=f"{', '.join(LOSSES)}, torch's own name such as {', '.join(TORCH_LOSSES[:3])}, or PKG.MOD:LOSS, a loss or "
        "a function of outputs and targets. By default bce for a model that ends in a sigmoid, else logistic for one "
        "output and cross-entropy for several. What a log_softmax or sigmoid at the end takes is attacked. bce: labels "
        "are numbers whose binary digits are the outputs'; mse: a real label, or a class for several outputs; "
        "exponential, hinge, logistic and squared-hinge take labels -1 and 1.",
    ),
    click.option(
        "--input-shape",
        callback=_shape,
        metavar="SIZES",
        multiple=True,
        default=["3,32,32"],
        show_default="3,32,32",
        help="One sample's, no batch. Of a model of several inputs each by its name, such as x=3,32,32 and meta=4: the "
        "first is attacked, the others have values between 0 and 1, drawn by --seed.",
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
        "--mean",
        callback=_channels,
        metavar="NUMBERS",
        help="That clients subtract before the model, one for all channels or one for each. Inputs, their range and "
        "pictures are those before it.",
    ),
    click.option("--std", callback=_channels, metavar="NUMBERS", help="That they divide by then."),
    click.option("--device", metavar="NAME", help="To compute on: cpu, cuda, cuda:1. Default: where the model is."),
    click.option("--seed", type=SEED, default=0, show_default=True, help="Of the model's initial weights."),
    click.option(
        "--training",
        is_flag=True,
        help="The clients' model is in training mode: dropout draws, batch norm takes the batch's statistics. Default: "
        "evaluation mode.",
    ),
)
"""What is attacked, as `make_target` takes it."""

protocol_options = options(
    click.option("--batch-size", type=COUNT, default=1, show_default=True, help="Of one client."),
    click.option(
        "--sends",
        type=click.Choice([sends.value for sends in Sends]),
        default=Sends.GRADIENT.value,
        show_default=True,
        help="A gradient, or the difference of its weights after local steps.",
    ),
    click.option("--local-steps", type=COUNT, default=1, show_default=True),
    click.option("--learning-rate", type=Number(min=0, min_open=True), help="Of the local steps."),
    click.option(
        "--optimiser",
        type=click.Choice([optimiser.value for optimiser in Optimiser]),
        default=Optimiser.SGD.value,
        show_default=True,
        help="Of the local steps.",
    ),
    click.option("--summed", is_flag=True, help="The loss is summed over a batch, not averaged."),
    click.option("--clients", type=COUNT, default=1, show_default=True, help="Averaged by the server."),
    click.option("--epochs", type=COUNT, default=1, show_default=True, help="Local passes over a client's samples."),
    click.option("--minibatch", type=COUNT, help="Samples of a local step; default: all of --batch-size."),
    click.option("--in-order", is_flag=True, help="Minibatches are taken in the samples' order, not shuffled."),
    click.option("--drop-last", is_flag=True, help="A last minibatch with too few samples is left out."),
    click.option("--momentum", type=POSITIVE, default=0.0, help="Of SGD."),
    click.option("--nesterov", is_flag=True, help="Its momentum is Nesterov's."),
    click.option("--weight-decay", type=POSITIVE, default=0.0, help="Of the local steps."),
    click.option("--proximal", type=POSITIVE, default=0.0, help="FedProx's mu."),
    click.option("--clip-norm", type=POSITIVE, help="Each local step's gradient is clipped to this norm."),
    click.option("--buffers", is_flag=True, help="Running statistics and other buffers are sent too."),
    click.option(
        "--schedule",
        callback=_factors,
        metavar="FACTORS",
        default="",
        help="What the learning rate is multiplied by in each epoch, such as 1,0.5,0.1.",
    ),
)
"""What a client does between its data and what it sends, as `make_protocol` takes it."""


def attack_options(default: str | None) -> Callable[[F], F]:
    """Which attack runs, as `make_attack` takes it; several attacks, if there is no default."""
    several = "" if default else "Default: all that apply. "
    return options(
        click.option(
            "--attack",
            default=default,
            show_default=bool(default),
            multiple=not default,
            type=click.Choice(ATTACKS),
            help=several + ABOUT_ATTACKS,
        ),
        click.option("--iterations", type=COUNT, help="Of attacks by optimisation."),
        click.option("--restarts", type=COUNT, help="Starts of attacks by optimisation; default: 1."),
        click.option("--polish", is_flag=True, help="Go on from the answer by Gauss-Newton on the gradient residual."),
    )


def output_options(json_help: str = "Print the result as JSON and nothing else.") -> Callable[[F], F]:
    """Where a command writes, and whether it prints for people."""
    return options(
        click.option("--out", type=PATH, default="rgap-out", show_default=True, help="Folder to write."),
        click.option("--json", "as_json", is_flag=True, help=json_help),
    )


def make_attack(attack: str, iterations: int | None, restarts: int | None, polish: bool) -> Attack:
    """The attack that the options describe.

    Raises:
        click.BadParameter: sizes for an attack that has none.
    """
    from rgap.attacks.named import by_name

    try:
        return by_name(attack, iterations, restarts, polish)
    except ValueError as error:
        raise click.BadParameter(f"--iterations and --restarts: {error}") from error


def make_protocol(sends: str, local_steps: int, optimiser: str, in_order: bool, **fields: Any) -> Protocol:
    """The protocol that the options describe; all others are its fields.

    Raises:
        click.BadParameter: the options contradict each other.
    """
    try:
        return Protocol(Sends(sends), local_steps, optimiser=Optimiser(optimiser), shuffled=not in_order, **fields)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def make_target(
    model: str,
    weights: Path | None,
    ignore: tuple[str, ...],
    loss: str | torch.Tensor | None,
    input_shape: tuple[int, ...],
    value_range: tuple[float, float] | None,
    seed: int,
    training: bool,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    device: str | None,
    batch_size: int = 1,
) -> Target:
    """The target the options describe."""
    from rgap import losses
    from rgap.checks import changes_with_mode
    from rgap.models.inputs import drawn, fixed, normalised
    from rgap.nn.models import in_mode
    from rgap.reading import load_weights
    from rgap.target import Target

    module = _module(model, input_shape, seed)
    if weights is not None:
        load_weights(module, weights, ignore=ignore)
    if mean is not None or std is not None:
        normalised(module, mean or (0.0,), std or (1.0,), input_shape[0])
    name, others = getattr(input_shape, "name", ""), getattr(input_shape, "others", {})
    if name:
        fixed(module, name, drawn(others, seed))
        if others:
            say(f"Only {name} is attacked: values of {', '.join(others)} are drawn by --seed, and known", err=True)
    if device is not None:
        module = module.to(_device(device))
    chosen = losses.for_model(module, input_shape, _named_loss(loss))
    target = Target(in_mode(module, training), chosen, input_shape, value_range, batch_size)
    if training and target.mode != "training" and changes_with_mode(target.model):
        message = (
            "--training: torch.export made the model in evaluation mode, to which it keeps; export one that trains"
        )
        raise click.BadParameter(message)
    return target


def _device(name: str) -> torch.device:
    import torch

    try:
        float(torch.zeros(1, device=name))
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        message = f"--device: this machine has no {name!r} that torch can use ({str(error).splitlines()[0]})"
        raise click.BadParameter(message) from error


def _module(model: str, input_shape: tuple[int, ...], seed: int) -> nn.Module:
    import torch

    from rgap.models.named import ModelError, built_in, own

    try:
        with torch.random.fork_rng():  # the same weights again when an audit goes on
            torch.manual_seed(seed)
            return own(model) if ":" in model else built_in(model, input_shape, seed)
    except ModelError as error:
        raise click.BadParameter(f"--model: {error}") from error


def _named_loss(loss: Any) -> Any:
    """A name or masks as they are, or what lies under PKG.MOD:LOSS."""
    from rgap.models.named import ModelError, imported

    if not isinstance(loss, str) or ":" not in loss:
        return loss
    try:
        return imported(loss, "loss")
    except ModelError as error:
        raise click.BadParameter(f"--loss: {error}") from error


def taken(named: dict[str, Any], *names: str) -> dict[str, Any]:
    """Some of a command's options, which are taken out of all."""
    return {name: named.pop(name) for name in names}


ATTACK = ("attack", "iterations", "restarts", "polish")
PROTOCOL = tuple({"steps": "local_steps", "shuffled": "in_order"}.get(f.name, f.name) for f in fields(Protocol))
"""Names of the options of `make_attack` and `make_protocol`."""
