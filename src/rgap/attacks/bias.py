"""The input of a Linear layer with a bias, read off its gradient.

L. T. Phong, Y. Aono, T. Hayashi, L. Wang and S. Moriai, *Privacy-Preserving Deep Learning via Additively Homomorphic
Encryption*, IEEE TIFS 2018, Eq. 3. For one sample, with k the gradient of the layer's output z = W x + b,

    grad W = k x',    grad b = k,    so    x = (row i of grad W) / k_i    for every i.

Whatever follows the layer, and whatever the loss is, only changes k. Layers in front of it are inverted one by one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.attacks.base import (
    AS_ONE,
    MIXTURE,
    Answer,
    Attack,
    LayerReport,
    Reconstruction,
    Status,
    gradient_residual,
    judge,
    residual_tolerance,
    rounding,
)
from rgap.attacks.labels import of_one
from rgap.attacks.trail import Step, Trail
from rgap.checks import Preflight
from rgap.constraints import System
from rgap.nn.chain import Chain
from rgap.nn.graph import Use
from rgap.nn.layers import Layer
from rgap.nn.losses import MarginLoss
from rgap.target import Target
from rgap.update import Update

DRAWS = 4
"""Inputs of noise at which a gradient other than zero is looked for."""


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
        place = _first(target, _linear(target, target.parameters), target.parameters)
        if isinstance(place, str):
            return place
        return MIXTURE.format(samples) if samples > 1 else None

    def run(self, target: Target, update: Update, checks: Preflight) -> Reconstruction:
        tolerance = update.tolerance
        gradients = {name: g.double().to(target.device) for name, g in update.gradients.items()}

        def ended(
            status: Status, reason: str, answers: tuple[Answer, ...] = (), assumptions: tuple[str, ...] = ()
        ) -> Reconstruction:
            return Reconstruction(
                self.name, status, reason, answers, assumptions, checks, tolerance, target.value_range
            )

        place = _find(target, gradients)
        if not isinstance(place, _Place):
            return ended(*place)
        x, error, layers = self._invert(place, gradients, update.dtype)
        inputs = x.reshape(1, *target.input_shape)
        possible = of_one(target, update)
        residuals = [gradient_residual(target, update, inputs, y) for y in possible.labels]
        best = min(range(len(residuals)), key=residuals.__getitem__)
        label = possible.labels[best].to(inputs.device)
        answer = Answer(inputs, label, _margin(target, inputs, label), residuals[best], error, layers)
        assumptions: tuple[str, ...] = (place.said, possible.assumption)
        if update.samples(target) != 1:
            assumptions = (AS_ONE, *assumptions)
        status, reason = judge(answer, tolerance, target.value_range, self.visible)
        return ended(status, reason, (answer,), assumptions)

    def _invert(
        self, place: _Place, gradients: dict[str, Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, float, tuple[LayerReport, ...]]:
        """The model's input, its estimated error, and what happened at each layer."""
        eps = float(torch.finfo(dtype).eps)
        rank_tolerance = eps ** (2 / 3) if self.rank_tolerance is None else self.rank_tolerance
        after = place.linear
        probe = torch.Generator(device=after.weight.device).manual_seed(self.seed)
        grad, k = after.pack_weight(gradients[after.weight_name][None]), gradients[str(after.bias_name)]
        row, error = divide(grad[0, 0], k, dtype)
        x, k = row.reshape(1, -1, 1), k.reshape(1, -1, 1)
        report = _linear_report(after, grad, k, x, error)
        trail = Trail()
        for layer, heard in zip(reversed(place.front), reversed(place.heard), strict=True):
            inverse = layer.activation.invert(layer.pack_output(after.unpack_input(x)), x.new_tensor([error]))
            z_error = error / inverse.slope.clamp(min=1e-12)
            k = layer.k_from(after, k) * inverse.slope  # Eq. 6 of R-GAP
            # Without gradient rows there are weight rows alone.
            own = k if heard else torch.zeros_like(k)
            grad = layer.pack_weight(gradients[layer.weight_name][None]) if heard else layer.weight[None] * 0
            system = System(layer, own, inverse.weight, rank_tolerance)
            solved = system.solve(inverse.z if layer.bias is None else inverse.z - layer.bias[:, None], grad)
            # What is left of the weight rows is an error of z too, one that the layers after this one did not see.
            z_error = z_error.maximum(solved.weight_misfit[:, None, None])
            error = _error(system, z_error, grad, dtype, probe)
            trail = trail.passed(layer)
            trail.add(Step(own, inverse.z, z_error, solved.x, inverse.weight), layer, system, solved, 0, error, False)
            if not heard:
                trail.layers[0] = replace(trail.layers[0], gradient_rows=0, dead_units=0)
            x, after = solved.x, layer
        return after.unpack_input(x), error, (*trail.layers, report)


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


def _error(system: System, z_error: Tensor, grad: Tensor, dtype: torch.dtype, probe: torch.Generator) -> float:
    """Push one draw of the right-hand side's noise through the solver: the root mean square of what comes out."""

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=probe, dtype=like.dtype, device=like.device)

    noise = draw(grad) * _rounding(grad, dtype)
    return float(system.apply_inverse(draw(z_error) * z_error, noise).square().mean().sqrt())


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

    linear: Layer
    front: tuple[Layer, ...]
    """The layers between the model's input and it."""
    heard: tuple[bool, ...]
    """For each of them, whether its gradient is shared and is K x with the k that comes back from `linear`."""

    @property
    def said(self) -> str:
        source = f"the input of {self.linear.name} is grad W / grad b, the mean of its rows"
        if not self.front:
            return source
        alone = [layer.name for layer, heard in zip(self.front, self.heard, strict=True) if not heard]
        by_weights = f", {' and '.join(alone)} by weights alone" if alone else ""
        return f"{source}; {' and '.join(layer.name for layer in self.front)} in front of it inverted{by_weights}"


