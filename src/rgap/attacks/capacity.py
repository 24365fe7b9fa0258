"""How much memory is free, and how many updates fit into it at once."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from rgap.inversion.layer import Solver
from rgap.inversion.layer import bytes_needed as layer_bytes
from rgap.nn.network import Network

MOST, CANDIDATES = 64, 2
"""Updates that are followed at once, at the most; candidates that each may have on the way, about."""

_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Where a container says what it may use and what it uses: less may be free there than in the machine."""


def free(device: torch.device) -> int:
    """Bytes that can still be had on a device; of the processor's memory, within a container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = int(psutil.virtual_memory().available)
    for limit, used in _LIMITS:
        try:
            found = min(found, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no container, or one without a limit
    return max(found, 0)


def readable(count: int | float) -> str:
    """A number of bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(count / 2**20, 1):.0f} MiB"


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
