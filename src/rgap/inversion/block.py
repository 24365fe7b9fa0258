"""Back through a block with branches: out = x + F(x), several paths that are concatenated, and the like.

What every value inside is goes from one to the next like a rumour: an inner activation h is known as soon as the
gradient rows K h = grad W of the layers that read it determine it alone; then z = W h + b is, and so is what else
enters the sum, x = out - z. Where that leads nowhere the block's input is sought from all its constraints together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.inversion import together
from rgap.inversion.layer import LayerRows, LayerSolution, LayerSystem, Rhs
from rgap.inversion.report import LayerReport, layer_report
from rgap.inversion.rounding import rounding
from rgap.inversion.state import History, Observation, State
from rgap.nn.activations import NonMonotone
from rgap.nn.network import Network
from rgap.nn.ops import Affine, Concat, Elementwise, Linear, Norm, Other, Sum

DENSE = 6_000
"""Unknowns of one group above which a value that is told directly is not solved for."""


def back(network: Network, given: Observation, state: State, trail: History, probe: torch.Generator) -> State | str:
    """What is known of the block's input from what is known of its output, for one candidate; or why nothing is.

    Args:
        network: the block alone.
        given: of one update.
        trail: is told what happened at the block's layers.
    """
    opened = trail.x_open or trail.k_open
    name = network.nodes[-1].op.name
    if opened is not None:
        return f"stops at {name}: {opened} leaves its input open, and no branches are followed from there"
    other = next((node.op for node in network.nodes if isinstance(node.op, (Norm, Other))), None)
    if other is not None:
        return f"stops at {other.name}: {other.loses}"
    inside = Inside(network, given, state, probe)
    inside.spread()
    if 0 not in inside.values or 0 not in inside.ks:
        found = together.solve(network, given, state, inside.start())
        if isinstance(found, str):
            return f"stops at {name}: {found}"
    else:
        # One value after another used some of the rows and not others; all of them know better.
        rows = together.Constraints(network, given, state, True)
        found = together.refine(rows, inside.values[0].y)
    if isinstance(found, together.Found):
        inside.take(found)
    trail.beside([inside.reports[place] for place in sorted(inside.reports)])
    value = inside.values[0]
    return State(value.y, inside.ks[0], None, value.error)


@dataclass(frozen=True)
class Known:
    """A value inside the block, (1, *shape), as `State` has it."""

    y: Tensor
    weight: Tensor | None
    error: Tensor

    @property
    def full(self) -> bool:
        return self.weight is None or bool((self.weight > 0).all())

    @property
    def size(self) -> Tensor:
        """The root mean square of the error, (1,)."""
        return self.error.expand(self.y.shape).square().mean().sqrt().reshape(1)


class Inside:
    """What is known of the values of a block, and the rules by which more becomes known."""

    def __init__(self, network: Network, given: Observation, state: State, probe: torch.Generator):
        self.network, self.given, self.probe = network, given, probe
        end = len(network.nodes)
        self.values: dict[int, Known] = {end: Known(state.value, state.row_weight, state.std)}
        self.ks: dict[int, Tensor] = {end: state.cotangent}
        self.slopes: dict[int, Tensor] = {}
        self.reports: dict[int, LayerReport] = {}

    def spread(self) -> None:
        """Apply the rules until nothing more becomes known."""
        count = -1
        while count != (count := len(self.values) + len(self.ks) + len(self.slopes)):
            for value in reversed(range(len(self.network.nodes))):
                if value not in self.ks:
                    self._k(value)
                if value not in self.values:
                    self._value(value)
            for place in range(len(self.network.nodes)):
                self._forward(place)

    def _k(self, value: int) -> None:
        """Eq. 6, once k of everything that reads the value is known."""
        k = self.network.cotangent_of(value, self.ks.get, self.slopes)
        if k is not None:
            self.ks[value] = k

    def _forward(self, place: int) -> None:
        """What is computed from known values is known."""
        node = self.network.nodes[place]
        reads = [self.values.get(at) for at in node.reads]
        known = [each for each in reads if each is not None and each.full]
        if len(known) < len(reads):
            return
        out = self.values.get(place + 1)
        if out is None or not out.full:
            xs = tuple(each.y for each in known)
            noise = tuple(self._draw(each.y) * each.error for each in known)
            y = node.op.forward(*xs)
            error = node.op.jvp(noise, xs).square().mean().sqrt()
            self.values[place + 1] = Known(y, None, error.reshape(1, *[1] * (y.dim() - 1)))
        if isinstance(node.op, Elementwise):
            self.slopes.setdefault(place, node.op.activation.slope(known[0].y))

    def _value(self, value: int) -> None:
        """A value from what reads it: layers by their constraints, all else by being undone."""
        direct = next(self._direct(value), None)
        rows = list(self._rows(value))
        if rows:
            self._solve(value, rows, direct)
        elif direct is not None:
            self.values[value] = direct

    def _direct(self, value: int) -> Iterator[Known]:
        for place in self.network.readers[value]:
            node, out = self.network.nodes[place], self.values.get(place + 1)
            op = node.op
            if out is None or isinstance(op, (Linear, Other)):
                continue
            if isinstance(op, Elementwise):
                if not isinstance(op.activation, NonMonotone):
                    inverse = op.activation.invert(out.y, out.size)
                    self.slopes[place] = inverse.slope
                    rows = (slice(None), *[None] * (out.y.dim() - 1))
                    error = out.size[rows] / inverse.slope.abs().clamp(min=1e-12)
                    yield Known(inverse.z, _product(inverse.weight, out.weight), error)
            elif isinstance(op, Sum):
                others = [self.values.get(at) for at in node.reads if at != value]
                known = [each for each in others if each is not None and each.full]
                if len(known) == len(others):
                    times = node.reads.count(value)
                    y = out.y - sum((each.y for each in known), torch.zeros_like(out.y))
                    error = sum((each.error.square() for each in known), out.error.square()).sqrt()
                    yield Known(y / times, out.weight, error / times)
            elif isinstance(op, Concat):
                at = node.reads.index(value)
                sizes = [self.network.shapes[each][op.dim] for each in node.reads]
                y, error = (torch.split(each.expand(out.y.shape), sizes, op.dim + 1)[at] for each in (out.y, out.error))
                weight = None if out.weight is None else torch.split(out.weight, sizes, op.dim + 1)[at]
                yield Known(y, weight, error)
            else:
                undone = op.invert(out.y)
                if undone is not None:
                    weight = out.weight if out.weight is None or isinstance(op, Affine) else op.invert(out.weight)
                    size = op.scale.abs().mean() if isinstance(op, Affine) else undone.new_ones(())
                    yield Known(undone, weight, out.size.reshape(1, *[1] * (undone.dim() - 1)) / size)

    def _rows(self, value: int) -> Iterator[tuple[int, LayerRows, Rhs, Tensor]]:
        """Of each layer that reads the value and of which something is known: place, rows, right side, error of z."""
        for place in self.network.readers[value]:
            op, k, out = self.network.nodes[place].op, self.ks.get(place + 1), self.values.get(place + 1)
            if not isinstance(op, Linear) or (out is None and (k is None or not op.has_gradient)):
                continue
            layer = op.layer
            zeros = layer.weight.new_zeros(1, layer.outputs, layer.positions)
            if k is not None and op.has_gradient:
                k, grad = layer.pack_output(k), layer.pack_weight(self.given.gradients[layer.weight_name])
            else:
                k, grad = zeros, torch.zeros_like(layer.weight)[None]
            z, weight, error = zeros, zeros, zeros
            if out is not None:
                z = layer.pack_output(out.y) - layer.offset
                weight = torch.ones_like(z) if out.weight is None else layer.pack_output(out.weight)
                error = layer.pack_output(out.error.expand(out.y.shape))
            yield place, LayerRows(layer, k, weight), (z, grad), error

    def _solve(self, value: int, rows: list[tuple[int, LayerRows, Rhs, Tensor]], direct: Known | None) -> None:
        """The value from all of its layers' constraints, and its own value where that is told, if they determine it."""
        first = rows[0][1].layer
        alike = all(
            (each.layer.groups, each.layer.channels, each.layer.pixels) == (first.groups, first.channels, first.pixels)
            for _, each, _, _ in rows
        )
        told = direct is not None and direct.full
        if not alike or first.unknowns // first.groups > DENSE:
            if told and direct is not None:
                self.values[value] = direct
            return
        sure = y = None
        if direct is not None:
            y = first.pack_input(direct.y)
            sure = torch.ones_like(y) if direct.weight is None else first.pack_input(direct.weight)
        beside = [each for _, each, _, _ in rows[1:]]
        sides = [side for _, _, side, _ in rows]
        head = rows[0][1]
        system = LayerSystem(first, head.k, head.row_weight, self.given.rank_tolerance, beside, sure)
        if system.rank[0] < first.unknowns:
            return
        solved = system.solve(*sides[0], sides[1:], y)
        error = self._error(system, rows, solved, direct, y)
        x = first.unpack_input(solved.x).reshape(1, *self.network.shapes[value])
        self.values[value] = Known(x, None, error.reshape(1, *[1] * (x.dim() - 1)))
        for place, each, _, _ in rows:
            heard = bool(each.k.any())
            self.reports[place] = layer_report(
                each.layer, each.k, each.row_weight, solved, 0, float(error), None, heard
            )

    def _error(
        self,
        system: LayerSystem,
        rows: list[tuple[int, LayerRows, Rhs, Tensor]],
        solved: LayerSolution,
        direct: Known | None,
        y: Tensor | None,
    ) -> Tensor:
        """One draw of the noise of everything on the right, pushed through the solver."""
        noises = []
        for _, _, (z, grad), error in rows:
            noises.append(
                (self._draw(z) * error.maximum(solved.weight_misfit), self._draw(grad) * rounding(grad, self.given.eps))
            )
        own = None if direct is None or y is None else self._draw(y) * direct.size.maximum(solved.weight_misfit)
        return system.apply_inverse(*noises[0], noises[1:], own).square().mean().sqrt()

    def _draw(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.probe, dtype=like.dtype, device=like.device)

    def start(self) -> Tensor:
        """Where to begin looking for the block's input: what enters the sum, if its shape is the input's."""
        shape = self.network.shapes[0]
        known = [self.values[at] for at in sorted(self.values) if self.network.shapes[at] == shape]
        return known[0].y if known else self.network.layers[0].weight.new_zeros(1, *shape)

    def take(self, found: together.Found) -> None:
        """The block's input as it was found from all constraints together."""
        x = found.x
        self.values[0] = Known(x, None, found.error.reshape(1, *[1] * (x.dim() - 1)))
        values = self.network.forward(x)
        k = self.network.vjp(values, self.network.slopes(values), {len(values) - 1: self.ks[len(values) - 1]})[0]
        self.ks[0] = torch.zeros_like(x) if k is None else k
        self.reports = found.reports | self.reports


def _product(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first * second
