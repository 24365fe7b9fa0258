"""Values so near the kink of their activation that their error leaves its slope open."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rgap.inversion.layer import LayerSystem
from rgap.inversion.pattern import DARK
from rgap.inversion.rounding import rounding
from rgap.inversion.state import Observation, State
from rgap.nn.activation import Activation, Inverse
from rgap.nn.activations import LOUD, ReLU
from rgap.nn.layers import Layer
from rgap.nn.network import Network
from rgap.nn.ops import Elementwise, Linear

NEAR = 5.0
"""A value within so many standard deviations of its activation's kink may lie on either side of it."""
BRANCHES, BRANCHED = 3, 20_000
"""How many of them are tried on both sides at once, and among how many values. Of more the sides are read off the
gradient."""
AGREES, ROUNDINGS, VISIBLE = 0.05, 3.0, 5.0
"""A unit's gradient agrees with the sides of its values where it misses no more than this part of what the other side
of one of them would do to it, or no more than so many roundings; of those whose effect is above so many."""
SPOILED = ((0,), (1,), (2,), (3,), (4,), (5,), (0, 1), (0, 1, 2))
"""Which outputs are left out in turn, by how much their gradients miss: those that a zero may spoil."""
MOVED, LEAST = 3, 1e-6
"""Values of an output that are on their other side, at the most; and what rounding alone may miss of a gradient,
relatively."""
OUTLYING, SPOILT = 10.0, 8
"""An output misses so many times more roundings than half of the others, if one of its values is on its wrong side; so
many of them are looked at once."""
MISSED_SUM = 100.0
"""A sum of cotangents that misses more roundings has a value on its wrong side."""
OF_A_SUM, OF_ROWS = 0.05, 0.5
"""How near what a value on its wrong side does comes to what is missed, relatively: of a sum, and of gradient rows."""
OTHER, LEFT = 0.5, 0.5
"""Of a value that is on its other side more than this part of what that would do is missed; and of what is missed less
than this part is left."""
FOR_SIGNS = 1e-5
"""Relative residual of the normal equations at which that input is good enough."""
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
    std, row_weight = x.std.expand(x.value.shape), None
    uncertain = (x.value.abs() <= NEAR * std) & (there != inverse.slope)
    if isinstance(activation, ReLU):
        # What is taken for noise may be a small value, and the other way round; then its row tells nothing.
        there, uncertain = 1 - inverse.slope, x.value < LOUD * std
        row_weight = None if inverse.weight is None else x.weighed(inverse.weight * ~uncertain)
    elif inverse.weight is not None:
        uncertain &= inverse.weight > 0  # nothing is known of the rest
    if not bool(uncertain.any()):
        return None
    return State(inverse.z, x.cotangent * torch.where(uncertain, there, inverse.slope), row_weight, x.std)


def sides_at(network: Network, value_id: int, state: State, value: Tensor) -> State:
    """The state with the sides of its kinks on which better known values lie.

    Args:
        value_id: of the state in the network.
        value: (s, *shape), of the state as well.
    """
    ops = [network.nodes[reader].op for reader in network.readers[value_id]]
    if state.alternative is None or len(ops) != 1 or not isinstance(ops[0], Elementwise):
        return state
    moved = ops[0].activation.slope(value) != ops[0].activation.slope(state.value)
    cotangent = torch.where(moved, state.alternative.cotangent, state.cotangent)
    return replace(state, cotangent=cotangent, alternative=None)


def lit(layer: Layer, x: Float[Tensor, "s c n"]) -> Bool[Tensor, "s o p"]:
    """Which units read something. One that reads next to nothing, as on an empty background, adds nothing to the
    gradient of its weights on either side of its kink."""
    read = layer.read(x)
    found: Tensor = read > DARK * read.flatten(1).amax(1)[:, None, None]
    return found


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
    missed = _of_each_output(grad - layer.grad_weight(x, k))[..., None]
    noise = _of_each_output(rounding(grad, eps))[..., None]
    effect = (there - k).abs() * layer.read(x)
    contradicted: Tensor = (
        ((effect > VISIBLE * noise) & (missed > torch.maximum(AGREES * effect, ROUNDINGS * noise))).flatten(1).any(1)
    )
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
    system = LayerSystem(
        layer,
        k * certain,
        row_weight,
        tolerance,
        solver=observed.solver,
        counted=0,
        probed=layer.weight_rows < layer.unknowns,
    )
    x = system.solve(layer.pack_output(state.value) - layer.offset, kept, tolerance=FOR_SIGNS).x
    residual = (grad - layer.grad_weight(x, k)).flatten(1, 2)
    patches = layer.patches(x)
    uncertain &= lit(layer, x)
    k = k.clone()
    for s, unit in (~certain[..., 0]).nonzero().tolist():
        at = uncertain[s, unit].nonzero().flatten()
        if system.rank[s] < layer.unknowns or len(at) > residual.shape[-1]:
            continue
        effect = _effect(layer, patches[s], unit, at, there[s, unit] - k[s, unit])
        moved = at[explain_together(residual[s, unit], effect)]
        k[s, unit, moved] = there[s, unit, moved]
    cotangent = layer.unpack_output(k).reshape(state.cotangent.shape)
    return replace(state, cotangent=cotangent, alternative=None)


