"""The cotangent of what a norm reads, from the gradient of the bias that was added there."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from rgap.inversion.state import Observation, State
from rgap.nn.ops import Linear, Norm, Op

CANCELS = 1e-4
"""Sums over positions below this fraction of their terms' sizes determine no norm's size."""


def before_norm(
    op: Norm, behind: Op | None, state: State, observed: Observation, of: Int[Tensor, " s"]
) -> State | None:
    """The cotangent alone, the value unknown; None if no bias determines it.

    The bias's gradient is its cotangent summed over positions, and each group's cotangent is known but for its size:
    as many linear equations as there are biases.

    Args:
        behind: the operation that the norm reads.
        of: which update each candidate is of.
    """
    name = behind.layer.bias_name if isinstance(behind, Linear) else None
    if not isinstance(behind, Linear) or name is None or name not in observed.gradients:
        return None
    layer = behind.layer
    times = layer.pack_output(op.vjp_times_size(state.cotangent, state.value))
    count = state.cotangent[0].numel()
    group = torch.arange(count, device=times.device).div(count // op.groups, rounding_mode="floor")
    group = layer.pack_output(group.reshape(1, *state.cotangent.shape[1:])).expand(times.shape)
    matrix = times.new_zeros(len(times), layer.outputs, op.groups).scatter_add_(2, group, times)
    sizes = times.new_zeros(matrix.shape).scatter_add_(2, group, times.abs()).amax((1, 2))
    if bool((torch.linalg.svdvals(matrix)[:, -1] <= CANCELS * sizes).any()) or layer.outputs < op.groups:
        return None  # the sums over positions cancel, as those of a whole group do
    grad = observed.gradient(name, of).reshape(len(times), -1, 1)
    inverse = torch.linalg.lstsq(matrix, grad).solution[..., 0]
    k = times * inverse.gather(1, group.flatten(1)).reshape(times.shape)
    unknown = torch.zeros_like(state.value)
    return State(unknown, layer.unpack_output(k).reshape(state.cotangent.shape), unknown, state.std)
