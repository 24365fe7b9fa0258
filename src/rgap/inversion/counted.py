"""What a perceptron's local steps make, as a smooth function of its samples and of how much each counts in each step.

A minibatch is a choice of samples; between two of them lie counts that are no whole numbers. No weights are formed on
the way: those of a step are the first ones and the products k h' of all samples in the steps before, which are few.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.head_steps import dense
from rgap.inversion.walk import Client, Difference, Order, Plan, Weights
from rgap.nn.layers import Layer
from rgap.nn.losses import Loss
from rgap.nn.ops import Elementwise, Linear, Op

SIDE = 64
"""Rows and columns, at the most, of what stands for a matrix."""


@dataclass(frozen=True, eq=False)
class Sketch:
    """Some thousand numbers for the values of all parameters, in roundings: each matrix between two random ones."""

    difference: Difference
    sides: dict[str, list[Tensor | None]]

    @classmethod
    def of(cls, difference: Difference, dtype: torch.dtype = torch.float64) -> Sketch:
        draw, sides = torch.Generator().manual_seed(0), dict[str, list[Tensor | None]]()
        for name, d in difference.sent.items():
            if difference.noise[name]:
                sides[name] = [_side(size, draw, d.to(dtype)) for size in (len(d), d[0].numel())]
        return cls(difference, sides)

    def __call__(self, values: Weights) -> Float[Tensor, " rows"]:
        parts = []
        for name, (left, right) in self.sides.items():
            own = values[name].reshape(len(values[name]), -1) / self.difference.noise[name]
            own = own if left is None else left @ own
            parts.append((own if right is None else own @ right.mT).flatten())
        return torch.cat(parts)

    def of_products(self, k: Weights, h: Weights) -> Float[Tensor, " rows"]:
        """Of k' h for each parameter, which is not formed."""
        parts = []
        for name, (left, right) in self.sides.items():
            k_part = (k[name] if left is None else k[name] @ left.mT) / self.difference.noise[name]
            h_part = h[name] if right is None else h[name] @ right.mT
            parts.append((k_part.mT @ h_part).flatten())
        return torch.cat(parts)


def _side(size: int, draw: torch.Generator, like: Tensor) -> Tensor | None:
    if size <= SIDE:
        return None
    found: Tensor = torch.randn(SIDE, size, generator=draw, dtype=torch.float64).to(like) / SIDE**0.5
    return found


@dataclass(eq=False)
class _Moved:
    """A layer's weights on the way: the first ones, and the products k' h of all samples in the steps so far."""

    weight: Float[Tensor, "o i"]
    bias: Float[Tensor, " o"] | None
    k: Float[Tensor, "before o"]
    h: Float[Tensor, "before i"]

    def forward(self, x: Float[Tensor, "s i"], first: float, share: Float[Tensor, "before 1"]) -> Float[Tensor, "s o"]:
        """
        Args:
            first: how much of the first weights is left.
            share: how much each of the products counts.
        """
        if self.bias is None:
            return first * (x @ self.weight.mT) + x @ self.h.mT @ (share * self.k)
        return first * (x @ self.weight.mT + self.bias) + (x @ self.h.mT + 1) @ (share * self.k)

    def back(self, k: Float[Tensor, "s o"], first: float, share: Float[Tensor, "before 1"]) -> Float[Tensor, "s i"]:
        return first * (k @ self.weight) + k @ self.k.mT @ (share * self.h)

    def add(self, k: Float[Tensor, "s o"], h: Float[Tensor, "s i"]) -> None:
        self.k, self.h = torch.cat([self.k, k]), torch.cat([self.h, h])


