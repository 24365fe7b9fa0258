"""What norms hide of an input, though every gradient agrees: its size, and a constant in each of its channels.

A layer, group or instance norm takes both away again, and the gradients are those of any such input. Biases, borders
and the small number that norms add to a variance may tell them all the same, some well and some hardly at all. No solve
of one layer shows which: so inputs are moved along them to where the whole model's gradient agrees best, and how far
its rounding may have moved them there is measured.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.rounding import rounding
from rgap.nn.network import Network
from rgap.nn.ops import Norm
from rgap.target import Target
from rgap.update import Update

HIDDEN = "but norms hide size and brightness, and how well several samples' gradient tells them is not known"
STEP = 1e-6
"""Of a difference quotient in float64, relative to the size of the input."""
MOVES, LESS = 3, 0.9
"""Gauss-Newton steps along what is hidden, and to which part of it one has to bring what is missed: what rounding alone
would make of an input is no gain."""
CHANNELS = 16
"""Each has a constant of its own; where there are more, as of series and tables, all have one."""


def along_hidden(
    target: Target,
    update: Update,
    inputs: Float[Tensor, "b ..."],
    labels: Float[Tensor, " b"],
    error: Float[Tensor, " b"],
) -> tuple[Float[Tensor, "b ..."], Float[Tensor, " b"]]:
    """Inputs whose gradients nearly agree, moved along what norms over maps hide, with their errors, root mean square
    over their values; as they are where the model has no such norm.

    What a client computes before its norms is rounded, and all gradients are off together: so rounding is taken to lie
    all along what is hidden, and not in any direction.

    Args:
        error: of each input, as far as its layers tell.
    """
    if not norms_over_maps(target.network):
        return inputs, error
    x = inputs.double()
    given = {name: grad.double().to(x.device) for name, grad in update.gradients.items()}
    noise = {name: rounding(grad, update.precision) for name, grad in given.items() if bool(grad.any())}

    def seen(at: Tensor) -> Float[Tensor, " rows"]:
        found = target.gradient(at, labels)
        return torch.cat([((found[name].double() - given[name]) / size).flatten() for name, size in noise.items()])

    missed, apart = seen(x), x[None]
    for _ in range(MOVES):
        directions = _directions(x)
        step = STEP * float(x.square().mean().sqrt() or 1.0)
        rows = torch.stack([(seen(x + step * each) - seen(x - step * each)) / (2 * step) for each in directions])
        value, vector = torch.linalg.eigh(rows @ rows.mT)
        # Along each eigenvector: by one standard deviation.
        moved = (vector / value.clamp(min=torch.finfo(x.dtype).tiny).sqrt()).mT
        apart = torch.einsum("ed,d...->e...", moved, directions)
        after = x - torch.einsum("e,e...->...", moved @ (rows @ missed), apart)
        left = seen(after)
        if not bool(after.isfinite().all()) or not float(left.norm()) < LESS * float(missed.norm()):
            break
        x, missed = after, left
    hidden = apart.flatten(2).square().sum(0).mean(1).sqrt()
    return x, error.maximum(len(missed) ** 0.5 * hidden)


def norms_over_maps(network: Network) -> bool:
    """Whether a norm takes size and brightness away where several positions share a layer's weights and biases. Of one
    position alone the bias's gradient is the cotangent, and tells what the norm takes away of it."""
    return any(isinstance(node.op, Norm) and len(node.shape) > 1 for node in network.nodes)


def _directions(x: Float[Tensor, "b ..."]) -> Float[Tensor, "m b ..."]:
    """Of each input itself and a constant in each channel, of norm one."""
    own = x.dim() > 2 and x.shape[1] <= CHANNELS
    channels = x.shape[1] if own else 1
    constants = torch.eye(channels).to(x).reshape(1, channels, channels, *[1] * (x.dim() - 2))
    each = torch.cat([x[:, None], constants.expand(len(x), channels, *x.shape[1:])], 1)
    found = torch.einsum("bs,bm...->bms...", torch.eye(len(x)).to(x), each).flatten(0, 1)
    length = found.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
    unit: Tensor = found / length.reshape(-1, *[1] * x.dim())
    return unit
