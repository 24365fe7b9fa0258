"""What stands between a client's samples and what it sent, in numbers: local steps, rounding, optimiser, buffers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from rgap.nn.ops import Linear
from rgap.printable import listed
from rgap.protocol import Sends
from rgap.target import Target
from rgap.update import Update

COARSE = 1e-3
"""Where rounding is a larger part of an update, it is said."""


def obstacles(target: Target, update: Update) -> Iterator[str]:
    """One sentence for each bound on what a weight difference can tell, with the numbers on both sides."""
    protocol, own = update.header.protocol, update.samples_of_one(target)
    if protocol.sends is Sends.GRADIENT:
        return
    steps = len(protocol.minibatches(own))
    if steps > 1:
        yield _steps(target, own, protocol.passes, steps)
    if not protocol.linear:
        yield (
            f"{protocol.optimiser.value} hides sizes: in its first step every weight moves by the learning rate "
            f"{protocol.learning_rate:g}, whatever its gradient. Signs are told, sizes are not; clients that use SGD "
            "would give them away."
        )
    if protocol.clip_norm is not None:
        yield f"Each step's gradient was clipped to a norm of {protocol.clip_norm:g}: above that its size is not told."
    weights = math.sqrt(sum(float(target.parameters[name].double().square().sum()) for name in update.gradients))
    rounded = float(torch.finfo(update.dtype).eps)
    if update.norm and rounded * weights > COARSE * update.norm:
        yield (
            f"Learning rate times gradient against the weights' rounding: the weights moved by "
            f"{update.norm / weights:.1e} of their size and are rounded to {rounded:.1e} of it, so that about "
            f"{min(rounded * weights / update.norm, 1):.1%} of what was sent is rounding. Larger steps would tell more."
        )


def width_exceeded(target: Target, updates: Sequence[Update]) -> str:
    """Samples against width, in a clause, where no client's local steps can be undone; empty where one's may be."""
    widths = list(_widths(target))
    if not widths or not updates:
        return ""
    name, width = max(widths, key=lambda each: each[1])
    numbers = []
    for update in updates:
        protocol, own = update.header.protocol, update.samples_of_one(target)
        several = protocol.sends is not Sends.GRADIENT and len(protocol.minibatches(own)) > 1
        if not several or not protocol.linear or own * protocol.passes < width:
            return ""
        numbers.append((own * protocol.passes, own, protocol.passes))
    _, own, passes = min(numbers)
    least = "" if len(set(numbers)) == 1 else "at least "
    return f"{least}{own} samples x {_epochs(passes)} against the width {width} of {name}"


def _epochs(passes: int) -> str:
    return "1 epoch" if passes == 1 else f"{passes} epochs"


def _steps(target: Target, own: int, passes: int, steps: int) -> str:
    """Why so many steps cannot be undone one by one, or what it takes to."""
    needed = own * passes
    epochs = _epochs(passes)
    widths = list(_widths(target))
    if not widths:
        return (
            f"{steps} local steps cannot be undone one by one here: no Linear layer follows another one, and that is "
            "where samples of several steps are told apart. The attacks take all steps for the first."
        )
    name, width = max(widths, key=lambda each: each[1])
    if needed < width:
        return (
            f"{own} samples x {epochs} = {needed} are fewer than the width {width} of {name}: {steps} local "
            "steps may be undone one by one. Where they are not, the attacks take all for the first."
        )
    return (
        f"{own} samples x {epochs} = {needed} against the width {width} of {name}: {steps} local steps cannot "
        f"be undone one by one, which takes fewer than {width}. The attacks take all steps for the first, and how "
        "often each label occurs is an estimate."
    )


def _widths(target: Target) -> Iterator[tuple[str, int]]:
    """Of Linear layers that follow another one, how many values both of them pass on."""
    try:
        nodes = target.network.nodes
    except NotImplementedError:
        return
    layers = [node.op.layer for node in nodes if isinstance(node.op, Linear) and node.op.layer.positions == 1]
    for first, second in pairwise(layers):
        yield second.name, min(first.unknowns, first.outputs, second.unknowns)


def sent_buffers(target: Target, update: Update) -> str | None:
    """Which buffers were sent and have moved; None if there are none."""
    moved = [
        name for name, t in update.buffers.items() if not torch.equal(t.to(target.buffers[name]), target.buffers[name])
    ]
    if not moved:
        return None
    still = len(update.buffers) - len(moved)
    rest = f"; {still} more have not moved" if still else ""
    return (
        f"Beside the trained parameters {len(moved)} buffers were sent that have moved: {listed(moved)}{rest}. "
        "Running statistics tell mean and variance of what a layer read: with those of a single step batch norm in "
        "training mode hides nothing."
    )
