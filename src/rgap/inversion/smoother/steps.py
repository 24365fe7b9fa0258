"""The steps of a client on one sample through a chain of layers with kinks between them, as far as values are known.

Values of the chain are normal, and so is what an activation makes of them: kinks are rounded off, each as far as its
own value is in doubt. The mean gradient of all steps is nearly that at the weights in their middle, but with each
unit's output and slope averaged over where it stands in the steps: those places differ by little from value to value,
and by much less from guess to guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.smoother.kinks import passed
from rgap.inversion.walk import Client, Difference, Plan, Weights
from rgap.nn.activations import Identity
from rgap.nn.layers import Layer
from rgap.nn.network import Network
from rgap.nn.ops import Elementwise, Linear


def is_kinked_chain(network: Network, names: Sequence[str]) -> bool:
    """Whether it is a chain of trained layers, linear operations and activations of two positive slopes."""
    trained = set()
    for segment, node in zip(network.segments, network.nodes, strict=False):
        op = node.op
        if segment.block or not (op.linear or (isinstance(op, Elementwise) and _two_slopes(op))):
            return False
        if isinstance(op, Linear) and op.has_gradient and not op.layer.transposed:
            trained |= {op.layer.weight_name, op.layer.bias_name}
    last = network.nodes[-1].op
    return isinstance(last, Linear) and last.has_gradient and set(names) <= trained


def _two_slopes(op: Elementwise) -> bool:
    activation, like = op.activation, torch.ones(1, 1, 1, 1)
    if isinstance(activation, Identity):
        return True
    straight = activation.kinked and activation.homogeneous
    return straight and bool((activation.slope(like) == 1).all() and (activation(-like) < 0).all())


@dataclass(frozen=True, eq=False)
class Guess:
    """What is known of a chain's values at the weights in the middle of the steps."""

    x: Float[Tensor, "1 ..."]
    z: Sequence[Tensor]
    """In front of each activation, (1, *shape)."""
    std: Sequence[Tensor]
    """Of these."""
    places: Sequence[Tensor]
    """Where each of them stands in the steps, less where it does in the middle, (steps, *shape)."""
    shares: Sequence[Tensor]
    """By how much more often each of them is above zero than its distribution says: as gradient rows have it."""


@dataclass(frozen=True, eq=False)
class Made:
    """What the steps make of a guess."""

    gradient: Mapping[str, Tensor]
    """The mean of all steps' gradients, as they count in the difference."""
    z: list[Tensor]
    """In front of each activation, (steps, *shape)."""
    trail: list[dict[str, Tensor]]
    """The weights before each step, and after the last."""
    each: list[dict[str, Tensor]]
    """Gradients of the steps."""


@dataclass(frozen=True, eq=False)
class Middle:
    """The chain at the weights in the middle, with each unit averaged over its places."""

    values: list[Tensor]
    slopes: dict[int, Tensor]
    variances: list[Tensor]
    """Of each activation's slopes."""
    residuals: list[Tensor]
    """Of each activation, the variance of what the straight line leaves."""
    apart: list[Tensor]
    """What is guessed in front of each activation, less what the layer in front makes of its guess."""
    cotangents: list[Tensor | None]


