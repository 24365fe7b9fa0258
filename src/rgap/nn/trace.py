"""From an ``nn.Module`` to a `Graph`, and to a `Chain` where it is one.

torch.export gives the operations, and a short table says what each one is. The exported program lives in memory only
and is never saved or loaded.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_structure

from rgap.nn import layers
from rgap.nn.activations import (
    ELU,
    GELU,
    SELU,
    Activation,
    Hardtanh,
    Identity,
    LeakyReLU,
    Mish,
    ReLU,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
)
from rgap.nn.build import Program
from rgap.nn.calls import BLOCKS, VIEWS, operation, where
from rgap.nn.calls import arguments as arguments_of
from rgap.nn.chain import Chain, Kind, Obstacle
from rgap.nn.graph import Graph, Use
from rgap.nn.layers import Layer

_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_NORMS = {"batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm"}
# Linear layers written by hand, which are counted but never part of a chain: the names of input, weight and bias.
_PRODUCTS = {"matmul": ("self", "other", ""), "mm": ("self", "mat2", ""), "addmm": ("mat1", "mat2", "self")}

_SMOOTH = 16
"""The threshold from which on Softplus steps down by less than float32 can tell, log(1 + 1/e^threshold)."""
_ONE_TENSOR = tree_structure(0)

_ACTIVATIONS: dict[str, Callable[[dict[str, Any]], Activation]] = {
    "leaky_relu": lambda a: LeakyReLU(float(a["negative_slope"])) if a["negative_slope"] else ReLU(),
    "relu": lambda a: ReLU(),
    "sigmoid": lambda a: Sigmoid(),
    "tanh": lambda a: Tanh(),
    "softplus": lambda a: Softplus(float(a["beta"]), float(a["threshold"])),
    "elu": lambda a: ELU(float(a["alpha"]), float(a["scale"])),
    "selu": lambda a: SELU,
}

# Those that a plain chain does not hold: they have two inputs for one output, or lose values.
_OTHER_ACTIVATIONS: dict[str, Callable[[dict[str, Any]], Activation]] = {
    "hardtanh": lambda a: Hardtanh(float(a["min_val"]), float(a["max_val"])),
    "relu6": lambda a: Hardtanh(0.0, 6.0),
    "gelu": lambda a: GELU(str(a["approximate"])),
    "silu": lambda a: SiLU(),
    "mish": lambda a: Mish(),
}

_PASSED = (Kind.PASSED, "ranks are measured of plain chains only")
# Further operations that the recursion passes.
_FOLLOWED = {
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "relu6", "pixel_shuffle", "pixel_unshuffle", "flip",
    "slice", "select", "split", "chunk", "roll", "sub", "mul", "div", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "channel_shuffle", "mT", "t", "narrow", "unbind",
}  # fmt: skip
_KNOWN_OBSTACLES: dict[str, tuple[Kind, str]] = {
    "add": _PASSED,
    "cat": _PASSED,
    "max_pool1d": (Kind.NOT_YET, "keeps only the maxima; replace it by a strided convolution"),
    "max_pool2d": (Kind.NOT_YET, "keeps only the maxima; replace it by a strided convolution"),
    "avg_pool2d": (Kind.NOT_YET, "replace it by a strided convolution"),
    "adaptive_avg_pool2d": (Kind.NOT_YET, "replace it by a flatten and a Linear layer"),
    "mean": (Kind.NOT_YET, "replace it by a flatten and a Linear layer"),
    "permute": _PASSED,
    "transpose": _PASSED,
    "matmul": _PASSED,
    "mm": _PASSED,
    "addmm": _PASSED,
    "pad": _PASSED,
    "gelu": _PASSED,
    "silu": _PASSED,
    "mish": _PASSED,
    "hardtanh": _PASSED,
    "clamp": (Kind.NEVER, "clamps values away"),
    "softmax": (Kind.SETTING, "give the loss the raw outputs"),
    "log_softmax": (Kind.SETTING, "give the loss the raw outputs"),
    "abs": (Kind.NEVER, "loses the sign of every value"),
    "square": (Kind.NEVER, "loses the sign of every value"),
    "pow": (Kind.NEVER, "may lose the sign of every value"),
    "sign": (Kind.NEVER, "keeps nothing but signs, and its gradient is zero"),
    "round": (Kind.NEVER, "its gradient is zero"),
    "floor": (Kind.NEVER, "its gradient is zero"),
    "wrap_with_set_grad_enabled": (Kind.SETTING, "layers under no_grad send no gradient; compute them with gradients"),
    "wrap_with_autocast": (Kind.SETTING, "rounding is not followed; call the model without autocast"),
    "detach": (Kind.NEVER, "stops the gradient"),
    "argmax": (Kind.NEVER, "its gradient is zero"),
}


def trace(model: nn.Module, input_shape: tuple[int, ...], outputs: int | None = 1) -> Chain:
    """Follow one sample through the model.

    Args:
        input_shape: one sample's shape, without the batch.
        outputs: the number of output values the loss takes; None for any.

    Raises:
        NotAChain: with every obstacle found.
    """
    return follow(model, input_shape, outputs).chain(dict(model.named_parameters()))


def follow(model: nn.Module, input_shape: tuple[int, ...], outputs: int | None = 1) -> Graph:
    """The layers and obstacles of any model, arguments as of `trace`. Reads no weight.

    A model that cannot be traced at all gives no layers and a single obstacle.
    """
    example = _example(model, input_shape)
    try:
        program = torch.export.export(model, (example,), strict=False)
    except Exception as error:  # torch.export raises many kinds for code it cannot follow
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if any(module.training for module in model.modules()):  # batch norm may refuse a single sample
            graph = follow(copy.deepcopy(model).eval(), input_shape, outputs)
            if graph.uses:
                what = f"cannot be traced in training mode: {first}"
                setting = Obstacle("forward", what, Kind.SETTING, "Call model.eval() first.")
                return replace(graph, obstacles=(setting, *graph.obstacles))
        remedy = "Control flow that depends on the values of the input cannot be followed."
        return Graph((), (Obstacle("forward", f"cannot be traced: {first}", Kind.NOT_YET, remedy),))
    module = program.graph_module
    detached = _inline(module)
    graph = module.graph
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    parameters = _Parameters(model, {n: names[n.name] for n in graph.nodes if n.name in names})
    walk = _Walk(parameters, graph, _with_gradient(graph, detached), outputs, program.call_spec.out_spec == _ONE_TENSOR)
    found = walk.run({n for n in graph.nodes if n.name in signature.user_inputs})
    written = signature.inputs_to_lifted_tensor_constants
    constants = {n: program.constants[written[n.name]].detach() for n in graph.nodes if n.name in written}
    return replace(found, program=walk.program(constants))


def _example(model: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    like = torch.zeros(()) if parameter is None else parameter
    return torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device)


def _inline(module: GraphModule) -> set[Node]:
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
        inner = _inline(body)
        places = [n for n in body.graph.nodes if n.op == "placeholder"]
        copies: dict[Node, Node] = dict(zip(places, node.args[at + 1 :], strict=True))
        with module.graph.inserting_before(node):
            outputs: Any = module.graph.graph_copy(body.graph, copies)
        under_no_grad = name == "wrap_with_set_grad_enabled" and not node.args[0]
        detached |= {copies[n] for n in body.graph.nodes if n.op == "call_function" and (under_no_grad or n in inner)}
        for user in list(node.users):  # the outputs are a tuple, and every use takes one out of it
            user.replace_all_uses_with(outputs[user.args[1]])
            module.graph.erase_node(user)
    return detached


def _needed(graph: torch.fx.Graph) -> set[Node]:
    """The operations that the outputs depend on, or that change a value in place, and the blocks put in line."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "call_function" and operation(node) in BLOCKS:
            found.add(node)
            continue
        mutates = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        if node.op == "output" or mutates or node in found:
            found |= {node, *node.all_input_nodes}
    return found


