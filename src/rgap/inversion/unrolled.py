"""Gauss-Newton on all local steps at once, for all samples of a client together.

Where the first layer reads the samples themselves its weights act on the space that they span alone, and move within
it. There a client of n samples is a network of n inputs, and the samples are n n numbers, whatever their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.walk import Client, Difference, Order, Plan, Walk
from rgap.linalg import psd
from rgap.nn.layers import Layer

STEPS = 10
"""With one matrix: samples are nearly known."""
ENOUGH = 0.999
"""A step that lowers the residual by less is the last."""
LARGEST = 1024
"""Unknowns above which no matrix is formed."""
CHUNK = 32
"""Of its columns that are computed together."""
SAME = 1e-9
"""How well the small network's step must agree with the whole one's, relatively."""


def in_their_span(
    client: Client,
    plan: Plan,
    difference: Difference,
    layer: Layer,
    x: Float[Tensor, "n u"],
    labels: Float[Tensor, " n"],
    order: Order,
) -> Float[Tensor, "n u"]:
    """Samples that all parameters agree with, in units of their rounding; x itself where that cannot be had.

    Args:
        layer: the first one, which reads the samples.
        order: of each step the numbers of its samples.
    """
    name, n = layer.weight_name, len(x)
    whole = client.weights[name]
    if n * n > LARGEST or whole.shape != (layer.outputs, layer.unknowns):
        return x
    q: Tensor = torch.linalg.qr(x.mT)[0]
    small = replace(client, weights={**client.weights, name: whole @ q}, gradient=client.differentiable)
    sent = {**difference.sent, name: difference.sent[name] @ q}
    scale = math.sqrt(sum(each.numel() for each in sent.values()))

    def residual(flat: Float[Tensor, " m"]) -> Float[Tensor, " r"]:
        made = Walk(small, plan).all(flat.reshape(n, n), labels, order).end
        missed = torch.cat([((made[each] - d) / difference.noise[each]).flatten() for each, d in sent.items()])
        return missed / scale

    at = (x @ q).flatten()
    if not _agrees(client, small, name, q, x, labels):
        return x
    here, jacobian = residual(at), _jacobian(residual, at)
    factored = psd.factor(jacobian @ jacobian.mT, 0.0)
    for _ in range(STEPS):
        move = factored.solve((jacobian @ here)[:, None])[:, 0]
        there = residual(at - move)
        if not float(there.norm()) < ENOUGH * float(here.norm()):
            break
        at, here = at - move, there
    return at.reshape(n, n) @ q.mT


def _jacobian(residual: Callable[[Tensor], Tensor], at: Float[Tensor, " m"]) -> Float[Tensor, "m r"]:
    """Transposed."""

    def along(v: Tensor) -> Tensor:
        moved: Tensor = torch.func.jvp(residual, (at,), (v,))[1]
        return moved

    directions = torch.eye(len(at), dtype=at.dtype, device=at.device)
    columns: Tensor = torch.func.vmap(along, chunk_size=CHUNK, randomness="different")(directions)
    return columns


def _agrees(
    client: Client, small: Client, name: str, q: Tensor, x: Float[Tensor, "n u"], labels: Float[Tensor, " n"]
) -> bool:
    """Whether the model takes samples as they are in their span: nothing that knows their shape stands in front."""
    wanted = client.gradient(client.weights, x.reshape(-1, *client.input_shape), labels)
    wanted = {**wanted, name: wanted[name] @ q}
    try:
        found = small.differentiable(small.weights, x @ q, labels)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return all(float((found[each] - g).norm()) <= SAME * float(g.norm()) for each, g in wanted.items())
