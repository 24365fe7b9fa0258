"""From a traced model and its weights to a `Network`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node as Traced
from torch.fx.node import map_arg

from rgap.nn import calls
from rgap.nn.activation import Activation
from rgap.nn.activations import LeakyReLU, PReLU
from rgap.nn.batch_norm import BatchNorm, BatchStatistics
from rgap.nn.export import Exported
from rgap.nn.fused import behind_gather
from rgap.nn.graph import Use
from rgap.nn.network import Network, Node
from rgap.nn.ops import Affine, Concat, Elementwise, Gather, Linear, Norm, Op, Other, Sum
from rgap.nn.pools import pool

# Operations whose output values are input values, or zeros.
_GATHERS = calls.VIEWS | {
    "permute", "transpose", "t", "mT", "numpy_T", "swapdims", "expand_as", "cat", "rot90", "index_select", "movedim",
    "swapaxes", "slice", "select", "narrow", "flip", "roll", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "split", "split_with_sizes", "chunk", "unbind", "expand", "repeat", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
    "replication_pad2d", "to", "_to_copy", "unsafe_split", "im2col", "unfold", "slice_scatter", "select_scatter",
}  # fmt: skip
# Operations with f(a x) = a f(x) for a > 0.
_SCALABLE = {
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "mean", "sum", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d", "upsample_bilinear2d", "amax",
    "upsample_linear1d", "upsample_bicubic2d", "upsample_trilinear3d", "max_pool2d_with_indices", "abs",
}  # fmt: skip


STATISTICS = "running statistics before and after one step would tell them, and were not sent with all gradients"


@dataclass(frozen=True, eq=False)
class Batch:
    """What an update tells of the very batch behind it."""

    statistics: Mapping[str, BatchStatistics]
    """Of batch norms in training mode, by the name of the running mean."""
    gradients: Mapping[str, Tensor]
    """Of the mean loss over the batch, by parameter name."""


@dataclass(frozen=True, eq=False)
class Program:
    """A traced model, in memory only; it holds no weights."""

    exported: Exported
    uses: Mapping[Traced, Use]
    """What is known of each use of a layer."""
    shared: frozenset[str]
    """Weights that are used more than once."""
    activations: Mapping[Traced, Activation]
    dropped: frozenset[Traced]
    """Operations that do nothing, such as dropout in evaluation mode."""

    def network(self, tensors: Mapping[str, Tensor], trained: frozenset[str], batch: Batch | None = None) -> Network:
        """The operations with their weights, in float64.

        Args:
            tensors: parameters and buffers by name.
            trained: the names of the parameters whose gradients are shared.
            batch: what is known of the very batch behind an update, for batch norm in training mode.

        Raises:
            NotImplementedError: an operation does something that a value cannot hold; says what.
        """
        return _Build(self, tensors, trained, batch or Batch({}, {})).run()


class _Build:
    """One pass over the traced operations."""

    def __init__(self, program: Program, tensors: Mapping[str, Tensor], trained: frozenset[str], batch: Batch):
        self.program, self.trained, self.batch = program, trained, batch
        self.exported, self.names = program.exported, program.exported.parameters.names
        # Copies: the model's code may write to its buffers.
        self.tensors = {n: t.double().clone() if t.is_floating_point() else t.clone() for n, t in tensors.items()}
        self.known: dict[Traced, Any] = {}  # what does not depend on the input
        self.value_ids: dict[Traced, int] = {}  # of values that do
        self.parts: set[Traced] = set()  # operations whose results are no values: several, masks, scalars, complex
        self.nodes: list[Node] = []
        self.device = next(iter(self.tensors.values())).device

    def run(self) -> Network:
        example = next(iter(self.exported.inputs)).meta["val"]
        for node in self.exported.graph.nodes:
            if node in self.exported.inputs:
                self.value_ids[node] = 0
            elif node.op == "placeholder":
                name = self.names.get(node)
                self.known[node] = self.exported.constants.get(node) if name is None else self.tensors[name]
            elif node.op == "call_function":
                self.visit(node)
            elif node.op == "output":
                return self.finish(node, tuple(example.shape[1:]))
        raise NotImplementedError("the model returns nothing")

    def finish(self, node: Traced, shape: tuple[int, ...]) -> Network:
        results = node.all_input_nodes
        if len(results) != 1 or results[0] not in self.value_ids:
            raise NotImplementedError("the model returns something else than one tensor of outputs")
        result = results[0]
        end = self.value_ids[result]
        if end == 0:
            raise NotImplementedError("the model returns its input")
        needed, reads = {end}, {node_id + 1: node.reads for node_id, node in enumerate(self.nodes)}
        for value in range(end, 0, -1):
            if value in needed:
                needed |= set(reads[value])
        # What nobody reads is left out, and the rest numbered anew.
        kept = [value for value in sorted(needed) if value > 0]
        number = {0: 0} | {value: at for at, value in enumerate(kept, 1)}
        nodes = (self.nodes[value - 1] for value in kept)
        renumbered = (replace(node, reads=tuple(number[at] for at in node.reads)) for node in nodes)
        return Network(tuple(renumbered), shape)

    def visit(self, node: Traced) -> None:
        data = [argument for argument in node.all_input_nodes if argument in self.value_ids or argument in self.parts]
        name = calls.operation(node).removesuffix("_")
        if not data:
            if name not in calls.BLOCKS and all(argument in self.known for argument in node.all_input_nodes):
                made = self.call(node, {})
                floats = isinstance(made, Tensor) and made.is_floating_point()
                self.known[node] = made.double() if floats else made
            return
        if name in calls.BLOCKS:
            return
        if node in self.program.dropped:
            self.value_ids[node] = self.value_ids[data[0]]
            return
        result = node.meta.get("val")
        if not isinstance(result, Tensor) or not result.is_floating_point() or not result.dim():
            self.parts.add(node)
            return
        if name == "getitem":
            name = calls.operation(data[0]).removesuffix("_")
        data = self.roots(data)
        ops = self.ops(node, name, data)
        reads = tuple(self.value_ids[each] for each in self.reads(ops[0], node, data))
        for op in ops:
            self.nodes.append(Node(op, reads, _own(result.shape)))
            reads = (len(self.nodes),)
        self.value_ids[node] = reads[0]
        if calls.operation(node).endswith("_"):  # in place: who reads the old value from here on gets the new one
            old = self.value_ids[data[0]]
            self.value_ids.update({each: reads[0] for each, at in self.value_ids.items() if at == old})

    def roots(self, data: list[Traced]) -> list[Traced]:
        """The values behind operations whose results are no values of their own."""
        found: dict[Traced, None] = {}
        for each in data:
            inner = [node for node in each.all_input_nodes if node in self.value_ids or node in self.parts]
            found.update(dict.fromkeys([each] if each in self.value_ids else self.roots(inner)))
        return list(found)

    def reads(self, op: Op, node: Traced, data: list[Traced]) -> list[Traced]:
        """The values that an operation reads, each as often as it does."""
        arguments = calls.arguments(node)
        if isinstance(op, Sum):
            return [arguments["self"], arguments["other"]]
        return list(arguments["tensors"]) if isinstance(op, Concat) else data

    def ops(self, node: Traced, name: str, data: list[Traced]) -> list[Op]:
        """What the operation is made of, one after another."""
        where, arguments = calls.where(node), calls.arguments(node)
        # The batch, which is of one here, may have gone elsewhere than in front.
        in_front = all(each.meta["val"].shape[0] == 1 for each in (node, *data))
        if node in self.exported.with_gradient and node in self.program.activations:
            return [Elementwise(where, self.program.activations[node])]
        if node in self.exported.with_gradient and name == "prelu":
            leaky = self.leaky(arguments["weight"])
            if leaky is not None:
                return [Elementwise(where, leaky)]
        if node in self.exported.with_gradient and name in _GATHERS and len(data) == 1:
            gathered = self.gathered(node, where, data[0])
            if gathered:
                return gathered
        if node in self.exported.with_gradient and in_front:
            trained = self.layer(node, data) if node in self.program.uses else None
            if trained is not None:
                return [trained]
            mean = self.names.get(arguments["running_mean"]) if name == "batch_norm" else None
            if mean is not None and mean in self.batch.statistics:
                told = self.of_batch(where, arguments, self.batch.statistics[mean], node.meta["val"].shape)
                return [told] if told is not None else [self.other(node, where, name, arguments, data)]
            if name == "batch_norm" and not arguments["training"]:
                return [self.normalised(where, arguments)]
            if name in ("layer_norm", "group_norm") or (name == "instance_norm" and arguments["use_input_stats"]):
                return [self.norm(where, name, arguments, node.meta["val"].shape)]
            shapes = data[0].meta["val"].shape[1:], node.meta["val"].shape[1:]
            pooled = pool(where, name, arguments, *shapes) if len(data) == 1 else None
            if pooled is not None:
                return [pooled.to(self.device)]
            if name in ("add", "sub", "mul", "div"):
                found = self.arithmetic(node, where, name, arguments, data)
                if found is not None:
                    return [found]
            dim = int(arguments["dim"]) % node.meta["val"].dim() if name == "cat" else 0
            if (
                dim > 0
                and len(data) == len(arguments["tensors"])
                and all(e in self.value_ids for e in arguments["tensors"])
            ):
                return [Concat(where, dim - 1)]
        return [self.other(node, where, name, arguments, data)]

    def leaky(self, weight: Traced) -> Activation | None:
        """A PReLU with these slopes; None if one of them keeps no order."""
        slopes = self.known.get(weight)
        if not isinstance(slopes, Tensor) or not slopes.numel() or not bool((slopes > 0).all()):
            return None
        slopes = slopes.detach().flatten()
        return LeakyReLU(float(slopes[0])) if bool((slopes == slopes[0]).all()) else PReLU(slopes)

    def other(self, node: Traced, where: str, name: str, arguments: dict[str, Any], data: list[Traced]) -> Other:
        """What no closed form passes."""
        trains = arguments.get("train") or arguments.get("training") or arguments.get("use_input_stats")
        mode = " in training mode" if trains else ""
        function = self.function(node, data)
        sizes = sum(each.meta["val"].numel() for each in data), node.meta["val"].numel()
        lost = ""
        if name == "batch_norm":
            channels = node.meta["val"].shape[1]
            lost = f"leaves mean and size of {channels} channels free, {2 * channels} dimensions: {STATISTICS}"
        detached = node not in self.exported.with_gradient
        return Other(where, name + mode, function, *sizes, name in _SCALABLE, detached, lost)

    def call(self, node: Traced, values: Mapping[Traced, Any]) -> Any:
        def value(argument: Traced) -> Any:
            if argument in values:
                return values[argument]
            return self.known[argument] if argument in self.known else self.call(argument, values)

        target: Any = node.target
        return target(*map_arg(node.args, value), **map_arg(node.kwargs, value))

    def function(self, node: Traced, data: list[Traced]) -> Callable[..., Tensor]:
        """The operation as a function of the values it reads, for one sample."""
        mutates = calls.operation(node).endswith("_")
        shapes, own = [each.meta["val"].shape for each in data], _own(node.meta["val"].shape)

        def run(*xs: Tensor) -> Tensor:
            whole = [x.reshape(shape) for x, shape in zip(xs, shapes, strict=True)]
            values = (x.clone() for x in whole) if mutates else whole
            found: Tensor = self.call(node, dict(zip(data, values, strict=True)))
            return found.reshape(1, *own)

        return run

    def layer(self, node: Traced, data: list[Traced]) -> Linear | None:
        use = self.program.uses[node]
        if use.make is None or use.weight_name is None or len(data) != 1:
            return None
        layer = use.layer(self.tensors)
        sent = use.weight_name in self.trained and use.weight_name not in self.program.shared
        has_gradient = sent and node in self.exported.with_gradient
        bias = use.bias_name
        if bias is not None and (not has_gradient or bias not in self.trained or bias in self.program.shared):
            layer = replace(layer, bias_name=None)
        value_id = self.value_ids[data[0]]
        before = self.nodes[value_id - 1].op if value_id else None
        sole = len(data[0].users) == 1 and not any(value_id in other.reads for other in self.nodes)
        if isinstance(before, Gather) and sole:
            fused = behind_gather(layer, before)
            if fused is not None:
                self.value_ids[data[0]] = self.nodes[value_id - 1].reads[0]
                return Linear(fused, has_gradient)
        return Linear(layer, has_gradient)

    def normalised(self, where: str, arguments: dict[str, Any]) -> Affine:
        """Batch norm with the statistics it has kept."""
        mean, var, weight, bias = map(self.value, map(arguments.get, ("running_mean", "running_var", "weight", "bias")))
        if mean is None or var is None:
            raise NotImplementedError(f"{where}: batch norm without statistics of its own")
        scale = (var + float(arguments["eps"])).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        shape = (1, -1, *[1] * (arguments["input"].meta["val"].dim() - 2))
        full = shift.numel() == math.prod(arguments["input"].meta["val"].shape)
        name = self.trained_name(arguments.get("bias")) if full else None
        return Affine(where, scale.reshape(shape), shift.reshape(shape), name)

    def of_batch(
        self, where: str, arguments: dict[str, Any], told: BatchStatistics, shape: torch.Size
    ) -> BatchNorm | None:
        """Batch norm in training mode; None if the gradients of its weight and bias are not known."""
        names = [self.trained_name(arguments.get(role)) for role in ("weight", "bias")]
        if any(name not in self.batch.gradients for name in names):
            return None
        gamma, beta = (self.known[arguments[role]] for role in ("weight", "bias"))
        if not bool((gamma != 0).all()):
            return None
        count = told.samples * math.prod(shape[2:])
        scale = gamma * (told.variance * (count - 1) / count + float(arguments["eps"])).rsqrt()
        along, mean_k = (self.batch.gradients[str(name)].double() / count for name in names)
        wide = (1, -1, *[1] * (len(shape) - 2))
        parts = (scale, beta - told.mean * scale, mean_k, along / gamma, beta)
        scale, shift, mean_k, along, beta = (part.reshape(wide) for part in parts)
        of_batch = partial(BatchNorm, eps=float(arguments["eps"]), samples=told.samples, precision=told.precision)
        return of_batch(where, scale, shift, mean_k=mean_k, along=along, beta=beta, gamma=gamma.reshape(wide))

    def norm(self, where: str, name: str, arguments: dict[str, Any], shape: torch.Size) -> Norm:
        """A norm that is taken of each sample."""
        if name == "layer_norm":
            groups = math.prod(shape[1 : len(shape) - len(arguments["normalized_shape"])])
        else:
            groups = int(arguments["num_groups"]) if name == "group_norm" else shape[1]
        parts = []
        for role, constant in (("weight", 1.0), ("bias", 0.0)):
            value = self.value(arguments.get(role))
            if value is None:
                value = torch.full((1,), constant, dtype=torch.float64, device=self.device)
            if name != "layer_norm":  # one for each channel
                value = value.reshape(-1, *[1] * (len(shape) - 2))
            parts.append(value[None])
        return Norm(where, name, groups, parts[0], parts[1], float(arguments["eps"]))

    def value(self, argument: Any) -> Any:
        """Of an argument that does not depend on the input."""
        return self.known[argument] if isinstance(argument, Traced) else argument

    def trained_name(self, argument: Any) -> str | None:
        name = self.names.get(argument) if isinstance(argument, Traced) else None
        return name if name in self.trained and name not in self.program.shared else None

    def arithmetic(
        self, node: Traced, where: str, name: str, arguments: dict[str, Any], data: list[Traced]
    ) -> Op | None:
        shape = node.meta["val"].shape
        same = all(each.meta["val"].shape == shape for each in data)
        first, second = arguments["self"], arguments["other"]
        if not same or arguments.get("alpha", 1) != 1 or arguments.get("rounding_mode") is not None:
            return None
        both = isinstance(first, Traced) and isinstance(second, Traced) and {first, second} <= set(self.value_ids)
        if both:
            return Sum(where) if name == "add" else None
        constant = second if first in data else first
        if constant in self.parts:  # such as x / x.max() and a mask
            return None
        value = self.value(constant)
        if isinstance(value, complex) or (isinstance(value, Tensor) and value.is_complex()):
            return None
        value = torch.as_tensor(value, dtype=torch.float64)
        value = value.reshape(*[1] * (len(shape) - value.dim()), *value.shape)
        if value.shape[0] != 1 or (name == "div" and first is not data[0]):
            return None
        one, zero = torch.ones_like(value), torch.zeros_like(value)
        if name == "add":
            full = value.numel() == math.prod(shape)
            return Affine(where, one, value, self.trained_name(constant) if full else None)
        if name == "sub":
            return Affine(where, one, -value) if first is data[0] else Affine(where, -one, value)
        return Affine(where, value if name == "mul" else 1 / value, zero)

    def gathered(self, node: Traced, where: str, data: Traced) -> list[Op]:
        """What the operation does to numbered values: a gather, and maybe constants added; nothing if it does else."""
        shape, out_shape = data.meta["val"].shape, node.meta["val"].shape
        run, count = self.function(node, [data]), math.prod(shape)
        numbers = torch.arange(1, count + 1, dtype=torch.float64, device=self.device).reshape(shape)
        constant = run(torch.zeros_like(numbers))
        if constant.dtype != torch.float64:
            return []
        out = run(numbers) - constant
        index = out.round().long().reshape(-1) - 1
        index = torch.where(index < 0, count, index)
        gather = Gather(where, index, _own(shape), _own(out_shape))
        # Any other values tell whether that is all it does.
        draw = torch.Generator(device=self.device).manual_seed(0)
        probe = torch.randn(shape, generator=draw, dtype=torch.float64, device=self.device)
        if not torch.allclose(gather.forward(probe[None]) + constant, run(probe), rtol=0, atol=1e-12):
            return []
        if not bool(constant.any()):
            return [gather]
        return [gather, Affine(where, torch.ones_like(constant), constant)]


def _own(shape: Sequence[int]) -> tuple[int, ...]:
    """Of one sample's value: without the dimension of the batch, if that is in front."""
    return tuple(shape[1:]) if shape[0] == 1 else tuple(shape)
