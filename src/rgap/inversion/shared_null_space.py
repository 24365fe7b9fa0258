"""A layer that leaves a part of several samples' inputs open, and the layer before it, which tells it of all at once.

What the weights leave open of each sample's input are coordinates c_i in one null space N, the same for all samples:

    x_i = W^+ (z_i - b) + N c_i

The gradient rows, which the samples share, and each one's virtual constraints (R-GAP, Section 4; Q as in
`rgap.inversion.null_space`, the directions that the layer before does not reach) are rows in these alone:

    sum over i of K_i N c_i = grad W - sum over i of K_i W^+ (z_i - b)
    Q' (f^-1(x_i) - b) = 0                                               for each sample i

The cotangents K_i are known, so that no unit's side of its kink makes a row jump, and Gauss and Newton need no prior.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.null_space import LARGEST, SETTLED, STUCK, before_it, unreached_by
from rgap.inversion.report import LayerReport
from rgap.inversion.rounding import rounding
from rgap.inversion.sides import sides_by_weights
from rgap.inversion.state import Observation, State
from rgap.linalg import deadline, psd
from rgap.nn.activation import Activation
from rgap.nn.activations import ReLU
from rgap.nn.layers import Layer
from rgap.nn.network import Network
from rgap.nn.ops import Linear

TOGETHER = 10_000
"""Open directions of all samples above which no matrix of them is formed."""
INDEPENDENT = 1e-6
"""Weights with a smaller diagonal in their triangular factor, relatively, are not told apart."""
STEPS, HALVINGS = 25, 6
"""Of Gauss and Newton, and of one of them, at the most."""
MET = 1e-2
"""What virtual constraints may miss in the end, relative to what the layer before put out: steps that lead nowhere
leave several times as much."""
HEAVY = 1e4
"""How much larger gradient rows may be made than virtual constraints: squares of that still fit a factor."""
CONDITION = 1e7
"""Of all rows together, above which they determine nothing: some weigh up to `HEAVY` times as much as others."""


def virtual_rows(network: Network, node: int) -> int:
    """Of each sample, the constraints that the layer directly before one adds to its own, by count; 0 if none do."""
    found = before_it(network, node)
    if found is None or found[0].groups > 1 or isinstance(found[1], ReLU):
        return 0
    return max(0, found[0].weight_rows - found[0].unknowns)


def may_be_told(network: Network, node: int, samples: int) -> bool:
    """Whether a layer leaves something open by count, and the layer before it tells enough, by count as well."""
    op, virtual = network.nodes[node].op, virtual_rows(network, node)
    if not isinstance(op, Linear) or virtual == 0:
        return False
    opened = samples * (op.layer.unknowns - op.layer.weight_rows)
    if op.layer.unknowns > LARGEST or not 0 < opened <= TOGETHER:
        return False
    return opened <= op.layer.spare_rows + samples * virtual


def told_together(network: Network, node: int, state: State, observed: Observation) -> tuple[State, LayerReport] | None:
    """What is known of a layer's input for each of several samples; None where the layer before does not tell it.

    Args:
        node: of the layer, of which `may_be_told` holds.
        state: of its output, (b, *shape).
        observed: of one update, the sum over the samples.
    """
    op, found = network.nodes[node].op, before_it(network, node)
    if found is None or not isinstance(op, Linear) or state.row_weight is not None:
        return None
    before, activation = found
    layer, unreached = op.layer, unreached_by(before, before.weight_rows)
    opened = None if unreached is None else Opened.by_weights(layer)
    if opened is None or unreached is None:
        return None
    grad = layer.pack_weight(observed.gradients[layer.weight_name])
    state = sides_by_weights(layer, state, grad[0], observed.eps)
    return _Together(before, layer, activation, opened, unreached, state, grad[0, 0], observed.eps).solve()


@dataclass(frozen=True, eq=False)
class Opened:
    """A layer's weight rows on one sample, factored: W' = R U."""

    reached: Float[Tensor, "u r"]
    """R, an orthonormal basis of what they tell."""
    upper: Float[Tensor, "r r"]
    """U."""
    null: Float[Tensor, "u f"]
    """N."""

    @staticmethod
    def by_weights(layer: Layer) -> Opened | None:
        """None where the weight rows are not independent."""
        units = torch.eye(layer.unknowns, dtype=layer.weight.dtype, device=layer.weight.device)
        units = units.reshape(-1, layer.channels, layer.pixels)
        matrix = torch.cat([layer.output(part).flatten(1) for part in torch.split(units, 256)])
        basis, upper = torch.linalg.qr(matrix, mode="complete")
        rows = matrix.shape[1]
        diagonal = upper.diagonal().abs()
        if float(diagonal.min()) < INDEPENDENT * float(diagonal.max()):
            return None
        return Opened(basis[:, :rows], upper[:rows], basis[:, rows:].contiguous())

    def told(self, z: Float[Tensor, "b r"]) -> Float[Tensor, "b u"]:
        """W^+ z."""
        found: Tensor = torch.linalg.solve_triangular(self.upper.mT, z.mT, upper=False).mT @ self.reached.mT
        return found


@dataclass(frozen=True, eq=False)
class _Linear:
    """All rows at some c, linearised and factored."""

    inputs: Float[Tensor, "b u"]
    virtual: Float[Tensor, "b q"]
    """What the virtual constraints miss."""
    shared: Float[Tensor, " w"]
    """What the gradient rows miss."""
    blocks: list[Tensor]
    """How the virtual constraints of each sample move with its c, (q, f)."""
    slope: Float[Tensor, "b u"]
    weight: float
    """Of the gradient rows."""
    gram: Float[Tensor, "bf bf"]
    """J'J of all rows."""

    @cached_property
    def lower(self) -> Float[Tensor, "bf bf"] | None:
        """Its factor; None if the rows do not determine c."""
        lower, info = torch.linalg.cholesky_ex(self.gram)
        return lower if int(info) == 0 else None

    @property
    def missed(self) -> float:
        return _size(self.weight, self.shared, self.virtual)


