"""What units whose side of their kink is in doubt may have done to each layer's gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.inversion.pattern import Pattern
from rgap.inversion.system import ConstraintSystem, Linearisation
from rgap.linalg.svd import svd
from rgap.nn.layer import Layer

RANK = 1e-9
"""Effects of units in doubt below this fraction of the largest tell nothing."""


@dataclass(frozen=True, eq=False)
class Effects:
    """Of one layer, a span of gradients.

    A gradient is K X' with a column for each position of each sample. Where there are fewer columns than X has rows, as
    in a table, every effect is one in X's own directions, and is written down by them alone.
    """

    basis: Float[Tensor, "r w"]
    """Orthonormal; of gradients, or of their parts along the directions."""
    directions: Float[Tensor, "g i m"] | None
    """An orthonormal basis of the columns of X, if that has few of them."""

    def __len__(self) -> int:
        return len(self.basis)

    @property
    def single(self) -> Effects:
        """In float32."""
        return Effects(self.basis.float(), None if self.directions is None else self.directions.float())

    def whole(self, grad: Float[Tensor, "1 g j i"]) -> Float[Tensor, "r w"]:
        """The basis as gradients; grad is one of them."""
        if self.directions is None:
            return self.basis
        along = self.basis.reshape(len(self), *grad.shape[1:3], self.directions.shape[-1])
        return (along @ self.directions.mT).flatten(1)

    def part(self, grad: Float[Tensor, "d g j m"]) -> Float[Tensor, "d g j m"]:
        """What lies in the span, of gradients along the directions."""
        return (grad.flatten(1) @ self.basis.mT @ self.basis).reshape(grad.shape)

    def without(self, grad: Float[Tensor, "d g j i"]) -> Float[Tensor, "d g j i"]:
        """Gradients without what lies in the span."""
        if not len(self):
            return grad
        if self.directions is None:
            return grad - self.part(grad)
        return grad - self.part(grad @ self.directions) @ self.directions.mT


def effects(system: ConstraintSystem, at: Linearisation, uncertain: Pattern | None) -> list[Effects]:
    """For each layer what the slopes of units in doubt put into its gradient.

    A slope that is wrong adds a multiple of one vector to the gradient rows: what the unit reads, at the unit's own
    weights, and likewise in the layers before it. The rest of the rows does not feel it.
    """
    nothing = [Effects(grad.new_zeros(0, grad.numel()), None) for grad in system.gradients]
    doubted = {node: mask for node, mask in (uncertain or {}).items() if bool(mask.any())}
    if not doubted:
        return nothing
    columns, units = read_columns(system, at), {node: mask.flatten().nonzero()[:, 0] for node, mask in doubted.items()}
    moved = unit_gradients(system, at, columns, units)
    found = [[each for each in of if each is not None] for of in zip(*moved.values(), strict=True)]
    return [
        Effects(_span(torch.cat(each)), own.directions) if each else none
        for each, own, none in zip(found, columns, nothing, strict=True)
    ]


def joined(of: Sequence[Effects], grad: Float[Tensor, "1 g j i"]) -> Effects:
    """What several systems' units may have done to a gradient that they share.

    Args:
        grad: one of the layer's.
    """
    every = [each.whole(grad) for each in of if len(each)]
    return Effects(_span(torch.cat(every)) if every else grad.new_zeros(0, grad.numel()), None)


def read_columns(system: ConstraintSystem, at: Linearisation) -> list[Columns]:
    """What each layer reads."""
    reads = [at.values[system.network.nodes[node].reads[0]] for node in system.nodes]
    return [Columns(layer, x) for layer, x in zip(system.layers, reads, strict=True)]


def unit_gradients(
    system: ConstraintSystem, at: Linearisation, columns: Sequence[Columns], units: Mapping[int, Int[Tensor, " u"]]
) -> dict[int, list[Float[Tensor, "u w"] | None]]:
    """What units put into each layer's gradient, each for a cotangent of one at what the unit reads; by their node, and
    None where nothing of them gets to.

    Args:
        columns: of each layer, along what its gradients are written down.
        units: of each elementwise operation, by its node, which of its values.
    """
    found: dict[int, list[Tensor | None]] = {}
    for node, index in units.items():
        sample, cotangents = _cotangents(system, at, node, index)
        behind = [cotangents[layer_node + 1] for layer_node in system.nodes]
        found[node] = [None if k is None else own.moved(k, sample) for k, own in zip(behind, columns, strict=True)]
    return found


def _cotangents(
    system: ConstraintSystem, at: Linearisation, node: int, index: Int[Tensor, " u"]
) -> tuple[Int[Tensor, "u b"], list[Tensor | None]]:
    """Of every value, from one at each of u units, (u * b, *shape), and the samples that it belongs to."""
    value = system.network.nodes[node].reads[0]
    shape = at.values[value].shape
    sample, *place = torch.unravel_index(index, shape)
    # Each unit belongs to one sample, and moves that sample's part of the sum alone; all where they depend on it.
    batch = system.samples if system.network.coupled else 1
    own = at.x.new_zeros(len(sample), batch, *shape[1:])
    own[(torch.arange(len(sample), device=own.device), sample % batch, *place)] = 1.0
    which = torch.arange(batch, device=own.device).expand(len(sample), -1) if batch > 1 else sample[:, None]
    one, flat = system.samples == 1, which.flatten()
    values = at.values if one else [each[flat] for each in at.values]
    slopes = at.slopes if one else {each: slope[flat] for each, slope in at.slopes.items()}
    return which, system.network.vjp(values, slopes, {value: own.flatten(0, 1)})


class Columns:
    """What each position of each sample of a layer reads."""

    def __init__(self, layer: Layer, x: Float[Tensor, "b *in"]):
        self._samples = len(x)
        few = len(x) * layer.positions < layer.weight.shape[-1]
        self.layer = layer.side_by_side(len(x)) if few else layer
        self.directions: Float[Tensor, "g i m"] | None = None
        self._x = self.layer.pack_input(x)
        if few:
            self.directions, self._along = torch.linalg.qr(self.layer.patches(self._x)[0])
        elif len(x) == 1:
            self._along = self.layer.patches(self._x)[0]

    def along(self, grad: Float[Tensor, "d g j i"]) -> Float[Tensor, "d g j m"]:
        """A gradient's part in the directions."""
        return grad if self.directions is None else grad @ self.directions

    def moved(self, k: Float[Tensor, "v *out"], sample: Int[Tensor, "u b"]) -> Float[Tensor, "u w"]:
        """What cotangents of some of the samples put into the gradient."""
        if self.directions is None and self._samples > 1:
            moved = self.layer.grad_weight(self._x[sample.flatten()], self.layer.pack_output(k))
            return moved.reshape(*sample.shape, -1).sum(1)
        every = k.new_zeros(len(sample), self._samples, *k.shape[1:])
        every[torch.arange(len(sample), device=k.device)[:, None], sample] = k.reshape(*sample.shape, *k.shape[1:])
        groups, j, _ = self.layer.weight.shape
        columns = self.layer.pack_output(every.flatten(0, 1)).reshape(len(sample), groups, j, -1)
        # As one product for each group: broadcast, what is read would be copied for each unit.
        along: Tensor = columns.movedim(1, 0).flatten(1, 2) @ self._along.mT
        return along.reshape(groups, len(sample), -1).movedim(0, 1).flatten(1)


def _span(moved: Float[Tensor, "m w"]) -> Float[Tensor, "r w"]:
    _, sigma, basis = svd(moved)
    found: Tensor = basis[sigma > RANK * sigma.amax().clamp(min=torch.finfo(sigma.dtype).tiny)]
    return found
