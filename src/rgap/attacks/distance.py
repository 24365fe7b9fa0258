"""Distances between two gradients, and the prior of a guess."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Gradients = Mapping[str, Tensor]
Distance = Callable[[Gradients, Gradients], Tensor]
NEGLIGIBLE = 1e-8
"""Squared size of a parameter's gradient, relative to all, below which it counts for less."""


def squared(found: Gradients, given: Gradients) -> Tensor:
    """|found - given|^2 / |given|^2: DLG's distance, relative so that it means the same on every network."""
    apart = {name: found[name] - g for name, g in given.items()}
    return _inner(apart, apart) / _inner(given, given)


def _inner(a: Gradients, b: Gradients) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def cosine(found: Gradients, given: Gradients) -> Tensor:
    """1 - cos of the angle between the two: blind to the gradient's size (Geiping et al. 2020, Eq. 4)."""
    return 1 - _inner(found, given) / (_inner(found, found) * _inner(given, given)).sqrt()


def relative(found: Tensor, given: Tensor) -> Tensor:
    """|found - given|^2 / |given|^2."""
    return (found - given).square().sum() / given.square().sum().clamp(min=torch.finfo(given.dtype).tiny)


def moments(x: Float[Tensor, "b c ..."]) -> Float[Tensor, "2 c"]:
    """Mean and variance of each channel over all else, the variance as running_var has it."""
    flat = x.movedim(1, 0).flatten(1)
    return torch.stack([flat.mean(1), flat.var(1)])


@dataclass(frozen=True)
class LayerWise:
    """The mean of the parameters' own squared distances, so that large layers do not drown the small ones.

    Args:
        growth: the weight of each parameter relative to that of the one before it; 1: all count alike.
    """

    growth: float = 1.0

    def __call__(self, found: Gradients, given: Gradients) -> Tensor:
        least = NEGLIGIBLE * _inner(given, given)  # a gradient of zero has no size of its own
        each = [(found[name] - g).square().sum() / (g.square().sum() + least) for name, g in given.items()]
        weights = torch.tensor([self.growth**at for at in range(len(each))]).to(each[0])
        return (torch.stack(each) * weights).sum() / weights.sum()


def total_variation(x: Float[Tensor, "b c h w"], opponents: float = 0.0) -> Tensor:
    """The mean difference of neighbours, down and across.

    Args:
        opponents: weight of the differences of each two colours, which count too (double opponents, as in breaching's
            modern attack).
    """
    if opponents and x.shape[1] == 3:
        x = torch.cat([x, opponents * (x - x.roll(1, 1))], 1)
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., 1:] - x[..., :-1]).abs().mean()
