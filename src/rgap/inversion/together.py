"""A block's input from all its constraints together, without a matrix.

With the output out = x + F(x) of a residual block there are as many weight constraints as unknowns, and the gradient
rows of the layers inside come on top. They are linear but for the activations: linearise at the present input, solve
the least-squares problem by products alone, repeat.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, lsmr
from torch import Tensor

from rgap.inversion.report import LayerReport
from rgap.inversion.rounding import rounding
from rgap.inversion.state import Observation, State
from rgap.linalg.cgls import cgls
from rgap.nn.layers import Layer
from rgap.nn.network import Network
from rgap.nn.ops import Linear

STEPS, INNER = 40, 400
"""Linearisations, and products in each, at the most."""
CLOSE = 1e-10
"""Of the normal equations, relative; the next linearisation makes up for the rest."""
AGREES = 1e-6
"""Relative misfit of outputs and gradients above which what was found is not the input."""
HALVINGS = 6
COMES_BACK = 1e-4
"""A drawn move that comes back from its rows to this part of itself has no part that they do not see."""
OPEN = 1e8
"""A condition above which directions of the input count as open."""


@dataclass(frozen=True)
class Found:
    """A block's input."""

    x: Tensor
    """(1, *shape)"""
    error: Tensor
    reports: dict[int, LayerReport]
    """By the place of the layer in the block."""


class Constraints:
    """The rows of a block on its input: weight rows of the output, and the gradient rows of its layers."""

    def __init__(self, network: Network, observed: Observation, state: State, with_gradients: bool):
        self.network, self.state = network, state
        # All rows are stated in units of their noise, which are those of the output here.
        self.noise = max(float(state.rms_std[0]), observed.eps * float(state.value.square().mean().sqrt()))
        self.weight = torch.ones_like(state.value) if state.row_weight is None else state.row_weight
        self.inner = [
            (place, node.op.layer, node.reads[0])
            for place, node in enumerate(network.nodes)
            if isinstance(node.op, Linear) and node.op.has_gradient and with_gradients
        ]
        gradients = observed.gradients
        self.grads = {place: layer.pack_weight(gradients[layer.weight_name]) for place, layer, _ in self.inner}
        noises = {at: float(rounding(grad, observed.eps).square().mean().sqrt()) for at, grad in self.grads.items()}
        self._units = {at: self.noise / noise if noise > 0 else 0.0 for at, noise in noises.items()}

    def at(self, x: Tensor) -> None:
        """Linearise."""
        self.values = self.network.forward(x)
        self.slopes = self.network.slopes(self.values)
        end = len(self.values) - 1
        self.ks = self.network.vjp(self.values, self.slopes, {end: self.state.cotangent})
        self.scales = {at: unit if bool(self.k(at).any()) else 0.0 for at, unit in self._units.items()}

    def output_miss(self) -> Tensor:
        return (self.state.value - self.values[-1]) * self.weight

    def gradient_miss(self, place: int, layer: Layer, value: int) -> Tensor:
        return self.grads[place] - layer.grad_weight(layer.pack_input(self.values[value]), self.k(place))

    def misses(self) -> Tensor:
        """What the present input leaves of all right-hand sides."""
        inner = [self.scales[each[0]] * self.gradient_miss(*each).flatten() for each in self.inner]
        return torch.cat([self.output_miss().flatten(), *inner])

    def misfit(self) -> float:
        """Relative, the worst of output and gradients."""
        inner = [_relative(self.gradient_miss(*each), self.grads[each[0]]) for each in self.inner]
        return max([_relative(self.output_miss(), self.state.value * self.weight), *inner])

    def k(self, place: int) -> Tensor:
        k = self.ks[place + 1]
        layer = self.network.nodes[place].op
        assert isinstance(layer, Linear)
        return layer.layer.pack_output(torch.zeros_like(self.values[place + 1]) if k is None else k)

    def forward(self, move: Tensor) -> Tensor:
        moves = self.network.jvp(self.values, self.slopes, move)
        parts = [(moves[-1] * self.weight).flatten()]
        for place, layer, value in self.inner:
            found = layer.grad_weight(layer.pack_input(moves[value]), self.k(place))
            parts.append(self.scales[place] * found.flatten())
        return torch.cat(parts)

    def adjoint(self, rows: Tensor) -> Tensor:
        sizes = [self.values[-1].numel()] + [layer.weight.numel() for _, layer, _ in self.inner]
        first, *rest = torch.split(rows, sizes)
        starts = {len(self.values) - 1: first.reshape(self.values[-1].shape) * self.weight}
        for (place, layer, value), part in zip(self.inner, rest, strict=True):
            pulled = layer.grad_input(self.k(place), self.scales[place] * part.reshape(1, *layer.weight.shape))
            pulled = layer.unpack_input(pulled).reshape(self.values[value].shape)
            starts[value] = starts[value] + pulled if value in starts else pulled
        found = self.network.vjp(self.values, self.slopes, starts)[0]
        return torch.zeros_like(self.values[0]) if found is None else found


