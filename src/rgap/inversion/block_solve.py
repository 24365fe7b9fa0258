"""A block's input from all its constraints jointly.

With the output out = x + F(x) of a residual block there are as many weight constraints as unknowns, and the gradient
rows of the layers inside come on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.inversion.common_mean import WithMean
from rgap.inversion.gauss_newton import Continuation, determine, gauss_newton, settle
from rgap.inversion.jacobian import Jacobian
from rgap.inversion.report import BLOCK, LayerReport
from rgap.inversion.state import Cause, Observation, State, Stop
from rgap.inversion.system import ConstraintSystem, Linearisation
from rgap.linalg.least_squares import Determined, Iterative
from rgap.nn.network import Network
from rgap.nn.ops import Norm

SOLVER = Iterative(rtol=1e-4, max_steps=400)
SCHEDULE = Continuation(patience=4, doubt=(4,))
AGREES = 1e-6
"""Relative distance of outputs and gradients above which what was found is not the input."""
SIZE = 1e-3
"""A relative error of its size from which on an input counts as open."""
OPEN = 1e8
"""A condition above which directions of the input count as open."""


@dataclass(frozen=True)
class BlockInput:
    """A block's input."""

    x: Tensor
    """(b, *shape)"""
    cotangent: Tensor
    """Of the same shape."""
    std: float
    reports: dict[int, LayerReport]
    """By the node of the layer in the block."""


def solve_jointly(
    network: Network, observed: Observation, output: State, start: Tensor, but_mean: bool = False
) -> BlockInput | Stop:
    """The input at which output and gradients agree, each as well as its noise allows; or why none was found.

    Args:
        observed: of one update.
        start: (b, *shape), where to begin.
        but_mean: whether the samples' mean may stay open, since something else tells it.
    """
    gradients = {name: grad[0] for name, grad in observed.gradients.items()}
    normed = any(isinstance(node.op, Norm) for node in network.nodes)
    system = ConstraintSystem(network, output, gradients, observed.eps, coupled=normed)
    agrees = max(AGREES, 100 * system.eps)
    found = gauss_newton(system, SOLVER, None, agrees, system.linearise(start), SCHEDULE)
    if found.distance > agrees:
        what = f"its input was not found from all its constraints jointly, misfit {found.distance:.1e}"
        return Stop(network.nodes[-1].op, Cause.NOT_FOUND, what)
    generator = torch.Generator(device=found.x.device).manual_seed(0)
    at = system.linearise(found.x)
    if but_mean:
        operator = WithMean(Jacobian(system, at, {}))
        sure = SOLVER.determine(operator, operator.weighted(system.noise(generator)))
    else:
        sure = determine(system, at, SOLVER, generator)
    if sure.rank < system.unknowns or sure.condition > OPEN:
        free = f"{system.unknowns - sure.rank} of {system.unknowns} directions"
        what = f"its constraints leave about {free} of its input open, condition {sure.condition:.1e}"
        return Stop(network.nodes[-1].op, Cause.OPEN, what)
    at, std = (at, sure.std) if but_mean else settle(system, at, SOLVER, sure)
    if normed:
        size = size_error(system, at, generator)
        if size > SIZE:
            what = f"the norm keeps the size of what is read to one part in {1 / size:.0f}"
            return Stop(network.nodes[-1].op, Cause.OPEN, what)
        std = math.hypot(std, size * float(at.x.square().mean().sqrt()))
    cotangent = torch.zeros_like(at.x) if at.cotangents[0] is None else at.cotangents[0]
    return BlockInput(at.x, cotangent, std, joint_reports(system, at, sure))


def size_error(system: ConstraintSystem, at: Linearisation, generator: torch.Generator) -> float:
    """How far noise moves the size of an input, relative to it: norms take it away, and nothing but biases, borders and
    the little number that they add to a variance tells it."""
    jacobian = Jacobian(system, at, {})
    told = float(jacobian.mv(at.x[None]).norm())
    noise = float(jacobian.weighted(system.noise(generator)).square().mean().sqrt())
    return noise / told if told else math.inf


def joint_reports(
    system: ConstraintSystem, at: Linearisation, sure: Determined, method: str = BLOCK
) -> dict[int, LayerReport]:
    """One for each layer by its node; what is reported of the constraints holds for all of them jointly."""
    missed = system.residual(at)
    weight = _relative(missed.weight[0] * system.row_weight, system.output.value * system.row_weight)
    return {
        node: LayerReport(
            name=layer.name,
            unknowns=system.samples * layer.unknowns,
            weight_rows=system.samples * layer.weight_rows,
            gradient_rows=layer.gradient_rows,
            rank=system.samples * layer.unknowns,
            condition=sure.condition,
            weight_residual=weight,
            gradient_residual=_relative(missed.gradient[which], system.gradients[which]),
            error=sure.std,
            dead_units=int((system.k(at, node) == 0).all(-1).all(0).sum()),
            method=method,
        )
        for which, (node, layer) in enumerate(zip(system.nodes, system.layers, strict=True))
    }


def _relative(miss: Tensor, given: Tensor) -> float:
    size = float(given.norm())
    return float(miss.norm()) / size if size else float(miss.norm())
