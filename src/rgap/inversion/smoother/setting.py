"""What all passes share: the steps, what is taken for granted of inputs, and how it goes on from pass to pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.prior import Prior
from rgap.inversion.smoother.information import Information, adjoint
from rgap.inversion.smoother.sides import MOST, most_numbers
from rgap.inversion.smoother.steps import KinkedSteps
from rgap.inversion.weight_rounding import rounded_by
from rgap.linalg.psd import cholesky_solve
from rgap.nn.network import Network
from rgap.nn.ops import Linear


@dataclass(frozen=True)
class Smoothing:
    """How it goes on from pass to pass."""

    apart: float = 0.07
    """Neighbouring values of an input differ by about this part of its range."""
    flat: float = 1e-2
    """Weight of the deviation from the middle of the range, relative to that of the differences."""
    first: float = 1e-3
    """Of a layer's gradient is taken for noise in the first pass, beside the weights' rounding,"""
    begin: float = 1e-2
    """in the second,"""
    cooling: tuple[float, float] = (0.4, 0.7)
    """and in each one after it this part of what it was: where rows miss less than half of their noise, else."""
    most: int = 24
    """Passes."""
    near: float = 1e-2
    """Where values of the input are known to this part of its range, or"""
    far: int = 8
    """after so many passes, the steps themselves are linearised."""
    patience: int = 6
    """Passes that come no nearer, at the end."""
    units: int = 2500
    """Whose slopes are numbers of their own, at the most."""
    open: float = 1e-3
    """Probability times that of the other side, below which a slope is none."""
    draws: int = 48
    """From which the errors of values are estimated."""
    wider: float = 4.0
    """By so much at the most values' errors are taken for larger first, where rows miss more than they may."""
    amiss: float = 1.5
    """Root mean square of a layer's rows, in units of their noise, from which on there is more of that."""


SMOOTHING = Smoothing()
USUAL = (4, 4)
"""Passes, and linearisations of the steps with as many units in doubt as there may be."""
SOLVES = 3
"""Of a pass: with larger errors and with more noise once more."""
PRODUCTS = 62_000
"""With a layer in each step of a linearisation, as they are measured beside other busy processes: some 350 iterations
of two products with the steps' second derivative each, and what two thousand doubts change."""


@dataclass(frozen=True, eq=False)
class Setting:
    """Of all passes."""

    steps: KinkedSteps
    prior: Prior
    """Of an input, or of each of its channels."""
    value_range: tuple[float, float]
    smoothing: Smoothing = SMOOTHING

    @cached_property
    def like(self) -> Tensor:
        return next(iter(self.steps.client.weights.values()))

    @cached_property
    def draw(self) -> torch.Generator:
        return torch.Generator(device=self.like.device).manual_seed(0)

    @cached_property
    def tie(self) -> tuple[Tensor, float]:
        """The prior's matrix, and the weight of the deviation from its centre."""
        weight = (self.smoothing.apart * (self.value_range[1] - self.value_range[0])) ** -2
        parts = math.prod(self.steps.middle_network.input_shape) // math.prod(self.prior.shape)
        matrix = weight * self.prior.matrix(self.like, parts)
        flat = self.smoothing.flat * weight
        matrix.diagonal().add_(flat)
        return matrix, flat

    def noise(self, trail: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The variance of each value of the mean gradient, by the weights' rounding."""
        difference, scale = self.steps.difference, self.steps.scale
        each = rounded_by(trail, difference.sent, difference.eps, difference.own)
        tiny = {name: 1e-9 * self.steps.size[name] for name in self.steps.names}
        return {name: (each[name] / scale).square() + tiny[name] ** 2 for name in self.steps.names}

    def drawn(self, lower: Tensor) -> Float[Tensor, "draws v"]:
        """Of a normal distribution with this factor of its information."""
        drawn = torch.randn(
            len(lower), self.smoothing.draws, generator=self.draw, dtype=lower.dtype, device=lower.device
        )
        found: Tensor = torch.linalg.solve_triangular(lower.mT, drawn, upper=True)
        return found.mT

    def pulled(self, at: int, information: Information) -> Information:
        """Through a linear operation, to the value that it reads."""
        network = self.steps.middle_network
        node, shape, out = network.nodes[at], network.shapes[network.nodes[at].reads[0]], network.shapes[at + 1]
        op, like = node.op, self.like.new_zeros(1, *shape)

        def back(columns: Tensor) -> Tensor:
            if isinstance(op, Linear) and not op.layer.channels_last:
                return adjoint(op.layer, columns)
            return op.vjp(columns.mT.reshape(-1, *out), (like,))[0].flatten(1).mT

        return information.pulled(back)

    def posterior(self, information: Information) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of all values, the latter from draws."""
        known = information.known.clone()
        known.diagonal().add_(1e-9 * float(known.diagonal().mean()))
        lower = torch.linalg.cholesky(known)
        mean = cholesky_solve(information.right[:, None], lower)[:, 0]
        return mean, self.drawn(lower).square().mean(0).sqrt()


def definite(matrix: Tensor) -> Tensor:
    """With as much on the diagonal as rounding may have taken."""
    found = matrix.clone()
    found.diagonal().add_(1e-12 * float(matrix.diagonal().mean()))
    return found


def memory(network: Network) -> int:
    """Bytes that it takes, about: passes half a dozen matrices of the chain's largest value, steps through the local
    steps as many of the input and of all doubts, and what these do to all parameters, in float32."""
    parameters, numbers = _sizes(network)
    through = 6 * 8 * (math.prod(network.input_shape) + numbers) ** 2 + 4 * numbers * parameters
    return max(6 * 8 * max(math.prod(shape) for shape in network.shapes) ** 2, through)


def operations(network: Network) -> float:
    """Of one pass, about: products with all layers, for every number of a value and of all doubts, and three factors,
    in each solve."""
    found, doubts = 3.0 * math.prod(network.input_shape) ** 3, _sizes(network)[1]
    for node in network.nodes:
        if isinstance(node.op, Linear):
            layer = node.op.layer
            each = 2.0 * layer.weight.numel() * layer.positions
            found += each * (layer.outputs * layer.positions + layer.unknowns + 3 * doubts) + layer.unknowns**3
    return SOLVES * found


def operations_to_the_end(network: Network, steps: int) -> float:
    """Of all passes, and of all linearisations of so many local steps: a solve each, what doubts have in common, and
    products with all layers."""
    parameters, doubts = _sizes(network)
    products = 2.0 * PRODUCTS * steps * sum(layer.weight.numel() * layer.positions for layer in network.layers)
    linearised = operations(network) / SOLVES + float(doubts) ** 2 * parameters + products
    return USUAL[0] * operations(network) + USUAL[1] * linearised


def _sizes(network: Network) -> tuple[int, int]:
    """How many numbers all parameters are, and how many there are in doubt at the most."""
    parameters = sum(layer.weight.numel() for layer in network.layers)
    units = sum(math.prod(network.shapes[node + 1]) for node, _ in network.activations)
    return parameters, min(most_numbers(8 * parameters), 2 * MOST, units)
