"""From an ``nn.Module`` to a `Chain`: torch.export gives the operations, a short table says what each one is.

The exported program lives in memory only and is never saved or loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from rgap.nn import layers
from rgap.nn.activations import ELU, SELU, Activation, Identity, LeakyReLU, ReLU, Sigmoid, Softplus, Tanh
from rgap.nn.chain import Chain, Kind, NotAChain, Obstacle
from rgap.nn.layers import Layer

# Operations that keep all values and their order.
_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "alias", "_unsafe_view",
    "identity", "lift_fresh_copy",
}  # fmt: skip
_DROPOUTS = {"dropout", "dropout_", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_NORMS = {"batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm"}

_ACTIVATIONS: dict[str, Callable[[dict[str, Any]], Activation]] = {
    "leaky_relu": lambda a: LeakyReLU(float(a["negative_slope"])) if a["negative_slope"] else ReLU(),
    "relu": lambda a: ReLU(),
    "sigmoid": lambda a: Sigmoid(),
    "tanh": lambda a: Tanh(),
    "softplus": lambda a: Softplus(float(a["beta"]), float(a["threshold"])),
    "elu": lambda a: ELU(float(a["alpha"]), float(a["scale"])),
    "selu": lambda a: SELU,
}

_NOT_MONOTONIC = "has two inputs for one output; use LeakyReLU, ELU or Softplus to attack this model"
_KNOWN_OBSTACLES: dict[str, tuple[Kind, str]] = {
    "add": (Kind.NOT_YET, "skip connections and added constants are not followed; attack the model without them"),
    "cat": (Kind.NOT_YET, "branches are not followed; attack the model without them"),
    "max_pool1d": (Kind.NOT_YET, "keeps only the maxima; replace it by a strided convolution"),
    "max_pool2d": (Kind.NOT_YET, "keeps only the maxima; replace it by a strided convolution"),
    "avg_pool2d": (Kind.NOT_YET, "replace it by a strided convolution"),
    "adaptive_avg_pool2d": (Kind.NOT_YET, "replace it by a flatten and a Linear layer"),
    "mean": (Kind.NOT_YET, "replace it by a flatten and a Linear layer"),
    "permute": (Kind.NOT_YET, "reordering is not followed; use flatten or reshape only"),
    "transpose": (Kind.NOT_YET, "reordering is not followed; use flatten or reshape only"),
    "matmul": (Kind.NOT_YET, "write it as torch.nn.functional.linear"),
    "mm": (Kind.NOT_YET, "write it as torch.nn.functional.linear"),
    "addmm": (Kind.NOT_YET, "write it as torch.nn.functional.linear"),
    "pad": (Kind.NOT_YET, "use the padding argument of the convolution, with zeros"),
    "gelu": (Kind.NOT_YET, _NOT_MONOTONIC),
    "silu": (Kind.NOT_YET, _NOT_MONOTONIC),
    "mish": (Kind.NOT_YET, _NOT_MONOTONIC),
    "hardtanh": (Kind.NEVER, "clamps values away; use Tanh"),
    "clamp": (Kind.NEVER, "clamps values away"),
    "softmax": (Kind.SETTING, "give the loss the raw outputs"),
    "log_softmax": (Kind.SETTING, "give the loss the raw outputs"),
    "abs": (Kind.NEVER, "loses the sign of every value"),
    "square": (Kind.NEVER, "loses the sign of every value"),
    "pow": (Kind.NEVER, "may lose the sign of every value"),
    "sign": (Kind.NEVER, "keeps nothing but signs, and its gradient is zero"),
    "round": (Kind.NEVER, "its gradient is zero"),
    "floor": (Kind.NEVER, "its gradient is zero"),
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
    example = _example(model, input_shape)
    try:
        program = torch.export.export(model, (example,), strict=False)
    except Exception as error:  # torch.export raises many kinds for code it cannot follow
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "Control flow that depends on the values of the input cannot be followed."
        raise NotAChain([Obstacle("forward", f"cannot be traced: {first}", Kind.NOT_YET, remedy)]) from error
    signature = program.graph_signature
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return _Walk(tensors, names, set(signature.user_inputs), outputs).run(program.graph)


def _example(model: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    like = torch.zeros(()) if parameter is None else parameter
    return torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device)


class _Walk:
    """One pass over the graph, collecting layers and obstacles."""

    def __init__(self, tensors: dict[str, Tensor], names: dict[str, str], inputs: set[Any], outputs: int | None):
        self.tensors, self.names, self.outputs = tensors, names, outputs
        self.data = {name for name in inputs if isinstance(name, str)}
        self.layers: list[Layer] = []
        self.obstacles: list[Obstacle] = []
        self.activated = True  # nothing to activate before the first layer

    def run(self, graph: torch.fx.Graph) -> Chain:
        for node in graph.nodes:
            if node.op == "call_function":
                self.visit(node)
            elif node.op == "output":
                self.finish(node)
        if self.obstacles:
            raise NotAChain(self.obstacles)
        return Chain(tuple(self.layers))

    def block(self, where: str, what: str, kind: Kind, remedy: str) -> None:
        self.obstacles.append(Obstacle(where, what, kind, remedy[:1].upper() + remedy[1:] + "."))

    def visit(self, node: Node) -> None:
        data = [argument for argument in node.all_input_nodes if argument.name in self.data]
        if not data:
            return  # computed from weights alone; whoever uses it as a weight is told so
        self.data.add(node.name)
        name = _operation(node)
        bare = name.removesuffix("_")
        arguments = _arguments(node)
        if len(data) > 1:
            self.unknown(node, bare, len(data))
        elif name in _VIEWS:
            pass
        elif name in _DROPOUTS:
            if arguments.get("train") and arguments.get("p"):
                self.block(_where(node), "dropout in training mode", Kind.SETTING, "call model.eval() first")
        elif name in _NORMS:
            training = arguments.get("training") or arguments.get("use_input_stats")
            if training:
                what = f"{name} in training mode mixes the samples of a batch"
                self.block(_where(node), what, Kind.SETTING, "call model.eval() first")
            else:
                self.block(_where(node), name, Kind.NOT_YET, "attack the model without its normalisation layers")
        elif name == "linear":
            self.linear(node, arguments)
        elif name in ("conv1d", "conv2d", "conv3d"):
            self.convolution(node, arguments)
        elif bare in _ACTIVATIONS:
            self.activate(node, _ACTIVATIONS[bare](arguments))
        else:
            self.unknown(node, bare, len(data))

    def unknown(self, node: Node, name: str, inputs: int) -> None:
        default = (Kind.NOT_YET, "no rule for it; replace it or attack the part of the model after it")
        kind, remedy = _KNOWN_OBSTACLES.get(name.removeprefix("_"), default)
        what = f"{name} of {inputs} values" if inputs > 1 else name
        self.block(_where(node), what, kind, remedy)

    def parameter(self, node: Node, argument: Any, role: str) -> tuple[Tensor, str] | None:
        """The parameter behind an argument; an obstacle if it is computed or its gradient is not shared."""
        name = self.names.get(argument.name) if isinstance(argument, Node) else None
        if name is None:
            self.block(_where(node), f"its {role} is computed, not a parameter", Kind.NOT_YET, "use plain parameters")
            return None
        tensor = self.tensors[name]
        if not tensor.requires_grad:
            remedy = "without its gradient a layer has weight constraints only; set requires_grad before the attack"
            self.block(_where(node), f"{name} is frozen", Kind.SETTING, remedy)
        if any(name in (layer.weight_name, layer.bias_name) for layer in self.layers):
            remedy = "its gradient is a sum over its uses, which the recursion cannot take apart"
            self.block(_where(node), f"{name} is used more than once", Kind.NOT_YET, remedy)
        return tensor, name

    def parameters(
        self, node: Node, arguments: dict[str, Any]
    ) -> tuple[tuple[Tensor, str], tuple[Tensor | None, str | None]] | None:
        weight = self.parameter(node, arguments["weight"], "weight")
        if arguments.get("bias") is None:
            return None if weight is None else (weight, (None, None))
        bias = self.parameter(node, arguments["bias"], "bias")
        return None if weight is None or bias is None else (weight, bias)

    def linear(self, node: Node, arguments: dict[str, Any]) -> None:
        found = self.parameters(node, arguments)
        shape = tuple(arguments["input"].meta["val"].shape)
        if len(shape) < 2:
            remedy = "flatten all dimensions but the batch"
            self.block(_where(node), "a Linear layer across the batch", Kind.SETTING, remedy)
        elif found is not None:
            (weight, weight_name), (bias, bias_name) = found
            self.append(layers.linear(_where(node), weight, bias, shape[1:], weight_name, bias_name))

    def convolution(self, node: Node, arguments: dict[str, Any]) -> None:
        found = self.parameters(node, arguments)
        shape = tuple(arguments["input"].meta["val"].shape)
        if found is None:
            return
        (weight, weight_name), (bias, bias_name) = found
        dims = weight.dim() - 2
        stride, dilation = _each(arguments["stride"], dims), _each(arguments["dilation"], dims)
        padding: list[tuple[int, int]]
        if arguments["padding"] == "same":
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            padding = [(t // 2, t - t // 2) for t in total]
        elif arguments["padding"] == "valid":
            padding = [(0, 0)] * dims
        else:
            padding = [(p, p) for p in _each(arguments["padding"], dims)]
        self.append(
            layers.convolution(
                _where(node), weight, bias, shape[1:], stride, padding, dilation, int(arguments["groups"]),
                weight_name, bias_name,
            )
        )  # fmt: skip

    def append(self, layer: Layer) -> None:
        self.layers.append(layer)
        self.activated = False

    def activate(self, node: Node, activation: Activation) -> None:
        if isinstance(activation, LeakyReLU) and activation.negative_slope < 0:
            what = f"leaky_relu with negative slope {activation.negative_slope:g}"
            self.block(_where(node), what, Kind.NEVER, "has two inputs for one output; use a positive slope")
        elif isinstance(activation, ELU) and activation.alpha <= 0:
            self.block(_where(node), f"elu with alpha {activation.alpha:g}", Kind.NEVER, "use a positive alpha")
        elif self.activated:
            what = f"{activation} on the input, or on another activation"
            self.block(_where(node), what, Kind.NOT_YET, "one activation after each layer is followed")
        else:
            self.layers[-1] = replace(self.layers[-1], activation=activation)
            self.activated = True

    def finish(self, node: Node) -> None:
        results = [argument for argument in node.all_input_nodes]
        if len(results) != 1 or results[0].name not in self.data:
            self.block("forward", f"returns {len(results)} values", Kind.SETTING, "return one tensor of outputs")
            return
        if not self.layers:
            if not self.obstacles:
                remedy = "there is no gradient to attack"
                self.block("forward", "no Linear or convolutional layer", Kind.SETTING, remedy)
            return
        last = self.layers[-1]
        if not isinstance(last.activation, Identity):
            what = f"{last.activation} after the last layer"
            self.block(last.name, what, Kind.SETTING, "the loss takes the raw output; remove the activation")
        count = results[0].meta["val"].numel()
        if self.outputs is not None and count != self.outputs:
            what = f"{count} outputs a sample, the loss takes {self.outputs}"
            remedy = "give the model a single output, or choose a loss for several"
            self.block(last.name, what, Kind.SETTING, remedy)


def _operation(node: Node) -> str:
    """The operation's name without namespace and overload, such as ``conv2d``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target))


def _arguments(node: Node) -> dict[str, Any]:
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


def _where(node: Node) -> str:
    """The path of the module that ran the operation, or the operation's own name at the top level."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths and paths[-1] else node.name


def _each(value: Any, dims: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return values * dims if len(values) == 1 else values
