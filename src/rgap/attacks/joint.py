"""Several layers' constraints, solved together for the network's input.

A layer whose own constraints leave dimensions of its input free may still leave none of the *network's* input free: the
layers before it restrict what it can be given. These are the paper's virtual constraints (Section 4). With the slopes
of the activations fixed, every constraint of every layer is linear in the input x_0, so all of them form one
least-squares problem. Its normal equations are carried from a layer's output to its input, as an information filter
carries them through time:

    G_i = W' D G_(i+1) D W + b K'P K      g_i = W' D (g_(i+1) - G_(i+1) c) + b K'P grad W

where x_(i+1) = D W x_i + c is the activation linearised, and b scales the gradient rows to the size of the others.

The k of a layer in front jumps when a unit after it changes its side, and with it the gradient rows. But what one
wrong side does to them is a multiple of one known vector. So the rows are used as soon as most sides are right, with
what the units in doubt may have done projected out (P).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.linalg import psd
from rgap.nn.chain import Chain
from rgap.nn.layers import Layer

READS = 1e-2
"""A unit that reads less than this fraction of what any unit of its layer reads has no side worth knowing."""
RANK = 1e-9
"""Effects of units in doubt below this fraction of the largest tell nothing."""
INCREMENTAL = 300
"""With at most so many changed slopes the normal equations are updated rather than made again."""


@dataclass(frozen=True)
class Known:
    """What is known exactly of the last of the layers: all that the recursion found before it broke off."""

    k: Float[Tensor, "1 o p"]
    z: Float[Tensor, "1 o p"]
    row_weight: Float[Tensor, "1 o p"] | None


@dataclass
class Carried:
    """W' D M D W, remembered: as long as M is the same and few slopes change it is cheap to bring up to date."""

    layer: Layer
    order: Int[Tensor, " m"]
    """Where each output of the layer stands in the next layer's input."""
    _of: Tensor | None = None
    _slopes: Tensor = field(default_factory=lambda: torch.empty(0))
    _result: Tensor = field(default_factory=lambda: torch.empty(0))

    def carry(self, matrix: Float[Tensor, "m m"], slopes: Float[Tensor, " m"]) -> Float[Tensor, "u u"]:
        """The matrix for the layer's input from that for its output, slopes in the order of the output."""
        changed = (slopes != self._slopes).nonzero().flatten() if matrix is self._of else None
        if changed is None or len(changed) > INCREMENTAL:
            ordered = matrix[self.order][:, self.order] * slopes * slopes[:, None]
            self._result = self._back(self._back(ordered).mT)
        elif len(changed):
            # (D+E) M (D+E) - D M D, with E on few units, has low rank.
            step = slopes[changed] - self._slopes[changed]
            columns = matrix[self.order][:, self.order[changed]]
            units = torch.zeros(len(changed), len(slopes), dtype=matrix.dtype, device=matrix.device)
            units[torch.arange(len(changed)), changed] = 1.0
            rows = self._back(units)
            cross = self._back((columns * self._slopes[:, None] * step).mT)
            both = step[:, None] * columns[changed] * step
            mixed = cross.mT @ rows
            self._result = self._result + mixed + mixed.mT + rows.mT @ both @ rows
        self._of, self._slopes = matrix, slopes
        return self._result

    def _back(self, rows: Float[Tensor, "r m"]) -> Float[Tensor, "r u"]:
        """Each row times W."""
        shape = (-1, self.layer.outputs, self.layer.positions)
        return torch.cat([self.layer.grad_input(part.reshape(shape)).flatten(1) for part in torch.split(rows, 512)])


@dataclass(frozen=True)
class Point:
    """Where the activations between the layers are linearised."""

    inputs: list[Tensor]
    """Of every layer; empty where only z is known."""
    outputs: list[Tensor]
    """z of every layer in front of the last."""
    slopes: list[Tensor]
    """D."""
    offsets: list[Tensor]
    """c."""


