"""What a model must be so that its gradient can be recomputed: unwrapped, with real values, used where they stand."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node


def unwrapped(model: Any) -> nn.Module:
    """The model inside of DataParallel or torch.compile, which compute the same.

    Raises:
        ValueError: nobody can put other weights into it, or its weights are no real numbers; says what to do.
    """
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        inner = model._orig_mod if hasattr(model, "_orig_mod") else model.module
        assert isinstance(inner, nn.Module)
        model = inner  # in the mode that it is in, whatever the wrapper's
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("got a scripted model, expected the one before torch.jit.script: its weights can be replaced")
    if isinstance(model, torch.export.ExportedProgram):
        raise ValueError("got an exported program, expected the model before torch.export, or the program's .module()")
    if not isinstance(model, nn.Module):
        raise ValueError(f"got {type(model).__name__}, expected a torch.nn.Module that takes a batch")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            continue
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device, where it has no values: load weights into the model first")
        if parameter.requires_grad and parameter.is_complex():
            raise ValueError(f"{name} holds complex numbers, expected real ones: write it as two real parameters")
    return model


def in_mode(model: nn.Module, training: bool) -> nn.Module:
    """The model in training or evaluation mode; what torch.export made keeps to the one that it was made in."""
    with contextlib.suppress(NotImplementedError):
        model.train(training)
    return model


def evaluating(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, of what torch.export made too: to be looked at, since its weights are others."""
    with warnings.catch_warnings(action="ignore"):  # torch's own, of what torch.export made
        found = in_mode(copy.deepcopy(model), training=False)
    for node, at in _switches(_exported(found)):
        if at < len(node.args):
            node.update_arg(at, False)
    for part in _programs(found):
        part.recompile()
    return found


def exported_modes(model: nn.Module) -> dict[str, bool] | None:
    """Of what torch.export made, whose own mode means nothing: each operation that trains otherwise than it evaluates,
    and whether it trains. None of any other model."""
    found: dict[str, bool] = {}
    calls = _exported(model)
    for node, at in _switches(calls):
        name = node.target._schema.name  # type: ignore[union-attr]
        found[name] = found.get(name, False) or bool(at < len(node.args) and node.args[at])
    return found if calls else None


def _programs(model: nn.Module) -> list[GraphModule]:
    return [part for part in model.modules() if isinstance(part, GraphModule)]


def _exported(model: nn.Module) -> list[Node]:
    """The operations of all that torch.export made."""
    nodes = (node for part in _programs(model) for node in part.graph.nodes)
    return [node for node in nodes if isinstance(node.target, torch._ops.OpOverload)]


def _switches(calls: list[Node]) -> list[tuple[Node, int]]:
    """The operations that train otherwise than they evaluate, and which argument says so."""
    return [
        (node, at)
        for node in calls
        for at, argument in enumerate(node.target._schema.arguments)  # type: ignore[union-attr]
        if argument.name in ("train", "training")
    ]


def trains(model: nn.Module, own: bool | None = None) -> bool:
    """Whether the model is in training mode; of what torch.export made, whether anything in it is.

    Args:
        own: the mode of another model, where it is not the present one.
    """
    exported = exported_modes(model)
    own = model.training if own is None else own
    return own if exported is None else any(exported.values())


def used_in_place(model: nn.Module, run: Callable[[], Tensor]) -> None:
    """Refuse a model that uses parameters past their names, where no others can be put in their places.

    Args:
        run: its outputs with others in their places, of which none takes a gradient.

    Raises:
        ValueError: the outputs depend on the model's own all the same; names them.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.enable_grad(), torch.random.fork_rng():
        try:
            outputs = run()
        except Exception:  # of the model's own code, and told elsewhere
            return
        if not outputs.requires_grad:
            return
        found = torch.autograd.grad(outputs.sum(), list(own.values()), allow_unused=True)
    names = [name for name, slope in zip(own, found, strict=True) if slope is not None]
    if names:
        raise ValueError(
            f"the model uses {', '.join(names[:3])} from a list or another place than their names, so that no other "
            "values can be put there: keep them in an nn.ParameterList, nn.ParameterDict or nn.ModuleList"
        )
