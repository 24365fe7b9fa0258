"""Back through a block with branches: out = x + F(x), several paths that are concatenated, and the like.

What every value inside is goes from one to the next like a rumour: an inner activation h is known as soon as the
gradient rows K h = grad W of the layers that read it determine it; then z = W h + b is, and so is what else
enters the sum, x = out - z. Where that leads nowhere the block's input is sought from all its constraints at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rgap.inversion.batch_norm import before_batch_norm
from rgap.inversion.block_solve import BlockInput, solve_jointly
from rgap.inversion.history import Paths
from rgap.inversion.layer import LayerRows, LayerSolution, LayerSystem, Rhs
from rgap.inversion.report import LayerReport, layer_report
from rgap.inversion.rounding import rounding
from rgap.inversion.sides import explained, outliers
from rgap.inversion.state import Cause, Observation, State, Stop
from rgap.inversion.unpool import FEWER
from rgap.nn.activations import NonMonotone, ReLU
from rgap.nn.batch_norm import BatchNorm
from rgap.nn.network import Network, Node
from rgap.nn.ops import Affine, Concat, Elementwise, Linear, Norm, Op, Other, Sum
from rgap.nn.pools import Pool

MENDED, DOUBTFUL = 8, 100.0
"""Times that values are moved to the other side of their kinks, and how many errors away from it they may be."""
DENSE = 6_000
"""Unknowns of one group above which a value is not solved for."""


def solve_block(network: Network, value_id: int, observed: Observation, paths: Paths, inputs: int) -> Paths | Stop:
    """The block's input from its output, for each candidate by itself; those that get nowhere fall out.

    Args:
        network: the block alone.
        value_id: of its output.
        inputs: numbers of the whole network's input.
    """
    found = []
    for s, history in enumerate(paths.history):
        one = observed.one(int(paths.update[s]))
        found.append(solve_one(network, value_id, one, paths.state.one(s), history.open_since, inputs))
    passed = [s for s, each in enumerate(found) if not isinstance(each, Stop)]
    if not passed:
        return next(each for each in found if isinstance(each, Stop))
    kept = paths.select(torch.tensor(passed, device=paths.root.device))
    through = [each for each in found if not isinstance(each, Stop)]
    histories = [each.passed_block(reports) for each, (_, reports) in zip(kept.history, through, strict=True)]
    return replace(kept, state=State.concatenate([state for state, _ in through]), history=tuple(histories))


def solve_one(
    network: Network,
    value_id: int,
    observed: Observation,
    state: State,
    open_since: str | None,
    inputs: int | None = None,
) -> tuple[State, tuple[LayerReport, ...]] | Stop:
    """For one candidate: what is known of the block's input, and its layers' reports from the input to the output.

    Args:
        state: (b, *shape), of all samples of one update.
        open_since: a layer that leaves the block's output open.
        inputs: numbers of the whole network's input. A large block is not solved jointly where they are far fewer than
            its own: all that is in front can be.
    """
    end = network.nodes[-1].op
    if open_since is not None:
        what = f"{open_since} leaves its input open, and no branches are followed from there"
        return Stop(end, Cause.OPEN, what)
    lossy = next((node.op for node in network.nodes if isinstance(node.op, (Norm, Other, Pool))), None)
    if lossy is not None:
        return Stop(lossy, Cause.LOSSY, lossy.loses)
    block = BlockValues(network, observed, state, observed.probe(value_id, state.value.device))
    block.propagate()
    large = state.value.numel() > DENSE
    if large and not block.determined and inputs is not None and FEWER * inputs <= math.prod(network.input_shape):
        return Stop(end, Cause.OPEN, "its layers do not tell what they read one after the other")
    if not (large and block.determined):
        # Where one value after another led to the input it used some of the rows and not others; all of them know
        # better.
        start = block.values[0].value if block.determined else block.start()
        found = solve_jointly(network, observed, state, start)
        if isinstance(found, BlockInput):
            block.take(found)
        elif not block.determined or block.samples > 1:
            return found  # of several samples no candidate is compared with others later on
    value = block.values[0]
    reports = tuple(block.reports[node] for node in sorted(block.reports))
    return State(value.value, block.ks[0], None, value.std), reports


@dataclass(frozen=True)
class Estimate:
    """A value inside the block, (1, *shape), as `State` has it."""

    value: Tensor
    row_weight: Tensor | None
    std: Tensor

    @property
    def full(self) -> bool:
        return self.row_weight is None or bool((self.row_weight > 0).all())

    @property
    def rms_std(self) -> Tensor:
        """The root mean square of the standard deviation of what is known, (1,)."""
        std = self.std.expand(self.value.shape)
        known = std if self.row_weight is None else std[self.row_weight > 0]
        return known.square().sum().div(max(known.numel(), 1)).sqrt().reshape(1)


@dataclass(frozen=True)
class Kinks:
    """The kinks behind a value, through operations that mix none of its numbers."""

    node: int
    """Of the activation, or the number of nodes if it reads the block's output."""
    there: Tensor
    """The value's cotangent if all that is in doubt were on the other side, (b, *shape)."""


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
                if value not in self.ks:
                    self._k(value)
                if value not in self.values:
                    self._value(value)
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
            there = 1 - slope if isinstance(op.activation, ReLU) else op.activation.other_side(slope)
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
            there = 1 - slope if isinstance(op.activation, ReLU) else op.activation.other_side(slope)
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
        for node_id in self.network.readers[value]:
            op, behind = self.network.nodes[node_id].op, self.network.readers[node_id + 1]
            norm = self.network.nodes[behind[0]].op if len(behind) == 1 else None
            if not isinstance(op, Linear) or not op.has_gradient or not isinstance(norm, BatchNorm):
                continue
            layer, k = op.layer.side_by_side(self.samples), self.ks.get(behind[0] + 1)
            if k is None or layer.weight_name not in self.observed.gradients:
                continue
            grad = layer.pack_weight(self.observed.gradients[layer.weight_name])
            found = before_batch_norm(layer, norm, k, grad, self.observed.rank_tolerance)
            if found is None:
                continue
            noise = self._draw(grad) * rounding(grad, self.observed.eps)
            error = found.system.apply_inverse(torch.zeros_like(found.system.k), noise).square().mean().sqrt()
            x = layer.unpack_input(found.solution.x).reshape(-1, *self.network.shapes[value])
            self.values[value] = Estimate(x, None, error.reshape(1, *[1] * (x.dim() - 1)))
            nothing = torch.zeros_like(found.system.k)
            self.reports[node_id] = layer_report(
                layer, found.system.k, nothing, found.solution, 0, float(error), None, True
            )
            return

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
                    found = _undone(node.op, out)
            if found is not None:
                yield found

    def _before_activation(self, node_id: int, op: Elementwise, out: Estimate) -> Estimate | None:
        if isinstance(op.activation, NonMonotone):
            return None
        inverse = op.activation.invert(out.value, out.std.expand(out.value.shape))
        self._slope(node_id, op, inverse.slope)
        std = out.std / inverse.slope.abs().clamp(min=1e-12)
        return Estimate(inverse.z, _product(inverse.weight, out.row_weight), std)

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
        self.reports = found.reports | self.reports


def _undone(op: Op, out: Estimate) -> Estimate | None:
    """Through an operation that has one input for each output."""
    x = op.invert(out.value)
    if x is None:
        return None
    weight = out.row_weight
    if weight is not None and not isinstance(op, Affine):
        weight = op.invert(weight)
    std: Tensor | None = out.std.expand(out.value.shape)
    assert std is not None
    std = std / op.scale.abs() if isinstance(op, Affine) else op.invert(std)
    return Estimate(x, weight, out.std if std is None else std)


def _product(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first * second
