"""What torch.export says of a module: its operations as a graph, in memory only, never saved or loaded."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, config
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import TreeSpec, tree_structure, tree_unflatten

from rgap.nn.calls import BLOCKS, VIEWS, arguments, operation
from rgap.nn.kernels import differentiable
from rgap.nn.outputs import FIXED, of_fixed_batch, outputs_of, reason_of

_ONE_TENSOR = tree_structure(0)
ENDINGS = ("sigmoid", "softmax", "log_softmax")
"""What a model may do last that belongs to a loss of probabilities."""


FILLED = {"zeros_like": 0, "new_zeros": 0, "empty_like": 0, "new_empty": 0, "ones_like": 1, "new_ones": 1}
"""Operations that take no more than the shape of what they are given, and what they put there."""


CASTS = ("to", "_to_copy", "type_as")


class Parameters:
    """Parameters and buffers behind the arguments of operations, each under one name however often it is shared.

    ``names`` has those of the arguments; ``trained`` how many values each trained one has, by name.
    """

    def __init__(self, model: nn.Module, names: dict[Node, str]):
        parameters = list(model.named_parameters(remove_duplicate=False))
        tensors = dict([*parameters, *model.named_buffers(remove_duplicate=False)])
        first = {id(tensor): name for name, tensor in reversed(tensors.items())}
        self.names = {node: first[id(tensors[name])] for node, name in names.items()}
        self.trained = {name: tensor.numel() for name, tensor in tensors.items() if tensor.requires_grad}

    def behind(self, argument: Node) -> int:
        """How many trained values an argument is computed from."""
        todo, met, names = [argument], {argument}, set()
        while todo:
            node = todo.pop()
            names |= {self.names[node]} if node in self.names else set()
            new = set(node.all_input_nodes) - met
            met |= new
            todo.extend(new)
        return sum(self.trained.get(name, 0) for name in names)


class CannotBeTraced(Exception):
    """torch.export does not follow the model's code."""

    remedy = "Keep to torch's own operations in the model's forward."


class Branches(CannotBeTraced):
    """The code is another one for other inputs."""

    remedy = "Control flow that depends on the values of the input cannot be followed."


class Scripted(CannotBeTraced):
    """A part is a program of torch.jit."""

    remedy = "Put the module that it was before torch.jit.script in its place."


class FixedBatch(CannotBeTraced):
    """It was made for batches of another size than one."""

    remedy = f"{FIXED}."


@dataclass(frozen=True, eq=False)
class Exported:
    """A module's operations, and what is known of them all; no weights."""

    graph: torch.fx.Graph
    parameters: Parameters
    inputs: frozenset[Node]
    constants: dict[Node, Tensor]
    """Tensors that are written in the model's code."""
    with_gradient: frozenset[Node]
    """Operations that a gradient gets back to from the outputs."""
    one_tensor: bool
    """Whether the model's outputs could be told among what it returns."""
    returned: int
    """How many values that is."""

    @property
    def ending(self) -> Node | None:
        """The function of probabilities that the model does last, over all outputs of a sample; None if it does not."""
        [output] = [node for node in self.graph.nodes if node.op == "output"]
        results = output.all_input_nodes
        node = results[0] if len(results) == 1 else None
        while node is not None and node.op == "call_function" and operation(node) in VIEWS:
            node = node.all_input_nodes[0]
        if node is None or node.op != "call_function" or operation(node).strip("_") not in ENDINGS:
            return None
        shape, dim = node.meta["val"].shape, arguments(node).get("dim", -1)
        return node if operation(node) == "sigmoid" or shape[dim] == node.meta["val"].numel() else None

    def without_ending(self, name: str) -> bool:
        """Take away what the model does last, if it is the function of that name; tells whether it was."""
        node = self.ending
        if node is None or operation(node).strip("_") != name:
            return False
        node.replace_all_uses_with(node.all_input_nodes[0])
        return True


