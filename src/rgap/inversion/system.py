"""All constraints of a network's layers on its inputs, jointly (R-GAP's virtual constraints, Section 4).

Of b samples whose gradients were added up, with value and cotangent known at the network's output:

    D (y_i - F(x_i)) = 0                          for each sample i: its weight rows (Eq. 16)
    grad W_l - sum over i of K_l(x_i) x_li = 0    for each layer l: gradient rows, which all samples share (Eq. 15)

F is linear but for the activations: with their slopes fixed, every row is linear in the inputs. Whether the rows
become a matrix is the solver's affair. b samples are one layer on b times as many pixels; so nothing but the sum over
samples in the gradient rows sets a batch apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.rounding import rounding
from rgap.inversion.state import State
from rgap.nn.activations import Identity
from rgap.nn.batch_norm import BatchNorm, OwnBatchNorm
from rgap.nn.layers import Layer
from rgap.nn.network import Network
from rgap.nn.ops import Elementwise, Linear
from rgap.nn.pools import MaxPool


@dataclass(frozen=True, eq=False)
class Linearisation:
    """All values of a network at its inputs, with what a first-order step needs."""

    values: list[Tensor]
    """By value id, (b, *shape)."""
    slopes: dict[int, Tensor]
    """Of every elementwise operation, by its node."""
    cotangents: list[Tensor | None]
    """By value id (Eq. 6); None where no gradient gets to."""

    @property
    def x(self) -> Float[Tensor, "b ..."]:
        return self.values[0]

    @property
    def single(self) -> Linearisation:
        """In float32."""
        return Linearisation(
            [value.float() for value in self.values],
            {node: slope.float() for node, slope in self.slopes.items()},
            [None if k is None else k.float() for k in self.cotangents],
        )


@dataclass(frozen=True, eq=False)
class Rows:
    """One number for each constraint, or d of them: what is on the right, what is missed, or what is noise."""

    weight: Tensor
    """Of the output, (d, b, *shape)."""
    gradient: tuple[Tensor, ...]
    """Of each layer whose gradient is known, (d, g, j, i)."""


class ConstraintSystem:
    """The constraints on the inputs of b samples. Knows no solver, no prior and no attack."""

    def __init__(
        self, network: Network, output: State, gradients: Mapping[str, Tensor], eps: float, coupled: bool = False
    ):
        """
        Args:
            output: value and cotangent of the network's output, (b, *shape).
            gradients: by parameter name, in the parameters' shapes; what is missing was not sent.
            eps: relative rounding of the gradients.
            coupled: whether cotangents are differentiated too, as they always are where samples depend on each other:
                else slopes are taken for fixed.
        """
        self.network, self.output, self.coupled = network, output, coupled or network.coupled
        self.eps, self._sent = max(eps, network.told_precision), gradients
        self.row_weight = torch.ones_like(output.value) if output.row_weight is None else output.row_weight
        self.nodes = tuple(
            at
            for at, node in enumerate(network.nodes)
            if isinstance(node.op, Linear) and node.op.has_gradient and node.op.layer.weight_name in gradients
        )
        """Those of the layers whose gradients are known, from the input to the output."""
        self.gradients = tuple(layer.pack_weight(gradients[layer.weight_name][None]) for layer in self.layers)
        self._biases = {
            at: gradients[layer.bias_name]
            for at, layer in zip(self.nodes, self.layers, strict=True)
            if layer.bias_name is not None and layer.bias_name in gradients
        }

    def differentiated(self) -> ConstraintSystem:
        """The same, with cotangents differentiated too."""
        return ConstraintSystem(self.network, self.output, self._sent, self.eps, True)

    @cached_property
    def single(self) -> ConstraintSystem | None:
        """The same in float32, for products that need no more; None where that cannot be had."""
        network = None if self.coupled else self.network.single
        if network is None:
            return None
        sent = {name: grad.float() for name, grad in self._sent.items()}
        return ConstraintSystem(network, self.output.single, sent, self.eps)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Those whose gradients are known."""
        ops = (self.network.nodes[at].op for at in self.nodes)
        return tuple(op.layer for op in ops if isinstance(op, Linear))

    @property
    def samples(self) -> int:
        return len(self.output.value)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Of the inputs, (b, *input_shape)."""
        return (self.samples, *self.network.input_shape)

    @property
    def unknowns(self) -> int:
        return self.samples * self.output.value.new_zeros(self.network.input_shape).numel()

    @property
    def weight_rows(self) -> int:
        """In use."""
        return int((self.row_weight > 0).sum())

    @property
    def gradient_rows(self) -> int:
        return sum(layer.gradient_rows for layer in self.layers)

    @property
    def rank_at_most(self) -> int:
        """By count, from the output on: rows behind a value tell no more of it than it has numbers."""
        rows, network = self.weight_rows, self.network
        of_node = dict(zip(self.nodes, self.layers, strict=True))
        for segment in reversed(network.segments):
            rows += sum(of_node[at].gradient_rows for at in segment.nodes if at in of_node)
            rows = min(rows, self.samples * prod(network.shapes[segment.entry]))
        return rows

    @cached_property
    def noise_ratios(self) -> tuple[float, ...]:
        """Of each layer whose gradient is known, the variance of the output's error over that of the gradient's; 0
        where the gradient is zero."""
        value = self.output.value
        of_output = float((self.output.std.expand(value.shape) * self.row_weight).square().mean())
        of_output = max(of_output, self.eps**2 * float(value.square().mean()))
        variances = (float(rounding(grad, self.eps).square().mean()) for grad in self.gradients)
        return tuple(of_output / each if each > 0 else 0.0 for each in variances)

    @property
    def movable_rows(self) -> int:
        """Gradient rows that a slope behind them may move."""
        pairs = zip(self.nodes, self.layers, strict=True)
        return sum(layer.gradient_rows for node, layer in pairs if self.curved_after(node))

    @property
    def kinked(self) -> bool:
        """Whether there are units whose side of a kink is to be found."""
        return any(activation.kinked for _, activation in self.network.activations)

    @property
    def smooth(self) -> bool:
        """Whether gradient rows are a smooth function of the inputs, and not a linear one."""
        maxima = any(isinstance(node.op, MaxPool) for node in self.network.nodes)
        return not self.kinked and not maxima and any(map(self.curved_after, self.nodes))

    def curved_after(self, node: int) -> bool:
        """Whether the cotangent there depends on the inputs: a slope behind it does, or a batch norm's sums."""
        sums = any(isinstance(each.op, (BatchNorm, OwnBatchNorm)) for each in self.network.nodes[node + 1 :])
        slopes = self.network.activations
        return sums or any(at > node and not isinstance(activation, Identity) for at, activation in slopes)

    def linearise(self, x: Float[Tensor, "b ..."], guess: Mapping[int, Tensor] | None = None) -> Linearisation:
        """Values, slopes and cotangents of every node.

        Args:
            guess: values of which something better is known than that they come of x, by value id. An elementwise
                operation that reads one of them is replaced by its tangent there.
        """
        guess = {} if guess is None else guess
        values, slopes = [x], {}
        for at, node in enumerate(self.network.nodes):
            read = [values[each] for each in node.reads]
            if isinstance(node.op, Elementwise):
                z = guess.get(node.reads[0], read[0])
                slopes[at] = node.op.activation.slope(z)
                values.append(node.op.activation(z) + slopes[at] * (read[0] - z))
            else:
                values.append(node.op.forward(*read))
        return Linearisation(values, slopes, self.cotangents(values, slopes))

    def cotangents(self, values: list[Tensor], slopes: Mapping[int, Tensor]) -> list[Tensor | None]:
        """The gradient of the loss with respect to every value (Eq. 6)."""
        return self.network.cotangents(values, slopes, self.output.cotangent)

    def with_slopes(self, at: Linearisation, slopes: dict[int, Tensor]) -> Linearisation:
        """The same values, with other slopes behind them."""
        return Linearisation(at.values, slopes, self.cotangents(at.values, slopes))

    def k(self, at: Linearisation, node: int) -> Float[Tensor, "b o p"]:
        """The gradient of the loss with respect to what a layer puts out."""
        op, k = self.network.nodes[node].op, at.cotangents[node + 1]
        assert isinstance(op, Linear)
        return op.layer.pack_output(torch.zeros_like(at.values[node + 1]) if k is None else k)

    def residual(self, at: Linearisation) -> Rows:
        """What the inputs leave of the right-hand sides; not weighted."""
        pairs = zip(self.gradients, self.made(at), strict=True)
        return Rows((self.output.value - at.values[-1])[None], tuple(grad - own for grad, own in pairs))

    def made(self, at: Linearisation) -> list[Float[Tensor, "1 g j i"]]:
        """The gradients of all layers' weights at the inputs."""
        found = []
        for node, layer in zip(self.nodes, self.layers, strict=True):
            x = layer.pack_input(at.values[self.network.nodes[node].reads[0]])
            found.append(layer.batch_gradient(x, self.k(at, node)))
        return found

    def made_biases(self, at: Linearisation) -> dict[str, Tensor]:
        """Those of the biases whose gradients were sent, by parameter name."""
        pairs = zip(self.nodes, self.layers, strict=True)
        return {layer.bias_name or "": self.k(at, node).sum((0, 2)) for node, layer in pairs if node in self._biases}

    def distance(self, at: Linearisation) -> float:
        """From the gradients at the inputs to the given ones, relatively, biases included; or that of the output, as
        far as its own error does not explain it, if it is larger."""
        return self._distance(at, self.residual(at))

    def _distance(self, at: Linearisation, missed: Rows) -> float:
        wrong = sum(float(each.square().sum()) for each in missed.gradient)
        size = sum(float(each.square().sum()) for each in self.gradients)
        for node, grad in self._biases.items():
            wrong += float((grad - self.k(at, node).sum((0, 2))).square().sum())
            size += float(grad.square().sum())
        return max((wrong / size) ** 0.5 if size else 0.0, self._missed_output(missed))

    def distance_by_layer(self, at: Linearisation) -> float:
        """The same with every layer's gradient in units of its own size, the root of the sum of squares: a unit on its
        wrong side spoils one layer, which may hardly count in all."""
        missed = self.residual(at)
        pairs = [pair for pair in zip(missed.gradient, self.gradients, strict=True) if bool(pair[1].any())]
        each = sum(float(m.square().sum() / g.square().sum()) for m, g in pairs)
        return max(self._distance(at, missed), math.sqrt(each))

    def _missed_output(self, missed: Rows) -> float:
        known, std = self.output.value * self.row_weight, self.output.std.expand(self.output.value.shape)
        size = float(known.norm())
        beyond = float((missed.weight[0] * self.row_weight).norm()) - 3 * float((std * self.row_weight).norm())
        return max(0.0, beyond) / size if size else max(0.0, beyond)

    def noise(self, generator: torch.Generator) -> Rows:
        """One draw of the noise of all right-hand sides: the output's error, and the rounding of the gradients."""

        def draw(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)

        value = self.output.value
        weight = draw(value) * self.output.std.expand(value.shape)
        return Rows(weight[None], tuple(draw(grad) * rounding(grad, SUMS * self.eps) for grad in self.gradients))


SUMS = 3
"""A gradient is a sum over positions, each of them rounded: it is off by up to about so many roundings."""
