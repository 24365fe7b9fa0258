"""A client's local steps: what they are by its protocol, and the weights on the way.

    w_T - w_0 = a w_0 + sum over t of c_t g_t(w_t)

with g_t the gradient of step t at the weights before it; a and the c_t follow from rate, momentum, weight decay and
proximal term, in which the weights are linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.weight_rounding import rounded_by
from rgap.nn.activations import LeakyReLU, ReLU
from rgap.nn.losses import Loss
from rgap.nn.network import Network
from rgap.nn.soft import GivenSides

Weights = Mapping[str, Tensor]
Order = Sequence[tuple[int, ...]]
"""Of each step the numbers of its samples."""
ROUNDED = 0.2124
"""The standard deviation of a rounded value's error in units of its type's epsilon times its size: that of a uniform
error of one unit in the last place, over values whose mantissas are distributed as those of products are."""


@dataclass(frozen=True)
class Plan:
    """The steps that a client takes, as its protocol has them."""

    sizes: tuple[int, ...]
    """Samples of each step."""
    epoch: int
    """Steps of each pass over the samples."""
    expansion: tuple[tuple[float, tuple[float, ...]], ...]
    """a and the c of the steps so far, before each step and after the last."""
    shuffled: bool = True
    """Whether each epoch takes the samples in an order of its own."""
    clip_norm: float | None = None
    proximal: float = 0.0
    """Weight of the distance to the first weights, where it is part of what is clipped."""

    @property
    def steps(self) -> int:
        return len(self.sizes)

    @property
    def samples(self) -> int:
        return sum(self.sizes[: self.epoch])


@dataclass(frozen=True, eq=False)
class Client:
    """What the server can compute for the client."""

    loss: Loss
    input_shape: tuple[int, ...]
    weights: Weights
    """Before the first step, in float64."""
    network: Callable[[Weights], Network]
    gradient: Callable[[Weights, Tensor, Tensor], dict[str, Tensor]]
    """Of the mean loss at some weights, for inputs and labels."""
    differentiable: Callable[[Weights, Tensor, Tensor], dict[str, Tensor]]
    """The same as a function that torch.func differentiates; of inputs without their shape, (b, n), too."""


@dataclass(frozen=True)
class Unit:
    """One in one step of one sample."""

    step: int
    sample: int
    """Its number."""
    activation: int
    """Among those with kinks, in the order in which they run."""
    unit: int


Sides = Mapping[Unit, bool]
"""Of units that stand at their kinks, whether they are taken for being above."""


@dataclass(frozen=True, eq=False)
class Walk:
    """The client's weights after some of its steps."""

    client: Client
    plan: Plan
    gradients: tuple[Weights, ...] = ()
    """Of the steps so far."""
    factors: tuple[Tensor | float, ...] = ()
    """What clipping multiplied each of them by."""
    sides: Sides = field(default_factory=dict)
    """Those that are not where the samples have them."""

    @property
    def step(self) -> int:
        return len(self.gradients)

    def moved(self, of: tuple[float, tuple[float, ...]], name: str) -> Tensor:
        """A combination of the first weights and of the gradients that are known."""
        found = of[0] * self.client.weights[name]
        for c, gradient in zip(of[1], self.gradients, strict=False):
            found = found + c * gradient[name]
        return found

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        of = self.plan.expansion[self.step]
        return {name: w + self.moved(of, name) for name, w in self.client.weights.items()}

    @property
    def trail(self) -> list[dict[str, Tensor]]:
        """The weights before each step so far, and behind the last."""
        return [replace(self, gradients=self.gradients[:step]).weights for step in range(self.step + 1)]

    def left(self, difference: Weights) -> dict[str, Tensor]:
        """What the steps so far leave of the whole difference, in units of the next step's gradient."""
        end = self.plan.expansion[-1]
        return {name: (d - self.moved(end, name)) / end[1][self.step] for name, d in difference.items()}

    def without_decay(self, difference: Weights) -> dict[str, Tensor]:
        """The whole difference, less what is due to the first weights."""
        decay = self.plan.expansion[-1][0]
        return {name: d - decay * self.client.weights[name] for name, d in difference.items()}

    @property
    def end(self) -> dict[str, Tensor]:
        """The difference after all steps."""
        return {name: self.moved(self.plan.expansion[-1], name) for name in self.client.weights}

    def then(self, x: Tensor, labels: Float[Tensor, " b"], members: Sequence[int] = ()) -> Walk:
        """After one step more, on these samples.

        Args:
            members: their numbers, by which units with given sides are told.
        """
        with given_sides(self.sides, self.step, members):
            found, plan = self.client.gradient(self.weights, x, labels), self.plan
        factor: Tensor | float = 1.0
        if plan.clip_norm is not None:
            if plan.proximal:
                found = {n: g + plan.proximal * (self.weights[n] - self.client.weights[n]) for n, g in found.items()}
            size = torch.stack([g.square().sum() for g in found.values()]).sum().sqrt()
            factor = (plan.clip_norm / (size + 1e-6)).clamp(max=1.0)
            found = {n: g * factor for n, g in found.items()}
        return replace(self, gradients=(*self.gradients, found), factors=(*self.factors, factor))

    def instead(self, sides: Sides, step: int) -> Walk:
        """Before a step that was taken already, with other sides from there on."""
        return replace(self, gradients=self.gradients[:step], factors=self.factors[:step], sides=sides)

    def all(self, x: Tensor, labels: Float[Tensor, " n"], order: Order) -> Walk:
        """After the steps on the samples with these numbers."""
        walk = self
        for members in order:
            walk = walk.then(x[list(members)], labels[list(members)], members)
        return walk


