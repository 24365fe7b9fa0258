"""Batch norm in training mode, as far as a client's running statistics tell what it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rgap.nn.ops import Affine, Op

CONSTANT = 4
"""Roundings of a running variance below which a batch's own is none."""


@dataclass(frozen=True, eq=False)
class BatchStatistics:
    """What one batch norm made of one batch."""

    mean: Float[Tensor, " c"]
    variance: Float[Tensor, " c"]
    """As running_var has it: over the number of values less one."""
    samples: int
    """Of the batch."""
    precision: float
    """How far the running statistics' rounding may have moved what the norm puts out, relative to its spread."""


def statistics(
    model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], samples: int
) -> dict[str, BatchStatistics]:
    """Those of one step's batch, by the name of the running mean, from the running statistics around the step.

    after = (1 - momentum) before + momentum * (the batch's), where momentum None stands for one over the number of
    batches. Layers whose statistics did not run, such as frozen ones, are left out.
    """
    found = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or not module.training:
            continue
        start = f"{prefix}." if prefix else ""
        mean, var, count = (start + name for name in ("running_mean", "running_var", "num_batches_tracked"))
        momentum = module.momentum
        if momentum is None and count in before:
            momentum = 1 / (float(before[count]) + 1)
        if not momentum or mean not in after or var not in after or mean not in before or var not in before:
            continue
        told = [
            (after[name].double() - (1 - momentum) * before[name].to(after[name].device).double()) / momentum
            for name in (mean, var)
        ]
        rounded = torch.finfo(after[mean].dtype).eps / momentum
        # A unit that is zero throughout, as behind ReLU, has no variance but what rounding makes of none.
        constant = told[1].abs() <= CONSTANT * rounded * after[var].double()
        if not bool((constant | (told[1] > 0)).all()) or bool(constant.all()):
            continue
        sizes = (after[mean].double().square(), after[var].double().square() / 4)
        moved = sizes[0] / told[1] + sizes[1] / told[1].square()
        variance = told[1].masked_fill(constant, 0.0)
        found[mean] = BatchStatistics(told[0], variance, samples, rounded * float(moved[~constant].mean().sqrt()))
    return found


@dataclass(frozen=True, eq=False)
class BatchNorm(Affine):
    """y = scale * x + shift with the statistics of the very batch, as the client's running ones tell them.

    With u = (y - beta) / gamma, the gradient of x is scale * (k - mean k - u * mean(k u)), the means over all samples
    and positions of a channel. Their sums are the gradients of beta and gamma: `source` is what they put in.
    """

    mean_k: Tensor | float = 0.0
    """The gradient of beta over the number of values, broadcast over the value."""
    along: Tensor | float = 0.0
    """That of gamma over the number of values, over gamma."""
    beta: Tensor | float = 0.0
    gamma: Tensor | float = 1.0
    eps: float = 0.0
    samples: int = 1
    """Of the batch."""
    precision: float = 0.0
    """As in `BatchStatistics`."""
    linear = False

    def source(self, x: Tensor) -> Tensor:
        return -self.scale * (self.mean_k + (self.forward(x) - self.beta) * self.along)

    @property
    def error(self) -> Tensor:
        """How far the statistics' rounding may have moved what it reads, broadcast over the value."""
        return (self.precision * self.gamma / self.scale).abs()

    @property
    def own(self) -> OwnBatchNorm:
        """The same with the statistics of the values themselves, which are as precise as these are."""
        return OwnBatchNorm(self.name, self.gamma, self.beta, self.eps, self.samples)


@dataclass(frozen=True, eq=False)
class OwnBatchNorm(Op):
    """Batch norm in training mode as it is: with mean and variance of the values that it reads, all samples of a batch
    together. Where more values come than a batch has, they are those of several batches."""

    name: str
    gamma: Tensor | float
    beta: Tensor | float
    eps: float
    samples: int

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """The values over their spread, one over the spread, and the axes of the means; by batch."""
        x = self._batches(x)
        axes = (1, *range(3, x.dim()))
        scale = (x.var(axes, unbiased=False, keepdim=True) + self.eps).rsqrt()
        return (x - x.mean(axes, keepdim=True)) * scale, scale, axes

    def _batches(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.samples, *x.shape[1:])

    def forward(self, *xs: Tensor) -> Tensor:
        return self._parts(xs[0])[0].reshape(xs[0].shape) * self.gamma + self.beta

    def vjp(self, k: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        u, scale, axes = self._parts(xs[0])
        of = self._batches(k * self.gamma)
        found = scale * (of - of.mean(axes, keepdim=True) - u * (of * u).mean(axes, keepdim=True))
        return (found.reshape(k.shape),)
