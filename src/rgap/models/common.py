"""What all constructors share: weights that depend on the seed alone, and sizes that make sense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

Activation = Callable[[], nn.Module]
"""Makes a new activation each time."""


def leaky_relu() -> nn.Module:
    """The activation of the paper's networks."""
    return nn.LeakyReLU(0.2)


def check_sizes(**sizes: int) -> None:
    """Raise ValueError, naming all of them, if one is less than 1."""
    if min(sizes.values()) < 1:
        raise ValueError(f"got {', '.join(f'{name}={size}' for name, size in sizes.items())}: expected 1 or more")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights made in here depend on the seed alone, and the global random state stays as it was."""
    # On the CPU whatever the default device, so that a seed means the same weights on every machine.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
