"""On how many threads an attack runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from rgap.linalg.threads import one_thread
from rgap.target import Target

LARGE = 50_000_000
"""Multiplications of a layer, on average, from which several threads are worth their waiting for each other. One
picture takes 3e7 in ResNet-18 on CIFAR-10, which two threads made slower, and 1e8 in three convolutions on 224 x
224."""


def threads(target: Target) -> AbstractContextManager[None]:
    """For a small model one thread, whatever torch is set to; for a large one all that it is set to."""
    return nullcontext() if multiplications(target) >= LARGE else one_thread()


def multiplications(target: Target) -> int:
    """Of a batch in one layer, on average over those layers that could be traced."""
    weights = [(use.outputs, target.parameters.get(use.weight_name or "")) for use in target.graph.uses]
    each = [outputs * weight[0].numel() for outputs, weight in weights if weight is not None]
    return target.batch_size * sum(each) // max(1, len(each))