def _find(target: Target, gradients: dict[str, Tensor]) -> _Place | tuple[Status, str]:
    """The Linear layer nearest to the input that tells its input, or how the attack ends without one."""
    told = [name for name, g in gradients.items() if g.any()]
    linear = _linear(target, gradients)
    alive = [use for use in linear if use.bias_name in told]
    if linear and not alive:
        names = " and ".join(str(use.bias_name) for use in linear)
        if any(use.weight_name in told for use in linear):
            return Status.NOT_CONVERGED, f"the gradient of {names} was withheld: it is zero, that of the weight is not"
        return Status.GRADIENT_ZERO, f"the gradient of {names} is zero: a saturated loss, or all units after it dead"
    place = _first(target, alive, told)
    return (Status.NOT_CONVERGED, place) if isinstance(place, str) else place


def _linear(target: Target, names: Collection[str]) -> list[Use]:
    """The Linear layers with grad W = k x' and grad b = k, both among the gradients of these names."""
    found = []
    for use in target.graph.uses:
        if use.make is not None and use.weight_name in names and use.bias_name in names:
            weight = target.parameters[str(use.weight_name)]
            if weight.dim() == 2 and use.outputs == len(weight):
                found.append(use)
    return found


def _first(target: Target, linear: Sequence[Use], names: Collection[str]) -> _Place | str:
    """The first of these layers that the input reaches through layers that can be inverted, or why there is none.

    Args:
        names: of the gradients that can be used.
    """
    if not linear:
        layers = ", ".join(use.name for use in target.graph.uses) or "not known"
        return (
            f"no Linear layer with a bias and one position whose gradients were sent; the model's layers are {layers}"
        )
    place = next((found for use in linear if (found := _place(target, use, names)) is not None), None)
    if place is None:
        layers = " or ".join(use.name for use in linear)
        return f"the input does not reach {layers} through layers alone: {_between(target)}"
    return place


def _place(target: Target, use: Use, names: Collection[str]) -> _Place | None:
    """The layers from the input to this one; None if there is no way back through them."""
    front: list[Use] = []
    at = use
    while not at.mixed and at.before is not None:
        at = target.graph.uses[at.before]
        front.insert(0, at)
    if at.mixed or not all(_invertible(each) for each in front):
        return None
    *before, linear = (each.layer(target._tensors) for each in (*front, use))
    heard = _heard(target, linear, before)
    if heard is None:
        return None
    sent = (layer.weight_name in names for layer in before)
    return _Place(linear, tuple(before), tuple(h and s for h, s in zip(heard, sent, strict=True)))


def _invertible(use: Use) -> bool:
    return use.make is not None and use.weight_name is not None


def _between(target: Target) -> str:
    """What stands in a way through the model, for a message; a frozen layer does not."""
    passed = {use.name for use in target.graph.uses if _invertible(use)}
    named = [f"{o.where}: {o.what}" for o in target.graph.obstacles if o.where not in passed]
    return "; ".join(named) or "it computes its gradients otherwise than its layers tell"


def _heard(target: Target, linear: Layer, front: list[Layer]) -> tuple[bool, ...] | None:
    """Which layers of the front have a gradient that follows from k of `linear`; None if they do not lead to it.

    Asked of the model itself, at an input of noise: the graph does not tell of batch norm, of an activation on the
    input, of a second way from one of these layers to the output, which adds to its k, or of a second use.
    """
    trained = [layer.weight_name in target.parameters for layer in front]
    found = _noise_gradient(target, str(linear.bias_name))
    if found is None:
        return tuple(trained)
    noise, gradients, tolerance = found
    chain = Chain((*front, linear))
    k = gradients[str(linear.bias_name)].reshape(1, -1, 1)
    inputs, outputs = chain.forward(chain[0].pack_input(noise.to(k)))
    if not _follows(linear, inputs[-1], k, gradients, tolerance):
        return None
    for at in reversed(range(len(front))):
        k = chain[at].k_from(chain[at + 1], k) * chain[at].activation.slope(outputs[at])
        trained[at] = trained[at] and _follows(chain[at], inputs[at], k, gradients, tolerance)
    return tuple(trained)


def _noise_gradient(target: Target, name: str) -> tuple[Tensor, dict[str, Tensor], float] | None:
    """An input of noise at which the gradient of this parameter is not zero, all gradients, and how exact they are."""
    low, high = target.value_range or (0.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        noise = low + (high - low) * torch.rand((1, *target.input_shape), generator=generator, dtype=torch.float64)
        for y in target.loss.labels[:2]:
            with torch.random.fork_rng():  # a model with dropout in training mode draws from the global state
                found = target.gradient(noise, torch.tensor([y], dtype=torch.float64))
            if found[name].any():
                tolerance = residual_tolerance(found[name].dtype)
                return noise, {each: g.double() for each, g in found.items()}, tolerance
    return None


def _follows(layer: Layer, x: Tensor, k: Tensor, gradients: dict[str, Tensor], tolerance: float) -> bool:
    """Whether the gradient of the layer's weight is K x."""
    given = layer.pack_weight(gradients[layer.weight_name][None])
    return bool((layer.grad_weight(x, k) - given).norm() <= tolerance * given.norm())
