"""How much memory is free, and what is done about an attack that would need more."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

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