@dataclass(frozen=True, eq=False)
class CountedSteps:
    """The steps of a client whose network is layers on vectors with smooth activations in between."""

    ops: tuple[Op, ...]
    weights: Weights
    """Before the first step."""
    loss: Loss
    labels: Float[Tensor, " n"]
    plan: Plan
    sketch: Sketch
    sent: Float[Tensor, " rows"]
    """What was sent, less what the first weights decayed by."""

    @classmethod
    def of(
        cls, client: Client, plan: Plan, difference: Difference, labels: Float[Tensor, " n"], dtype: torch.dtype
    ) -> CountedSteps | None:
        """None where the network is another one, or steps are clipped."""
        nodes, known = client.network(client.weights).nodes, client.weights
        chain = all(
            node.reads == (at,) and dense(node.op, known) and not _kinked(node.op) for at, node in enumerate(nodes)
        )
        if not chain or plan.clip_norm is not None:
            return None
        decay, sketch = plan.expansion[-1][0], Sketch.of(difference, dtype)
        sent = sketch({name: (d - decay * known[name]).to(dtype) for name, d in difference.sent.items()})
        weights = {name: w.to(dtype) for name, w in known.items()}
        return cls(tuple(node.op for node in nodes), weights, client.loss, labels, plan, sketch, sent)

    def missed(self, x: Float[Tensor, "n u"], counts: Float[Tensor, "later n"], told: Order) -> Float[Tensor, " rows"]:
        """What the steps make, less what was sent, in roundings.

        Args:
            counts: how much each sample counts in each of the later steps: 1 in those that it is a member of.
            told: the members of the steps before these.
        """
        layers = {op: self._begun(op.layer) for op in self.ops if isinstance(op, Linear)}
        taken = list[int]()
        for step, size in enumerate(self.plan.sizes):
            whole = step < len(told)
            rows = list(told[step]) if whole else list(range(len(x)))
            own = x.new_ones(len(rows)) if whole else counts[step - len(told)]
            self._step(x[rows], self.labels[rows], own / size, layers, self._shares(step, taken, x))
            taken += [step] * len(rows)
        share, k, h = self._shares(-1, taken, x)[1], dict[str, Tensor](), dict[str, Tensor]()
        for op, moved in layers.items():
            k[op.layer.weight_name], h[op.layer.weight_name] = share * moved.k, moved.h
            if op.layer.bias_name is not None:
                k[op.layer.bias_name], h[op.layer.bias_name] = share * moved.k, x.new_ones(len(moved.k), 1)
        return self.sketch.of_products(k, h) - self.sent

    def _begun(self, layer: Layer) -> _Moved:
        weight = self.weights[layer.weight_name]
        bias = None if layer.bias_name is None else self.weights[layer.bias_name]
        return _Moved(weight, bias, weight.new_zeros(0, len(weight)), weight.new_zeros(0, weight.shape[1]))

    def _shares(self, step: int, taken: list[int], like: Tensor) -> tuple[float, Float[Tensor, "before 1"]]:
        """How much of the first weights is left before a step, and how much what was added counts.

        Args:
            taken: the steps that added it.
        """
        decay, c = self.plan.expansion[step]
        return 1 + decay, like.new_tensor([c[each] for each in taken])[:, None]

    def _step(
        self,
        x: Float[Tensor, "s u"],
        labels: Float[Tensor, " s"],
        own: Float[Tensor, " s"],
        layers: dict[Linear, _Moved],
        shares: tuple[float, Tensor],
    ) -> None:
        values = [x]
        for op in self.ops:
            z = layers[op].forward(values[-1], *shares) if isinstance(op, Linear) else op.forward(values[-1])
            values.append(z)
        k, new = self.loss.output_gradient(values[-1], labels), list[tuple[Linear, Tensor, Tensor]]()
        for op, value in zip(reversed(self.ops), reversed(values[:-1]), strict=True):
            if isinstance(op, Linear):
                new.append((op, own[:, None] * k, value))
                k = layers[op].back(k, *shares)
            else:
                k = op.vjp(k, (value,))[0]
        for op, own_k, value in new:
            layers[op].add(own_k, value)


def _kinked(op: Op) -> bool:
    return isinstance(op, Elementwise) and op.activation.kinked