def sides_by_bias(layer: Layer, state: State, other: State, bias: Float[Tensor, "s o"], eps: float) -> State:
    """The sides of values with which the gradient of a convolution's bias agrees: it is the sum of k over positions.

    What an output's sum misses is the cotangent of the value that is taken for its other side.
    """
    k, there = layer.pack_output(state.cotangent), layer.pack_output(other.cotangent)
    missed, size = bias - k.sum(-1), k.abs().sum(-1) + bias.abs()
    found = k.clone()
    for s, unit in (missed.abs() > MISSED_SUM * max(eps, LEAST**2) * size).nonzero().tolist():
        at = (there[s, unit] != k[s, unit]).nonzero().flatten()
        moved = at[_explain(missed[s, unit].reshape(1, 1), (there[s, unit, at] - k[s, unit, at])[None], OF_A_SUM)]
        found[s, unit, moved] = there[s, unit, moved]
    if torch.equal(found, k):
        return state
    row_weight = state.row_weight
    if row_weight is not None:
        kept = layer.unpack_output((found == k).to(k)).reshape(row_weight.shape)
        row_weight = row_weight * kept
    return replace(state, cotangent=layer.unpack_output(found).reshape(state.cotangent.shape), row_weight=row_weight)


def sides_by_weights(layer: Layer, state: State, grad: Float[Tensor, "1 o i"], eps: float) -> State:
    """The sides of values of several samples with which a layer's gradient agrees, whatever its inputs are: what the
    weights make of them is known, and grad W W' is the sum of k (W x)' over samples and positions.

    Args:
        state: of the layer's output, (b, *shape).
    """
    other = state.alternative
    if other is None or layer.groups > 1:
        return state
    k, there = layer.pack_output(state.cotangent), layer.pack_output(other.cotangent)
    z = layer.pack_output(state.value) - layer.offset
    missed = grad[0] @ layer.weight[0].mT - (k @ z.mT).sum(0)
    noise = z.square().sum((0, 2)).mean().sqrt() * k.square().sum((0, 2)).sqrt() * max(eps, LEAST)
    found = k.clone()
    for unit in range(layer.outputs):
        sample, at = (there[:, unit] != k[:, unit]).nonzero(as_tuple=True)
        if not len(at) or not float(missed[unit].norm()) > OUTLYING * float(noise[unit]):
            continue
        effect = z[sample, :, at].mT * (there - k)[sample, unit, at]
        moved = _explain(missed[unit, :, None], effect, OF_ROWS)
        found[sample[moved], unit, at[moved]] = there[sample[moved], unit, at[moved]]
    return replace(state, cotangent=layer.unpack_output(found).reshape(state.cotangent.shape), alternative=None)


def choose_zeros(
    op: Linear, state: State, other: State, x: Tensor, grad: Float[Tensor, "s g j i"], observed: Observation
) -> State:
    """Which values a ReLU made zero, where the gradient contradicts those taken for zeros.

    A small value may be taken for a zero's noise, and noise for a value. That spoils the gradient rows of one output,
    and with them the input. So outputs that miss most are left out until the others agree; what they miss then is
    what their own values on the other side do to them.

    Args:
        other: the cotangents if zeros were values and small values zeros; row weights without the latter.
        x: solved for with the sides taken.
    """
    layer = op.layer
    k, there, z = (layer.pack_output(each) for each in (state.cotangent, other.cotangent, state.value))
    assert state.row_weight is not None
    assert other.row_weight is not None
    weight, sure = layer.pack_output(state.row_weight), layer.pack_output(other.row_weight)
    size = _of_each_output(rounding(grad, observed.eps)).clamp(min=torch.finfo(k.dtype).tiny)
    worst = (_of_each_output(grad - layer.grad_weight(x, k)) / size).argsort(1, descending=True)
    found, open_ = k, torch.ones(len(k), dtype=torch.bool, device=k.device)
    for left_out in SPOILED:
        kept = torch.ones_like(size).scatter_(1, worst[:, [at for at in left_out if at < worst.shape[1]]], 0.0)
        system = LayerSystem(layer, k * kept[..., None], sure, observed.rank_tolerance, solver=observed.solver)
        x = system.solve(z - layer.offset, grad * kept.reshape(*grad.shape[:3], 1)).x
        chosen = explained(layer, k, there, x, grad, kept)
        agrees = open_ & gradient_agrees(layer, chosen, x, grad, observed.eps)
        found = torch.where(agrees[:, None, None], chosen, found)
        open_ &= ~agrees
        if not bool(open_.any()):
            break
    told = ~open_[:, None, None]
    weight = torch.where(told, sure, weight)
    shape = state.cotangent.shape
    return replace(
        state,
        cotangent=layer.unpack_output(found).reshape(shape),
        row_weight=layer.unpack_output(weight).reshape(shape),
        alternative=None,
    )


