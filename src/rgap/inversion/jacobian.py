"""The linearised constraints as one linear operator: J x, and its adjoint, without a matrix.

A product goes through the network once. At a layer one unfolding of the input gives both kinds of rows, and one
folding takes both back.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.coupled import Coupled, LayerRows
from rgap.inversion.doubted import Effects, effects
from rgap.inversion.pattern import Pattern
from rgap.inversion.system import ConstraintSystem, Linearisation, Rows
from rgap.linalg.least_squares import probes
from rgap.linalg.operator import LinearOperator
from rgap.nn.ops import Linear

PROBES = 4
"""Drawn inputs from which the sizes of the rows are estimated."""
LIMIT, EVEN = 100.0, 1.0
"""Of how much more a layer's gradient rows may weigh than all rows behind them, in squares: beyond the first rounding
hides the others. With the second conjugate gradients need half as many products for the same input, but what they come
to in the end is less precise."""
MANY = 1000
"""Unknowns from which products in float32 take less time than in float64."""


class Jacobian(LinearOperator):
    """Weighted rows: those of the output, each as far as it is known, and those of each layer's gradient, scaled, and
    without what units in doubt may have done to it."""

    def __init__(
        self,
        system: ConstraintSystem,
        at: Linearisation,
        uncertain: Pattern | None,
        limit: float = LIMIT,
        outputs: tuple[Float[Tensor, " o"], ...] | None = None,
        doubted: Sequence[Effects] | None = None,
    ):
        """
        Args:
            uncertain: units whose side of their kink is in doubt; None keeps all gradient rows out that a slope
                behind them may move.
            limit: of how much more a layer's gradient rows may weigh than all rows behind them, in squares.
            outputs: of each layer, what the gradient rows of each of its outputs weigh besides, where no unit is in
                doubt.
            doubted: of each layer what units in doubt may have done to its gradient, if that is more than those of this
                system.
        """
        self.system, self.at, self._limit, self._outputs = system, at, limit, outputs
        self.in_shape, self.like = system.in_shape, at.x
        self.values = sum(value.numel() for value in at.values)
        self._coupled = Coupled(system, at) if system.coupled else None
        self.doubted = effects(system, at, uncertain) if doubted is None else list(doubted)
        used = [node for node in system.nodes if uncertain is not None or not system.curved_after(node)]
        self._k = {node: system.k(at, node) for node in used}
        self.scale, self.mean_diagonal = self._weights()

    def _weights(self) -> tuple[list[float], float]:
        """Of each layer's gradient rows, squared, and the mean of the diagonal of J'J.

        All rows are stated in units of their noise, which are those of the output here. Where that would leave
        nothing of one kind, the gradient rows of a layer weigh at least as much as all rows behind them together, and
        at most `limit` times as much.
        """
        drawn, system = probes(self, PROBES), self.system
        rows = self.moved_rows(drawn)
        size = float((rows.weight * system.row_weight).square().sum())
        scale = [0.0] * len(rows.gradient)
        for at in reversed(range(len(scale))):
            # All of them, whatever is in doubt: the few that are left of many say no more for that.
            own = float(rows.gradient[at].square().sum())  # 0 where the rows are not used
            if own > 0:
                even = (size or own) / own
                scale[at] = min(max(system.noise_ratios[at], even), self._limit * even)
            size += scale[at] * float(self.doubted[at].without(rows.gradient[at]).square().sum())
        return scale, size / drawn.numel()

    @cached_property
    def single(self) -> Jacobian | None:  # type: ignore[override]
        if self.unknowns < MANY or self.system.single is None:
            return None
        found = copy(self)
        vars(found).pop("factor", None)
        found.system, found.at, found.like = self.system.single, self.at.single, self.like.float()
        found.doubted = [each.single for each in self.doubted]
        # Their squares might not have a place in its range.
        scale = dict(zip(self.system.nodes, self.scale, strict=True))
        found._k = {node: (k * scale[node] ** 0.5).float() for node, k in self._k.items()}
        found.scale = [1.0 if each else 0.0 for each in self.scale]
        found._outputs = None if self._outputs is None else tuple(each.float() for each in self._outputs)
        return found

    def mv(self, x: Float[Tensor, "d *in_shape"]) -> Float[Tensor, "d rows"]:
        return self.weighted(self.moved_rows(x))

    def rmv(self, rows: Float[Tensor, "d rows"]) -> Float[Tensor, "d *in_shape"]:
        sizes = [self.system.output.value.numel(), *(grad[0].numel() for grad in self.system.gradients)]
        first, *rest = torch.split(rows, sizes, 1)
        shapes = [(len(rows), *grad.shape[1:]) for grad in self.system.gradients]
        gradient = tuple(part.reshape(shape) for part, shape in zip(rest, shapes, strict=True))
        weight = first.reshape(len(rows), *self.system.output.value.shape)
        return self.pulled_back(self.weigh(Rows(weight, gradient), 0.5))

    def normal(self, x: Float[Tensor, "d *in_shape"]) -> Float[Tensor, "d *in_shape"]:
        if self._coupled is None:
            return self.pulled_back(self.weigh(self.moved_rows(x), 1.0))
        out, pairs = self._coupled.moves(x)
        layers = zip(self._coupled.layers, pairs, strict=True)
        return self._coupled.pull(
            self._weighed_output(out, 1.0), [self._normal(at, *each) for at, each in enumerate(layers)]
        )

    def _normal(self, at: int, layer: LayerRows, moves: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A layer's gradient rows, weighed, and back."""
        if not self.scale[at]:
            found = (torch.zeros_like(moves[0]), torch.zeros_like(moves[1]))
        elif layer.thin:
            found = layer.normal(*moves, self.doubted[at], None if self._outputs is None else self._outputs[at])
        else:
            found = layer.back(self._used(at, layer.rows(*moves), 1.0))
        return self.scale[at] * found[0], self.scale[at] * found[1]

    def weighted(self, rows: Rows) -> Float[Tensor, "d rows"]:
        """Right-hand sides as `rmv` takes them."""
        rows = self.weigh(rows, 0.5)
        return torch.cat([rows.weight.flatten(1), *(each.flatten(1) for each in rows.gradient)], 1)

    def weigh(self, rows: Rows, power: float) -> Rows:
        """Each row times its weight to a power, squares being what the weights are."""
        gradient = tuple(
            self._used(at, each, power) * self.scale[at] ** power if self.scale[at] else torch.zeros_like(each)
            for at, each in enumerate(rows.gradient)
        )
        return Rows(self._weighed_output(rows.weight, power), gradient)

    def _weighed_output(self, rows: Float[Tensor, "d ..."], power: float) -> Tensor:
        """The output's rows times their weights to a power, squares being what the weights are."""
        if self.system.output.row_weight is None:
            return rows
        return rows * self.system.row_weight ** (2 * power)

    def moved_rows(self, x: Float[Tensor, "d *in_shape"]) -> Rows:
        """How all rows move with the inputs, not weighted."""
        if self._coupled is not None:
            return self._coupled.rows(x)
        system, network, d = self.system, self.system.network, len(x)
        moves: dict[int, Tensor] = {0: x.flatten(0, 1)}
        found: dict[int, Tensor] = {}
        for at, node in enumerate(network.nodes):
            read = tuple(moves[each] for each in node.reads)
            if at in self._k and isinstance(node.op, Linear):
                layer = node.op.layer
                z, grads = layer.rows(layer.pack_input(read[0]), self._each(self._k[at], d))
                found[at] = self._summed(grads, d)
                moves[at + 1] = layer.unpack_output(z)
            elif at in self.at.slopes:
                moves[at + 1] = (read[0].reshape(d, *self.at.slopes[at].shape) * self.at.slopes[at]).flatten(0, 1)
            else:
                moves[at + 1] = node.op.jvp(read, self._values(node.reads, node.op.linear, d))
            for each in network.last_read[at]:
                del moves[each]
        gradient = tuple(
            found[at] if at in found else x.new_zeros(d, *grad.shape[1:])
            for at, grad in zip(system.nodes, system.gradients, strict=True)
        )
        return Rows(moves[len(network.nodes)].reshape(d, *system.output.value.shape), gradient)

    def _each(self, k: Float[Tensor, "b o p"], d: int) -> Float[Tensor, "_ o p"]:
        """The cotangents for each direction and sample; one for all where there is one sample."""
        return k if len(k) == 1 else k.repeat(d, 1, 1)

    def _summed(self, grads: Float[Tensor, "db g j i"], d: int) -> Float[Tensor, "d g j i"]:
        """Over the samples: all share the gradient rows."""
        return grads if self.system.samples == 1 else grads.reshape(d, -1, *grads.shape[1:]).sum(1)

    def pulled_back(self, rows: Rows) -> Float[Tensor, "d *in_shape"]:
        """The adjoint of `moved_rows`."""
        if self._coupled is not None:
            return self._coupled.back(rows)
        network, d = self.system.network, len(rows.weight)
        end = len(network.nodes)
        back: dict[int, Tensor] = {end: rows.weight.flatten(0, 1)}
        weighed = zip(self.system.nodes, rows.gradient, self.scale, strict=True)
        grads = {node: grad for node, grad, scale in weighed if scale}
        for at in reversed(range(end)):
            node, cotangent = network.nodes[at], back.pop(at + 1, None)
            if cotangent is None and at not in grads:
                continue
            if at in grads and isinstance(node.op, Linear):
                pulled: tuple[Tensor, ...] = (self._pulled(at, node.op, cotangent, grads[at], d),)
            elif cotangent is None:
                continue
            elif at in self.at.slopes:
                pulled = ((cotangent.reshape(d, *self.at.slopes[at].shape) * self.at.slopes[at]).flatten(0, 1),)
            else:
                pulled = node.op.vjp(cotangent, self._values(node.reads, node.op.linear, d))
            for each, more in zip(node.reads, pulled, strict=True):
                back[each] = back[each] + more if each in back else more
        if 0 not in back:
            return rows.weight.new_zeros(d, *self.in_shape)
        return back[0].reshape(d, *self.in_shape)

    def _pulled(self, at: int, op: Linear, cotangent: Tensor | None, grad: Float[Tensor, "d g j i"], d: int) -> Tensor:
        """W'z + K'grad of one layer, folded once."""
        layer, samples = op.layer, self.system.samples
        k = self._each(self._k[at], d)
        if cotangent is None:
            z = layer.weight.new_zeros(d * samples, layer.outputs, layer.positions)
        else:
            z = layer.pack_output(cotangent)
        grad = grad if samples == 1 else grad.repeat_interleave(samples, 0)  # the adjoint of a sum
        x = layer.unpack_input(layer.rows_adjoint(z, grad, k))
        return x.reshape(len(x), *self.at.values[self.system.network.nodes[at].reads[0]].shape[1:])

    def _values(self, reads: tuple[int, ...], linear: bool, d: int) -> tuple[Tensor, ...]:
        """The values that an operation reads, for each direction and sample; a linear one asks for shapes alone."""
        values = (self.at.values[each] for each in reads)
        if linear or (d == 1 and self.system.samples == 1):
            return tuple(values)
        return tuple(value.expand(d, *value.shape).flatten(0, 1) for value in values)

    def _used(self, at: int, grad: Float[Tensor, "d g j i"], power: float) -> Tensor:
        """A layer's gradient rows without what is in doubt, those of each output times a power of its weight, squared;
        a projection is its own square."""
        if self._outputs is None:
            return self.doubted[at].without(grad)
        return grad * self._outputs[at].reshape(*grad.shape[1:3], 1) ** (2 * power)
