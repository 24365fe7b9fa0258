"""How a traced operation is read: its name, its arguments, and the module that it stands in."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

VIEWS = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "alias", "_unsafe_view",
    "identity", "lift_fresh_copy",
}  # fmt: skip
"""Operations that keep all values and their order."""
BLOCKS = {"wrap_with_set_grad_enabled", "wrap_with_autocast"}
"""Operations around a graph of their own."""


def operation(node: Node) -> str:
    """The operation's name without namespace and overload, such as ``conv2d``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target))


def arguments(node: Node) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return dict(node.kwargs)
    found: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            found[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            found[argument.name] = argument.default_value
    return found


def where(node: Node) -> str:
    """The path of the module that ran the operation, or the operation's own name at the top level."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths and paths[-1] else node.name
