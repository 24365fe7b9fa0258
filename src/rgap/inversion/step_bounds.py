"""Why the samples behind several local steps are not told apart: what counts say, with the numbers on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from rgap.inversion.subspace.head import told
from rgap.inversion.subspace.step import Place, layer_of
from rgap.inversion.walk import Difference, Plan, Weights
from rgap.nn.network import Network


class Limit(Enum):
    """What keeps the samples behind several steps from being told apart."""

    PLACE = "the network has no two Linear layers in front"
    WIDTH = "more hidden vectors than the second layer tells apart"
    PRECISION = "steps too small for the rounding of the weights"
    SIZES = "the optimiser hides the sizes of gradients"
    SEARCH = "a sample was not found"
    TIME = "it takes longer than there is"


@dataclass(frozen=True)
class Bound:
    """Why the steps are not followed to their end: the numbers on both sides, and what would have to change."""

    limit: Limit
    text: str

    def __str__(self) -> str:
        return self.text


def no_place(network: Network, sent: Weights, plan: Plan) -> str:
    """Why steps are not told apart, with what is nearest to it: the widest Linear layer that reads features."""
    text = f"{plan.steps} local steps are told apart where two Linear layers stand before all others that are trained"
    layers = [layer_of(network, segment) for segment in network.segments if told(network, segment, sent)]
    behind = [layer for layer in layers if layer is not network.layers[0]]
    if not behind:
        return text
    layer = max(behind, key=lambda each: min(each.outputs, each.unknowns))
    apart, vectors, epochs = min(layer.outputs, layer.unknowns) - 1, sum(plan.sizes), plan.steps // plan.epoch
    text += (
        f"; the difference of {layer.name}, behind others, tells up to {apart} vectors apart with {layer.unknowns} "
        f"inputs and {layer.outputs} outputs, and {plan.samples} samples in {epochs} epochs leave {vectors}, since the "
        "layers in front move in between"
    )
    if apart < vectors and (few := apart // epochs):
        text += f": up to {few} {'sample' if few == 1 else 'samples'} would leave it rank to spare"
    return text


def counted_bound(network: Network, difference: Difference, plan: Plan, rank: int) -> Bound | None:
    """What counts alone say against it."""
    segments = Place.layers(network, difference.sent)
    assert segments is not None
    second = layer_of(network, segments[1])
    biased = second.bias_name is not None
    # As many equations are left beside the second row space as there are unknowns in the first.
    width = min(second.unknowns + biased - rank + 1, second.outputs - 1)
    vectors = sum(plan.sizes)
    if vectors > width:
        text = (
            f"{plan.samples} samples in {plan.steps // plan.epoch} epochs leave {vectors} hidden vectors in "
            f"{second.name}'s difference, which tells up to {width} apart with {second.unknowns} inputs and "
            f"{second.outputs} outputs: fewer samples or epochs would be read, or a wider layer"
        )
        return Bound(Limit.WIDTH, text)
    if rank < plan.samples:
        text = (
            f"the first layer's difference has rank {rank} for {plan.samples} samples: some are the same, give no "
            "gradient, or moved the weights by less than their rounding"
        )
        return Bound(Limit.PRECISION, text)
    return None
