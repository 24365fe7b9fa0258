"""What a pool makes of its windows while the values in them are in doubt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rgap.nn.activation import Activation
from rgap.nn.activations import Identity
from rgap.nn.pools import MaxPool, MeanPool, Pool

# b samples, o outputs, m windows of an output, w places of a window.

DRAWS = 15
"""Values that a number in doubt is taken to have: quantiles of a normal distribution."""
DECIDED = 1e-3
"""Where all other places together have less weight a route is decided; with slopes that vary less a mean is."""


@dataclass(frozen=True)
class Windows:
    """The value of each window, and how it moves with its places."""

    value: Float[Tensor, "b o m"]
    variance: Float[Tensor, "b o m"]
    """Of the value, while its places are in doubt."""
    slope: Float[Tensor, "b o m w"]
    """Of the value in each place, on average."""
    spread: Float[Tensor, "b o m w"]
    """How far the slopes may be from that: for maxima the square roots of the routes' weights, whose sum is certain;
    for means the standard deviation of each."""
    undecided: Bool[Tensor, "b o m"]


def windows(pool: Pool, activation: Activation, z: Float[Tensor, "b o n"], heat: float) -> Windows:
    """Of a pool behind an activation.

    Args:
        z: before the activation.
        heat: how far z is in doubt.
    """
    if isinstance(pool, MaxPool):
        assert isinstance(activation, Identity)
        return _largest(pool, z, heat)
    assert isinstance(pool, MeanPool)
    return _mean(pool, activation, z, heat)


def _largest(pool: MaxPool, z: Tensor, heat: float) -> Windows:
    places = pool.read(z, -math.inf)
    routes = torch.softmax(places / heat, -1) if heat > 0 else pool.routes(z)
    finite = places.masked_fill(places == -math.inf, 0.0)
    value = (routes * finite).sum(-1)
    variance = (routes * (finite - value[..., None]).square()).sum(-1)
    return Windows(value, variance, routes, routes.sqrt(), routes.amax(-1) < 1 - DECIDED)


def normal(like: Tensor) -> Float[Tensor, " draws"]:
    """Quantiles of the standard normal distribution."""
    found: Tensor = torch.special.ndtri((torch.arange(DRAWS, dtype=like.dtype, device=like.device) + 0.5) / DRAWS)
    return found


def _mean(pool: MeanPool, activation: Activation, z: Tensor, heat: float) -> Windows:
    apart = z.new_zeros(1)
    if heat > 0:
        apart = heat * normal(z)
    drawn = z[..., None] + apart
    value, slope = activation(drawn), activation.slope(drawn)
    mean, variance = (value.mean(-1), value.var(-1, correction=0))
    spread = pool.read(slope.std(-1, correction=0)) * pool.share
    return Windows(
        (pool.read(mean) * pool.share).sum(-1),
        (pool.read(variance) * pool.share.square()).sum(-1),
        pool.read(slope.mean(-1)) * pool.share,
        spread,
        (spread > DECIDED * pool.share).any(-1),
    )