def solve(network: Network, observed: Observation, state: State, start: Tensor) -> Found | str:
    """The input at which output and gradients agree, or why none was found.

    Args:
        start: (1, *shape), where to begin.
    """
    whole = Constraints(network, observed, state, True)
    whole.at(start)
    misfit, x, agrees = whole.misfit(), start, max(AGREES, 100 * observed.eps)
    for rows in (Constraints(network, observed, state, False), whole):
        if misfit > agrees:
            x = _descend(rows, x)
            whole.at(x)
            misfit = whole.misfit()
    if misfit > agrees:
        return f"its input was not found from all its constraints together, misfit {misfit:.1e}"
    return refine(whole, x)


def refine(whole: Constraints, x: Tensor) -> Found | str:
    """The input near by that satisfies all constraints best, each as well as its noise allows."""
    x = _descend(whole, x)
    condition, error = _determined(whole)
    if condition > OPEN:
        return f"its constraints leave directions of its input open, condition {condition:.1e}"
    return Found(x, x.new_tensor(error), _reports(whole, condition, error))


def _descend(rows: Constraints, x: Tensor) -> Tensor:
    rows.at(x)
    size = float(rows.misses().norm())
    for _ in range(STEPS):
        move = cgls(rows.forward, rows.adjoint, rows.misses(), INNER, CLOSE)
        for halving in range(HALVINGS):
            new = x + move * 0.5**halving
            rows.at(new)
            there = float(rows.misses().norm())
            if there < size:
                break
        else:
            break
        done = there > 0.5 * size and (there > 0.99 * size or float(move.norm()) < 1e-9 * float(x.norm()))
        x, size = new, there
        if done:
            break
    rows.at(x)
    return x


def _operator(rows: Constraints) -> LinearOperator:
    x, count = rows.values[0], len(rows.misses())

    def forward(v: NDArray[np.float64]) -> NDArray[np.float64]:
        return rows.forward(torch.from_numpy(np.ascontiguousarray(v.reshape(-1))).to(x).reshape(x.shape)).cpu().numpy()

    def adjoint(u: NDArray[np.float64]) -> NDArray[np.float64]:
        return rows.adjoint(torch.from_numpy(np.ascontiguousarray(u.reshape(-1))).to(x)).flatten().cpu().numpy()

    return LinearOperator((count, x.numel()), matvec=forward, rmatvec=adjoint, dtype=np.float64)


def _determined(rows: Constraints) -> tuple[float, float]:
    """The condition, and how far one draw of the noise of all rows moves the input (root mean square)."""
    here = rows.misses()
    generator = torch.Generator(device=here.device).manual_seed(0)
    noise = rows.noise * torch.randn(here.shape, generator=generator, dtype=here.dtype, device=here.device)
    noise[: rows.weight.numel()] *= rows.weight.flatten()
    right = noise.cpu().numpy()
    found = lsmr(_operator(rows), right, maxiter=INNER, atol=1e-10, btol=1e-10, conlim=1e12)
    # The condition is that of the directions which the rows reach. Whether those are all shows in a move that is drawn:
    # it comes back from what the rows say of it, or it does not.
    move = torch.randn(rows.values[0].shape, generator=generator, dtype=here.dtype, device=here.device)
    said = lsmr(
        _operator(rows), rows.forward(move).cpu().numpy(), maxiter=4 * INNER, atol=1e-12, btol=1e-12, conlim=1e14
    )
    back = torch.from_numpy(said[0]).to(move).reshape(move.shape)
    if float((back - move).norm()) > COMES_BACK * float(move.norm()):
        return float("inf"), float("inf")
    return max(float(found[6]), float(said[6])), float(np.sqrt(np.mean(found[0] ** 2)))


def _reports(rows: Constraints, condition: float, error: float) -> dict[int, LayerReport]:
    """One for each layer, by its place; what is said of the constraints is that of all of them together."""
    reports = {}
    for place, layer, value in rows.inner:
        reports[place] = LayerReport(
            name=layer.name,
            unknowns=layer.unknowns,
            weight_rows=layer.weight_rows,
            gradient_rows=layer.gradient_rows,
            rank=layer.unknowns,
            condition=condition,
            weight_residual=_relative(rows.output_miss(), rows.state.value * rows.weight),
            gradient_residual=_relative(rows.gradient_miss(place, layer, value), rows.grads[place]),
            error=error,
            dead_units=int((rows.k(place)[0] == 0).all(-1).sum()),
            method="together",
        )
    return reports


def _relative(miss: Tensor, given: Tensor) -> float:
    size = float(given.norm())
    return float(miss.norm()) / size if size else float(miss.norm())