class Problem:
    """All constraints of the layers 0 to ``depth`` on the network's input, for one candidate."""

    def __init__(self, chain: Chain, depth: int, known: Known, gradients: dict[str, Tensor]):
        self.layers, self.known = chain.layers[: depth + 1], known
        self.grads = [layer.pack_weight(gradients[layer.weight_name][None]) for layer in self.layers]
        self._carried = [
            Carried(before, _order(before, after)) for before, after in zip(self.layers, self.layers[1:], strict=False)
        ]
        last = self.layers[-1]
        self.z = known.z - last.offset
        self._row_weight = None if known.row_weight is None else known.row_weight**2
        self._away: list[Tensor] = [grad.new_zeros(0, grad.numel()) for grad in self.grads]
        self._scale = [0.0] * (depth + 1)
        """Of each layer's gradient rows, squared; 0 where they take no part."""
        self._gram: list[Tensor] = []
        """Of the constraints on each layer's input, from the last layer to the first, once `normal` was asked for."""

    def weighted(self, z: Float[Tensor, "s o p"]) -> Float[Tensor, "s o p"]:
        """Values of the last layer's output, each as far as it is known."""
        return z if self.known.row_weight is None else z * self.known.row_weight

    @property
    def device(self) -> torch.device:
        return self.known.z.device

    @property
    def unknowns(self) -> int:
        return self.layers[0].unknowns

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input, as `forward` takes it."""
        return (1, self.layers[0].channels, self.layers[0].pixels)

    @property
    def rows_in_front(self) -> int:
        """Gradient rows of the layers in front of the last."""
        return sum(layer.gradient_rows for layer in self.layers[:-1])

    @property
    def kinked(self) -> bool:
        """Whether units in front have sides to settle on."""
        return any(layer.activation.kinked for layer in self.layers[:-1])

    @property
    def rows(self) -> int:
        last, weight = self.layers[-1], self.known.row_weight
        used = last.weight_rows if weight is None else int((weight > 0).sum())
        return used + sum(layer.gradient_rows for layer in self.layers)

    def at(self, outputs: list[Tensor], inputs: list[Tensor]) -> Point:
        """The activations between the layers, linearised at values of z."""
        slopes, offsets = [], []
        for layer, z in zip(self.layers[:-1], outputs, strict=False):
            slope = layer.activation.slope(z)
            slopes.append(slope)
            offsets.append(layer.activation(z) - slope * (z - layer.offset))
        return Point(inputs, outputs, slopes, offsets)

    def forward(self, x: Float[Tensor, "1 c n"]) -> Point:
        """The same at a network input."""
        inputs, outputs = [x], []
        for layer, after in zip(self.layers, self.layers[1:], strict=False):
            outputs.append(layer.output(inputs[-1]) + layer.offset)
            inputs.append(after.pack_input(layer.unpack_output(layer.activation(outputs[-1]))))
        return self.at(outputs, inputs)

    def normal(self, point: Point, doubtful: list[Tensor] | None) -> tuple[Float[Tensor, "u u"], Float[Tensor, " u"]]:
        """G and g for the network's input.

        Args:
            doubtful: for each layer in front of the last a mask of units whose side of the kink is in doubt; None
                keeps all gradient rows of these layers out.
        """
        ks = self.ks(point.slopes)
        if not self._gram:
            last = self.layers[-1]
            gram = psd.block_diagonal(last.weight_gram(self._row_weight)[0])
            self._gram = [self._with_gradient_rows(len(self.layers) - 1, gram, self.known.k)]
        self._away = self.of_doubtful(point, doubtful)
        del self._gram[1:]
        for depth in reversed(range(len(self.layers) - 1)):
            gram = self._carried[depth].carry(self._gram[-1], point.slopes[depth].flatten())
            self._scale[depth] = 0.0
            self._gram.append(gram if doubtful is None else self._with_gradient_rows(depth, gram, ks[depth]))
        return self._gram[-1], self.right_side(self.z, self.grads, point.slopes, point.offsets)

    def right_side(
        self, z: Tensor, grads: list[Tensor], slopes: list[Tensor], offsets: list[Tensor] | None
    ) -> Float[Tensor, " u"]:
        """g for the matrix that `normal` made last."""
        last, ks = self.layers[-1], self.ks(slopes)
        rhs = last.grad_input(z if self._row_weight is None else z * self._row_weight)
        rhs = rhs + self._scale[-1] * last.grad_input(ks[-1], grads[-1])
        for depth in reversed(range(len(self.layers) - 1)):
            layer, order = self.layers[depth], self._carried[depth].order
            flat = rhs.flatten()
            if offsets is not None and bool(offsets[depth].any()):
                c = torch.zeros_like(flat)
                c[order] = offsets[depth].flatten()
                flat = flat - self._gram[len(self.layers) - 2 - depth] @ c
            rhs = layer.grad_input(slopes[depth] * flat[order].reshape(slopes[depth].shape))
            if self._scale[depth]:
                away, grad = self._away[depth], grads[depth].flatten()
                told = (grad - away.mT @ (away @ grad)).reshape(grads[depth].shape)
                rhs = rhs + self._scale[depth] * layer.grad_input(ks[depth], told)
        return rhs.flatten()

    def noise(self, point: Point, z: Tensor, grads: list[Tensor]) -> Float[Tensor, " u"]:
        """g for errors of z and of the gradients, for the matrix that `normal` made last."""
        return self.right_side(z, grads, point.slopes, None)

    def ks(self, slopes: list[Tensor]) -> list[Tensor]:
        """k of every layer (Eq. 6)."""
        ks = [self.known.k]
        for depth in reversed(range(len(self.layers) - 1)):
            ks.insert(0, self._k_before(depth, ks[0]) * slopes[depth])
        return ks

    def _k_before(self, depth: int, k: Float[Tensor, "s o p"]) -> Float[Tensor, "s c n"]:
        """The gradient of a layer's activated output, from the next layer's k."""
        layer, after = self.layers[depth], self.layers[depth + 1]
        return layer.k_from(after, k)

    def of_doubtful(self, point: Point, doubtful: list[Tensor] | None) -> list[Float[Tensor, "m r"]]:
        """For each layer, an orthonormal basis of what the slopes of units in doubt put into its gradient.

        A slope that is wrong adds a multiple of one vector to the gradient rows: what the unit reads, at the unit's
        own weights, and likewise in the layers before it. The rest of the rows does not feel it.
        """
        bases: list[Tensor] = [grad.new_zeros(0, grad.numel()) for grad in self.grads]
        if doubtful is None or not any(bool(mask.any()) for mask in doubtful):
            return bases
        moves = self.known.k.new_zeros(0, *self.known.k.shape[1:])
        for depth in reversed(range(len(self.layers) - 1)):
            layer, mask = self.layers[depth], doubtful[depth].flatten().nonzero().flatten()
            own = moves.new_zeros(len(mask), layer.weight_rows)
            own[torch.arange(len(mask), device=mask.device), mask] = 1.0
            moves = torch.cat(
                [self._k_before(depth, moves) * point.slopes[depth], own.reshape(-1, layer.outputs, layer.positions)]
            )
            if not len(moves):
                continue
            effects = layer.grad_weight(point.inputs[depth].expand(len(moves), -1, -1), moves).flatten(1)
            bases[depth] = span(effects)
        return bases

    def _with_gradient_rows(self, depth: int, gram: Tensor, k: Tensor) -> Tensor:
        """Add a layer's K'K, scaled so that both kinds of rows weigh the same."""
        layer = self.layers[depth]
        kernel = layer.kernel_matrix(k)[0]
        blocks = (kernel.mT @ kernel).repeat_interleave(layer.channels // layer.groups, 0)
        size = float(blocks.diagonal(dim1=1, dim2=2).sum())
        self._scale[depth] = (float(gram.diagonal().sum()) or size) / size if size > 0 else 0.0
        gram = gram.clone()
        diagonal = gram.view(layer.channels, layer.pixels, layer.channels, layer.pixels).diagonal(dim1=0, dim2=2)
        diagonal += (self._scale[depth] * blocks).movedim(0, -1)
        away = self._away[depth]
        if len(away):
            pulled = layer.grad_input(k.expand(len(away), -1, -1), away.reshape(-1, *layer.weight.shape)).flatten(1)
            gram -= self._scale[depth] * (pulled.mT @ pulled)
        return gram

    def misfit(self, point: Point) -> float:
        """Relative distance between these layers' gradients at a network input and the given ones."""
        wrong, size = 0.0, 0.0
        for layer, x, k, grad in zip(self.layers, point.inputs, self.ks(point.slopes), self.grads, strict=True):
            wrong += float((layer.grad_weight(x, k) - grad).square().sum())
            size += float(grad.square().sum())
        return float((wrong / size) ** 0.5)

    def nearest_to_kink(self, point: Point, count: int) -> list[Tensor]:
        """Masks of the units, over all layers in front of the last, that are nearest to their kink.

        Units that read next to nothing, as on an empty background, stay out: they are all near their kinks, and have
        hardly any effect on whichever side they are.
        """
        kinked = [layer.activation.kinked for layer in self.layers[:-1]]
        return nearest(point.outputs, self._sizes(point), kinked, count)

    def changed(self, before: Point, after: Point) -> int:
        """How many slopes are other than they were by more than half of the steepest, units that read something."""
        return turned(before.slopes, after.slopes, self._sizes(after))

    def _sizes(self, point: Point) -> list[Float[Tensor, "1 o p"]]:
        """The norm of what each unit in front of the last layer reads."""
        return [layer.read(x) for layer, x in zip(self.layers[:-1], point.inputs, strict=False)]