def _with_gradient(graph: torch.fx.Graph, detached: set[Node]) -> set[Node]:
    """The operations that a gradient gets back to from the outputs."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or (node in found and node not in detached and operation(node) != "detach"):
            found |= set(node.all_input_nodes)
    return found - detached


class _Parameters:
    """Parameters and buffers behind the arguments of operations, each under one name however often it is shared."""

    def __init__(self, model: nn.Module, names: dict[Node, str]):
        parameters = list(model.named_parameters(remove_duplicate=False))
        tensors = [*parameters, *model.named_buffers(remove_duplicate=False)]
        first = {id(tensor): name for name, tensor in reversed(tensors)}
        self.tensors = dict(tensors)
        self.names = {node: first[id(self.tensors[name])] for node, name in names.items()}

    def behind(self, argument: Node) -> int:
        """How many trained values an argument is computed from."""
        todo, met, names = [argument], {argument}, set()
        while todo:
            node = todo.pop()
            names |= {self.names[node]} if node in self.names else set()
            new = set(node.all_input_nodes) - met
            met |= new
            todo.extend(new)
        return sum(self.tensors[name].numel() for name in names if self.tensors[name].requires_grad)


class _Walk:
    """One pass over the graph, collecting layers and obstacles."""

    def __init__(
        self,
        parameters: _Parameters,
        graph: torch.fx.Graph,
        with_gradient: set[Node],
        outputs: int | None,
        one_tensor: bool,
    ):
        self.parameters, self.graph, self.with_gradient = parameters, graph, with_gradient
        self.outputs, self.one_tensor = outputs, one_tensor
        self.source: dict[Node, _Source] = {}  # of every value computed from the input
        self.uses: list[Use] = []
        self.activated: set[int] = set()
        self.named: set[str] = set()
        self.shared: set[str] = set()
        self.obstacles: list[Obstacle] = []
        # For the network that is built of the same operations.
        self.use_ids: dict[Node, int] = {}
        self.activations: dict[Node, Activation] = {}
        self.idle: set[Node] = set()
        self.inputs: set[Node] = set()

    def run(self, inputs: set[Node]) -> Graph:
        self.source, self.inputs = dict.fromkeys(inputs, _Source()), inputs
        needed = _needed(self.graph)
        for node in self.graph.nodes:
            if node not in needed:
                continue
            if node.op == "call_function":
                self.visit(node)
            elif node.op == "output":
                self.finish(node)
        return Graph(tuple(self.uses), tuple(self.obstacles))

    def program(self, constants: dict[Node, Tensor]) -> Program:
        """The operations themselves, with what was found out about each."""
        return Program(
            self.graph,
            frozenset(self.inputs),
            self.parameters.names,
            constants,
            {node: self.uses[use_id] for node, use_id in self.use_ids.items()},
            frozenset(self.shared),
            frozenset(self.with_gradient),
            self.activations,
            frozenset(self.idle),
        )

    def block(self, where: str, what: str, kind: Kind, remedy: str) -> None:
        self.obstacles.append(Obstacle(where, what, kind, remedy[:1].upper() + remedy[1:] + "."))

    def visit(self, node: Node) -> None:
        data = [argument for argument in node.all_input_nodes if argument in self.source]
        if not data:
            return  # computed from weights alone; whoever uses it as a weight is told so
        name = operation(node)
        bare = name.removesuffix("_")
        arguments = arguments_of(node)
        self.source[node] = _Source(mixed=True)
        if len(data) > 1:
            self.unknown(node, bare, len(data))
        elif name in VIEWS:
            self.source[node] = self.source[data[0]]
        elif bare in _DROPOUTS:
            if arguments.get("train") and arguments.get("p"):
                self.block(where(node), "dropout in training mode", Kind.SETTING, "call model.eval() first")
            else:
                self.idle.add(node)
                self.source[node] = self.source[data[0]]
        elif name in _NORMS:
            own = arguments.get("training") or arguments.get("use_input_stats")  # of the batch, not those it has kept
            if own and arguments.get("running_mean") is not None:
                what = f"{name} in training mode mixes the samples of a batch"
                self.block(where(node), what, Kind.SETTING, "call model.eval() first")
            elif name == "batch_norm" and not own:  # fixed statistics: one known factor and shift for every value
                self.block(where(node), name, *_PASSED)
                self.source[node] = self.source[data[0]]
            else:
                self.block(where(node), name, Kind.NOT_YET, "attack the model without its normalisation layers")
        elif name == "linear":
            self.linear(node, arguments)
        elif name in ("conv1d", "conv2d", "conv3d"):
            self.convolution(node, arguments)
        elif bare in _ACTIVATIONS:
            self.activate(node, data[0], _ACTIVATIONS[bare](arguments))
        elif name != "getitem":  # takes a value out of what another operation returned, and that one is no chain's
            self.unknown(node, bare, len(data))
            if bare in _OTHER_ACTIVATIONS:
                self.activations[node] = _OTHER_ACTIVATIONS[bare](arguments)
            if name in _PRODUCTS and arguments[_PRODUCTS[name][0]] is data[0]:
                x, weight, bias = (arguments.get(role) for role in _PRODUCTS[name])
                make = None
                by_hand = weight in self.parameters.names and len(_shape(weight)) == 2
                if x is not None and by_hand and (bias is None or _plain(arguments)):
                    make = partial(layers.linear, input_shape=_shape(x)[1:], transposed=True)
                self.count(node, x, weight, bias, _values(x), make)
            elif name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
                self.transposed(node, arguments)

    def unknown(self, node: Node, name: str, inputs: int) -> None:
        default = (Kind.NOT_YET, "no rule for it; replace it or attack the part of the model after it")
        default = _PASSED if name.removeprefix("_") in _FOLLOWED else default
        kind, remedy = _KNOWN_OBSTACLES.get(name.removeprefix("_"), default)
        what = f"{name} of {inputs} values" if inputs > 1 else name
        self.block(where(node), what, kind, remedy)

    def parameter(self, node: Node, argument: Any, role: str) -> str | None:
        """The name of the parameter behind an argument; an obstacle if it is computed or its gradient is not shared."""
        name = self.parameters.names.get(argument)
        if name is None:
            self.block(where(node), f"its {role} is computed, not a parameter", Kind.NOT_YET, "use plain parameters")
            return None
        if not self.parameters.tensors[name].requires_grad:
            remedy = "without its gradient a layer has weight constraints only; set requires_grad before the attack"
            self.block(where(node), f"{name} is frozen", Kind.SETTING, remedy)
        elif node not in self.with_gradient:
            remedy = "without its gradient a layer has weight constraints only; let the gradient through"
            self.block(where(node), f"no gradient gets to {name}", Kind.SETTING, remedy)
        if name in self.named:
            remedy = "its gradient is a sum over its uses, which the recursion cannot take apart"
            self.block(where(node), f"{name} is used more than once", Kind.NOT_YET, remedy)
            self.shared.add(name)
        return name

    def linear(self, node: Node, arguments: dict[str, Any]) -> None:
        x, weight, bias = arguments["input"], arguments["weight"], arguments.get("bias")
        shape = tuple(x.meta["val"].shape)
        if len(shape) < 2 or shape[0] != 1:
            remedy = "flatten all dimensions but the batch"
            self.block(where(node), "a Linear layer across the batch", Kind.SETTING, remedy)
        self.count(node, x, weight, bias, _values(x), partial(layers.linear, input_shape=shape[1:]))

    def convolution(self, node: Node, arguments: dict[str, Any]) -> None:
        x, weight = arguments["input"], arguments["weight"]
        shape, kernel = tuple(x.meta["val"].shape), tuple(weight.meta["val"].shape[2:])
        dims = len(kernel)
        if len(shape) < dims + 2 or shape[0] != 1:
            remedy = "keep the dimension of the batch"
            self.block(where(node), "a convolution across the batch", Kind.SETTING, remedy)
        stride, dilation = _each(arguments["stride"], dims), _each(arguments["dilation"], dims)
        padding: list[tuple[int, int]]
        if arguments["padding"] == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            padding = [(t // 2, t - t // 2) for t in total]
        elif arguments["padding"] == "valid":
            padding = [(0, 0)] * dims
        else:
            padding = [(p, p) for p in _each(arguments["padding"], dims)]
        make = partial(
            layers.convolution,
            input_shape=shape[1:],
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=int(arguments["groups"]),
        )
        # Along each dimension a pixel is read or not, whatever the others: no table of all pixels is needed.
        out = node.meta["val"].shape[-dims:]
        sizes = zip(shape[-dims:], out, kernel, stride, padding, dilation, strict=True)
        read = [{pixel for _, pixel in _reads(*size)} for size in sizes]
        self.count(node, x, weight, arguments.get("bias"), math.prod(shape[:-dims]) * math.prod(map(len, read)), make)

    def transposed(self, node: Node, arguments: dict[str, Any]) -> None:
        """A transposed convolution's input takes the place of a convolution's output."""
        x, weight = arguments["input"], arguments["weight"]
        shape, kernel = tuple(x.meta["val"].shape), tuple(weight.meta["val"].shape[2:])
        dims = len(kernel)
        stride, dilation = _each(arguments["stride"], dims), _each(arguments["dilation"], dims)
        padding = [(p, p) for p in _each(arguments["padding"], dims)]
        out = node.meta["val"].shape[-dims:]
        sizes = zip(out, shape[-dims:], kernel, stride, padding, dilation, strict=True)
        used = [{position for position, _ in _reads(*size)} for size in sizes]
        make = partial(
            layers.transposed_convolution,
            input_shape=shape[1:],
            output_size=tuple(out),
            stride=stride,
            padding=[p for p, _ in padding],
            dilation=dilation,
            groups=int(arguments["groups"]),
        )
        seen = math.prod(shape[:-dims]) * math.prod(map(len, used))
        self.count(node, x, weight, arguments.get("bias"), seen, make)

    def count(self, node: Node, x: Any, weight: Any, bias: Any, seen: int, make: partial[Layer] | None = None) -> None:
        """Take up one use of a layer."""
        if x not in self.source or weight in self.source:
            self.block(where(node), "its weight is computed from the input", Kind.NOT_YET, "use plain parameters")
            return
        weight_name = self.parameter(node, weight, "weight")
        bias_name = None if bias is None else self.parameter(node, bias, "bias")
        self.named |= {name for name in (weight_name, bias_name) if name is not None}
        came = self.source[x]
        self.source[node] = _Source(len(self.uses))
        self.use_ids[node] = len(self.uses)
        if make is not None:
            make = partial(make, name=where(node), weight_name=weight_name, bias_name=bias_name)
        gets = node in self.with_gradient
        self.uses.append(
            Use(
                name=where(node),
                weight_name=weight_name,
                bias_name=bias_name,
                unknowns=_values(x),
                seen=seen,
                outputs=_values(node),
                # A computed weight's gradient is told through the gradients of what it is computed from.
                weight_gradients=min(_values(weight), self.parameters.behind(weight)) if gets else 0,
                bias_gradients=min(_values(bias), self.parameters.behind(bias)) if gets and bias is not None else 0,
                before=came.layer,
                mixed=came.mixed,
                make=make,
            )
        )

    def activate(self, node: Node, data: Node, activation: Activation) -> None:
        at = self.source[data].layer
        if isinstance(activation, LeakyReLU) and activation.negative_slope < 0:
            what = f"leaky_relu with negative slope {activation.negative_slope:g}"
            self.block(where(node), what, Kind.NEVER, "has two inputs for one output; use a positive slope")
            return
        if isinstance(activation, ELU) and activation.alpha <= 0:
            self.block(where(node), f"elu with alpha {activation.alpha:g}", Kind.NEVER, "use a positive alpha")
            return
        if isinstance(activation, Softplus) and (activation.beta <= 0 or activation.threshold < _SMOOTH):
            what = f"softplus with beta {activation.beta:g} and threshold {activation.threshold:g}"
            remedy = f"falls somewhere; use a positive beta and a threshold of {_SMOOTH} or more"
            self.block(where(node), what, Kind.SETTING, remedy)
            return
        self.activations[node] = activation
        self.source[node] = self.source[data]
        if self.source[data].mixed:
            return  # behind an obstacle already named
        if at is None or at in self.activated:
            what = f"{activation} on the input, or on another activation"
            self.block(where(node), what, *_PASSED)
        else:
            self.uses[at] = replace(self.uses[at], activation=activation)
            self.activated.add(at)

    def finish(self, node: Node) -> None:
        results = [argument for argument in node.all_input_nodes]
        if not self.one_tensor or len(results) != 1 or results[0] not in self.source:
            what = f"returns {len(results)} values" if len(results) > 1 else "returns something else than outputs alone"
            self.block("forward", what, Kind.SETTING, "return one tensor of outputs")
            return
        if not self.uses:
            if not self.obstacles:
                remedy = "there is no gradient to attack"
                self.block("forward", "no Linear or convolutional layer", Kind.SETTING, remedy)
            return
        last = self.uses[-1]
        if not isinstance(last.activation, Identity):
            what = f"{last.activation} after the last layer"
            self.block(last.name, what, Kind.SETTING, "the loss takes the raw output; remove the activation")
        count = _values(results[0])
        if self.outputs is not None and count != self.outputs:
            what = f"{count} outputs a sample, the loss takes {self.outputs}"
            remedy = "give the model a single output, or choose a loss for several"
            self.block(last.name, what, Kind.SETTING, remedy)


@dataclass(frozen=True)
class _Source:
    """What a value comes from, apart from what keeps it whole: one layer, the model's input, or a mixture."""

    layer: int | None = None
    mixed: bool = False


def _reads(
    length: int, positions: int, width: int, stride: int, padding: tuple[int, int], dilation: int
) -> Iterator[tuple[int, int]]:
    """Along one dimension, every output position with every pixel that it reads."""
    for position in range(positions):
        for offset in range(width):
            pixel = position * stride + offset * dilation - padding[0]
            if 0 <= pixel < length:
                yield position, pixel


def _plain(arguments: dict[str, Any]) -> bool:
    """Whether an addmm has no factors."""
    return bool(arguments.get("alpha", 1) == 1 and arguments.get("beta", 1) == 1)


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _values(node: Any) -> int:
    """The number of values of one sample, or of a parameter."""
    return int(node.meta["val"].numel())


def _each(value: Any, dims: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return values * dims if len(values) == 1 else values
