"""Values so near the kink of their activation that their error leaves its slope open."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rgap.inversion.layer import LayerSystem
from rgap.inversion.rounding import rounding
from rgap.inversion.state import Observation, State
from rgap.nn.activations import Activation, Inverse
from rgap.nn.layers import Layer
from rgap.nn.ops import Linear

NEAR = 5.0
"""A value within so many standard deviations of its activation's kink may lie on either side of it."""
BRANCHES, BRANCHED = 3, 20_000
"""How many of them are tried on both sides at once, and among how many values. Of more the sides are read off the
gradient."""
AGREES, VISIBLE = 0.05, 20.0
"""A unit's gradient agrees with the sides of its values where it misses no more than this part of what the other side
of one of them would do to it; of those whose effect is above so many roundings."""
ROUGH = 1e-4
"""Singular values below this fraction of the largest are of no use where an input is wanted for its signs alone."""


def branches(
    activation: Activation, x: Tensor, slope: Tensor, std: Tensor
) -> tuple[Int[Tensor, " b"], Float[Tensor, "b ..."]]:
    """Every choice of sides of a few uncertain values becomes a candidate.

    Returns:
        The candidate that each of b branches comes from, and its slopes.
    """
    other = activation.other_side(slope)
    of, slopes = [], []
    for s in range(len(x)):
        near = ((x[s].abs() <= NEAR * std[s]) & (other[s] != slope[s])).flatten().nonzero().flatten()
        near = near[:0] if len(near) > BRANCHES or x[s].numel() > BRANCHED else near
        for sides in product((False, True), repeat=len(near)):
            branch = slope[s].clone()
            for at, change in zip(near.tolist(), sides, strict=True):
                branch.view(-1)[at] = (other[s] if change else slope[s]).reshape(-1)[at]
            of.append(s)
            slopes.append(branch)
    return torch.tensor(of, device=x.device), torch.stack(slopes)


def other_side(activation: Activation, x: State, inverse: Inverse) -> State | None:
    """The state before the activation if all uncertain values lay on the other side; None if there are none.

    Args:
        x: behind the activation.
    """
    there = activation.other_side(inverse.slope)
    uncertain = (x.value.abs() <= NEAR * x.std.expand(x.value.shape)) & (there != inverse.slope)
    if inverse.weight is not None:
        uncertain &= inverse.weight > 0  # nothing is known of the rest
    if not bool(uncertain.any()):
        return None
    return State(inverse.z, x.cotangent * torch.where(uncertain, there, inverse.slope), None, x.std)


def sides_agree(
    layer: Layer,
    k: Float[Tensor, "s o p"],
    there: Float[Tensor, "s o p"],
    x: Float[Tensor, "s c n"],
    grad: Float[Tensor, "s g j i"],
    eps: float,
) -> Bool[Tensor, " s"]:
    """Whether the gradient that an input has leaves no doubt on which side of their kinks the values behind lie.

    Where the rows of the units in doubt are not needed for the input, they agree with it on the right sides alone.

    Args:
        k: the cotangent on the sides taken, there: on the others.
        x: solved for with the sides taken.
        eps: relative rounding of the gradient.
    """
    missed = (grad - layer.grad_weight(x, k)).norm(dim=-1).reshape(*k.shape[:2], 1)
    noise = rounding(grad, eps).norm(dim=-1).reshape(*k.shape[:2], 1)
    effect = (there - k).abs() * layer.read(x)
    contradicted: Tensor = ((effect > VISIBLE * noise) & (missed > AGREES * effect)).flatten(1).any(1)
    return ~contradicted


def choose_side(op: Linear, state: State, other: State, grad: Float[Tensor, "s g j i"], observed: Observation) -> State:
    """Of two sides of their kinks on which values may lie, the one with which the gradient agrees.

    The wrong one adds a multiple of one vector to the gradient of the unit's own weights, what the unit reads. So the
    gradient rows of such units are left out at first; if the others determine the input it shows the sides.
    """
    layer = op.layer
    k, there = layer.pack_output(state.cotangent), layer.pack_output(other.cotangent)
    row_weight = None if state.row_weight is None else layer.pack_output(state.row_weight)
    uncertain = k != there
    certain = ~uncertain.any(-1, keepdim=True)
    kept = grad * certain.reshape(len(k), layer.groups, -1, 1)
    tolerance = max(ROUGH, observed.rank_tolerance)
    system = LayerSystem(layer, k * certain, row_weight, tolerance, solver=observed.solver, counted=0)
    x = system.solve(layer.pack_output(state.value) - layer.offset, kept).x
    residual = (grad - layer.grad_weight(x, k)).flatten(1, 2)
    patches = layer.patches(x)
    k = k.clone()
    for s, unit in (~certain[..., 0]).nonzero().tolist():
        at = uncertain[s, unit].nonzero().flatten()
        if system.rank[s] < layer.unknowns or len(at) > residual.shape[-1]:
            continue
        effect = patches[s, unit * layer.groups // layer.outputs][:, at] * (there - k)[s, unit, at]
        share = torch.linalg.lstsq(effect, residual[s, unit, :, None]).solution[:, 0]
        flipped = share > 0.5
        left = residual[s, unit] - effect[:, flipped].sum(1)
        # What the other side does not explain has another cause, such as a candidate that is none.
        if float(left.norm()) < 0.5 * float(residual[s, unit].norm()):
            k[s, unit, at[flipped]] = there[s, unit, at[flipped]]
    return replace(state, cotangent=layer.unpack_output(k).reshape(state.cotangent.shape), alternative=None)
