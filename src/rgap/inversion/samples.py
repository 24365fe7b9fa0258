"""Back through a chain for several samples whose gradients were added up, layer by layer.

Each sample has its own weight rows W x_i = z_i, and all share the gradient rows: sum over i of K_i x_i = grad W. One
layer of a batch is one layer on b times as many pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rgap.inversion.layer import LayerSystem
from rgap.inversion.rounding import rounding
from rgap.inversion.state import State
from rgap.nn.network import Network
from rgap.nn.ops import Elementwise, Linear


def layer_by_layer(
    network: Network, output: State, gradients: Mapping[str, Tensor], eps: float, rank_tolerance: float
) -> State | None:
    """The inputs of b samples from what is known of each one's output; None if an operation is not inverted.

    Args:
        output: value, cotangent and error of the output, (b, *shape).
        gradients: of the sum over the samples, by parameter name; those of all layers.
        eps: relative rounding of the gradients.
        rank_tolerance: singular values below this fraction of the largest count as zero.
    """
    state = output
    for segment in reversed(network.segments):
        op = network.nodes[segment.nodes[-1]].op
        if segment.block:
            return None
        if isinstance(op, Linear):
            state = _layer(op, state, gradients[op.layer.weight_name], eps, rank_tolerance)
        elif isinstance(op, Elementwise):
            inverse = op.activation.invert(state.value, state.std)
            std = state.std / inverse.slope.abs().clamp(min=1e-12)
            state = State(inverse.z, state.cotangent * inverse.slope, inverse.weight, std)  # Eq. 6
        else:
            value, moved = op.invert(state.value), op.invert(state.value + state.std)
            if value is None or moved is None:
                return None
            state = State(value, op.vjp(state.cotangent, (value,))[0], None, (moved - value).abs())
    return state


def _layer(op: Linear, state: State, gradient: Tensor, eps: float, rank_tolerance: float) -> State:
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
    return State(x, apart(layer.grad_input(k)), None, moved.expand(x.shape))
