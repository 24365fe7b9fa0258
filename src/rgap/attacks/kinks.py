"""Units that stand so near the kink of their activation that an answer's own error decides their side.

The gradient jumps when a unit changes its side. An answer that is right to seven digits can therefore miss the update
by a few per cent, because of one unit out of ten thousand. Which unit it is shows in the gradient itself: on the
right sides it agrees.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.nn.activations import LeakyReLU
from rgap.nn.chain import Chain

TRIED = 32
"""How many units, those nearest to their kink, are tried on their other side."""
NEAR = 0.2
"""A relative gradient residual above this has other causes than a few units."""
VISIBLE = 1e-3
"""A move above this fraction of the answer is no correction of its error."""
FLIPS = 8
"""How many of them are changed at the most."""


def settle(
    chain: Chain, gradients: dict[str, Tensor], x: Float[Tensor, "1 c n"], k: Float[Tensor, "1 1 1"], tolerance: float
) -> Float[Tensor, "1 c n"]:
    """x, moved by next to nothing to the sides of its kinks on which the gradient agrees; x itself if none do.

    Args:
        k: gradient of the loss with respect to the network's output.
        tolerance: relative residual of the gradient below which it agrees.
    """
    inputs, outputs = chain.forward(x)
    slopes = [layer.activation.slope(z) for layer, z in zip(chain, outputs, strict=True)]
    start = best = float(_residuals(chain, gradients, inputs, k, slopes)[0])
    if not tolerance < start < NEAR:
        return x
    near = _nearest_to_kink(chain, outputs)
    changed: list[tuple[int, int]] = []
    while near and best > tolerance and len(changed) < FLIPS:
        tried = [_flipped(chain, slopes, unit) for unit in near]
        together = [torch.cat([each[depth] for each in tried]) for depth in range(len(chain))]
        residuals = _residuals(chain, gradients, inputs, k, together)
        at = int(residuals.argmin())
        if float(residuals[at]) > 0.7 * best:
            break
        best, slopes = float(residuals[at]), tried[at]
        changed.append(near.pop(at))
    if not changed:
        return x
    moved = step_over(chain, x, changed)
    if float((moved - x).norm()) > VISIBLE * float(x.norm()):
        return x  # an answer that must move so far has other causes than its own error
    inputs, outputs = chain.forward(moved)
    slopes = [layer.activation.slope(z) for layer, z in zip(chain, outputs, strict=True)]
    return moved if float(_residuals(chain, gradients, inputs, k, slopes)[0]) < start else x


def step_over(chain: Chain, x: Float[Tensor, "1 c n"], units: list[tuple[int, int]]) -> Float[Tensor, "1 c n"]:
    """x with the smallest move that brings the given units to the other side of their kinks."""
    outputs = chain.forward(x)[1]
    rows = []
    for depth, index in units:
        k = torch.zeros_like(outputs[depth])
        k.view(-1)[index] = 1.0
        for at in reversed(range(depth + 1)):
            k_in = chain[at].grad_input(k)
            if at == 0:
                rows.append(k_in.reshape(-1))
            else:
                before = chain[at - 1]
                k = before.pack_output(chain[at].unpack_input(k_in)) * before.activation.slope(outputs[at - 1])
    jacobian = torch.stack(rows)
    value = torch.stack([outputs[depth].view(-1)[index] for depth, index in units])
    # The move of minimum norm. The rows are few, and scaled to be compared with each other.
    scale = jacobian.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    move = torch.linalg.pinv(jacobian / scale) @ (-2 * value[:, None] / scale)
    moved: Tensor = x + move.reshape(x.shape)
    return moved


def _nearest_to_kink(chain: Chain, outputs: list[Tensor]) -> list[tuple[int, int]]:
    """Units of kinked activations, the nearest first, measured by the spread of their layer."""
    near: list[tuple[float, int, int]] = []
    for depth, (layer, z) in enumerate(zip(chain, outputs, strict=True)):
        if isinstance(layer.activation, LeakyReLU):
            distance = (z / z.square().mean().sqrt()).abs().reshape(-1)
            values, index = distance.topk(min(TRIED, len(distance)), largest=False)
            near += [(v, depth, i) for v, i in zip(values.tolist(), index.tolist(), strict=True)]
    return [(depth, index) for _, depth, index in sorted(near)[:TRIED]]


def _flipped(chain: Chain, slopes: list[Tensor], unit: tuple[int, int]) -> list[Tensor]:
    depth, index = unit
    changed = slopes[depth].clone()
    changed.view(-1)[index] = chain[depth].activation.other_side(slopes[depth]).view(-1)[index]
    return [changed if at == depth else slope for at, slope in enumerate(slopes)]


def _residuals(
    chain: Chain, gradients: dict[str, Tensor], inputs: list[Tensor], k: Tensor, slopes: list[Tensor]
) -> Float[Tensor, " s"]:
    """Relative distance between the gradient with the given slopes and the given one; x is one, slopes are s."""
    total, size = torch.zeros(len(slopes[0]), dtype=k.dtype, device=k.device), 0.0
    ks = chain.backward(k.expand(len(slopes[0]), 1, 1), slopes)
    for layer, x, each in zip(chain, inputs, ks, strict=True):
        grad = gradients[layer.weight_name].reshape(1, *layer.weight.shape)
        found = layer.grad_weight(x.expand(len(each), *x.shape[1:]), each)
        total += (found - grad).flatten(1).square().sum(1)
        size += float(grad.square().sum())
    return (total / size).sqrt()
