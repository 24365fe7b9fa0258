"""Candidates of one update that a few products show to contradict the weights, before a layer is solved for them."""

from __future__ import annotations

import torch

from rgap.inversion.history import Paths
from rgap.inversion.layer import LayerSystem
from rgap.nn.ops import Linear

PIXELS = 512
"""Of a layer, from which on the solve itself takes many times as long."""
SPARE = 1.1
"""Weight rows for each unknown: of fewer rows nearly every value is what some input gives."""
ENOUGH = 1e-2
"""Relative residual of the normal equations at which it is seen what the rows miss."""
MISSED, TIMES = 0.1, 10.0
"""A candidate that misses this part of its values, and so many times what another one misses, is not the sample."""


def without_contradicting(op: Linear, paths: Paths, rank_tolerance: float) -> Paths:
    """The paths whose values are, as nearly as those of any other one of the update, what some input gives.

    Both roots of a margin lead to a value of the last layer's input, and only one of them to values that the layer in
    front can put out. The weight rows alone tell which, where they are more than the unknowns.
    """
    layer, state = op.layer, paths.state
    alone = len(paths.updates) == len(paths.history)
    if alone or layer.pixels < PIXELS or layer.weight_rows < SPARE * layer.unknowns or state.row_weight is not None:
        return paths
    z = layer.pack_output(state.value)
    nothing = layer.weight.new_zeros(len(z), *layer.weight.shape)
    system = LayerSystem(layer, torch.zeros_like(z), None, rank_tolerance, solver="iterative", counted=0, probed=False)
    missed = system.solve(z - layer.offset, nothing, tolerance=ENOUGH).weight_residual
    least = torch.where(paths.update[:, None] == paths.update, missed, torch.inf).amin(1)
    return paths.select(((missed <= MISSED) | (missed <= TIMES * least)).nonzero().flatten())
