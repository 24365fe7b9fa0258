"""torch.export follows a structure of modules once in a process: most tests make one of few, often."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, _lazy_graph_module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PLAIN = (int, float, str, bool, tuple, type(None))
OF_ALL = frozenset(vars(nn.Module()))
"""What every module has."""


def follow_once() -> None:
    """To be called before anything is traced."""
    plain, known = torch.export.export, dict[Hashable, ExportedProgram]()

    def export(model: nn.Module, args: tuple[Tensor, ...], **named: Any) -> ExportedProgram:
        """Without writing the graph down as code after each pass over it, which takes a seventh of the time."""
        with _lazy_graph_module._use_lazy_graph_module(True):
            return plain(model, args, **named)

    def once(key: Hashable, make: Callable[[], ExportedProgram], still: Callable[[], bool]) -> ExportedProgram:
        if key not in known:
            program = make()
            # Parts without gradient are modules of their own, which a copy would not have.
            if not still() or any(True for _ in program.graph_module.children()):
                return program
            known[key] = with_graph(program, Held(named_alike(program.graph)))
        return own(known[key], key)

    def own(kept: ExportedProgram, key: Hashable) -> ExportedProgram:
        """A copy: whoever asks changes the graph."""
        program = with_graph(kept, Held(named_alike(kept.graph)))
        program.run_decompositions = lambda table: once(  # type: ignore[method-assign]
            (key, repr(table)), lambda: runs(kept).run_decompositions(table), lambda: True
        )
        program.module = lambda: runs(kept).module()  # type: ignore[method-assign]
        return program

    def found(model: nn.Module, args: tuple[Tensor, ...], **named: Any) -> ExportedProgram:
        key = structure(model, *args)
        if key is None:
            return export(model, args, **named)
        # Code that keeps something for its next call is followed in each.
        return once(key, lambda: export(model, args, **named), lambda: structure(model, *args) == key)

    torch.export.export = found


class Held(GraphModule):
    """A graph that nobody runs. Each GraphModule has a class of its own, and torch, which replaces methods of nn.Module
    as it traces, slows down with the number of classes."""

    def __new__(cls, graph: Graph) -> Held:
        return object.__new__(cls)

    def __init__(self, graph: Graph) -> None:
        nn.Module.__init__(self)
        self._graph = graph


def with_graph(program: ExportedProgram, module: GraphModule) -> ExportedProgram:
    """A copy."""
    program = copy.copy(program)
    program._graph_module = module
    return program


def runs(program: ExportedProgram) -> ExportedProgram:
    """A copy of which the graph can be run."""
    return with_graph(program, GraphModule({}, named_alike(program.graph)))


def named_alike(original: Graph) -> Graph:
    """A copy whose nodes have the same names."""
    graph = copy.deepcopy(original)
    for node, first in zip(graph.nodes, original.nodes, strict=True):
        node.name = first.name
    return graph


def structure(model: nn.Module, example: Tensor) -> Hashable:
    """All that the trace of a model hangs on; None where that may be more than is known here."""
    parts: list[Hashable] = [_kind(example)]
    tensors: dict[int, int] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        code = _code(type(module))
        torchs = code == ()
        settings = {
            key: _setting(value)
            for key, value in vars(module).items()
            if key == "training" or (key not in OF_ALL and not (torchs and key.startswith("_")))
        }
        if code is None or None in settings.values() or any(getattr(module, hooks) for hooks in HOOKS):
            return None
        held = [*module._parameters.items(), *module._buffers.items()]
        shared = [
            (key, value is not None and (_kind(value), tensors.setdefault(id(value), len(tensors))))
            for key, value in held
        ]
        parts.append((name, type(module), code, tuple(sorted(settings.items())), tuple(shared)))
    return tuple(parts)


def _code(kind: type[nn.Module]) -> Hashable:
    """What a module of one's own computes, unless that hangs on what is around its class; nothing for torch's."""
    if kind.__module__.startswith("torch.nn.modules."):
        return ()
    # What is rgap's own the tests wrap, to check shapes.
    code = [
        _setting(inspect.unwrap(value) if inspect.isfunction(value) and each.__module__.startswith("rgap.") else value)
        for each in kind.__mro__
        if each.__module__.partition(".")[0] not in ("torch", "builtins")
        for name, value in vars(each).items()
        if inspect.isfunction(value) or not name.startswith("__")
    ]
    return None if None in code or not code else tuple(code)


def _setting(value: object) -> Hashable:
    """All there is to a value that cannot change; None where there may be more."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, BuiltinFunctionType):
        return value
    if isinstance(value, FunctionType) and set(value.__code__.co_freevars) <= {"__class__"}:
        return value.__code__, repr(value.__defaults__), repr(value.__kwdefaults__)
    return None


def _kind(value: Tensor) -> Hashable:
    return type(value), value.dtype, value.shape, value.device, value.requires_grad