def gradient_agrees(layer: Layer, k: Tensor, x: Tensor, grad: Tensor, eps: float) -> Bool[Tensor, " s"]:
    """Whether an input has the layer's gradient, but for what its own error does to it."""
    missed = (grad - layer.grad_weight(x, k)).flatten(1).norm(dim=1)
    agrees: Tensor = missed <= max(eps**0.5, LEAST) * grad.flatten(1).norm(dim=1)
    return agrees


def outliers(layer: Layer, k: Tensor, x: Tensor, grad: Tensor, eps: float) -> Bool[Tensor, "s o"]:
    """The outputs whose gradients an input misses far more than those of the others, in roundings."""
    missed = in_roundings(grad - layer.grad_weight(x, k), grad, eps)
    typical = missed.median(dim=1, keepdim=True).values.clamp(min=1.0)
    found: Tensor = missed > OUTLYING * typical
    return found & (missed >= missed.topk(min(SPOILT, missed.shape[1]), dim=1).values[:, -1:])


def explained(layer: Layer, k: Tensor, there: Tensor, x: Tensor, grad: Tensor, kept: Float[Tensor, "s o"]) -> Tensor:
    """The cotangents that explain what is missed of each output left out, a few values moved to their other side."""
    missed, patches, found = (grad - layer.grad_weight(x, k)).flatten(1, 2), layer.patches(x), k.clone()
    for s, unit in (kept == 0).nonzero().tolist():
        at = (there[s, unit] != k[s, unit]).nonzero().flatten()
        effect = _effect(layer, patches[s], unit, at, there[s, unit] - k[s, unit])
        moved = at[_explain(missed[s, unit, :, None], effect, OF_ROWS)]
        found[s, unit, moved] = there[s, unit, moved]
    return found


def in_roundings(missed: Float[Tensor, "s g j i"], grad: Float[Tensor, "s g j i"], eps: float) -> Float[Tensor, "s o"]:
    """What is missed of each output's gradient, in roundings; 0 of one that has none."""
    size = _of_each_output(rounding(grad, eps))
    return torch.where(size > 0, _of_each_output(missed) / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0)


def _of_each_output(grad: Float[Tensor, "s g j i"]) -> Float[Tensor, "s o"]:
    """The norm of each output's gradient."""
    size: Tensor = grad.norm(dim=-1).flatten(1)
    return size


def _effect(
    layer: Layer, patches: Float[Tensor, "g i p"], unit: int, at: Int[Tensor, " q"], change: Float[Tensor, " p"]
) -> Float[Tensor, "i q"]:
    """What changes of the cotangent at some of an output's positions do to its gradient."""
    return patches[unit * layer.groups // layer.outputs][:, at] * change[at]


def explain_together(missed: Float[Tensor, " i"], effect: Float[Tensor, "i q"]) -> Bool[Tensor, " q"]:
    """Which of several effects make up what is missed; none where they leave too much: that has another cause, such as
    a candidate that is none."""
    share = torch.linalg.lstsq(effect, missed[:, None]).solution[:, 0]
    made = share > OTHER
    left = missed - effect[:, made].sum(1)
    return made if float(left.norm()) < LEFT * float(missed.norm()) else torch.zeros_like(made)


def _explain(missed: Float[Tensor, "i 1"], effect: Float[Tensor, "i q"], within: float) -> list[int]:
    """A few of several effects that explain what is missed, one after the other, each to this part of what is left."""
    chosen: list[int] = []
    for _ in range(min(MOVED, effect.shape[1])):
        apart = (missed - effect).norm(dim=0)
        best = int(apart.argmin())
        if not float(apart[best]) < within * float(missed.norm()):
            break
        missed = missed - effect[:, best : best + 1]
        chosen.append(best)
    return chosen
