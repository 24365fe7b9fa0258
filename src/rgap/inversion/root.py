"""The one unknown number of a last layer without a bias: k = s u and x = v / s, from <u, k(W v / s + b)> = s."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.rounding import rounding
from rgap.linalg.roots import find_roots
from rgap.nn.losses import Loss

LARGEST = 1e100
"""The largest 1 / |k| at which roots are looked for."""
NEAR = 0.1
"""How near to zero the function turns where rounding may hide a root."""


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

    def __call__(self, t: Float[Tensor, " r"], label: Float[Tensor, ""]) -> Float[Tensor, " r"]:
        k = self.loss.output_gradient(self.outputs(t), label.expand(len(t)))
        along = self.loss.projection(self.u, label)
        return t * (k @ along) / (along @ self.u).clamp(min=torch.finfo(t.dtype).tiny) - 1

    def grid(self) -> Float[Tensor, " r"]:
        """Where roots are looked for, one sign of t: fine wherever z moves with t, coarse where k hardly does."""
        far = self.a.abs().max().clamp(min=1 / LARGEST)
        # Some losses depend on the differences of outputs alone.
        apart = torch.minimum(far, (self.a - self.a.mean()).abs().max().clamp(min=1e-9 * far))
        least = -math.log(self.loss.gradient_bound)
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
        grid = self.grid()
        return torch.cat([each for sign in (1, -1) for each in find_roots(lambda t: self(t, label), sign * grid, NEAR)])

    def error(
        self, t: Float[Tensor, " r"], label: Float[Tensor, ""], moved: Float[Tensor, " r"], precision: float
    ) -> Float[Tensor, " r"]:
        """How far rounding may have moved a root, relatively: by noise over slope, at an extremum by its root."""
        along = self.loss.projection(self.u, label)
        weights = t.abs()[:, None] * along.abs() / (along @ self.u).clamp(min=torch.finfo(t.dtype).tiny)
        explained = self.loss.gradient_rounding(self.outputs(t), label.expand(len(t)), moved, precision)
        # Values are rounded independently of each other.
        of_u = rounding(self.u, precision) / t.abs()[:, None]
        noise = (weights * (explained + of_u)).square().sum(1).sqrt()
        step = 1e-4
        before, here, after = (self(t * (1 + move), label) for move in (-step, 0.0, step))
        slope, bend = ((after - before) / (2 * step)).abs(), ((after - 2 * here + before) / step**2).abs()
        noise = noise + here.abs()
        inside = slope.square() - 2 * bend * noise
        tiny = torch.finfo(t.dtype).tiny
        plain = 2 * noise / (slope + inside.clamp(min=0).sqrt() + tiny)
        at_extremum = (slope + (slope.square() + 2 * bend * noise).sqrt()) / (bend + tiny)
        return precision + torch.where(inside >= 0, plain, at_extremum)
