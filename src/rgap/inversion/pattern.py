"""On which side of its kink each unit is: known, in doubt, or to be changed.

The cotangents in front of a unit jump when it changes its side, and with them the gradient rows. But what one wrong
side does to them is a multiple of one known vector. So the rows are used as soon as most sides are right, with what
the units in doubt may have done projected out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from rgap.nn.ops import Linear

if TYPE_CHECKING:
    from rgap.inversion.system import ConstraintSystem, Linearisation

Pattern = Mapping[int, Bool[Tensor, "b ..."]]
"""Of each elementwise operation, by its node, which units are in doubt; all are known where it is not named."""

READS = 1e-2
"""A unit that reads less than this fraction of what any unit of its layer reads has no side worth knowing."""
DARK = 1e-4
"""One that reads less than this reads an empty background, which no value is nearer to its kink than."""


def least_certain(system: ConstraintSystem, at: Linearisation, count: int) -> Pattern:
    """The units, over all activations and samples, that are nearest to their kink, measured by the spread of their
    layer. Those that read next to nothing, as on an empty background, stay out: they are all near their kinks, and
    have hardly any effect on whichever side they are."""
    if not count:
        return {}
    distances, shapes = [], {}
    for node, activation in system.network.activations:
        z = at.values[system.network.nodes[node].reads[0]]
        if activation.kinked:
            size = norms_read(system, at, node)
            apart = z.abs() / z.square().mean().sqrt()
            distances.append(torch.where(size > READS * size.max(), apart, torch.inf).flatten())
            shapes[node] = z.shape
    if not distances:
        return {}
    every = torch.cat(distances)
    count = min(count, int(every.isfinite().sum()))
    chosen = torch.zeros_like(every, dtype=torch.bool)
    chosen[every.topk(count, largest=False).indices] = True
    parts = torch.split(chosen, [len(each) for each in distances])
    return {node: part.reshape(shape) for (node, shape), part in zip(shapes.items(), parts, strict=True)}


def changed_sides(system: ConstraintSystem, before: Linearisation, after: Linearisation) -> int:
    """How many slopes are other than they were by more than half of the steepest, of units that read something."""
    total = 0
    for node, new in after.slopes.items():
        size = norms_read(system, after, node)
        old = before.slopes[node]
        total += int((((old - new).abs() > 0.5 * new.abs().max()) & (size > READS * size.max())).sum())
    return total


def norms_read(system: ConstraintSystem, at: Linearisation, node: int) -> Tensor:
    """The norm of what each unit reads; 1 where it is not a layer's."""
    value = system.network.nodes[node].reads[0]
    before = system.network.nodes[value - 1] if value else None
    if before is None or not isinstance(before.op, Linear):
        return torch.ones_like(at.values[value])
    layer = before.op.layer
    size = layer.read(layer.pack_input(at.values[before.reads[0]]))
    return layer.unpack_output(size).reshape(at.values[value].shape)
