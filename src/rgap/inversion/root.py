"""The one unknown number of a last layer without a bias: k = s u and x = v / s, from <u, k(W v / s + b)> = s."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.nn.losses import CrossEntropy, Loss, MeanSquaredError

LARGEST = 1e100
"""The largest 1 / |k| at which roots are looked for."""


def leading_pair(grad: Float[Tensor, "o n"]) -> tuple[Float[Tensor, " o"], float, Float[Tensor, " n"], float]:
    """The leading singular pair u, v with its value, and what it leaves of the gradient, relatively.

    By power iteration: of a matrix that is nearly of rank one it is there at once.
    """
    scale = grad.abs().max()  # squares of a saturated loss's gradient would be lost
    g = grad / scale
    u = torch.zeros_like(g[:, 0])
    v = g[g.norm(dim=1).argmax()]
    for _ in range(30):
        u = g @ v
        u = u / u.norm()
        v = g.mT @ u
    size = v.norm()
    v = v / size
    return u, float(size * scale), v, float((g - size * torch.outer(u, v)).norm() / size)


@dataclass(frozen=True)
class ScaleEquation:
    """t * <u, k(a t + b)> - 1 as a function of t = 1 / s, for k = s u."""

    loss: Loss
    u: Float[Tensor, " o"]
    a: Float[Tensor, " o"]
    b: Float[Tensor, " o"]

    def outputs(self, t: Float[Tensor, " r"]) -> Float[Tensor, "r o"]:
        return t[:, None] * self.a + self.b

    def direction(self, label: Float[Tensor, ""]) -> Float[Tensor, " o"]:
        """What k is projected on: of k_y = p_y - 1 a model that is certain and right leaves rounding alone."""
        along = self.u.clone()
        if isinstance(self.loss, CrossEntropy) and not self.loss.label_smoothing:
            along[int(label)] = 0
        return along

    def __call__(self, t: Float[Tensor, " r"], label: Float[Tensor, ""]) -> Float[Tensor, " r"]:
        k = self.loss.output_gradient(self.outputs(t), label.expand(len(t)))
        along = self.direction(label)
        return t * (k @ along) / (along @ self.u).clamp(min=torch.finfo(t.dtype).tiny) - 1

    def grid(self) -> Float[Tensor, " r"]:
        """Where roots are looked for, one sign of t: fine wherever z moves with t, coarse where k hardly does."""
        bound = 2.0
        if isinstance(self.loss, CrossEntropy):
            bound = 2 * float(self.loss.targets(self.u).sum(1).max())
        elif isinstance(self.loss, MeanSquaredError):
            bound = 1e6
        far = self.a.abs().max().clamp(min=1 / LARGEST)
        apart = far
        if isinstance(self.loss, CrossEntropy):  # of which a softmax depends on differences alone
            apart = (self.a - self.a.mean()).abs().max().clamp(min=1e-9 * far)
        least = -math.log(bound)
        most = math.log(LARGEST)
        first, last = (1e-3 / far).log().item(), (2e3 / apart).log().item()
        first, last = max(least, min(first, most)), max(least, min(last, most))
        steps = [
            torch.linspace(low, high, 2 + int((high - low) / step), dtype=torch.float64)
            for low, high, step in ((least, first, 0.1), (first, last, 0.02), (last, most, 0.1))
            if high > low
        ]
        return torch.cat(steps).sort().values.exp().to(self.u)

    def roots(self, label: Float[Tensor, ""]) -> Float[Tensor, " r"]:
        """All roots of both signs, and where the function has an extremum near zero: rounding may hide a root there."""
        found = [self._of_sign(sign * self.grid(), label) for sign in (1, -1)]
        return torch.cat(found)

    def _of_sign(self, t: Float[Tensor, " r"], label: Float[Tensor, ""]) -> Float[Tensor, " roots"]:
        value = self(t, label).nan_to_num(nan=-1.0)
        crossed = (value[:-1] * value[1:] <= 0).nonzero().flatten()
        low, high = t[crossed], t[crossed + 1]
        # The least |value| on one side of zero: two roots may lie between the grid's points, or have met there.
        inner = value[1:-1]
        side = inner.sign()
        extrema = (inner.abs() <= value[:-2].abs()) & (inner.abs() <= value[2:].abs()) & (inner.abs() < 0.1)
        extrema &= (value[:-2] * inner > 0) & (value[2:] * inner > 0)
        at = extrema.nonzero().flatten()
        left, right, side = t[at], t[at + 2], side[at]
        extremum = self._least(left, right, side, label)
        through = side * self(extremum, label) < 0
        low = torch.cat([low, left[through], extremum[through]])
        high = torch.cat([high, extremum[through], right[through]])
        return torch.cat([self._bisected(low, high, label), extremum[~through]])

    def _least(self, low: Tensor, high: Tensor, side: Tensor, label: Tensor) -> Tensor:
        """Golden-section search."""
        ratio = (5**0.5 - 1) / 2
        for _ in range(60):
            first, second = high - ratio * (high - low), low + ratio * (high - low)
            before = side * self(first, label) < side * self(second, label)
            low, high = torch.where(before, low, first), torch.where(before, second, high)
        return (low + high) / 2

    def _bisected(self, low: Tensor, high: Tensor, label: Tensor) -> Tensor:
        sign = self(low, label).sign()
        for _ in range(60):
            middle = (low + high) / 2
            same = self(middle, label).sign() == sign
            low, high = torch.where(same, middle, low), torch.where(same, high, middle)
        return (low + high) / 2

    def error(
        self, t: Float[Tensor, " r"], label: Float[Tensor, ""], moved: Float[Tensor, " r"], precision: float
    ) -> Float[Tensor, " r"]:
        """How far rounding may have moved a root, relatively: by noise over slope, at an extremum by its root."""
        along = self.direction(label)
        own = label.expand(len(t))
        z = self.outputs(t)
        k = self.loss.output_gradient(z, own)
        weights = t.abs()[:, None] * along.abs() / (along @ self.u).clamp(min=torch.finfo(t.dtype).tiny)
        if isinstance(self.loss, CrossEntropy):
            target = self.loss.targets(z)[own.long()]
            share = target.sum(1, keepdim=True) * z.softmax(1)
            parts = share + target * bool(self.loss.label_smoothing)
        else:
            share = k.abs()
            parts = share + 2 / self.loss.outputs  # k is a difference of the output's share and the label's
            if isinstance(self.loss, MeanSquaredError):
                share = torch.full_like(k, 1 / self.loss.outputs)
        noise = (weights * (2 * moved[:, None] * share + precision * (parts + 1 / t.abs()[:, None]))).sum(1)
        step = 1e-4
        before, here, after = (self(t * (1 + move), label) for move in (-step, 0.0, step))
        slope, bend = ((after - before) / (2 * step)).abs(), ((after - 2 * here + before) / step**2).abs()
        noise = noise + here.abs()
        inside = slope.square() - 2 * bend * noise
        tiny = torch.finfo(t.dtype).tiny
        plain = 2 * noise / (slope + inside.clamp(min=0).sqrt() + tiny)
        at_extremum = (slope + (slope.square() + 2 * bend * noise).sqrt()) / (bend + tiny)
        return precision + torch.where(inside >= 0, plain, at_extremum)
