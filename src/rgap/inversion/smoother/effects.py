"""What doubts about slopes do to the mean gradient of all steps, with the weights of the steps given.

Another slope changes all cotangents in front of its unit, by what the unit gives all values behind it, and by these the
output's cotangent. All steps stand side by side as positions do, so that many doubts are one product for each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.inversion.smoother.sides import Doubt, Step
from rgap.inversion.smoother.steps import KinkedSteps, gradients
from rgap.nn.network import Network
from rgap.nn.ops import Linear

AT_ONCE = 128
"""Doubts."""
MANY = 512
"""Doubts from which on they are had in float32: what that rounds is less than what is known of any of them while noise
is taken for so large that so many are in doubt."""


def effects(steps: KinkedSteps, run: Sequence[Step], found: Sequence[Doubt]) -> dict[str, Tensor]:
    """Of each doubt, and last of each of the output's cotangents changed by one, for each parameter (n, *shape)."""
    number = sum(len(doubt.unit) for doubt in found)
    run = _single(run) if number >= MANY else run
    outputs = [_of_output(steps, step) for step in run]
    mean = {
        n: torch.stack([share * each[n] for share, each in zip(steps.shares, outputs, strict=True)])
        for n in steps.names
    }
    whole = {n: torch.cat([each.new_zeros(number, *each.shape[2:]), each.sum(0)]) for n, each in mean.items()}
    start = 0
    for at, doubt in zip(steps.activations, found, strict=True):
        for unit, pattern in zip(*(torch.split(each, AT_ONCE) for each in (doubt.unit, doubt.pattern)), strict=True):
            curved, rows = _of_doubts(steps, run, at, unit, pattern)
            for name, own in whole.items():
                part = own[start : start + len(unit)]
                if name in rows:
                    part.copy_(rows[name].reshape(part.shape))
                part.flatten(1).addmm_(curved, mean[name].flatten(0, 1).flatten(1))
            start += len(unit)
    return whole


def _single(run: Sequence[Step]) -> Sequence[Step]:
    found = list[Step]()
    for step in run:
        network = step.network.single
        if network is None:
            return run
        slopes = {at: each.float() for at, each in step.slopes.items()}
        ks = [None if k is None else k.float() for k in step.cotangents]
        found.append(Step(network, [each.float() for each in step.values], slopes, ks))
    return found


def _of_output(steps: KinkedSteps, step: Step) -> dict[str, Tensor]:
    value = step.values[-1]
    one = torch.eye(value.numel(), dtype=value.dtype, device=value.device).reshape(-1, *value.shape[1:])
    ks = step.network.vjp(step.values, step.slopes, {len(step.values) - 1: one})
    return steps.rows(step.network, step.values, ks)


def _of_doubts(
    steps: KinkedSteps, run: Sequence[Step], at: int, unit: Int[Tensor, " n"], pattern: Float[Tensor, "n steps"]
) -> tuple[Float[Tensor, "n k"], dict[str, Tensor]]:
    """Of one activation's: how each changes the output's cotangents in all steps, and what it does to the gradients
    but for that."""
    there, network, fronts, behinds, curved = steps.reads(at), steps.middle_network, [], [], []
    for t, step in enumerate(run):
        k, value = step.cotangents[at + 1], step.values[there]
        assert k is not None
        one = k.new_zeros(len(unit), k.numel())
        one[torch.arange(len(unit), device=k.device), unit] = pattern[:, t].to(k)
        one = one.reshape(-1, *k.shape[1:])
        fronts.append(step.network.vjp(step.values, step.slopes, {there: one * k}))
        behinds.append(pushed(step.network, step.values, step.slopes, {at + 1: one * value}))
        last = behinds[-1][-1]
        assert last is not None
        curved.append(last.flatten(1) @ steps.output_curvature(step.values[-1].double()).mT.to(k))
    found = dict[str, Tensor]()
    for layer_at in steps.layers:
        op, reads = network.nodes[layer_at].op, network.nodes[layer_at].reads[0]
        assert isinstance(op, Linear)
        front = layer_at < at
        xs, ks = list[Tensor](), list[Tensor]()
        for t, step in enumerate(run):
            read = (step.values if front else behinds[t])[reads]
            k = (fronts[t] if front else step.cotangents)[layer_at + 1]
            assert read is not None
            assert k is not None
            xs.append(op.layer.patches(op.layer.pack_input(read)))
            ks.append(steps.shares[t] * op.layer.pack_output(k))
        x, k = torch.cat(xs, -1), torch.cat(ks, -1)
        found[op.layer.weight_name] = gradients(op.layer, x, k)
        if front and op.layer.bias_name is not None:  # a bias does not see what its layer reads
            found[op.layer.bias_name] = k.sum(-1)
    return torch.cat(curved, 1), found


def pushed(
    network: Network, values: list[Tensor], slopes: dict[int, Tensor], starts: Mapping[int, Tensor]
) -> list[Tensor | None]:
    """The tangents of all values of a chain from what comes in at some of them, by their ids; None where nothing
    gets to."""
    found = [starts.get(0)]
    for at, node in enumerate(network.nodes):
        read, more = found[node.reads[0]], starts.get(at + 1)
        if read is not None:
            read = read * slopes[at] if at in slopes else node.op.jvp((read,), (values[node.reads[0]],))
        found.append(more if read is None else read if more is None else read + more)
    return found
