"""How many updates fit into memory at once."""

from __future__ import annotations

from rgap.inversion.layer import Solver
from rgap.inversion.layer import bytes_needed as layer_bytes
from rgap.memory import free, readable
from rgap.nn.network import Network

MOST, CANDIDATES = 64, 2
"""Updates that are followed at once, at the most; candidates that each may have on the way, about."""


def bytes_needed(network: Network, solver: Solver = "auto") -> tuple[int, int]:
    """About how much memory the recursion takes: for each candidate that is followed, and whatever their number.

    Each layer is let go of before the next one. What stays are gradients, weights, and what was found at each layer.
    """
    layers = network.layers
    parameters = sum(layer.weight.numel() for layer in layers)
    kept = sum(5 * layer.weight_rows + layer.unknowns for layer in layers)
    largest = max(layer_bytes(layer, solver) for layer in layers)
    return largest + 8 * (kept + 2 * parameters), 8 * 4 * parameters


def updates_at_once(network: Network, solver: Solver) -> int:
    """How many updates are followed at once.

    Raises:
        MemoryError: not even one can be.
    """
    each, shared = bytes_needed(network, solver)
    there = free(network.device)
    if each + shared > there:
        raise MemoryError(
            f"the recursion would take about {readable(each + shared)}, {readable(there)} are free: expected "
            "a smaller input, or solver='iterative'"
        )
    return max(1, min(MOST, int((there - shared) / 2 / (CANDIDATES * each))))
