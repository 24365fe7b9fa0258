"""Back through a chain for several samples whose gradients were added up, layer by layer.

Each sample has its own weight rows W x_i = z_i, and all share the gradient rows: sum over i of K_i x_i = grad W. One
layer of a batch is one layer on b times as many pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.inversion.layer import LayerSystem
from rgap.inversion.report import LayerReport, layer_report
from rgap.inversion.rounding import rounding
from rgap.inversion.state import Cause, State, Stop
from rgap.inversion.unpool import before_pool
from rgap.nn.network import Network
from rgap.nn.ops import Elementwise, Linear
from rgap.nn.pools import Pool


@dataclass(frozen=True, eq=False)
class Passed:
    """How far the inputs of several samples are known, and what happened on the way."""

    state: State
    """Of the value in front of the last operation that was passed."""
    certain: tuple[int, State]
    """The last value that every layer behind it determines, with its value_id."""
    layers: tuple[LayerReport, ...]
    stop: Stop | None = None
    """The operation that was not passed."""


def layer_by_layer(
    network: Network,
    output: State,
    gradients: Mapping[str, Tensor],
    eps: float,
    rank_tolerance: float,
    report: Callable[[int, float], None] = lambda step, missed: None,
) -> Passed:
    """Back from what is known of each sample's output, to the inputs or to an operation that is not inverted.

    Args:
        output: value, cotangent and error of the output, (b, *shape).
        gradients: of the sum over the samples, by parameter name; those of all layers.
        eps: relative rounding of the gradients.
        rank_tolerance: singular values below this fraction of the largest count as zero.
        report: is called with the number of steps through a pool and what they miss.
    """
    passed = Passed(output, (len(network.nodes), output), ())
    for segment in reversed(network.segments):
        op, state = network.nodes[segment.nodes[-1]].op, passed.state
        if segment.block:
            return replace(passed, stop=Stop(op, Cause.OPEN, "a block is solved with all that is in front of it"))
        if isinstance(op, Linear):
            if op.layer.weight_name not in gradients or not op.has_gradient:
                return replace(passed, stop=Stop(op, Cause.LOSSY, "its gradient is not its own, or was not sent"))
            state, own = _layer(op, state, gradients[op.layer.weight_name], eps, rank_tolerance)
            passed = replace(passed, layers=(own, *passed.layers))
        elif isinstance(op, Elementwise):
            inverse = op.activation.invert(state.value, state.std)
            std = state.std / inverse.slope.abs().clamp(min=1e-12)
            state = State(inverse.z, state.cotangent * inverse.slope, state.weighed(inverse.weight), std)  # Eq. 6
        elif isinstance(op, Pool):
            found = before_pool(network, segment.nodes[-1], state, gradients, eps, report)
            if isinstance(found, str):
                return replace(passed, stop=Stop(op, Cause.LOSSY, found))
            state = found
        else:
            value, moved = op.invert(state.value), op.invert(state.value + state.std)
            if value is None or moved is None:
                return replace(passed, stop=Stop(op, Cause.LOSSY, op.loses))
            state = State(value, op.cotangent(state.cotangent, value), None, (moved - value).abs())
        determined = all(layer.open_since is None for layer in passed.layers)
        certain = (segment.entry, state) if determined else passed.certain
        passed = replace(passed, state=state, certain=certain)
    return passed


def _layer(op: Linear, state: State, gradient: Tensor, eps: float, rank_tolerance: float) -> tuple[State, LayerReport]:
    """The layer's inputs from their weight rows and the gradient rows that they share (Eqs. 15 and 16)."""
    b, layer = len(state.value), op.layer.side_by_side(len(state.value))

    def wide(values: Tensor) -> Tensor:
        """(b, *output_shape) as (1, o, b p)."""
        return op.layer.pack_output(values).movedim(0, 1).flatten(1)[None]

    k, grad = wide(state.cotangent), op.layer.pack_weight(gradient[None])
    weight = None if state.row_weight is None else wide(state.row_weight)
    system = LayerSystem(layer, k, weight, rank_tolerance)
    solution = system.solve(wide(state.value) - layer.offset, grad)
    generator = torch.Generator(device=k.device).manual_seed(0)
    std = wide(state.std.expand(state.value.shape)).maximum(solution.weight_misfit[:, None, None])
    noise = [
        size * torch.randn(size.shape, generator=generator, dtype=k.dtype, device=k.device)
        for size in (std, rounding(grad, eps))
    ]
    moved = system.apply_inverse(noise[0], noise[1]).square().mean().sqrt()

    def apart(x: Tensor) -> Tensor:
        """(1, c, b n) as (b, *input_shape)."""
        return op.layer.unpack_input(x.reshape(layer.channels, b, -1).movedim(0, 1))

    x = apart(solution.x)
    open_since = layer.name if solution.rank[0] < layer.unknowns else None
    report = layer_report(layer, k, weight, solution, 0, float(moved), open_since)
    return State(x, apart(layer.grad_input(k)), None, moved.expand(x.shape)), report
