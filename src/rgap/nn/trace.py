"""From an ``nn.Module`` to a `Graph`: its layers, what stands in the way of a plain chain, and its operations.

torch.export gives the operations; `rgap.nn.activations.ACTIVATIONS`, `rgap.nn.layer_calls.LAYERS` and
`rgap.nn.obstacles` say what each is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn
from torch.fx import Node

from rgap.nn import obstacles
from rgap.nn.activation import Activation
from rgap.nn.activations import ACTIVATIONS, ELU, Identity, LeakyReLU, Softplus
from rgap.nn.build import Program
from rgap.nn.calls import VIEWS, operation, where
from rgap.nn.calls import arguments as arguments_of
from rgap.nn.export import CASTS, CannotBeTraced, Exported, export, needed
from rgap.nn.graph import Graph, Use
from rgap.nn.layer_calls import LAYERS, LayerCall
from rgap.nn.models import evaluating, exported_modes
from rgap.nn.obstacles import PASSED, Kind, Obstacle
from rgap.nn.pools import as_pool

_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_NORMS = {"batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm"}

_SMOOTH = 16
"""The threshold from which on Softplus steps down by less than float32 can tell, log(1 + 1/e^threshold)."""


def follow(model: nn.Module, input_shape: tuple[int, ...], outputs: int | None = 1, ending: str = "") -> Graph:
    """The layers and obstacles of any model, found with one sample. Reads no weight.

    A model that cannot be traced at all gives no layers and a single obstacle.

    Args:
        input_shape: one sample's shape, without the batch.
        outputs: the number of output values the loss takes; None for any.
        ending: a function that belongs to the loss if the model ends in it, such as ``log_softmax``.
    """
    try:
        exported = export(model, input_shape)
    except CannotBeTraced as error:
        if any(module.training for module in model.modules()):  # batch norm may refuse a single sample
            graph = follow(evaluating(model), input_shape, outputs, ending)
            if graph.uses:
                what = f"cannot be traced in training mode: {error}"
                made = exported_modes(model) is not None
                remedy = "Export it in evaluation mode." if made else "Call model.eval() first."
                setting = Obstacle("forward", what, Kind.SETTING, remedy)
                return replace(graph, obstacles=(setting, *graph.obstacles))
        return Graph((), (Obstacle("forward", f"cannot be traced: {error}", Kind.NOT_YET, error.remedy),))
    last = exported.ending
    name = "" if last is None else operation(last).strip("_")
    taken = exported.without_ending(ending)
    found = _Walk(exported, outputs).run()
    return replace(found, ending=name, ending_is_the_loss=taken, returned=exported.returned)


class _Walk:
    """One pass over the graph, collecting layers and obstacles."""

    def __init__(self, exported: Exported, outputs: int | None):
        self.exported, self.parameters, self.outputs = exported, exported.parameters, outputs
        self.source: dict[Node, _Source] = dict.fromkeys(exported.inputs, _Source())  # of every value of the input's
        self.uses: list[Use] = []
        self.activated: set[int] = set()
        self.named: set[str] = set()
        self.shared: set[str] = set()
        self.obstacles: list[Obstacle] = []
        # For the network that is built of the same operations.
        self.use_ids: dict[Node, int] = {}
        self.activations: dict[Node, Activation] = {}
        self.idle: set[Node] = set()

    def run(self) -> Graph:
        wanted = needed(self.exported.graph)
        for node in self.exported.graph.nodes:
            if node in wanted and node.op == "call_function":
                self.visit(node)
            elif node in wanted and node.op == "output":
                self.finish(node)
        uses = {node: self.uses[use_id] for node, use_id in self.use_ids.items()}
        program = Program(self.exported, uses, frozenset(self.shared), self.activations, frozenset(self.idle))
        return Graph(tuple(self.uses), tuple(self.obstacles), program)

    def block(self, where: str, what: str, kind: Kind, remedy: str) -> None:
        self.obstacles.append(Obstacle(where, what, kind, remedy[:1].upper() + remedy[1:] + "."))

    def visit(self, node: Node) -> None:
        data = [argument for argument in node.all_input_nodes if argument in self.source]
        if not data:
            return  # computed from weights alone; whoever uses it as a weight is told so
        name = operation(node)
        bare = name.removesuffix("_")
        arguments = arguments_of(node)
        active = bare in ACTIVATIONS and not arguments.get("training")
        self.source[node] = _Source(mixed=True)
        if len(data) > 1:
            self.unknown(node, bare, len(data))
        elif name in VIEWS:
            self.source[node] = self.source[data[0]]
        elif bare in _DROPOUTS:
            self.dropout(node, data[0], arguments)
        elif name in _NORMS:
            self.norm(node, name, data[0], arguments)
        elif name in LAYERS:
            self.layer(node, name, data[0], LAYERS[name](node, arguments))
        elif active and not obstacles.known(bare):
            self.activate(node, data[0], ACTIVATIONS[bare](arguments))
        elif name != "getitem":  # takes a value out of what another operation returned, and that one is no chain's
            self.unknown(node, bare, len(data))
            if active:
                self.activations[node] = ACTIVATIONS[bare](arguments)

    def unknown(self, node: Node, name: str, inputs: int) -> None:
        what = f"{name} of {inputs} values" if inputs > 1 else name
        if name in CASTS:
            what = f"a cast to {str(node.meta['val'].dtype).removeprefix('torch.')}"
        if name == "mean":
            name = as_pool(name, arguments_of(node), node.all_input_nodes[0].meta["val"].dim())
        self.block(where(node), what, *obstacles.about(name.removeprefix("_")))

    def dropout(self, node: Node, data: Node, arguments: dict[str, Any]) -> None:
        if arguments.get("train") and arguments.get("p"):
            self.block(where(node), "dropout in training mode", Kind.SETTING, "call model.eval() first")
        else:
            self.idle.add(node)
            self.source[node] = self.source[data]

    def norm(self, node: Node, name: str, data: Node, arguments: dict[str, Any]) -> None:
        own = arguments.get("training") or arguments.get("use_input_stats")  # of the batch, not those it has kept
        if own and arguments.get("running_mean") is not None:
            what = f"{name} in training mode mixes the samples of a batch"
            self.block(where(node), what, Kind.SETTING, "call model.eval() first")
        elif name == "batch_norm" and not own:  # fixed statistics: one known factor and shift for every value
            self.block(where(node), name, *PASSED)
            self.source[node] = self.source[data]
        else:
            self.block(where(node), name, Kind.NOT_YET, "attack the model without its normalisation layers")

    def layer(self, node: Node, name: str, data: Node, call: LayerCall) -> None:
        if obstacles.known(name):  # counted, and followed, but never part of a plain chain
            self.unknown(node, name, 1)
            if call.x is not data:
                return
        if call.misuse is not None:
            self.block(where(node), *call.misuse)
        self.count(node, call)

    def parameter(self, node: Node, argument: Any, role: str) -> str | None:
        """The name of the parameter behind an argument; an obstacle if it is computed or its gradient is not shared."""
        name = self.parameters.names.get(argument)
        if name is None:
            self.block(where(node), f"its {role} is computed, not a parameter", Kind.NOT_YET, "use plain parameters")
            return None
        if name not in self.parameters.trained:
            remedy = "without its gradient a layer has weight constraints only; set requires_grad before the attack"
            self.block(where(node), f"{name} is frozen", Kind.SETTING, remedy)
        elif node not in self.exported.with_gradient:
            remedy = "without its gradient a layer has weight constraints only; let the gradient through"
            self.block(where(node), f"no gradient gets to {name}", Kind.SETTING, remedy)
        if name in self.named:
            remedy = "its gradient is a sum over its uses, which the recursion cannot take apart"
            self.block(where(node), f"{name} is used more than once", Kind.NOT_YET, remedy)
            self.shared.add(name)
        return name

    def count(self, node: Node, call: LayerCall) -> None:
        """Take up one use of a layer."""
        x, weight, bias, make = call.x, call.weight, call.bias, call.make
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
        gets = node in self.exported.with_gradient
        self.uses.append(
            Use(
                name=where(node),
                weight_name=weight_name,
                bias_name=bias_name,
                unknowns=_values(x),
                seen=call.seen,
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
            self.block(where(node), what, *PASSED)
        else:
            self.uses[at] = replace(self.uses[at], activation=activation)
            self.activated.add(at)

    def finish(self, node: Node) -> None:
        results = [argument for argument in node.all_input_nodes]
        if not self.exported.one_tensor or len(results) != 1 or results[0] not in self.source:
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


def _values(node: Any) -> int:
    """The number of values of one sample, or of a parameter."""
    return int(node.meta["val"].numel())
