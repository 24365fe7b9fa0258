"""Activations with two inputs for one output, such as GELU: which of the two it was, the weight rows decide."""

from __future__ import annotations

import torch

from rgap.inversion.layer import LayerSystem
from rgap.inversion.state import Observation, State
from rgap.nn.activations import NonMonotone
from rgap.nn.ops import Linear

CHOICES = 20
"""How often the branches of all values are chosen anew."""
UNCERTAIN = 1e-2
"""The weight of a row whose value may be another one, while the others decide."""


def both_branches(activation: NonMonotone, x: State, upper: State) -> State:
    """The value on the upper branch, with that on the lower one as its alternative; outputs >= 0 have one alone.

    Args:
        x: behind the activation.
        upper: in front of it, its cotangent not yet multiplied by the slope.
    """
    std = x.std.expand(x.value.shape)
    z = activation.lower(x.value)
    slope = torch.where(x.value < 0, activation.slope(z), activation.slope(upper.value))
    z = torch.where(x.value < 0, z, upper.value)
    lower = State(z, x.cotangent * slope, slope.abs().clamp(max=1.0), std / slope.abs().clamp(min=1e-12))
    return State(upper.value, upper.cotangent, upper.row_weight, upper.std, lower)


def choose_branch(op: Linear, state: State, other: State, observed: Observation) -> State:
    """Of two values that each output of the activation allows, the one that the weight rows of all the others predict.

    The cotangent of a unit depends on which it is, so the gradient rows tell nothing before it is chosen.
    """
    layer = op.layer
    uncertain = state.value != other.value
    weight = torch.ones_like(state.value) if state.row_weight is None else state.row_weight
    weight = layer.pack_output(torch.where(uncertain, UNCERTAIN * weight, weight))
    no_gradient = torch.zeros_like(layer.pack_output(state.cotangent))
    system = LayerSystem(layer, no_gradient, weight, observed.rank_tolerance, solver=observed.solver)
    grad = torch.zeros_like(layer.weight).expand(len(no_gradient), *layer.weight.shape)
    lower = torch.zeros_like(uncertain)
    for _ in range(CHOICES):
        value = torch.where(lower, other.value, state.value)
        x = system.solve(layer.pack_output(value) - layer.offset, grad).x
        z = layer.unpack_output(layer.output(x) + layer.offset)
        nearer = uncertain & ((z - other.value).abs() < (z - state.value).abs())
        if bool((nearer == lower).all()):
            break
        lower = nearer
    chosen = None
    if state.row_weight is not None and other.row_weight is not None:
        chosen = torch.where(lower, other.row_weight, state.row_weight)
    return State(
        torch.where(lower, other.value, state.value),
        torch.where(lower, other.cotangent, state.cotangent),
        chosen,
        torch.where(lower, other.std, state.std.expand(state.value.shape)),
    )
