"""Distances between two gradients, and the prior of a guess."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

Gradients = Mapping[str, Tensor]
Distance = Callable[[Gradients, Gradients], Tensor]


def squared(found: Gradients, given: Gradients) -> Tensor:
    """|found - given|^2 / |given|^2: DLG's distance, relative so that it means the same on every network."""
    apart = {name: found[name] - g for name, g in given.items()}
    return _inner(apart, apart) / _inner(given, given)


def _inner(a: Gradients, b: Gradients) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def cosine(found: Gradients, given: Gradients) -> Tensor:
    """1 - cos of the angle between the two: blind to the gradient's size (Geiping et al. 2020, Eq. 4)."""
    return 1 - _inner(found, given) / (_inner(found, found) * _inner(given, given)).sqrt()


def total_variation(x: Float[Tensor, "b c h w"]) -> Tensor:
    """The mean difference of neighbours, down and across."""
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., 1:] - x[..., :-1]).abs().mean()