@dataclass(frozen=True, eq=False)
class _Together:
    """The rows in the open coordinates c of all samples, (b, f)."""

    before: Layer
    layer: Layer
    activation: Activation
    opened: Opened
    unreached: Float[Tensor, "u q"]
    state: State
    grad: Float[Tensor, "o i"]
    eps: float

    @cached_property
    def k(self) -> Float[Tensor, "b o p"]:
        return self.layer.pack_output(self.state.cotangent)

    @cached_property
    def told(self) -> Float[Tensor, "b u"]:
        """What the weight rows tell of each sample."""
        return self.opened.told((self.layer.pack_output(self.state.value) - self.layer.offset).flatten(1))

    @cached_property
    def noise(self) -> tuple[Float[Tensor, "b u"], Float[Tensor, " w"]]:
        """One draw of the noise: in what the weight rows tell, and in what is left of the gradient rows."""
        generator = torch.Generator(device=self.grad.device).manual_seed(0)

        def draw(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)

        value, std = self.state.value, self.state.std
        told = self.opened.told(self.layer.pack_output(draw(value) * std.expand(value.shape)).flatten(1))
        return told, self._left(draw(self.grad) * rounding(self.grad, self.eps), told)

    @cached_property
    def _beside(self) -> Float[Tensor, "i m"]:
        """Directions of an output's gradient that the weight rows of all samples do not tell already."""
        weight = self.layer.weight[0, : self.layer.weight.shape[-1]]
        return psd.complement(weight.mT)

    @cached_property
    def rows(self) -> Float[Tensor, "w bf"]:
        """What the gradient rows make of c."""
        null = self.opened.null.mT.reshape(-1, self.layer.channels, self.layer.pixels)
        patches = self._beside.mT @ self.layer.patches(null)[:, 0]
        return torch.cat([(k @ patches.mT).flatten(1) for k in self.k]).mT.contiguous()

    @cached_property
    def square(self) -> Float[Tensor, "bf bf"]:
        return self.rows.mT @ self.rows

    def _left(self, grad: Float[Tensor, "o i"], x: Float[Tensor, "b u"]) -> Float[Tensor, " w"]:
        """What inputs leave of a gradient, in the gradient rows."""
        made = self.layer.grad_weight(x.reshape(-1, self.layer.channels, self.layer.pixels), self.k)
        return ((grad - made[:, 0].sum(0)) @ self._beside).flatten()

    def start(self) -> Float[Tensor, "b f"]:
        """The shortest c that the gradient rows allow."""
        size = float(self.square.diagonal().mean())
        gram = self.square.clone()
        gram.diagonal().add_(size / HEAVY**2)
        back = self.rows.mT @ self._left(self.grad, self.told)
        return psd.cholesky_solve(back[:, None], torch.linalg.cholesky(gram)).reshape(len(self.k), -1)

    def misses(self, c: Float[Tensor, "b f"]) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """The inputs, what the virtual constraints and the gradient rows miss, and the slopes; None where a value has
        no input."""
        x = self.told + c @ self.opened.null.mT
        packed = self.layer.unpack_input(x.reshape(-1, self.layer.channels, self.layer.pixels))
        inverse = self.activation.invert(packed, self.state.rms_std)
        if inverse.weight is not None and not bool((inverse.weight > 0).all()):
            return None
        z = (self.before.pack_output(inverse.z) - self.before.offset).flatten(1)
        slope = self.before.pack_output(inverse.slope).flatten(1)
        return x, z @ self.unreached, self._left(self.grad, x), slope

    def linearise(self, at: tuple[Tensor, Tensor, Tensor, Tensor]) -> _Linear:
        x, virtual, shared, slope = at
        blocks = [(self.unreached.mT / each) @ self.opened.null for each in slope]
        told, left = self.noise
        # Until the slopes are right that is what the virtual constraints miss.
        noise = (told / slope @ self.unreached).square().mean().maximum(virtual.square().mean()).sqrt()
        size = sum(float(each.square().sum()) for each in blocks) / len(self.square)
        largest = HEAVY * (size / float(self.square.diagonal().mean())) ** 0.5
        weight = min(float(noise / left.square().mean().sqrt()), largest)
        gram = weight**2 * self.square
        for block, own in zip(blocks, _diagonal_blocks(gram, len(blocks)), strict=True):
            own += block.mT @ block
        return _Linear(x, virtual, shared, blocks, slope, weight, gram)

    def least(self, at: _Linear, shared: Float[Tensor, " w"], virtual: Float[Tensor, "b q"]) -> Float[Tensor, "b f"]:
        """The c that misses least of both kinds of rows."""
        own = torch.cat([block.mT @ row for block, row in zip(at.blocks, virtual, strict=True)])
        back = at.weight**2 * (self.rows.mT @ shared) - own
        assert at.lower is not None
        return psd.cholesky_solve(back[:, None], at.lower).reshape(len(virtual), -1)

    def solve(self) -> tuple[State, LayerReport] | None:
        """Gauss and Newton's steps, until one changes little."""
        c = self.start()
        now = self.misses(c)
        at = None if now is None else self.linearise(now)
        for _ in range(STEPS):
            deadline.check()
            if at is None or at.lower is None:
                return None
            step = self.least(at, at.shared, at.virtual)
            for halving in range(HALVINGS):
                now = self.misses(c + step * 0.5**halving)
                if now is not None and _size(at.weight, now[2], now[1]) < at.missed:
                    break
            else:
                break  # there is nothing better
            left = _size(at.weight, now[2], now[1])
            enough = left > (STUCK if halving else SETTLED) * at.missed
            c, at = c + step * 0.5**halving, self.linearise(now)
            if enough:
                break
        if at is None or not float(at.virtual.norm()) < MET * float((at.inputs / at.slope).norm()):
            return None
        return self._answer(at)

    def _answer(self, at: _Linear) -> tuple[State, LayerReport] | None:
        """None where the rows do not determine the inputs."""
        layer, state, factor = self.layer, self.state, psd.factor(at.gram, 1 / CONDITION)
        if factor.rank < len(at.gram) or at.lower is None:
            return None
        told, left = self.noise
        error = told + self.least(at, left, told / at.slope @ self.unreached) @ self.opened.null.mT
        value = layer.unpack_input(at.inputs.reshape(-1, layer.channels, layer.pixels))
        std = error.square().mean().sqrt()
        report = LayerReport(
            name=layer.name,
            unknowns=at.inputs.numel(),
            weight_rows=state.value.numel(),
            gradient_rows=layer.gradient_rows,
            rank=at.inputs.numel(),
            condition=factor.condition,
            weight_residual=0.0,
            gradient_residual=float(at.shared.norm() / self.grad.norm()),
            error=float(std),
            dead_units=int((self.k == 0).all(-1).all(0).sum()),
            method="virtual rows",
        )
        return State(value, layer.unpack_input(layer.grad_input(self.k)), None, std.expand(value.shape)), report


def _diagonal_blocks(matrix: Float[Tensor, "n n"], count: int) -> list[Tensor]:
    """Views of the square blocks on the diagonal."""
    size = len(matrix) // count
    return [matrix[at : at + size, at : at + size] for at in range(0, len(matrix), size)]


def _size(weight: float, shared: Tensor, virtual: Tensor) -> float:
    """The root of the sum of squares of what is missed."""
    return float((weight**2 * shared.square().sum() + virtual.square().sum()).sqrt())
