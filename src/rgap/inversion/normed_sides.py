"""The sides of a ReLU's values behind a batch norm in training mode, where a layer's gradient contradicts those taken.

A small value that is taken for a zero takes its whole cotangent out of one output's gradient rows: solved with the
others they draw the input away from where it is, and then all outputs miss. So outputs count the less the more they
miss (iteratively reweighted least squares, with the weights of Geman and McClure), until the spoiled ones stand out.
What the norm makes of the input that the others tell shows which of their values are on their other side.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rgap.inversion.jacobian import Jacobian
from rgap.inversion.sides import NEAR, OUTLYING, explain_together, in_roundings
from rgap.inversion.state import State
from rgap.inversion.system import ConstraintSystem, Linearisation
from rgap.linalg import deadline
from rgap.linalg.least_squares import Solver
from rgap.nn.batch_norm import BatchNorm
from rgap.nn.ops import Linear

STEPS, PATIENCE = 20, 3
"""Solves with other weights, at the most, and those in which half of the outputs come no nearer to theirs."""
STANDS = 0.5
"""It comes nearer where half of the outputs miss less than this part of what they did."""


def missed(system: ConstraintSystem, at: Linearisation) -> Float[Tensor, " o"]:
    """What is missed of each output's gradient, in roundings; 0 of one that has none.

    Args:
        system: of one layer and what is behind it.
    """
    [rows], [grad] = system.residual(at).gradient, system.gradients
    return in_roundings(rows, grad, system.eps)[0]


def without_spoiled(system: ConstraintSystem, start: Tensor, solver: Solver) -> Linearisation:
    """Where the gradients of most outputs agree, whatever those of a few others say."""
    at, least, since = system.linearise(start), torch.inf, 0
    for _ in range(STEPS):
        deadline.check()
        each = missed(system, at)
        typical = float(each.median())
        least, since = (typical, 0) if typical < STANDS * least else (least, since + 1)
        if typical <= 1 or since >= PATIENCE:
            break
        weight = 1 / (1 + (each / (1 + typical)).square())
        jacobian = Jacobian(system, at, {}, outputs=(weight,))
        at = system.linearise(solver.step(jacobian, jacobian.weighted(system.residual(at)), at.x, None))
    return at


def other_sides(system: ConstraintSystem, start: Tensor, solver: Solver) -> tuple[State, Tensor]:
    """What is known of the norm's output, with the sides on which the gradient of the layer in front agrees, and the
    layer's input, about. Both as they were where no other side explains what is missed.

    Args:
        system: of a layer and the norm behind it; the state of its output with what it is on other sides.
        start: the layer's input, about.
    """
    op, norm = (node.op for node in system.network.nodes)
    state, other = system.output, system.output.alternative
    if not isinstance(op, Linear) or not isinstance(norm, BatchNorm) or other is None:
        return state, start
    at = without_spoiled(system, start, solver)
    each = missed(system, at)
    typical = float(each.median())
    if typical > OUTLYING:
        return state, start
    spoiled = each > OUTLYING * max(typical, 1.0)
    if not bool(spoiled.any()):
        return state, at.x
    # The input shows on which side a value lies, but for those that are as near to the kink as its error.
    y, taken = at.values[-1], system.row_weight > 0
    near = NEAR * state.std.expand(y.shape)[taken].median()
    doubt = (y.abs() * ((y > 0) == taken)).masked_fill(other.cotangent == state.cotangent, torch.inf)
    change = norm.vjp(other.cotangent - state.cotangent, (y,))[0]
    layer = op.layer.side_by_side(len(y))
    rows = system.residual(at).gradient[0].flatten(0, -2)
    patches = layer.patches(layer.pack_input(at.x))[0]
    moved = _moved(patches, layer.pack_output(change)[0], layer.pack_output(doubt)[0], rows, spoiled, float(near))
    if not bool(moved.any()):
        return state, start
    moved = layer.unpack_output(moved[None].to(y)).reshape(y.shape) > 0
    cotangent = torch.where(moved, other.cotangent, state.cotangent)
    # Of a value that was taken for a zero nothing else is known.
    return replace(state, cotangent=cotangent, row_weight=system.row_weight * ~moved), at.x


def _moved(
    patches: Float[Tensor, "g i p"],
    change: Float[Tensor, "o p"],
    doubt: Float[Tensor, "o p"],
    rows: Float[Tensor, "o i"],
    spoiled: Bool[Tensor, " o"],
    near: float,
) -> Bool[Tensor, "o p"]:
    """The values whose other sides together make up what is missed of each spoiled output.

    Args:
        change: of each value's cotangent, on its other side.
        doubt: how far each one is from its kink; 0 on the other side of it.
        rows: what is missed of each output's gradient.
    """
    found = torch.zeros_like(change, dtype=torch.bool)
    for output in spoiled.nonzero().flatten().tolist():
        at = (doubt[output] <= near).nonzero().flatten()
        at = at[doubt[output, at].argsort()[: rows.shape[1] // 2]]
        effect = patches[output * len(patches) // len(change)][:, at] * change[output, at]
        found[output, at[explain_together(rows[output], effect)]] = True
    return found
