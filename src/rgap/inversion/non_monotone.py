"""Activations with two inputs for one output, such as GELU: which of the two it was, the other rows decide."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.layer import LayerSystem
from rgap.inversion.state import Observation, State
from rgap.nn.non_monotone import NonMonotone
from rgap.nn.ops import Linear

CHOICES = 20
"""How often the branches of all values are chosen anew."""
UNCERTAIN = 1e-2
"""The weight of a row whose value may be another one, while the others decide."""
QUIET = 3.0
"""So many errors away from zero an output may be that of a silent unit."""


def both_branches(activation: NonMonotone, x: State, upper: State) -> State:
    """The value on the upper branch, with that on the lower one as its alternative; outputs >= 0 have one alone, but
    those near zero may be those of a silent unit, whose row is dropped.

    Args:
        x: behind the activation.
        upper: in front of it, its cotangent not yet multiplied by the slope.
    """
    std = x.std.expand(x.value.shape)
    z = activation.lower(x.value)
    slope = torch.where(x.value < 0, activation.slope(z), activation.slope(upper.value))
    z = torch.where(x.value < 0, z, upper.value)
    silent = (x.value.abs() <= QUIET * std) & (activation.silent > -math.inf)
    slope, z = torch.where(silent, 0.0, slope), torch.where(silent, activation.silent, z)
    lower = State(z, x.cotangent * slope, slope.abs().clamp(max=1.0), std / slope.abs().clamp(min=1e-12))
    return State(upper.value, upper.cotangent, upper.row_weight, upper.std, lower)


def choose_branch(
    op: Linear, state: State, other: State, grad: Float[Tensor, "s g j i"], has_gradient: bool, observed: Observation
) -> State:
    """Of two values that each output of the activation allows, the one that the rows of all the others predict.

    The cotangent of a unit depends on which it is, so its gradient rows tell nothing before it is chosen; but where the
    cotangents are the client's own they hang on no choice, and all rows tell.
    """
    layer = op.layer
    uncertain = state.value != other.value
    weight = torch.ones_like(state.value) if state.row_weight is None else state.row_weight
    weight = layer.pack_output(torch.where(uncertain, UNCERTAIN * weight, weight))
    told = torch.full_like(weight, has_gradient)
    if op.cotangent_parameter in observed.gradients:
        other = replace(other, cotangent=state.cotangent)
    else:
        told = told * ~layer.pack_output(uncertain).any(-1, keepdim=True)
    k = told * layer.pack_output(state.cotangent)
    system = LayerSystem(layer, k, weight, observed.rank_tolerance, solver=observed.solver)
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