def kinks(network: Network) -> list[int]:
    """The activations whose units have sides, by their node ids."""
    return [node for node, f in network.activations if isinstance(f, ReLU | LeakyReLU)]


def given_sides(sides: Sides, step: int, members: Sequence[int]) -> AbstractContextManager[object]:
    """In which a model that runs once, on the samples of a step, has units on the sides that are given."""
    found: dict[int, list[tuple[int, int, bool]]] = {}
    for at, above in sides.items():
        if at.step == step and at.sample in members:
            found.setdefault(at.activation, []).append((list(members).index(at.sample), at.unit, above))
    return GivenSides(found) if found else nullcontext()


@dataclass(frozen=True, eq=False)
class Difference:
    """What was sent, with the standard deviation of each value's rounding, by parameter."""

    sent: Weights
    noise: Mapping[str, float]
    """Root mean square over a parameter's values."""
    eps: float
    own: float
    each: Weights = field(default_factory=dict)
    """Each value's own, where the steps are known; see `along`."""

    @classmethod
    def of(cls, sent: Weights, weights: Weights, eps: float, own: float, steps: int) -> Difference:
        """
        Args:
            weights: before the first step.
            eps: relative rounding of the weights, which are rounded at every step.
            own: relative rounding of what was sent.
        """
        noise = {}
        everything = math.sqrt(sum(float(d.square().sum()) for d in sent.values()))
        for name, d in sent.items():
            moved = float(d.square().mean().sqrt())
            size = float(weights[name].square().mean().sqrt()) + moved
            # Zeros that did not move: of what cancelled to nothing the whole difference is more than the terms' size.
            least = 0.0 if size else own * everything
            noise[name] = ROUNDED * ((eps * size) ** 2 * steps + (own * moved) ** 2 + least**2) ** 0.5
        return cls(sent, noise, eps, own)

    def along(self, walk: Walk) -> Difference:
        """The same with each value's own rounding, as the steps of a walk have it: the larger a weight, the coarser."""
        each = rounded_by(walk.trail, self.sent, self.eps, self.own)
        return replace(
            self, each={name: std for name, std in each.items() if self.noise[name] and bool((std > 0).all())}
        )

    def units(self, name: str) -> float | Tensor:
        """In which a parameter's values are told apart."""
        return self.each.get(name, self.noise[name])

    def misfit(self, walk: Walk) -> float:
        """By how many roundings the steps of a walk miss what was sent, in the parameter that agrees least."""
        found, worst = walk.end, 0.0
        for name, d in self.sent.items():
            wrong, noise = found[name] - d, self.units(name)
            if bool(wrong.any()):
                worst = max(worst, float((wrong / noise).square().mean().sqrt()) if self.noise[name] else math.inf)
            if worst != worst:
                return math.inf
        return worst

    def missed(self, walk: Walk) -> float:
        """The norm of what the steps of a walk leave of it."""
        found = walk.end
        return math.sqrt(sum(float((found[name] - d).square().sum()) for name, d in self.sent.items()))
