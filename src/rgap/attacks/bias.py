"""The input of a Linear layer with a bias, read off its gradient.

L. T. Phong, Y. Aono, T. Hayashi, L. Wang and S. Moriai, *Privacy-Preserving Deep Learning via Additively Homomorphic
Encryption*, IEEE TIFS 2018, Eq. 3. For one sample, with k the gradient of the layer's output z = W x + b,

    grad W = k x',    grad b = k,    so    x = (row i of grad W) / k_i    for every i.

Whatever follows the layer, and whatever the loss is, only changes k. Layers in front of it are inverted one by one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.attacks.base import (
    AS_ONE,
    MIXTURE,
    Answer,
    Attack,
    Reconstruction,
    Status,
    gradient_residual,
    judge,
)
from rgap.attacks.labels import of_one
from rgap.checks import Preflight
from rgap.inversion.history import Paths
from rgap.inversion.layer import LayerSystem
from rgap.inversion.recursion import recurse
from rgap.inversion.report import LayerReport, layer_report
from rgap.inversion.rounding import rounding
from rgap.inversion.state import Observation, State
from rgap.nn.layers import Layer
from rgap.nn.losses import MarginLoss
from rgap.nn.network import Network
from rgap.nn.ops import Affine, Gather, Linear, Other
from rgap.target import Target
from rgap.update import Update


@dataclass(frozen=True)
class Bias(Attack):
    """Divide the gradient of a Linear layer's weight by that of its bias, and invert the layers in front of it.

    It takes the Linear layer nearest to the input that has a bias, one position and a gradient. In front of it there
    may be a chain of layers, trained or frozen; behind it, anything.

    Args:
        rank_tolerance: singular values below this fraction of the largest count as zero; as in `Recursive`.
        visible: an estimated error above this fraction of the value range (or of the input's own spread) is called
            ill-conditioned, not exact.
        seed: of the random probe that estimates errors.
    """

    rank_tolerance: float | None = None
    visible: float = 0.01
    seed: int = 0
    partial: ClassVar[bool] = True

    def obstacle(self, target: Target, samples: int) -> str | None:
        places = _places(target, set(target.parameters))
        if isinstance(places, str):
            return places
        return MIXTURE.format(samples) if samples > 1 else None

    def run(self, target: Target, update: Update, checks: Preflight) -> Reconstruction:
        tolerance = update.tolerance
        # Zeros are a gradient that was withheld.
        told = {name: g.double().to(target.device) for name, g in update.gradients.items() if g.any()}

        def ended(
            status: Status, reason: str, answers: tuple[Answer, ...] = (), assumptions: tuple[str, ...] = ()
        ) -> Reconstruction:
            return Reconstruction(
                self.name, status, reason, answers, assumptions, checks, tolerance, target.value_range
            )

        silent = _silent(target, update, set(told))
        if silent is not None:
            return ended(*silent)
        places = _places(target, set(told))
        if isinstance(places, str):
            return ended(Status.NOT_CONVERGED, places)
        reasons: dict[str, None] = {}
        for place in places:
            found = self._invert(target.network, place, told, update.dtype)
            if isinstance(found, str):
                reasons[found] = None
                continue
            x, error, layers = found
            inputs = x.reshape(1, *target.input_shape)
            possible = of_one(target, update)
            residuals = [gradient_residual(target, update, inputs, y) for y in possible.labels]
            best = min(range(len(residuals)), key=residuals.__getitem__)
            label = possible.labels[best].to(inputs.device)
            answer = Answer(inputs, label, _margin(target, inputs, label), residuals[best], error, layers)
            assumptions: tuple[str, ...] = (place.said(layers), possible.assumption)
            if update.samples(target) != 1:
                assumptions = (AS_ONE, *assumptions)
            status, reason = judge(answer, tolerance, target.value_range, self.visible)
            return ended(status, reason, (answer,), assumptions)
        return ended(Status.NOT_CONVERGED, "; ".join(reasons))

    def _invert(
        self, network: Network, place: _Place, told: dict[str, Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, float, tuple[LayerReport, ...]] | str:
        """The model's input, its estimated error, and what happened at each layer; or why there is none."""
        eps = float(torch.finfo(dtype).eps)
        rank_tolerance = eps ** (2 / 3) if self.rank_tolerance is None else self.rank_tolerance
        probe = torch.Generator(device=network.device).manual_seed(self.seed)
        layer = place.layer
        k = _k(network, place.value, told)
        if k is None:
            return f"k of {layer.name} is not told"
        grad, k = layer.pack_weight(told[layer.weight_name][None]), layer.pack_output(k)
        if _simple(layer):
            row, error = divide(grad[0, 0], k.flatten(), dtype)
            x = row.reshape(1, -1, 1)
            report = _linear_report(layer, grad, k, x, error)
        else:
            system = LayerSystem(layer, k, torch.zeros_like(k), rank_tolerance)
            solved = system.solve(torch.zeros_like(k), grad)
            if solved.rank[0] < layer.unknowns:
                return f"the gradient of {layer.name} alone leaves its input open"
            noise = torch.randn(grad.shape, generator=probe, dtype=grad.dtype, device=grad.device)
            moved = system.apply_inverse(torch.zeros_like(k), noise * _rounding(grad, dtype))
            x, error = solved.x, float(moved.square().mean().sqrt())
            report = layer_report(layer, k, torch.zeros_like(k), solved, 0, error, None)
        entry = network.nodes[place.value - 1].reads[0]
        y = layer.unpack_input(x).reshape(1, *network.shapes[entry])
        if entry == 0:
            return y, error, (report,)
        before = _k(network, entry, told)
        state = State(y, torch.zeros_like(y) if before is None else before, None, y.new_full((1,) * y.dim(), error))
        # Where the cotangent goes on by a way that is not known, the layers in front have weight constraints only.
        known = {} if before is None else {name: g[None] for name, g in told.items()}
        front = network.part([segment for segment in network.segments if segment.exit <= entry])
        paths = Paths.begin(state, torch.zeros(1, dtype=torch.long, device=y.device), y.new_zeros(1))
        [found, *_] = recurse(front, Observation(known, eps, rank_tolerance, self.seed), paths)
        if found.stop is not None:
            return str(found.stop)
        return found.value, found.std, (*found.layers, report)


def divide(
    grad_weight: Float[Tensor, "o n"], grad_bias: Float[Tensor, " o"], dtype: torch.dtype
) -> tuple[Float[Tensor, " n"], float]:
    """The mean of all rows of grad W / grad b, each with its inverse variance.

    A row's noise is the rounding of the gradient, and what the rows disagree by if that is more.

    Args:
        grad_bias: not all zero; rows where it is zero tell nothing and are left out.
        dtype: in which the gradient was sent.

    Returns:
        x, and its estimated error (root mean square).
    """
    # Squares of a saturated loss's gradient would be lost; of quotients to the largest k they are not.
    scale = grad_bias.abs().max()
    k = grad_bias / scale
    rows = k != 0
    grad, k = grad_weight[rows] / scale, k[rows]
    of_weight = (_rounding(grad_weight[rows], dtype) / scale).square().mean(1)
    of_bias = (_rounding(grad_bias[rows], dtype) / scale).square() * (grad / k[:, None]).square().mean(1)
    disagree = (grad - torch.outer(k, k @ grad / (k @ k))).square().mean()
    noise = (of_weight + of_bias + disagree).sqrt() / k.abs()
    # k divides the weight and not the row: a tiny k then overflows nowhere.
    least = noise.min()
    weight = (least / noise).square()
    x = (weight / k) @ grad / weight.sum()
    return x, float(least / weight.sum().sqrt())


def _rounding(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounding, that of values too small for the type's full precision included."""
    limits = torch.finfo(dtype)
    return rounding(grad, limits.eps) + limits.eps * limits.smallest_normal


def _linear_report(layer: Layer, grad: Tensor, k: Tensor, x: Tensor, error: float) -> LayerReport:
    rows = int((k != 0).sum())
    return LayerReport(
        name=layer.name,
        unknowns=layer.unknowns,
        weight_rows=0,
        gradient_rows=rows * layer.unknowns,
        rank=layer.unknowns,
        condition=1.0,
        weight_residual=0.0,
        gradient_residual=float((layer.grad_weight(x, k) - grad).norm() / grad.norm()) if grad.any() else 0.0,
        error=error,
        dead_units=layer.outputs - rows,
        method="bias",
    )


def _margin(target: Target, inputs: Tensor, label: Tensor) -> float:
    if not isinstance(target.loss, MarginLoss):
        return math.nan
    with torch.no_grad():
        return float(label) * float(target.outputs(inputs))


@dataclass(frozen=True)
class _Place:
    """Where the input is read off."""

    layer: Layer
    value: int
    """What the layer puts out, whose k is told."""
    by: str
    """The parameter whose gradient tells it."""

    def said(self, layers: tuple[LayerReport, ...]) -> str:
        name = self.layer.name
        if _simple(self.layer):
            source = f"the input of {name} is grad W / grad b, the mean of its rows"
            if self.by != self.layer.bias_name:
                source = f"{source}, with the gradient of {self.by} for that of b"
        else:
            source = f"the gradient of {self.by} is k of {name}, whose gradient rows alone tell its input"
        front = layers[:-1]
        if not front:
            return source
        alone = [each.name for each in front if not each.gradient_rows]
        by_weights = f", {' and '.join(alone)} by weights alone" if alone else ""
        return f"{source}; {' and '.join(each.name for each in front)} in front of it inverted{by_weights}"


def _simple(layer: Layer) -> bool:
    """Whether every row of the weight's gradient is a multiple of the input."""
    whole = layer.seen == layer.unknowns  # a stride may pass over pixels, and padding may be all that is read
    return whole and layer.positions == 1 and layer.offsets == 1 and layer.groups == 1


def _places(target: Target, told: Collection[str]) -> list[_Place] | str:
    """The layers whose k is told and that the input reaches on one way, the nearest first; or why there are none.

    Args:
        told: names of the gradients that can be used.
    """
    network = _network(target)
    found = [] if network is None else list(_told_layers(network, told))
    if network is None or not found:
        layers = ", ".join(use.name for use in target.graph.uses) or "not known"
        return (
            f"no Linear layer with a bias and one position whose gradients were sent; the model's layers are {layers}"
        )
    between = {place: _between(network, network.nodes[place.value - 1].reads[0]) for place in found}
    open_ones = [place for place, reason in between.items() if reason is None]
    if open_ones:
        return open_ones
    names = " or ".join(place.layer.name for place in found)
    reasons = "; ".join(dict.fromkeys(reason for reason in between.values() if reason is not None))
    return f"the input does not reach {names} through layers alone: {reasons}"


def _network(target: Target) -> Network | None:
    """None if the model cannot be followed."""
    try:
        return target.network
    except NotImplementedError:
        return None


def _told_layers(network: Network, told: Collection[str]) -> Iterator[_Place]:
    for place, node in enumerate(network.nodes):
        op = node.op
        if isinstance(op, Linear) and op.has_gradient and op.layer.weight_name in told:
            by = _told_by(network, place + 1, told)
            if by is not None:
                yield _Place(op.layer, place + 1, by)


def _own(network: Network, value: int, told: Collection[str]) -> str | None:
    """The parameter whose gradient is k of this value, if there is one that was told."""
    name = network.nodes[value - 1].op.cotangent_parameter if value else None
    return name if name in told else None


def _told_by(network: Network, value: int, told: Collection[str]) -> str | None:
    """The parameter whose gradient is k of this value, or of one that it goes into alone and unchanged but for a
    known factor."""
    while value:
        own = _own(network, value, told)
        if own is not None:
            return own
        readers = network.readers[value]
        if len(readers) != 1 or not isinstance(network.nodes[readers[0]].op, (Affine, Gather)):
            return None
        value = readers[0] + 1
    return None


def _k(network: Network, value: int, told: Mapping[str, Tensor]) -> Tensor | None:
    """The gradient of a value, as far as gradients of biases and the like tell it without any slope."""
    own = _own(network, value, told)
    if own is not None:
        return told[own].reshape(1, *network.shapes[value])
    return network.cotangent_of(value, lambda behind: _k(network, behind, told), {})


def _between(network: Network, value: int) -> str | None:
    """What stands between the input and a value, for a message; None if nothing that is known beforehand."""
    segments = [segment for segment in network.segments if segment.exit <= value]
    if (segments[-1].exit if segments else 0) != value:
        return f"{network.nodes[value - 1].op.name}: one of several ways"
    for segment in reversed(segments):
        for place in segment.nodes:
            op = network.nodes[place].op
            lost = isinstance(op, (Affine, Gather)) and op.invert(_zeros(network, place)) is None
            if isinstance(op, Other) or (lost and not segment.block):
                return f"{op.name}: {op.what if isinstance(op, Other) else op.loses}"
    return None


def _zeros(network: Network, place: int) -> Tensor:
    """Zeros in the shape of what an operation puts out."""
    return torch.zeros(1, *network.nodes[place].shape, dtype=torch.float64, device=network.device)


def _silent(target: Target, update: Update, told: Collection[str]) -> tuple[Status, str] | None:
    """How the attack ends where the gradients that it needs were sent, and are zero."""
    network = _network(target)
    if network is None:
        return None
    sent = list(_told_layers(network, set(update.gradients)))
    if not sent or any(True for _ in _told_layers(network, told)):
        return None
    names = " and ".join(dict.fromkeys(place.by for place in sent))
    if any(place.layer.weight_name in told for place in sent):
        return Status.NOT_CONVERGED, f"the gradient of {names} was withheld: it is zero, that of the weight is not"
    return Status.GRADIENT_ZERO, f"the gradient of {names} is zero: a saturated loss, or all units after it dead"