def span(effects: Float[Tensor, "m w"]) -> Float[Tensor, "r w"]:
    """An orthonormal basis of what units in doubt may do to a gradient, in rows."""
    _, sigma, basis = torch.linalg.svd(effects, full_matrices=False)
    found: Tensor = basis[sigma > RANK * sigma.amax().clamp(min=torch.finfo(sigma.dtype).tiny)]
    return found


def nearest(zs: Sequence[Tensor], sizes: Sequence[Tensor], kinked: Sequence[bool], count: int) -> list[Tensor]:
    """Masks of the units, over all activations, that are nearest to their kink, measured by the spread of their layer.

    Args:
        zs: before each activation.
        sizes: of what each unit reads; those that read next to nothing stay out.
    """
    distances = [
        torch.where((size > READS * size.max()) & bent, z.abs() / z.square().mean().sqrt(), torch.inf).flatten()
        for z, size, bent in zip(zs, sizes, kinked, strict=True)
    ]
    if not distances:
        return []
    together = torch.cat(distances)
    count = min(count, int(together.isfinite().sum()))
    chosen = torch.zeros_like(together, dtype=torch.bool)
    chosen[together.topk(count, largest=False).indices] = True
    return list(torch.split(chosen, [len(each) for each in distances]))


def turned(before: Sequence[Tensor], after: Sequence[Tensor], sizes: Sequence[Tensor]) -> int:
    """How many slopes are other than they were by more than half of the steepest, of units that read something."""
    return sum(
        int((((a - b).abs() > 0.5 * b.abs().max()) & (size > READS * size.max())).sum())
        for a, b, size in zip(before, after, sizes, strict=True)
    )


def _order(before: Layer, after: Layer) -> Int[Tensor, " m"]:
    """Index into the next layer's flattened input for each of this layer's flattened outputs."""
    index = torch.arange(after.unknowns, device=before.weight.device).reshape(1, after.channels, after.pixels)
    return before.pack_output(after.unpack_input(index)).flatten()
