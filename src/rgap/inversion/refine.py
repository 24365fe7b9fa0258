"""The last digits of an input, from the gradients of all layers together.

What was solved layer by layer, or from the layers in front alone, carries the errors of what lies behind. The whole
network's rows, linearised where the input nearly is, know better, and a few products with them are enough.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.differentiated import LARGEST
from rgap.inversion.jacobian import Jacobian
from rgap.inversion.pattern import least_certain
from rgap.inversion.refine_sides import refine_sides
from rgap.inversion.system import ConstraintSystem
from rgap.linalg import deadline
from rgap.linalg.least_squares import Iterative

STEPS = 4
ROUNDINGS = 6.0
"""An input of which no layer misses more roundings of the gradient is hardly moved by another solve."""
FINE = 20.0
"""No layer misses so many roundings on the right sides of all kinks, once the input is that good."""
SOLVED = 1e-10
"""What solves in double precision leave, relatively: below it no unit is looked for."""
DOUBTED = 64
"""Units that are nearest to their kinks, where one of all is on its wrong side."""
SOLVER = Iterative(rtol=1e-3, max_steps=25)
COUPLED = 100
"""Products of a solve where every one differentiates batch norms too."""


def refine_input(
    system: ConstraintSystem, x: Float[Tensor, "b ..."], tolerance: float, steps: int = STEPS
) -> Float[Tensor, "b ..."]:
    """x on the right sides of its kinks, and as near to the gradients as a few linearised solves bring it.

    Args:
        system: of the whole network.
        tolerance: relative distance to the gradient, by layer, below which no unit is on its wrong side.
        steps: solves, at the most; of none the sides alone are looked at.
    """
    if not steps:
        return refine_sides(system, x, min(tolerance, max(FINE * system.eps, SOLVED)))
    if system.smooth and system.unknowns <= LARGEST:
        system = system.differentiated()
    at = system.linearise(refine_sides(system, x, tolerance))
    best = system.distance(at)
    try:
        for _ in range(steps):
            if not ROUNDINGS * system.eps < best <= tolerance:
                break
            jacobian = Jacobian(system, at, {})
            residual = jacobian.weighted(system.residual(at))
            moved = system.linearise(refine_sides(system, SOLVER.step(jacobian, residual, at.x, None), tolerance))
            missed = system.distance(moved)
            if not missed < best:
                break
            at, best = moved, missed
        if best <= tolerance:  # a single unit of a layer that hardly counts
            return refine_sides(system, at.x, FINE * system.eps)
    except deadline.OutOfTime:  # it is found already, only not as precisely
        pass
    return at.x


def refined(
    system: ConstraintSystem, x: Float[Tensor, "b ..."], tolerance: float
) -> tuple[Float[Tensor, "b ..."], float]:
    """Inputs of several samples that were found layer by layer, once more from all constraints together, and how far
    noise moves them, root mean square; infinitely where they are left as they are.

    Args:
        tolerance: relative distance to the gradients, by layer, below which no unit is on its wrong side.
    """
    at = system.linearise(x)
    agrees = system.distance_by_layer(at) <= tolerance
    # Else there may be a unit on its wrong side, and what those nearest to their kinks do is left out.
    jacobian = Jacobian(system, at, {} if agrees else least_certain(system, at, DOUBTED))
    noise = system.noise(torch.Generator(device=x.device).manual_seed(0))
    try:
        solver = Iterative(max_steps_refine=COUPLED) if system.network.coupled else Iterative()
        moved, std = solver.refine(jacobian, jacobian.weighted(system.residual(at)), jacobian.weighted(noise), x)
    except deadline.OutOfTime:  # they are found already, only not as precisely
        return x, torch.inf
    moved = refine_sides(system, moved, tolerance)  # the move may bring a unit to its other side
    if system.distance(system.linearise(moved)) <= system.distance(at):
        return moved, std
    return x, torch.inf


def with_own_statistics(
    system: ConstraintSystem, x: Float[Tensor, "b ..."], error: float, tolerance: float
) -> Float[Tensor, "b ..."]:
    """Inputs that running statistics told, more precisely by the statistics of the values themselves; x where those
    hide more than the error of what was told.

    Args:
        system: with batch norms of `Network.own`.
        error: of x, root mean square.
        tolerance: as in `refined`.
    """
    moved, std = refined(system, x, tolerance)
    return moved if std <= error else x
