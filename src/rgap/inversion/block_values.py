"""What is known of the values inside a block with branches, and the rules by which more becomes known.

An inner activation h is known as soon as the gradient rows K h = grad W of the layers that read it determine it; then
z = W h + b is, and so is what else enters the sum, x = out - z.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rgap.inversion.batch_norm import before_batch_norm, rows_before
from rgap.inversion.block_solve import BlockInput
from rgap.inversion.estimate import Estimate, Kinks, other_slope, product, undone
from rgap.inversion.layer import LayerRows, LayerSolution, LayerSystem, Rhs
from rgap.inversion.report import LayerReport, layer_report
from rgap.inversion.rounding import rounding
from rgap.inversion.sides import explained, outliers
from rgap.inversion.state import Observation, State
from rgap.nn.network import Network, Node
from rgap.nn.non_monotone import NonMonotone
from rgap.nn.ops import Affine, Concat, Elementwise, Linear, Other, Sum
from rgap.nn.pools import Pool

MENDED, DOUBTFUL = 8, 100.0
"""Times that values are moved to the other side of their kinks, and how many errors away from it they may be."""
DENSE = 6_000
"""Unknowns of one group above which no matrix of a value's rows is formed."""


class BlockValues:
    """What is known of the values of a block, and the rules by which more becomes known."""

    def __init__(self, network: Network, observed: Observation, state: State, probe: torch.Generator):
        self.network, self.observed, self.probe = network, observed, probe
        self.output, self.samples = state, len(state.value)
        self.flipped: dict[int, Tensor] = {}
        """Of an elementwise operation by its node, or of the block's output, the values that are on the other side of
        their kink than they seem to be."""
        self.patient = False
        """Whether large values are solved for by products too, which take seconds."""
        self.mended = 0
        """Times that sides were mended."""
        self._begin()

    def _begin(self) -> None:
        """With nothing known but the output."""
        state, end = self.output, len(self.network.nodes)
        self.values: dict[int, Estimate] = {end: Estimate(state.value, state.row_weight, state.std)}
        self.ks: dict[int, Tensor] = {end: state.cotangent}
        self.slopes: dict[int, Tensor] = {}
        self.reports: dict[int, LayerReport] = {}
        self.kinks: dict[int, Kinks] = {}
        if state.alternative is not None:
            there = state.alternative.cotangent
            self.kinks[end] = Kinks(end, there)
            if end in self.flipped:
                self.ks[end] = torch.where(self.flipped[end], there, state.cotangent)

    def propagate(self) -> None:
        """Apply the rules until nothing more becomes known."""
        self._propagate()
        self.patient = not self.determined
        if self.patient:
            self._propagate()

    @property
    def determined(self) -> bool:
        """Whether the block's input is known, and its cotangent."""
        return 0 in self.values and 0 in self.ks

    def _propagate(self) -> None:
        before: tuple[int, ...] = ()
        while before != (before := (len(self.values), len(self.ks), len(self.slopes), self.mended)):
            for value in reversed(range(len(self.network.nodes))):
                if value not in self.values:
                    self._value(value)
                # Eq. 6 takes the slope at a value, and a layer in front of it takes its k.
                if value not in self.ks:
                    self._k(value)
            for node_id in range(len(self.network.nodes)):
                self._forward(node_id)

    def _k(self, value: int) -> None:
        """Eq. 6, once k of everything that reads the value is known."""
        k = self.network.cotangent_of(value, self.ks.get, self.slopes, self._known)
        if k is None:
            return
        self.ks[value] = k
        readers = self.network.readers[value]
        if len(readers) == 1:
            kinks = self._kinks_behind(readers[0], k)
            if kinks is not None:
                self.kinks[value] = kinks

    def _kinks_behind(self, node_id: int, k: Tensor) -> Kinks | None:
        """The kinks that alone stand behind what an operation reads, and its cotangent on their other sides."""
        op, out = self.network.nodes[node_id].op, self.values.get(node_id + 1)
        if isinstance(op, Elementwise):
            if not op.activation.kinked or out is None or node_id not in self.slopes:
                return None
            slope = self.slopes[node_id]
            there = other_slope(op.activation, slope)
            near = out.value.abs() <= DOUBTFUL * out.std
            return Kinks(node_id, self.ks[node_id + 1] * torch.where(near, there, slope))
        behind = self.kinks.get(node_id + 1)
        if behind is None or not isinstance(op, (Affine, Sum)) or behind.there.shape != k.shape:
            return None
        there = op.scale * behind.there if isinstance(op, Affine) else behind.there
        return replace(behind, there=there)

    def _known(self, value: int) -> Tensor | None:
        found = self.values.get(value)
        return found.value if found is not None and found.full else None

    def _forward(self, node_id: int) -> None:
        """What is computed from known values is known."""
        node = self.network.nodes[node_id]
        reads = [self.values.get(at) for at in node.reads]
        known = [each for each in reads if each is not None and each.full]
        if len(known) < len(reads):
            return
        out = self.values.get(node_id + 1)
        if out is None or not out.full:
            xs = tuple(each.value for each in known)
            noise = tuple(self._draw(each.value) * each.std for each in known)
            y = node.op.forward(*xs)
            error = node.op.jvp(noise, xs).square().mean().sqrt()
            self.values[node_id + 1] = Estimate(y, None, error.reshape(1, *[1] * (y.dim() - 1)))
        if isinstance(node.op, Elementwise) and node_id not in self.slopes:
            self._slope(node_id, node.op, node.op.activation.slope(known[0].value))

    def _slope(self, node_id: int, op: Elementwise, slope: Tensor) -> None:
        if node_id in self.flipped:
            there = other_slope(op.activation, slope)
            slope = torch.where(self.flipped[node_id], there, slope)
        self.slopes[node_id] = slope

    def _value(self, value: int) -> None:
        """A value from what reads it: layers by their constraints, all else by being inverted."""
        inverted = next(self._inverted(value), None)
        rows = list(self._rows(value))
        if rows:
            self._solve(value, rows, inverted)
        elif inverted is not None:
            self.values[value] = inverted
        if value not in self.values:
            self._before_batch_norm(value)

    def _before_batch_norm(self, value: int) -> None:
        """A value from the gradient of a layer that reads it, where a batch norm in training mode follows."""
        rows = rows_before(self.network, value, self.ks, self.values, self.observed.gradients)
        if rows is None:
            return
        x = before_batch_norm(rows, (self.samples, *self.network.shapes[value]))
        if x is not None:
            size = self.observed.eps * float(x.square().mean().sqrt())
            self.values[value] = Estimate(x, None, x.new_full((1,) * x.dim(), size))

    def _inverted(self, value: int) -> Iterator[Estimate]:
        """From each operation without weights that reads the value, what its output tells of it."""
        for node_id in self.network.readers[value]:
            node, out = self.network.nodes[node_id], self.values.get(node_id + 1)
            if out is None:
                continue
            match node.op:
                case Linear() | Other() | Pool():
                    found = None
                case Elementwise():
                    found = self._before_activation(node_id, node.op, out)
                case Sum():
                    found = self._summand(value, node, out)
                case Concat():
                    found = self._part(value, node, node.op, out)
                case _:
                    found = undone(node.op, out)
            if found is not None:
                yield found

    def _before_activation(self, node_id: int, op: Elementwise, out: Estimate) -> Estimate | None:
        if isinstance(op.activation, NonMonotone):
            return None
        inverse = op.activation.invert(out.value, out.std.expand(out.value.shape))
        self._slope(node_id, op, inverse.slope)
        std = out.std / inverse.slope.abs().clamp(min=1e-12)
        return Estimate(inverse.z, product(inverse.weight, out.row_weight), std)

    def _summand(self, value: int, node: Node, out: Estimate) -> Estimate | None:
        """The sum less what else is in it, if all of that is known."""
        others = [self.values.get(at) for at in node.reads if at != value]
        known = [each for each in others if each is not None and each.full]
        if len(known) < len(others):
            return None
        times = node.reads.count(value)
        left = out.value - sum((each.value for each in known), torch.zeros_like(out.value))
        std = sum((each.std.square() for each in known), out.std.square()).sqrt()
        return Estimate(left / times, out.row_weight, std / times)

    def _part(self, value: int, node: Node, op: Concat, out: Estimate) -> Estimate:
        at = node.reads.index(value)
        sizes = [self.network.shapes[each][op.dim] for each in node.reads]

        def own(whole: Tensor) -> Tensor:
            return torch.split(whole, sizes, op.dim + 1)[at]

        row_weight = None if out.row_weight is None else own(out.row_weight)
        return Estimate(own(out.value), row_weight, own(out.std.expand(out.value.shape)))

    def _rows(self, value: int) -> Iterator[tuple[int, LayerRows, Rhs, Tensor]]:
        """Of each layer that reads the value and of which something is known: node_id, rows, right side, error of z."""
        for node_id in self.network.readers[value]:
            op, k, out = self.network.nodes[node_id].op, self.ks.get(node_id + 1), self.values.get(node_id + 1)
            if not isinstance(op, Linear):
                continue
            sent = op.has_gradient and op.layer.weight_name in self.observed.gradients
            if out is None and (k is None or not sent):
                continue
            layer = op.layer.side_by_side(self.samples)
            zeros = layer.weight.new_zeros(1, layer.outputs, layer.positions)
            if k is not None and sent:
                k, grad = layer.pack_output(k), layer.pack_weight(self.observed.gradients[layer.weight_name])
            else:
                k, grad = zeros, torch.zeros_like(layer.weight)[None]
            z, weight, error = zeros, zeros, zeros
            if out is not None:
                z = layer.pack_output(out.value) - layer.offset
                weight = torch.ones_like(z) if out.row_weight is None else layer.pack_output(out.row_weight)
                error = layer.pack_output(out.std.expand(out.value.shape))
            yield node_id, LayerRows(layer, k, weight), (z, grad), error

    def _solve(self, value: int, rows: list[tuple[int, LayerRows, Rhs, Tensor]], inverted: Estimate | None) -> None:
        """The value from all of its layers' constraints, and itself where it is known, if they determine it."""
        first = rows[0][1].layer
        alike = all(
            (each.layer.groups, each.layer.channels, each.layer.pixels) == (first.groups, first.channels, first.pixels)
            for _, each, _, _ in rows
        )
        if not alike:
            if inverted is not None and inverted.full:
                self.values[value] = inverted
            return
        observed_weight = observed_input = None
        if inverted is not None:
            observed_input = first.pack_input(inverted.value)
            observed_weight = (
                torch.ones_like(observed_input)
                if inverted.row_weight is None
                else first.pack_input(inverted.row_weight)
            )
        rhs = [each for _, _, each, _ in rows]
        system = self._system([each for _, each, _, _ in rows], observed_weight)
        if system is None:
            if inverted is not None and inverted.full:
                self.values[value] = inverted
            return
        solution = system.solve(*rhs[0], rhs[1:], observed_input)
        if self._mend(rows, solution, observed_weight, observed_input):
            return
        error = self._error(system, rows, solution, inverted, observed_input)
        shape = (-1, *self.network.shapes[value])
        x = first.unpack_input(solution.x).reshape(shape)
        # Directions that the constraints hardly determine are the same in all channels: so is the error of each pixel.
        pixel = error.square().mean(1, keepdim=True).sqrt().expand(error.shape)
        self.values[value] = Estimate(x, None, first.unpack_input(pixel).reshape(shape))
        size = float(error.square().mean().sqrt())
        for node_id, each, _, _ in rows:
            has_gradient = bool(each.k.any())
            self.reports[node_id] = layer_report(
                each.layer, each.k, each.row_weight, solution, 0, size, None, has_gradient
            )

    def _system(self, rows: list[LayerRows], observed_weight: Tensor | None) -> LayerSystem | None:
        """The constraints of layers on a value that they read, if they determine it.

        Of a large value gradient rows alone are asked first, which take matrices of one channel; all rows by products
        only where nothing else leads on.
        """
        head, *others = rows
        if head.layer.unknowns // head.layer.groups <= DENSE // self.samples:
            kinds: list[dict[str, Any]] = [{}]
        else:
            enough = sum(float(each.used.sum()) + each.layer.gradient_rows * bool(each.k.any()) for each in rows)
            by_products = self.patient and enough >= head.layer.unknowns
            kinds = [{"alone": True}] + [{"solver": "iterative"}] * by_products
        tolerance = self.observed.rank_tolerance
        for kind in kinds:
            system = LayerSystem(head.layer, head.k, head.row_weight, tolerance, others, observed_weight, **kind)
            if system.rank[0] == head.layer.unknowns:
                return system
        return None

    def _mend(
        self,
        rows: list[tuple[int, LayerRows, Rhs, Tensor]],
        solution: LayerSolution,
        observed_weight: Tensor | None,
        observed_input: Tensor | None,
    ) -> bool:
        """Whether a value behind a layer lies on the other side of its kink than was taken: all begins anew with that.

        It spoils the gradient of one output. So outputs that miss far more than the others are left out, and what
        they miss then is what their own values on the other side do to them.
        """
        eps = self.observed.eps
        for at, (node_id, each, (_, grad), _) in enumerate(rows):
            kinks, layer = self.kinks.get(node_id + 1), each.layer
            if kinks is None or self.mended >= MENDED or not bool(each.k.any()):
                continue
            spoiled = outliers(layer, each.k, solution.x, grad, eps)
            if not bool(spoiled.any()):
                continue
            kept = (~spoiled).to(grad)
            left = [row for _, row, _, _ in rows]
            rhs = [right for _, _, right, _ in rows]
            left[at] = replace(each, k=each.k * kept[..., None])
            rhs[at] = rhs[at][0], grad * kept.reshape(*grad.shape[:3], 1)
            system = self._system(left, observed_weight)
            if system is None:
                continue
            x = system.solve(*rhs[0], rhs[1:], observed_input).x
            k = explained(layer, each.k, layer.pack_output(kinks.there), x, grad, kept)
            moved = layer.unpack_output((k != each.k).to(k)).reshape(kinks.there.shape) > 0
            if bool(moved.any()):
                before = self.flipped.get(kinks.node)
                self.flipped[kinks.node] = moved if before is None else moved ^ before
                self.mended += 1
                self._begin()
                return True
        return False

    def _error(
        self,
        system: LayerSystem,
        rows: list[tuple[int, LayerRows, Rhs, Tensor]],
        solution: LayerSolution,
        inverted: Estimate | None,
        observed_input: Tensor | None,
    ) -> Tensor:
        """One draw of the noise of everything on the right, pushed through the solver."""
        noises, eps = [], self.observed.eps
        for _, each, (z, grad), z_std in rows:
            z_noise = self._draw(z) * z_std.maximum(solution.weight_misfit)
            moved = each.layer.grad_weight(solution.x, eps * self._draw(each.k).sign() * each.k)
            noises.append((z_noise, self._draw(grad) * rounding(grad, eps) + moved))
        own = None
        if inverted is not None and observed_input is not None:
            own = self._draw(observed_input) * inverted.rms_std.maximum(solution.weight_misfit)
        return system.apply_inverse(*noises[0], noises[1:], own)

    def _draw(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.probe, dtype=like.dtype, device=like.device)

    def start(self) -> Tensor:
        """Where to begin looking for the block's input: what enters the sum, if its shape is the input's."""
        shape = self.network.shapes[0]
        known = [self.values[at] for at in sorted(self.values) if self.network.shapes[at] == shape]
        return known[0].value if known else self.ks[len(self.network.nodes)].new_zeros(self.samples, *shape)

    def take(self, found: BlockInput) -> None:
        """The block's input as it was found from all constraints jointly."""
        x = found.x
        self.values[0] = Estimate(x, None, x.new_full((1,) * x.dim(), found.std))
        self.ks[0] = found.cotangent
        own = {} if self.network.own.coupled else self.reports  # what told statistics say is not as precise
        self.reports = found.reports | own
