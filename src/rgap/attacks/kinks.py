"""Units that stand so near the kink of their activation that an answer's own error decides their side.

The gradient jumps when a unit changes its side. An answer that is right to seven digits can therefore miss the update
by a few per cent, because of one unit out of ten thousand. Which unit it is shows in the gradient itself: on the
right sides it agrees.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.nn.activations import LeakyReLU, ReLU
from rgap.nn.network import Network, Slopes

TRIED = 32
"""How many units, those nearest to their kink, are tried on their other side."""
NEAR = 0.2
"""A relative gradient residual above this has other causes than a few units."""
VISIBLE = 1e-3
"""A move above this fraction of the answer is no correction of its error."""
FLIPS = 8
"""How many of them are changed at the most."""


def settle(network: Network, gradients: dict[str, Tensor], x: Tensor, k: Tensor, tolerance: float) -> Tensor:
    """x, moved by next to nothing to the sides of its kinks on which the gradient agrees; x itself if none do.

    Args:
        x: (1, *input_shape).
        k: gradient of the loss with respect to the network's output, (1, *output_shape).
        tolerance: relative residual of the gradient below which it agrees.
    """
    values = network.forward(x)
    slopes = network.slopes(values)
    start = best = float(_residuals(network, gradients, values, k, slopes)[0])
    if not tolerance < start < NEAR:
        return x
    near = _nearest_to_kink(network, values)
    changed: list[tuple[int, int]] = []
    while near and best > tolerance and len(changed) < FLIPS:
        tried = [_flipped(network, slopes, unit) for unit in near]
        together = {place: torch.cat([each[place] for each in tried]) for place in slopes}
        residuals = _residuals(network, gradients, values, k, together)
        at = int(residuals.argmin())
        if float(residuals[at]) > 0.7 * best:
            break
        best, slopes = float(residuals[at]), tried[at]
        changed.append(near.pop(at))
    if not changed:
        return x
    moved = step_over(network, x, changed)
    if float((moved - x).norm()) > VISIBLE * float(x.norm()):
        return x  # an answer that must move so far has other causes than its own error
    values = network.forward(moved)
    found = float(_residuals(network, gradients, values, k, network.slopes(values))[0])
    return moved if found < start else x


def step_over(network: Network, x: Tensor, units: list[tuple[int, int]]) -> Tensor:
    """x with the smallest move that brings the given units to the other side of their kinks.

    Args:
        units: the place of each one's activation in the network, and which of its values.
    """
    values = network.forward(x)
    slopes = network.slopes(values)
    rows, heights = [], []
    for place, index in units:
        value = network.nodes[place].reads[0]
        k = torch.zeros_like(values[value])
        k.view(-1)[index] = 1.0
        row = network.vjp(values, slopes, {value: k})[0]
        rows.append(torch.zeros_like(x).flatten() if row is None else row.flatten())
        heights.append(values[value].reshape(-1)[index])
    jacobian, value_of = torch.stack(rows), torch.stack(heights)
    # The move of minimum norm. The rows are few, and scaled to be compared with each other.
    scale = jacobian.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    move = torch.linalg.pinv(jacobian / scale) @ (-2 * value_of[:, None] / scale)
    moved: Tensor = x + move.reshape(x.shape)
    return moved


def _nearest_to_kink(network: Network, values: list[Tensor]) -> list[tuple[int, int]]:
    """Units of kinked activations, the nearest first, measured by the spread of their layer."""
    near: list[tuple[float, int, int]] = []
    for place, activation in network.activations:
        if isinstance(activation, (LeakyReLU, ReLU)):
            z = values[network.nodes[place].reads[0]]
            distance = (z / z.square().mean().sqrt()).abs().reshape(-1)
            found, index = distance.topk(min(TRIED, len(distance)), largest=False)
            near += [(v, place, i) for v, i in zip(found.tolist(), index.tolist(), strict=True)]
    return [(place, index) for _, place, index in sorted(near)[:TRIED]]


def _flipped(network: Network, slopes: Slopes, unit: tuple[int, int]) -> dict[int, Tensor]:
    place, index = unit
    changed = slopes[place].clone()
    activation = dict(network.activations)[place]
    # Of ReLU's slopes, 0 and 1, an output of zero tells neither: `other_side` leaves them alone.
    other = 1 - slopes[place] if isinstance(activation, ReLU) else activation.other_side(slopes[place])
    changed.view(-1)[index] = other.reshape(-1)[index]
    return {at: changed if at == place else slope for at, slope in slopes.items()}


def _residuals(
    network: Network, gradients: dict[str, Tensor], values: list[Tensor], k: Tensor, slopes: Slopes
) -> Float[Tensor, " s"]:
    """Relative distance of the gradient with the given slopes from the given one; values are of one, slopes of s."""
    count = len(next(iter(slopes.values()))) if slopes else 1
    total, size = torch.zeros(count, dtype=k.dtype, device=k.device), 0.0
    ks = network.vjp(values, slopes, {len(values) - 1: k.expand(count, *k.shape[1:])})
    for layer, found in network.gradients(values, ks):
        grad = layer.pack_weight(gradients[layer.weight_name][None])
        total = total + (found - grad).flatten(1).square().sum(1)
        size += float(grad.square().sum())
    return (total / size).sqrt()
