"""Past what no constraint passes: a value nearer to the input that a gradient alone tells.

A layer with no more positions than outputs tells what it reads up to its size, whatever lies behind it
(`rgap.inversion.subspace.patches`). The size is that with which the network puts out what is known of its output, and
the layer's own gradient shows whether all of it is right. What lies between is computed, not inverted.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.history import History, Paths
from rgap.inversion.report import LayerReport
from rgap.inversion.state import Observation, State
from rgap.inversion.subspace.patches import Direction, input_direction, readable
from rgap.linalg import deadline
from rgap.nn.layers import Layer
from rgap.nn.network import Network
from rgap.nn.ops import Linear

AGREES = 2000
"""Roundings of the gradient by which that of the layer may be missed."""
SIZES = 24
"""Sizes that are tried, each twice the one before it, on both sides of 1 a value."""
STEPS = 12
"""From the best of them to the right one."""
OWN_STEPS = 4
"""From there, while they bring the layer's own gradient nearer: an output that hardly moves tells the size badly, and
the gradient is as large as what the layer reads."""


def read_ahead(
    network: Network, before: int, observed: Observation, output: Paths, paths: Paths
) -> tuple[int, Paths] | None:
    """The value nearest to the input that a gradient tells, and what is known of it; None if there is none.

    Args:
        before: the value behind which nothing needs to be known.
        output: the candidates at the network's output.
        paths: those that are left of them.
    """
    entries = [segment.entry for segment in network.segments if segment.entry <= before]
    for entry in entries:
        for node_id in network.readers[entry]:
            op = network.nodes[node_id].op
            if not (isinstance(op, Linear) and op.has_gradient and readable(op.layer)):
                continue
            if op.layer.weight_name not in observed.gradients:
                continue
            deadline.check()
            found = _at(network, node_id, op.layer, observed, output, paths)
            if found is not None:
                return entry, found
    return None


def _at(
    network: Network, node_id: int, layer: Layer, observed: Observation, output: Paths, paths: Paths
) -> Paths | None:
    """The candidates at the value that the layer reads, those of them that its gradient agrees with."""
    entry = network.nodes[node_id].reads[0]
    tail = network.part([each for each in network.segments if each.entry >= entry])
    directions: dict[int, Direction | None] = {}
    found: list[tuple[int, State, History]] = []
    for s, update in enumerate(paths.update.tolist()):
        grad = layer.pack_weight(observed.gradient(layer.weight_name, paths.update[s : s + 1]))[0, 0]
        if update not in directions:
            directions[update] = input_direction(layer, grad, observed.eps)
        direction = directions[update]
        if direction is None:
            continue
        ends = output.state.one(int((output.root == paths.root[s]).nonzero()[0]))
        state = _sized(tail, node_id - entry, layer, direction, grad, ends, observed.eps)
        if state is not None:
            found.append((s, state, _history(paths.history[s], layer, direction, state, grad)))
    if not found:
        return None
    kept = paths.select(torch.tensor([s for s, _, _ in found], device=paths.update.device))
    scatter = torch.full_like(kept.cotangent_scatter, observed.eps)
    return replace(
        kept,
        state=State.concatenate([state for _, state, _ in found]),
        cotangent_scatter=scatter,
        history=tuple(history for _, _, history in found),
    )


def _sized(
    tail: Network,
    node_id: int,
    layer: Layer,
    direction: Direction,
    grad: Float[Tensor, "o i"],
    output: State,
    eps: float,
) -> State | None:
    """The input with its size and sign, and its cotangent; None where the layer's gradient is another one.

    Args:
        tail: from what the layer reads to the output.
        node_id: of the layer in it.
    """
    unit = layer.unpack_input(direction.x)
    wanted = output.value
    best: tuple[float, float, Tensor] | None = None
    sizes = unit.numel() ** 0.5 * 2.0 ** (torch.arange(SIZES, dtype=unit.dtype, device=unit.device) - SIZES // 2)
    for sign in (1.0, -1.0):
        missed = [float((tail.forward(sign * size * unit)[-1] - wanted).norm()) for size in sizes]
        size = sign * float(sizes[missed.index(min(missed))])
        for _ in range(STEPS):
            values = tail.forward(size * unit)
            moved = tail.jvp(values, tail.slopes(values), unit)[-1]
            if not float(moved.norm()):
                break
            size -= float((moved * (values[-1] - wanted)).sum() / moved.square().sum())
        for _ in range(OWN_STEPS):
            found = _made(tail, node_id, layer, size * unit, grad, output)
            if found is None:
                return None
            wrong, there, along = found
            if there is None or (best is not None and not wrong < best[0]):
                break
            best = wrong, size, there
            size /= along or 1.0
    if best is None or not best[0] <= AGREES * eps:
        return None
    _, size, there = best
    # Errors are the same in all channels' pixels, as those of a layer's solution are.
    pixel = (size * direction.error).square().mean(1, keepdim=True).sqrt().expand(direction.x.shape)
    return State(size * unit, there, None, layer.unpack_input(pixel))


def _made(
    tail: Network, node_id: int, layer: Layer, x: Tensor, grad: Float[Tensor, "o i"], output: State
) -> tuple[float, Tensor | None, float] | None:
    """How far the layer's gradient at an input is from the one given, relatively; the input's cotangent; and how much
    of the one given it is. None where no cotangent comes to the layer."""
    values = tail.forward(x)
    cotangent = tail.cotangents(values, tail.slopes(values), output.cotangent)
    k = cotangent[node_id + 1]
    if k is None:
        return None
    made = layer.grad_weight(layer.pack_input(values[0]), layer.pack_output(k))[0, 0]
    size = grad.square().sum()
    return float((made - grad).norm() / size.sqrt()), cotangent[0], float((made * grad).sum() / size)


def _history(before: History, layer: Layer, direction: Direction, state: State, grad: Tensor) -> History:
    """With nothing left open, and a report of the layer that told it."""
    report = LayerReport(
        name=layer.name,
        unknowns=layer.unknowns,
        weight_rows=0,
        gradient_rows=layer.gradient_rows,
        rank=layer.unknowns,
        condition=1 / direction.gap,
        weight_residual=0.0,
        gradient_residual=0.0,
        error=float(state.rms_std[0]),
        dead_units=int((grad == 0).all(1).sum()),
        method="row space",
    )
    return replace(
        before,
        layers=(report, *before.layers),
        value_open=None,
        cotangent_open=None,
        certain=None,
        open=None,
        told=None,
    )
