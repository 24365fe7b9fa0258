"""A layer that leaves a few dimensions of its input open, and the layer before it, which tells them.

What layer i leaves open of its input x_i = f(z_(i-1)) are the coordinates c in its null space N. But z_(i-1) - b is
W_(i-1) times something. With Q an orthonormal basis of directions that W_(i-1) does not reach,

    Q' (f^-1(x_i + N c) - b_(i-1)) = 0                              virtual constraints (R-GAP, Section 4),

one for each column of Q: in the few unknowns c alone, and nothing needs to be taken for granted of the input. From
there the recursion goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.history import History, Open, Paths
from rgap.inversion.state import State
from rgap.linalg import deadline, psd
from rgap.nn.activation import Activation
from rgap.nn.layers import Layer
from rgap.nn.network import Network
from rgap.nn.non_monotone import NonMonotone
from rgap.nn.ops import Elementwise, Linear

LARGEST = 4096
"""Unknowns of the layer before above which its matrix is not factored, and dimensions that may be open."""
SPARE = 64
"""Virtual constraints beyond twice the unknowns are left out: they would cost more than they tell."""
STEPS, HALVINGS = 40, 8
"""Of Gauss and Newton, and of one of them, at the most."""
SETTLED, STUCK = 0.9, 0.999
"""A whole step, or one that was halved, that leaves more than this part of what was missed is the last."""
SLACK = 30.0
"""What is missed in the end beyond so many times what the layer's error explains is no rounding."""
CONDITION = 1e4
"""Of virtual constraints, above which they determine nothing."""
_unreached: WeakKeyDictionary[Layer, Tensor] = WeakKeyDictionary()


def complete(network: Network, node: int, paths: Paths) -> Paths:
    """The paths behind a layer; where it left something of a candidate open and the layer before tells it, complete."""
    open_ = [s for s, history in enumerate(paths.history) if history.open is not None]
    states, histories = [paths.state.one(s) for s in range(len(paths.history))], list(paths.history)
    for s in open_:
        found = _told(network, node, histories[s], states[s])
        if found is not None:
            states[s], steps, condition = found
            histories[s] = histories[s].completed(steps, condition)
    return replace(paths, state=State.concatenate(states), history=tuple(histories)) if open_ else paths


def _told(network: Network, node: int, history: History, state: State) -> tuple[State, int, float] | None:
    """What is known of the input of a layer that leaves a part of it open, with the steps and the condition."""
    op, ahead = network.nodes[node].op, before_it(network, node)
    if ahead is None or history.open is None or not isinstance(op, Linear):
        return None
    before, activation = ahead
    null = history.open.system.null(history.open.s)
    if null is None or null.shape[1] > LARGEST:
        return None
    unreached = unreached_by(before, 2 * null.shape[1] + SPARE)
    if unreached is None or unreached.shape[1] < null.shape[1]:
        return None
    x = op.layer.pack_input(state.value)
    rows = _VirtualRows(before, op.layer, activation, x, history.open, null, unreached)
    found = rows.solve()
    if found is None:
        return None
    value, error, condition, steps = found
    # All values follow from as few as the layer before reads: their errors are not averaged out.
    times = max(1.0, before.weight_rows / before.unknowns) ** 0.5
    std = (error.square().mean().sqrt() * times).reshape(1, *[1] * (value.dim() - 1))
    return replace(state, value=value, std=std.expand(value.shape)), steps, condition


def before_it(network: Network, node: int) -> tuple[Layer, Activation] | None:
    """The layer before one, and the activation between them; None where something else stands before it."""
    if node < 2:
        return None
    op, between, before = (network.nodes[at].op for at in (node, node - 1, node - 2))
    in_line = all(any(part.nodes == range(at, at + 1) for part in network.segments) for at in (node, node - 1))
    if not (in_line and isinstance(op, Linear) and isinstance(between, Elementwise) and isinstance(before, Linear)):
        return None
    if isinstance(between.activation, NonMonotone):
        return None
    writes, reads = (
        (before.layer.output_shape, before.layer.channels_last),
        (op.layer.input_shape, op.layer.channels_last),
    )
    if op.layer.groups > 1 or writes != reads:
        return None
    return before.layer, between.activation


