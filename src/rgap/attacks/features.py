"""What a layer reads, read off its gradient: all that an update gives away at once, whatever else is in the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.inversion.bias import Source, cotangent, read_off, sources
from rgap.inversion.report import LayerReport
from rgap.nn.network import Network
from rgap.target import Target
from rgap.update import Update


@dataclass(frozen=True, eq=False)
class Features:
    """The values that a layer reads."""

    layer: str
    value_id: int
    """Of the value in the network."""
    x: Tensor
    """(1, *shape)"""
    std: float
    """Of its error."""
    report: LayerReport


def features(target: Target, update: Update) -> Features | None:
    """What the layer nearest to the input whose gradient tells it reads (Eq. 3); None where no gradient does.

    Args:
        update: of a single sample.
    """
    try:
        network = target.network
    except NotImplementedError:
        return None
    given = nonzero(target, update)
    for source in sources(network, set(given)):
        found = layer_input(network, source, given, update.precision)
        if isinstance(found, Features):
            return found
    return None


def nonzero(target: Target, update: Update) -> dict[str, Tensor]:
    """The gradients that say anything: zeros are a gradient that was withheld."""
    return {name: g.double().to(target.device) for name, g in update.gradients.items() if g.any()}


def layer_input(
    network: Network,
    source: Source,
    gradients: Mapping[str, Tensor],
    eps: float,
    rank_tolerance: float | None = None,
    seed: int = 0,
) -> Features | str:
    """What the source's layer reads, or why its gradient does not tell.

    Args:
        eps: relative rounding of the gradients.
        rank_tolerance: as in `Recursive`.
        seed: of the probe that estimates the error.
    """
    layer = source.layer
    tolerance = eps ** (2 / 3) if rank_tolerance is None else rank_tolerance
    probe = torch.Generator(device=network.device).manual_seed(seed)
    k = cotangent(network, source.value_id, gradients)
    if k is None:
        return f"k of {layer.name} is not known"
    grad = layer.pack_weight(gradients[layer.weight_name][None])
    found = read_off(source, grad, layer.pack_output(k), eps, tolerance, probe)
    if found is None:
        return f"the gradient of {layer.name} alone leaves its input open"
    entry = network.nodes[source.value_id - 1].reads[0]
    x = layer.unpack_input(found.x).reshape(1, *network.shapes[entry])
    return Features(layer.name, entry, x, found.std, found.report)
