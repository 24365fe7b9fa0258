"""Where to begin with the samples of several steps that mixtures of them fit as well.

Where little bends, no single step tells a sample's vector from mixtures of others. But there all outputs are nearly the
same, so that the last bias tells how often each label is there, and k hardly depends on the sample: X = (c K)^+ G, as
for one gradient. All steps together then tell the samples, and the order, by exchanges.
"""

from __future__ import annotations

import torch

from rgap.inversion.subspace.step import Candidates, Place
from rgap.inversion.subspace.together import HeadSystem, counted_labels
from rgap.inversion.walk import Plan, Weights

APART = 0.01
"""Samples of one label begin this far from each other, relative to their size."""


def begun_by_labels(place: Place, plan: Plan, left: Weights) -> tuple[Candidates, tuple[tuple[int, ...], ...]] | None:
    """About where all samples of one epoch are, in any order; None where their outputs are too different to tell the
    labels.

    Args:
        place: before the first step.
        left: the whole difference, in units of the first step's gradient.
    """
    c, spaces = plan.expansion[-1][1], place.spaces
    times = c[0] / sum(c)
    mean = {name: times * each for name, each in left.items()}
    labels = counted_labels(spaces, mean, plan.samples)
    if labels is None or len(labels) != spaces.left:
        return None
    first = spaces.first
    share = labels.new_full((len(labels),), 1 / (times * len(labels)))
    system = HeadSystem(spaces, labels, share, left, 0.0)
    draw = torch.Generator(device=labels.device).manual_seed(0)
    start = system.start()
    noise = torch.randn(start.shape, generator=draw, dtype=start.dtype, device=start.device)
    t = system.settled(start + APART * float(first.v.square().mean().sqrt()) * noise)
    if t is None:
        return None
    order, each = list[tuple[int, ...]](), iter(range(len(labels)))
    for size in plan.sizes:
        order.append(tuple(next(each) for _ in range(size)))
    return Candidates(system.inputs(t), labels), tuple(order)