@dataclass(frozen=True)
class _VirtualRows:
    """Q' (f^-1(x + N c) - b) = 0, of two layers with an activation between them."""

    before: Layer
    layer: Layer
    activation: Activation
    x: Float[Tensor, "1 c n"]
    """The layer's input, as far as the layer tells it."""
    open: Open
    null: Float[Tensor, "u free"]
    unreached: Float[Tensor, "z q"]

    def value(self, c: Float[Tensor, " free"]) -> Float[Tensor, "1 ..."]:
        return self.layer.unpack_input(self.x + (self.null @ c).reshape(self.x.shape))

    def misses(self, c: Float[Tensor, " free"]) -> tuple[Float[Tensor, " q"], Float[Tensor, " u"]] | None:
        """What c leaves of the rows, and the derivative of f^-1 there; None where a value has no input."""
        x = self.value(c)
        inverse = self.activation.invert(x, self.open.error.square().mean().sqrt().reshape(1))
        if inverse.weight is not None and not bool((inverse.weight > 0).all()):
            return None
        z = (self.before.pack_output(inverse.z) - self.before.offset).flatten()
        return self.unreached.mT @ z, 1 / self.layer.pack_input(inverse.slope).flatten()

    def solve(self) -> tuple[Tensor, Tensor, float, int] | None:
        """The layer's input, a draw of its error, the condition and the number of steps; None if the rows do not tell
        it."""
        c = self.x.new_zeros(self.null.shape[1])
        now = self.misses(c)
        for step in range(STEPS):
            deadline.check()
            if now is None:
                return None
            missed, steep = now
            pulled = self.unreached.mT * steep
            if not bool(pulled.isfinite().all()):
                return None
            q, r = torch.linalg.qr(pulled @ self.null)
            condition = psd.triangular_condition(r.mT)
            if not condition < CONDITION:
                return None
            move = torch.linalg.solve_triangular(r, (q.mT @ missed)[:, None], upper=True)[:, 0]
            size = float(missed.norm())
            for halving in range(HALVINGS):
                after = c - move * 0.5**halving
                now = self.misses(after)
                if now is not None and float(now[0].norm()) < size:
                    break
            if now is None or float(now[0].norm()) > (STUCK if halving else SETTLED) * size:
                noise = pulled @ self.open.error.flatten()
                if size > SLACK * float(noise.norm()):
                    return None
                move, error = self._least(pulled, torch.stack([missed, noise], 1)).unbind(1)
                x, error = self.value(c), error + self.open.error.flatten()
                return x + self.layer.unpack_input(move.reshape(self.x.shape)), error, condition, step + 1
            c = after
        return None

    def _least(self, pulled: Float[Tensor, "q u"], missed: Float[Tensor, "q m"]) -> Float[Tensor, "u m"]:
        """What the input has to move by for the rows to be met, not along its open directions alone: what is hardly
        told moves before what is told well (generalised least squares, the layer's own errors as the covariance)."""
        shape = self.x.shape[1:]
        spread = self.open.system.covariance(self.open.s, pulled.mT.reshape(*shape, -1)).flatten(0, 1)  # C A'
        opened = pulled @ self.null
        basis = psd.complement(opened)  # of rows that c does not move
        core = pulled @ spread  # A C A'
        # There may be more rows than the layer tells directions: then some of them repeat others.
        inverse = torch.linalg.pinv(basis.mT @ core @ basis, rtol=1e-12, hermitian=True)
        force = -basis @ (inverse @ (basis.mT @ missed))
        c = torch.linalg.lstsq(opened, -(missed + core @ force)).solution
        moved: Tensor = self.null @ c + spread @ force
        return moved


def unreached_by(layer: Layer, most: int) -> Float[Tensor, "z q"] | None:
    """An orthonormal basis of directions that a layer's weights do not reach, so many at the most; None if they reach
    all, or are not independent themselves."""
    if layer.groups > 1 or layer.unknowns > LARGEST or layer.weight_rows <= layer.unknowns:
        return None
    known = _unreached.get(layer)
    count = min(most, layer.weight_rows - layer.unknowns)
    if known is not None and known.shape[1] >= count:
        return known[:, :count]
    lower, info = torch.linalg.cholesky_ex(layer.weight_gram()[0, 0])
    if int(info) != 0:
        return None
    generator = torch.Generator(device=lower.device).manual_seed(0)
    shape = (count, layer.outputs, layer.positions)
    drawn = torch.randn(shape, generator=generator, dtype=lower.dtype, device=lower.device)
    for _ in range(2):  # once more for what rounding left
        seen = psd.cholesky_solve(layer.grad_input(drawn).flatten(1).mT, lower)
        drawn = drawn - layer.output(seen.mT.reshape(count, layer.channels, layer.pixels))
        drawn = torch.linalg.qr(drawn.flatten(1).mT)[0].mT.reshape(shape)
    found = drawn.flatten(1).mT
    _unreached[layer] = found
    return found