@dataclass(frozen=True, eq=False)
class KinkedSteps:
    """The steps of one sample."""

    client: Client
    plan: Plan
    difference: Difference
    labels: Float[Tensor, " 1"]

    @cached_property
    def names(self) -> list[str]:
        return [name for name in self.difference.sent if self.difference.noise[name]]

    @cached_property
    def scale(self) -> float:
        """What the mean gradient is multiplied by in the difference."""
        return float(sum(self.plan.expansion[-1][1]))

    @cached_property
    def shares(self) -> list[float]:
        """What each step's gradient counts in their mean."""
        return [c / self.scale for c in self.plan.expansion[-1][1]]

    @cached_property
    def gradient(self) -> dict[str, Tensor]:
        """The mean gradient of all steps that was sent."""
        decay, start = self.plan.expansion[-1][0], self.client.weights
        sent = self.difference.sent
        return {name: (sent[name] - decay * start[name]) / self.scale for name in self.names}

    @cached_property
    def size(self) -> dict[str, float]:
        return {name: float(g.square().mean().sqrt()) for name, g in self.gradient.items()}

    @cached_property
    def middle_network(self) -> Network:
        trail = self.trail(None)
        names = self.client.weights
        pairs = list(zip(self.shares, trail, strict=False))
        return self.client.network({name: sum((c * w[name] for c, w in pairs), 0 * names[name]) for name in names})

    @cached_property
    def activations(self) -> list[int]:
        return [node for node, _ in self.middle_network.activations]

    @cached_property
    def layers(self) -> list[int]:
        nodes = self.middle_network.nodes
        return [at for at, node in enumerate(nodes) if isinstance(node.op, Linear) and node.op.has_gradient]

    @cached_property
    def below(self) -> list[Tensor]:
        """Of each activation the slopes below zero."""
        network = self.middle_network
        like = next(iter(self.client.weights.values()))
        return [f.slope(-like.new_ones(1, *network.shapes[node + 1])) for node, f in network.activations]

    def reads(self, node: int) -> int:
        """The id of the value that a node reads."""
        return self.middle_network.nodes[node].reads[0]

    def trail(self, gradients: Sequence[Weights] | None, tied: bool = True) -> list[dict[str, Tensor]]:
        """The weights before each step and after the last, from the steps' gradients; tied to what was sent, so that
        only by how far gradients differ between steps counts."""
        steps, start, sent = self.plan.steps, self.client.weights, self.difference.sent
        if gradients is None:
            found, end = [dict(start) for _ in self.plan.expansion], dict(sent)
        else:
            found = [self.now(gradients[:step]) for step in range(len(self.plan.expansion))]
            if not tied:
                return found
            end = {name: sent[name] - (found[-1][name] - w) for name, w in start.items()}
        return [{n: w + step / steps * end[n] for n, w in each.items()} for step, each in enumerate(found)]

    def run(self, guess: Guess, apart: Sequence[Tensor], before: Made | None, tied: bool) -> Made:
        """All steps, from the guess, with what its layers do not agree by added to every step's values.

        Args:
            before: the steps of a guess before, whose gradients tell the weights where they are tied.
        """
        gradients = list[dict[str, Tensor]]()
        fixed = self.trail(None if before is None else before.each) if tied else []
        zs: list[list[Tensor]] = []
        for step in range(self.plan.steps):
            weights = fixed[step] if tied else self.now(gradients)
            found, z = self._step(self.client.network(weights), guess, apart)
            gradients.append(found)
            zs.append(z)
        mean = {
            name: sum((c * g[name] for c, g in zip(self.shares, gradients, strict=True)), 0 * self.gradient[name])
            for name in self.names
        }
        return Made(mean, [torch.cat(z) for z in zip(*zs, strict=True)], self.trail(gradients, tied), gradients)

    def now(self, gradients: Sequence[Weights]) -> dict[str, Tensor]:
        """The weights behind the steps that had these gradients."""
        decay, c = self.plan.expansion[len(gradients)]
        start = self.client.weights
        pairs = list(zip(c, gradients, strict=True))
        return {name: (1 + decay) * w + sum((a * g[name] for a, g in pairs), 0 * w) for name, w in start.items()}

    def _step(self, network: Network, guess: Guess, apart: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        values, slopes, zs = [guess.x], dict[int, Tensor](), list[Tensor]()
        for at, node in enumerate(network.nodes):
            read = values[node.reads[0]]
            if at not in self.activations:
                values.append(node.op.forward(read))
                continue
            j = len(zs)
            z = values[node.reads[0]] = read + apart[j]
            zs.append(z)
            out = passed(z, guess.std[j], self.below[j])
            share = self._weighed(guess, j)
            upper = (out.upper + guess.shares[j] * out.upper * (1 - out.upper) / share).clamp(0.0, 1.0)
            values.append(out.mean)
            slopes[at] = self.below[j] + (1 - self.below[j]) * upper
        k = self.output_gradient(values[-1])
        found = self.rows(network, values, network.cotangents(values, slopes, k))
        return {name: found[name][0] if name in found else 0 * w for name, w in self.client.weights.items()}, zs

    def _weighed(self, guess: Guess, j: int) -> Tensor:
        """The mean of P (1 - P) over the steps."""
        upper = passed(guess.z[j] + guess.places[j], guess.std[j], self.below[j]).upper
        return (upper * (1 - upper)).mean(0, keepdim=True).clamp(min=1e-12)

    def output_gradient(self, value: Tensor) -> Tensor:
        """k of the network's output."""
        return self.client.loss.output_gradient(value.reshape(len(value), -1), self.labels).reshape(value.shape)

    def output_curvature(self, value: Tensor) -> Float[Tensor, "o o"]:
        """How k of the network's output changes with the output."""
        flat = value.flatten()
        step = 1e-6 * max(1.0, float(flat.abs().max()))
        columns = []
        for unit in torch.eye(len(flat), dtype=flat.dtype).to(flat):
            up, down = (self.output_gradient((flat + sign * step * unit).reshape(value.shape)) for sign in (1, -1))
            columns.append((up - down).flatten() / (2 * step))
        return torch.stack(columns, 1)

    def rows(self, network: Network, values: Sequence[Tensor | None], ks: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """The gradients of all parameters that these values and cotangents give, of one or of each, (s, *shape)."""
        found = {}
        for at in self.layers:
            op, k = network.nodes[at].op, ks[at + 1]
            assert isinstance(op, Linear)
            read = values[network.nodes[at].reads[0]]
            if k is None or read is None:
                continue
            layer, k, x = op.layer, op.layer.pack_output(k), op.layer.pack_input(read)
            grad = gradients(layer, layer.patches(x), k)
            found[layer.weight_name] = grad.reshape(len(grad), *self.client.weights[layer.weight_name].shape)
            if layer.bias_name is not None and layer.bias_name in self.difference.sent:
                found[layer.bias_name] = k.sum(-1).expand(len(grad), -1)
        return found

    def middle(self, guess: Guess) -> Middle:
        """The chain with each unit averaged over its places."""
        network, values, slopes = self.middle_network, [guess.x], dict[int, Tensor]()
        variances, residuals, apart = list[Tensor](), list[Tensor](), list[Tensor]()
        for at, node in enumerate(network.nodes):
            read = values[node.reads[0]]
            if at not in self.activations:
                values.append(node.op.forward(read))
                continue
            j = len(apart)
            apart.append(guess.z[j] - read)
            values[node.reads[0]] = guess.z[j]
            out = passed(guess.z[j] + guess.places[j], guess.std[j], self.below[j])
            values.append(out.mean.mean(0, keepdim=True))
            upper = (out.upper.mean(0, keepdim=True) + guess.shares[j]).clamp(0.0, 1.0)
            slopes[at] = self.below[j] + (1 - self.below[j]) * upper
            variances.append(out.slope_variance.mean(0, keepdim=True))
            residuals.append(out.residual.mean(0, keepdim=True))
        k = self.output_gradient(values[-1])
        return Middle(values, slopes, variances, residuals, apart, network.cotangents(values, slopes, k))


def gradients(layer: Layer, patches: Float[Tensor, "a g i p"], k: Float[Tensor, "b o p"]) -> Float[Tensor, "n g j i"]:
    """Of the layer's weight, by what it reads at each position and its output's cotangents: one product for each group
    where one of both is the same for all."""
    g, j, i = layer.weight.shape
    k = k.reshape(len(k), g, j, k.shape[-1])
    if len(patches) == 1:
        return (k.movedim(1, 0).flatten(1, 2) @ patches[0].mT).reshape(g, len(k), j, i).movedim(1, 0)
    if len(k) == 1:
        return (patches.movedim(1, 0).flatten(1, 2) @ k[0].mT).reshape(g, len(patches), i, j).movedim(1, 0).mT
    return k @ patches.mT
