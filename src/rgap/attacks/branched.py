"""The joint constraints of any network in front of a known value: branches, pooling, normalisation and all.

What `rgap.attacks.joint` does for a plain chain, by forward mode: every operation is linearised at the present input,
the unit vectors of the input are pushed through, and each layer's gradient rows are read off what arrives there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.attacks.joint import nearest, span, turned
from rgap.inversion.state import State
from rgap.nn.layers import Layer
from rgap.nn.network import Network
from rgap.nn.ops import Linear

MOST_BYTES = 2**31
"""Of the matrix of all rows, above which nothing is solved jointly."""
COLUMNS = 128
"""Unit vectors that are pushed at once."""


@dataclass(frozen=True, eq=False)
class At:
    """Where the operations are linearised: all values and slopes at an input."""

    values: list[Tensor]
    by_place: dict[int, Tensor]

    @property
    def x(self) -> Tensor:
        return self.values[0]

    @property
    def slopes(self) -> list[Tensor]:
        return list(self.by_place.values())


class Branched:
    """All constraints of a network's layers on its input, for one candidate, its output being known."""

    def __init__(self, network: Network, known: State, gradients: dict[str, Tensor]):
        self.network, self.known = network, known
        self.weight = torch.ones_like(known.value) if known.row_weight is None else known.row_weight
        self.heard = [
            (place, node.op.layer, node.reads[0])
            for place, node in enumerate(network.nodes)
            if isinstance(node.op, Linear) and node.op.has_gradient
        ]
        self.grads = [layer.pack_weight(gradients[layer.weight_name][None]) for _, layer, _ in self.heard]
        self._rows: Float[Tensor, "u r"] = known.value.new_zeros(0, 0)
        self._scales = [0.0] * len(self.heard)
        self._away: list[Tensor | None] = [None] * len(self.heard)

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.network.layers

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input, as `forward` takes it."""
        return (1, *self.network.input_shape)

    @property
    def unknowns(self) -> int:
        return self.known.value.new_zeros(self.network.input_shape).numel()

    @property
    def rows_in_front(self) -> int:
        return sum(layer.gradient_rows for _, layer, _ in self.heard)

    @property
    def rows(self) -> int:
        return int((self.weight > 0).sum()) + self.rows_in_front

    @property
    def kinked(self) -> bool:
        return any(activation.kinked for _, activation in self.network.activations)

    def forward(self, x: Tensor) -> At:
        values = self.network.forward(x.reshape(self.shape))
        return At(values, self.network.slopes(values))

    def ks(self, point: At) -> list[Tensor | None]:
        return self.network.vjp(point.values, point.by_place, {len(point.values) - 1: self.known.cotangent})

    def _k(self, ks: list[Tensor | None], place: int, layer: Layer) -> Tensor:
        k = ks[place + 1]
        return layer.weight.new_zeros(1, layer.outputs, layer.positions) if k is None else layer.pack_output(k)

    def normal(self, point: At, doubtful: list[Tensor] | None) -> tuple[Float[Tensor, "u u"], Float[Tensor, " u"]]:
        """G and g for the network's input.

        Args:
            doubtful: for each activation a mask of units whose side of the kink is in doubt; None keeps all gradient
                rows out.
        """
        ks = self.ks(point)
        self._away = self._of_doubtful(point, doubtful)
        # The last layer's k does not depend on any side.
        heard = [doubtful is not None or not self._kinked_after(place) for place, _, _ in self.heard]
        parts = [self._columns(point, ks, heard, start) for start in range(0, self.unknowns, COLUMNS)]
        rows = torch.cat(parts)
        sizes = [self.weight.numel(), *(layer.weight.numel() for _, layer, _ in self.heard)]
        first, *inner = torch.split(rows, sizes, 1)
        mean = float(first.square().sum()) / max(int((self.weight > 0).sum()), 1)
        for at, part in enumerate(inner):
            size = float(part.square().sum()) / part.shape[1]
            self._scales[at] = (mean or size) / size if size > 0 and heard[at] else 0.0
            part *= self._scales[at] ** 0.5
        self._rows = rows
        gram = rows @ rows.mT
        return gram, self._right(self._misses(point, ks)) + gram @ point.x.flatten()

    def _misses(self, point: At, ks: list[Tensor | None]) -> list[Tensor]:
        """What the point leaves of the output, and of each layer's gradient."""
        misses = [(self.known.value - point.values[-1]) * self.weight]
        for (place, layer, value), grad in zip(self.heard, self.grads, strict=True):
            misses.append(grad - layer.grad_weight(layer.pack_input(point.values[value]), self._k(ks, place, layer)))
        return misses

    def _kinked_after(self, place: int) -> bool:
        return any(at > place and activation.kinked for at, activation in self.network.activations)

    def _columns(self, point: At, ks: list[Tensor | None], heard: Sequence[bool], start: int) -> Tensor:
        """The rows' products with some unit vectors of the input, (columns, rows)."""
        count = min(COLUMNS, self.unknowns - start)
        units = point.x.new_zeros(count, self.unknowns)
        units[torch.arange(count), start + torch.arange(count)] = 1.0
        moves = self.network.jvp(point.values, point.by_place, units.reshape(count, *self.network.input_shape))
        parts = [(moves[-1] * self.weight).flatten(1)]
        for at, (place, layer, value) in enumerate(self.heard):
            if not heard[at]:
                parts.append(units.new_zeros(count, layer.weight.numel()))
                continue
            k = self._k(ks, place, layer).expand(count, -1, -1)
            part = layer.grad_weight(layer.pack_input(moves[value]), k).flatten(1)
            away = self._away[at]
            parts.append(part if away is None else part - (part @ away.mT) @ away)
        return torch.cat(parts, 1)

    def _right(self, sides: list[Tensor]) -> Float[Tensor, " u"]:
        """J' r for right-hand sides of the output and of each layer's gradient."""
        parts = [sides[0].flatten()]
        for side, scale, away in zip(sides[1:], self._scales, self._away, strict=True):
            flat = side.flatten()
            flat = flat if away is None else flat - away.mT @ (away @ flat)
            parts.append(scale**0.5 * flat)
        return self._rows @ torch.cat(parts)

    def noise(self, point: At, z: Tensor, grads: list[Tensor]) -> Float[Tensor, " u"]:
        """J' of errors of the output and of the gradients, for the matrix that `normal` made last."""
        return self._right([z * self.weight, *grads])

    def _of_doubtful(self, point: At, doubtful: list[Tensor] | None) -> list[Tensor | None]:
        """For each layer, an orthonormal basis of what the slopes of units in doubt put into its gradient."""
        found: list[list[Tensor]] = [[] for _ in self.heard]
        for (place, _), mask in zip(self.network.activations, doubtful or [], strict=False):
            units = mask.flatten().nonzero().flatten()
            if not len(units):
                continue
            value = self.network.nodes[place].reads[0]
            own = point.x.new_zeros(len(units), mask.numel())
            own[torch.arange(len(units), device=own.device), units] = 1.0
            starts = {value: own.reshape(len(units), *point.values[value].shape[1:])}
            ks = self.network.vjp(point.values, point.by_place, starts)
            for at, (layer_place, layer, read) in enumerate(self.heard):
                k = ks[layer_place + 1]
                if k is not None:
                    x = layer.pack_input(point.values[read]).expand(len(units), -1, -1)
                    found[at].append(layer.grad_weight(x, layer.pack_output(k)).flatten(1))
        return [span(torch.cat(effects)) if effects else None for effects in found]

    def misfit(self, point: At) -> float:
        """Relative distance of these layers' gradients, and of the output, from the given ones."""
        miss, *inner = self._misses(point, self.ks(point))
        wrong = sum(float(each.square().sum()) for each in inner)
        size = sum(float(grad.square().sum()) for grad in self.grads)
        gradients = (wrong / size) ** 0.5 if size else 0.0
        return max(gradients, float(miss.norm() / (self.known.value * self.weight).norm().clamp(min=1e-300)))

    def nearest_to_kink(self, point: At, count: int) -> list[Tensor]:
        """Masks of the units, over all activations, that are nearest to their kink."""
        zs = [point.values[self.network.nodes[place].reads[0]] for place, _ in self.network.activations]
        kinked = [activation.kinked for _, activation in self.network.activations]
        return nearest(zs, self._sizes(point), kinked, count)

    def changed(self, before: At, after: At) -> int:
        """How many slopes are other than they were by more than half of the steepest, units that read something."""
        return turned(before.slopes, after.slopes, self._sizes(after))

    def _sizes(self, point: At) -> list[Tensor]:
        """The norm of what each unit reads; 1 where it is not a layer's."""
        found = []
        for place, _ in self.network.activations:
            value = self.network.nodes[place].reads[0]
            node = self.network.nodes[value - 1] if value else None
            if node is None or not isinstance(node.op, Linear):
                found.append(torch.ones_like(point.values[value]))
                continue
            layer = node.op.layer
            size = layer.read(layer.pack_input(point.values[node.reads[0]]))
            found.append(layer.unpack_output(size).reshape(point.values[value].shape))
        return found
