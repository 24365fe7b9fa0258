"""The rank of [W; K] where the layer is too large for a matrix: random vectors, projected.

For x with independent standard normal values, the least-squares solution of W y = W x, K y = K x that starts from 0
is x without its part in the null space, so |x - y|^2 has mean f and variance 2 f for f free dimensions (Hutchinson's
estimate of the trace of the projection). Conjugate gradients approach y from the side of too large an f, and need
nothing but the layer's own contractions.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.linalg import cg
from rgap.rank.measured import Free, Rows, patch_rank, residue_classes, unseen_directions

ITERATIONS = 3000
WORK = 1e11
"""Multiplications and additions that the probes of one layer may take."""
SETTLED = {1: 4e-5, 4: 0.2}
"""By number of probes, the sum of |x - y|^2 below which no dimension is free: one would give less in 1 of 200 draws.

Four probes where they can be afforded: one alone says as much of a large f, and less of a small one."""


def estimate(found: Rows, generator: torch.Generator) -> Free:
    """The number of free dimensions to about two standard errors, within what the structure allows.

    If the iterations run out, the estimate is too high by an unknown amount, and the error reaches down to what the
    structure alone leaves free.
    """
    layer = found.layer
    cost = 8 * layer.weight.numel() * layer.positions
    probes = 4 if 4 * cost * ITERATIONS <= WORK else 1
    steps = max(1, min(ITERATIONS, int(WORK // (cost * probes))))
    shape = (probes, layer.channels, layer.pixels)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(found.k.device)
    history: list[float] = []

    def settled(y: Tensor) -> bool:
        history.append(float((x - y).square().sum()) / probes)
        return history[-1] * probes < SETTLED[probes] or _stalled(history)

    # The normal equations of J (x - y) = 0, each probe on its own.
    cg.solve(lambda y: _normal(found, y), _normal(found, x), 0.0, steps, until=settled)
    at_least = _structural(found)
    value = history[-1] if history else float(x.square().sum()) / probes  # no row tells anything
    if value * probes < SETTLED[probes]:
        return Free(found.unseen, f"{probes} random probe(s)", unseen_directions(found), exact=False)
    count = max(round(value), at_least, 1 if at_least == 0 else 0)
    error = math.ceil(2 * math.sqrt(2 * value / probes))
    if _stalled(history):
        return Free(count + found.unseen, f"{probes} random probe(s)", None, False, error)
    method = f"{probes} random probe(s), stopped after {len(history)} steps"
    return Free(count + found.unseen, method, None, False, max(error, count - at_least))


def _normal(found: Rows, x: Float[Tensor, "s c n"]) -> Float[Tensor, "s c n"]:
    """(W'W + K'K) x."""
    z, grad = found.layer.rows(x, found.k)
    return found.layer.rows_adjoint(z * found.known, grad, found.k)


def _stalled(history: list[float]) -> bool:
    """Whether the estimate fell by less than a tenth of a dimension in the second half of the steps."""
    if len(history) < 100:
        return False
    return history[len(history) // 2] - history[-1] < 0.1


def _structural(found: Rows) -> int:
    """Free dimensions among the seen unknowns that follow from shapes alone."""
    layer = found.layer
    per_group = layer.channels // layer.groups
    outputs = layer.outputs // layer.groups
    gradient = sum(min(outputs * len(offsets), len(pixels)) for offsets, pixels in residue_classes(layer))
    rows = layer.groups * per_group * gradient + int(found.known.sum())
    return max(0, layer.unknowns - min(patch_rank(found), rows))
