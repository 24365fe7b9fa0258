"""R-GAP with virtual constraints: where the recursion breaks off, the layers in front are solved jointly."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.attacks import joint
from rgap.attacks.base import JointReport
from rgap.attacks.recursive import End, Recursive, settled
from rgap.target import Target


@dataclass(frozen=True)
class Virtual(Recursive):
    """The recursion as far as it is exact, then all constraints of the layers in front of it together.

    On a network whose layers all have full rank it is `Recursive`. Where a layer leaves dimensions of its input free,
    everything after it is known exactly, and the layers from the input up to it are solved for the network's input;
    see `rgap.attacks.joint`. What no constraint tells, a prior does: it is listed in the assumptions, and how many
    dimensions it decided is in the answer's `joint` report.

    Args:
        strongest: first weight of the prior relative to the constraints.
        fading: by how much the weight falls in each step.
        steps: how many weights there are.
        largest: unknowns of a layer above which dense normal equations are refused; 16 of them take 2 GiB a matrix.
    """

    strongest: float = 0.1
    fading: float = 5.0
    steps: int = 17
    largest: int = 16_000

    def finish(
        self,
        target: Target,
        gradients: dict[str, Tensor],
        end: End,
        eps: float,
        rank_tolerance: float,
        probe: torch.Generator,
    ) -> End:
        """Solve jointly from the input to the last layer that leaves the input open; nothing if none does."""
        if end.layers[0].open_since is None:
            return end
        chain = target.chain
        depth = max(at for at, layer in enumerate(end.layers) if layer.open_since is not None)
        widest = max(max(layer.unknowns, layer.weight_rows) for layer in chain.layers[: depth + 1])
        if widest > self.largest:
            need = 3 * 8 * widest**2 / 2**30
            raise MemoryError(
                f"solving {depth + 1} layers jointly takes dense matrices of {widest} unknowns, about {need:.0f} GiB, "
                f"more than largest={self.largest} allows; raise it, or attack with Recursive"
            )
        step = end.steps[depth]
        problem = joint.Problem(chain, depth, joint.Known(step.k, step.z, step.row_weight), gradients)
        prior, centre, said = _prior(target, step.k)
        weights = [self.strongest / self.fading**at for at in range(self.steps)]
        found = joint.solve(problem, _start(end, target, depth), prior, centre, weights, settled(eps), rank_tolerance)
        report = JointReport(
            layers=tuple(layer.name for layer in problem.layers),
            unknowns=problem.unknowns,
            rows=problem.rows,
            rank=found.factor.rank,
            condition=found.factor.condition,
            steps=found.steps,
            converged=found.converged,
            prior=said,
        )
        error = joint.error(problem, found, step.z_error, eps, probe)
        return replace(end, x=found.x, error=error, joint=report)


Closed = Virtual
"""Everything there is in closed form: the recursion, and the joint solve where it breaks off."""


def _prior(target: Target, like: Tensor) -> tuple[Tensor, float, str]:
    low, high = target.value_range or (0.0, 0.0)
    centre = (low + high) / 2
    smooth = joint.smoothness(target.input_shape, like)
    if smooth is not None:
        return smooth, centre, "where constraints are missing, neighbouring values of the input are similar"
    first = target.chain[0]
    identity = torch.eye(first.unknowns, dtype=like.dtype, device=like.device)
    return identity, centre, f"where constraints are missing, values of the input are near {centre:g}"


def _start(end: End, target: Target, depth: int) -> list[Tensor]:
    """z of the layers in front, from the recursion's own inputs: least squares, right in most signs."""
    chain = target.chain
    found = []
    for at in range(depth):
        layer, after = chain[at], chain[at + 1]
        x = layer.pack_output(after.unpack_input(end.steps[at + 1].x))
        found.append(layer.activation.invert(x, torch.zeros(1, dtype=x.dtype, device=x.device)).z)
    return found
