"""One hidden layer and one output: the samples of a batch by which of the hidden units fire for each.

Behind ReLU or LeakyReLU the cotangent of a sample is k = kappa (w * d), with w the second layer's only row and d the
slopes: 1 where a unit fires, else 0 or the slope below. So the column space of G, divided by w, holds one vector of two
values for each sample. They are the zeros of

    v (v - 1) / |v|    or    (v - slope) (v - 1)        with      v = (U beta) / w,

and once all are known G = sum over i of c k_i (x_i, 1)' gives every sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.inversion.subspace.head import Head, Spaces
from rgap.inversion.subspace.identify import SLACK, Samples, identify
from rgap.linalg import deadline
from rgap.linalg.levenberg_marquardt import affordable, levenberg_marquardt
from rgap.nn.activations import LeakyReLU, ReLU
from rgap.nn.ops import Elementwise, Linear

NEAR = 0.1
"""A value that is farther from both values of a slope is neither."""


@dataclass(frozen=True, eq=False)
class TwoValues:
    """min |r(beta)|^2: v = basis beta has two values."""

    basis: Float[Tensor, "h r"]
    low: float

    def select(self, index: Int[Tensor, " a"]) -> TwoValues:
        return self

    def _residual(self, t: Float[Tensor, "s r"]) -> tuple[Tensor, Tensor, Tensor]:
        v = t @ self.basis.mT
        size = v.norm(dim=1, keepdim=True).clamp(min=1e-300) if self.low == 0 else torch.ones_like(v[:, :1])
        return v, (v - self.low) * (v - 1) / size, size

    def cost(self, t: Float[Tensor, "s r"]) -> Float[Tensor, " s"]:
        v, r, _ = self._residual(t)
        return r.square().sum(1) / v.shape[1]

    def normal(self, t: Float[Tensor, "s r"]) -> tuple[Float[Tensor, "s r"], Float[Tensor, "s r r"]]:
        v, r, size = self._residual(t)
        j = ((2 * v - 1 - self.low) / size)[:, :, None] * self.basis
        if self.low == 0:
            j = j - (r / size**2)[:, :, None] * (v @ self.basis)[:, None]
        return (r[:, None] @ j)[:, 0], j.mT @ j


def one_hidden_layer(head: Head) -> tuple[Float[Tensor, " h"], float] | None:
    """The second layer's only row, and the slope of units that do not fire; None if the head is another one."""
    ops = [node.op for node in head.network.nodes]
    if len(ops) != 3 or not isinstance(ops[1], Elementwise) or not isinstance(ops[2], Linear):
        return None
    activation = ops[1].activation
    if not isinstance(activation, (ReLU, LeakyReLU)) or head.loss.outputs != 1:
        return None
    low = 0.0 if isinstance(activation, ReLU) else float(activation.slope(torch.tensor(-1.0)))
    return ops[2].layer.weight[0, 0], low


def by_patterns(spaces: Spaces, count: int, starts: int, rounds: int, seed: int = 0) -> Samples:
    """All samples of a head with one hidden layer and one output, or none.

    Args:
        count: the number of samples.
        starts: in each round; of fewer where one's Jacobian is large.
        rounds: at the most.
    """
    none = Samples.none(spaces.first.v.new_zeros(0, spaces.head.layer.unknowns))
    given, first = one_hidden_layer(spaces.head), spaces.first
    if given is None:
        return none
    row, low = given
    used = row.abs() > 1e-3 * row.abs().max()
    problem = TwoValues(first.u[used] / row[used][:, None], low)
    generator = torch.Generator(device=first.u.device).manual_seed(seed)
    patterns: list[Tensor] = []
    starts = affordable(starts, problem.basis.numel())
    # Near the middle of both values: from elsewhere many end at a vector that is nearly constant.
    constant = problem.basis.new_full((len(problem.basis), 1), (1 + low) / 2)
    middle = torch.linalg.lstsq(problem.basis, constant).solution.mT
    for _ in range(rounds):
        if len(patterns) >= first.rank or deadline.used() >= 1:
            break
        draw = torch.randn(starts, first.rank, generator=generator, dtype=first.u.dtype, device=first.u.device)
        size = (draw @ problem.basis.mT).square().mean(1, keepdim=True).sqrt()
        t, _ = levenberg_marquardt(problem, middle + 0.5 * draw / size, 80, found=1e-24)
        for v in t @ problem.basis.mT:
            slopes = torch.where(v > (1 + low) / 2, 1.0, low).to(v)
            pattern = torch.full_like(row, low)
            pattern[used] = slopes
            new = bool(((v - slopes).abs() < NEAR).all()) and not any(bool((pattern == p).all()) for p in patterns)
            if new and _lies(spaces, row * pattern, used):
                patterns.append(pattern)
    if len(patterns) != first.rank:
        return none
    # The last coordinate tells c kappa; without a bias its size is told by the loss.
    k = torch.stack([row * pattern for pattern in patterns])[:, used]
    a = torch.linalg.lstsq(k.mT, (first.u @ first.core)[used]).solution @ first.v.mT
    x = a[:, :-1] / a[:, -1:] if first.biased else torch.nn.functional.normalize(torch.cat([a, -a]))
    return identify(spaces, x, count)


def _lies(spaces: Spaces, k: Float[Tensor, " o"], used: Tensor) -> bool:
    """Whether a cotangent lies in the column space, as far as rounding lets it."""
    first = spaces.first
    moved = float(first.cotangent_uncertainty(k[None]))
    return float(first.outside(k[None])[0][used].norm()) <= SLACK * moved + 1e-9 * float(k.norm())