@contextmanager
def _norms_evaluating(model: nn.Module) -> Iterator[frozenset[str]]:
    """Batch norms in training mode refuse a single sample, and count batches: they are followed in evaluation mode, and
    `_train` says of those that they train. Gives the names of their running means."""
    norms = {
        f"{name}.running_mean".lstrip("."): each
        for name, each in model.named_modules()
        if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.training and each.running_mean is not None
    }
    for each in norms.values():
        each.training = False
    try:
        yield frozenset(norms)
    finally:
        for each in norms.values():
            each.training = True


def _train(graph: torch.fx.Graph, names: dict[Node, str], means: frozenset[str]) -> None:
    """Mark batch norms with these running means as in training mode."""
    for node in graph.nodes:
        if node.op == "call_function" and operation(node) == "batch_norm":
            told = arguments(node)
            if names.get(told["running_mean"]) in means:
                at = list(told).index("training")
                node.update_arg(at, True)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch prints of code that it does not follow: the reason is given in a line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # of several of torch's loggers, some of which are made as they are needed
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextmanager
def _without_lines() -> Iterator[None]:
    """Without the lines of code that each operation comes from, which take an eighth of the time and nobody reads."""
    name = "do_not_emit_stack_traces"
    before = getattr(config, name, None)  # torch 2.6 does not have it
    try:
        if before is not None:
            setattr(config, name, True)
        yield
    finally:
        if before is not None:
            setattr(config, name, before)


def export(model: nn.Module, input_shape: tuple[int, ...]) -> Exported:
    """One sample's way through the model.

    Raises:
        CannotBeTraced: the model's code cannot be followed; says why in a line.
    """
    example = _example(model, input_shape)
    try:
        with differentiable(), _norms_evaluating(model) as training, _quietly(), _without_lines():
            program = torch.export.export(model, (example,), strict=False)
            if _writes_through_views(program.graph):
                program = program.run_decompositions({})
    except GuardOnDataDependentSymNode as error:
        raise Branches("its code branches on values that depend on the input") from error
    except Exception as error:  # torch.export raises many kinds
        scripted = next((n for n, each in model.named_modules() if isinstance(each, torch.jit.ScriptModule)), None)
        if scripted is not None:
            raise Scripted(f"{scripted} is scripted") from error
        reason = reason_of(error)
        raise (FixedBatch if of_fixed_batch(reason) else CannotBeTraced)(reason) from error
    module, signature = program.graph_module, program.graph_signature
    output = next(node for node in module.graph.nodes if node.op == "output")
    returned = list(output.args[0])[-program.call_spec.out_spec.num_leaves :]  # behind the buffers that were changed
    output.args = (tuple(returned),)
    one_tensor = _outputs_alone(module.graph, program.call_spec.out_spec)
    _as_batch(module.graph)
    _simplify(module.graph, example.dtype)
    detached = inline(module)
    graph = module.graph
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    named = {node: names[node.name] for node in graph.nodes if node.name in names}
    _train(graph, named, training)
    written = signature.inputs_to_lifted_tensor_constants
    return Exported(
        graph,
        Parameters(model, named),
        frozenset(n for n in graph.nodes if n.name in signature.user_inputs),
        {n: program.constants[written[n.name]].detach() for n in graph.nodes if n.name in written},
        frozenset(reached_by_gradient(graph, detached)),
        one_tensor,
        sum(isinstance(value, Node) for value in returned),
    )


def _writes_through_views(graph: torch.fx.Graph) -> bool:
    """Whether a value is changed in place by whoever does not go on with it: what it then is, no operation tells."""
    changes = (node for node in graph.nodes if _mutates(node) and not node.users)
    return any(node.args and isinstance(node.args[0], Node) and node.args[0].op == "call_function" for node in changes)


def _mutates(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _simplify(graph: torch.fx.Graph, dtype: torch.dtype) -> None:
    """Take away what only asserts sizes and types, which are others where the operations are run again, and casts that
    round no more than the model does; let who reads a copy of one value over another, which nobody else reads, read the
    one; and make constants that take a value's shape alone depend on no value."""

    def fine(each: torch.dtype) -> bool:
        return each.is_floating_point and torch.finfo(each).eps <= torch.finfo(dtype).eps

    for node in reversed(list(graph.nodes)):
        name = operation(node) if node.op == "call_function" else ""
        if name in FILLED:
            with graph.inserting_before(node):
                size, value = list(node.meta["val"].shape), node.meta["val"]
                kind = {"dtype": value.dtype, "device": value.device}
                constant = graph.call_function(torch.ops.aten.full.default, (size, FILLED[name]), kind)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
            graph.erase_node(node)
        elif name.startswith("_assert") and not node.users:
            graph.erase_node(node)
        elif name in CASTS and all(fine(each.meta["val"].dtype) for each in (node, node.all_input_nodes[0])):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
        elif name in ("copy", "copy_") and isinstance(node.args[1], Node):
            target, source = node.all_input_nodes[0], node.args[1]
            if len(target.users) == 1 and source.meta["val"].shape == node.meta["val"].shape:
                node.replace_all_uses_with(source)
                graph.erase_node(node)


def _outputs_alone(graph: torch.fx.Graph, structure: TreeSpec | None) -> bool:
    """Let the graph return the outputs and nothing else; tells whether they could be told."""
    if structure is None or structure == _ONE_TENSOR:
        return structure is not None
    [output] = [node for node in graph.nodes if node.op == "output"]
    values = list(output.args[0])
    try:
        chosen = outputs_of(tree_unflatten(values[-structure.num_leaves :], structure))
    except (TypeError, ValueError):
        return False
    if not isinstance(chosen, Node):
        return False
    output.args = ((chosen,),)
    return True


def _as_batch(graph: torch.fx.Graph) -> None:
    """Take away what turns one sample's single output into a value without a batch, as squeeze does."""
    [output] = [node for node in graph.nodes if node.op == "output"]
    values = output.all_input_nodes
    while len(values) == 1 and values[0].op == "call_function" and operation(values[0]) in VIEWS:
        if values[0].meta["val"].dim():
            return
        values = values[0].all_input_nodes
        output.args = ((values[0],),)


def _example(model: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    like = torch.zeros(()) if parameter is None else parameter
    return torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device)


def inline(module: GraphModule) -> set[Node]:
    """Put the operations of no_grad and autocast blocks, which are graphs of their own, in the blocks' places.

    The block itself stays, with nobody to read it, and becomes an obstacle. Returns the operations under no_grad.
    """
    detached: set[Node] = set()
    for node in list(module.graph.nodes):
        name = operation(node) if node.op == "call_function" else ""
        if name not in BLOCKS:
            continue
        at = next(i for i, a in enumerate(node.args) if isinstance(a, Node) and a.op == "get_attr")
        body = getattr(module, str(node.args[at].target))
        inner = inline(body)
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        copies: dict[Node, Node] = dict(zip(inputs, node.args[at + 1 :], strict=True))
        with module.graph.inserting_before(node):
            outputs: Any = module.graph.graph_copy(body.graph, copies)
        under_no_grad = name == "wrap_with_set_grad_enabled" and not node.args[0]
        detached |= {copies[n] for n in body.graph.nodes if n.op == "call_function" and (under_no_grad or n in inner)}
        for user in list(node.users):  # the outputs are a tuple, and every use takes one out of it
            user.replace_all_uses_with(outputs[user.args[1]])
            module.graph.erase_node(user)
    return detached


def needed(graph: torch.fx.Graph) -> set[Node]:
    """The operations that the outputs depend on, or that change a value in place, and the blocks put in line."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "call_function" and operation(node) in BLOCKS:
            found.add(node)
            continue
        if node.op == "output" or _mutates(node) or node in found:
            found |= {node, *node.all_input_nodes}
    return found


def reached_by_gradient(graph: torch.fx.Graph, detached: set[Node]) -> set[Node]:
    """The operations that a gradient gets back to from the outputs."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or (node in found and node not in detached and operation(node) != "detach"):
            found |= set(node.all_input_nodes)
    return found - detached
