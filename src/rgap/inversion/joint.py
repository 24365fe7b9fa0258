"""Where the recursion breaks off: the layers in front of the last certain value, solved jointly for the input.

These are the paper's virtual constraints (Section 4). What no constraint tells, a prior does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.by_values import input_by_values
from rgap.inversion.differentiated import LARGEST, differentiated_steps
from rgap.inversion.gauss_newton import CONTINUATION, Continuation, Solution, determine, gauss_newton, settle
from rgap.inversion.history import Candidate, Paths
from rgap.inversion.inequalities import narrowed, upper_limits
from rgap.inversion.jacobian import EVEN, Jacobian
from rgap.inversion.layer import Solver as Kind
from rgap.inversion.prior import Prior
from rgap.inversion.recursion import recurse
from rgap.inversion.refine_sides import refine_sides
from rgap.inversion.report import JointReport
from rgap.inversion.sides import sides_at
from rgap.inversion.state import Observation, State, Stop
from rgap.inversion.system import ConstraintSystem, Linearisation
from rgap.inversion.unpool import Route, route_of, solve_route, zeros_behind
from rgap.linalg import psd
from rgap.linalg.deadline import OutOfTime
from rgap.linalg.least_squares import Direct, Iterative, Solver, probes
from rgap.nn.network import Network, Segment
from rgap.nn.non_monotone import NonMonotone
from rgap.nn.ops import Elementwise, Linear
from rgap.nn.pools import Pool

RANK_ROUNDINGS = 8
"""Singular values of the joint constraints below so many roundings of the gradient count as zero."""
REFINED = 600
"""Products for the last digits of an input that the recursion found with virtual constraints."""
WITHIN = "inputs within the value range"
"""What is taken for granted where inequalities tell what equations leave open."""
NEAR = 1e-2
"""A distance below which steps that converge slowly may still get there."""
FROM_ROUTES = Continuation(doubt=(1,), always=512, max_steps=20, patience=6)
"""From an input that a pool's routes or sides tell, whose units in front are on their wrong sides here and there."""


@dataclass(frozen=True, eq=False)
class Solved:
    """The inputs of all samples from the constraints of several layers."""

    x: Float[Tensor, "b ..."]
    std: float
    report: JointReport


@dataclass(frozen=True)
class JointSolve:
    """How the layers in front are solved for the network's input.

    Args:
        continuation: how the prior's weight falls.
        largest: unknowns above which no dense matrix is formed; 16,000 take 2 GiB each.
        dense: unknowns above which ``auto`` solves by products alone.
        counted: unknowns up to which free dimensions are counted by a factor where products found some.
        differentiated: unknowns up to which smooth constraints are differentiated with their cotangents at last.
    """

    continuation: Continuation = CONTINUATION
    largest: int = 16_000
    dense: int = 1_500
    counted: int = 8_192
    differentiated: int = LARGEST

    def __call__(
        self,
        network: Network,
        observed: Observation,
        candidate: Candidate,
        value_range: tuple[float, float] | None,
        tolerance: float,
        report: Callable[[int, float], None] = lambda step, distance: None,
    ) -> Candidate:
        """The candidate with the network's input, from the last value that is known for certain; or with a note why
        there is none.

        Args:
            observed: of one update.
            tolerance: distance of the gradients at which they agree.
            report: is called with the number of steps and what they miss.
        """
        if candidate.certain_id == 0:
            return candidate
        front = network.up_to(candidate.certain_id)
        gradients = {name: g[0] for name, g in observed.gradients.items()}
        system = ConstraintSystem(front, candidate.certain, gradients, observed.eps)
        if not system.nodes:
            return candidate  # no gradient adds to what stopped the recursion, such as a crop of the input
        solver = self.solver(system, observed.solver)
        if isinstance(solver, Direct) and system.unknowns > self.largest:
            return replace(candidate, note=self._too_large(system))
        low, high = value_range or (0.0, 0.0)
        prior, probe = Prior(network.input_shape, (low + high) / 2), observed.probe(0, network.device)
        start = _start(system, candidate, prior, value_range or (-1.0, 1.0), probe)
        refused = _refused(system, start)
        if refused is not None:
            return replace(candidate, note=f"what is in front is not solved jointly: {refused}")
        if candidate.told is not None and candidate.layers[0].open_since is None:
            at = system.linearise(candidate.value)
            if system.distance(at) <= tolerance:
                return self._refined(network, observed, candidate, system, at, probe)
            start = at
        try:
            told, enough = _by_routes(network, candidate, system, gradients, tolerance, report), system
            if told is None:
                system, told, enough = _by_values(network, candidate, system, gradients, prior.centre, report)
            # Who asks for products alone may not have the memory for a matrix.
            by = replace(self, differentiated=0) if observed.solver == "iterative" else self
            found = by.solve(system, solver, prior, tolerance, start, probe, report, told, enough)
        except OutOfTime:
            note = f"{' and '.join(names(system))} were not solved jointly: the time was up"
            return replace(candidate, note=note, cut_off=True)
        if isinstance(solver, Direct) and value_range is not None and found.report.converged and found.report.free:
            limits = upper_limits(network, candidate.certain_id, candidate.certain)
            found = found if limits is None else self._narrowed(system, found, limits, value_range)
        twin = _twin(network, observed, found.x)
        return replace(candidate, value=found.x, std=found.std, joint=found.report, stop=None, twin=twin, known=None)

    def solver(self, system: ConstraintSystem, chosen: Kind) -> Solver:
        """By a factor or by products, as is chosen, or whichever the number of unknowns asks for."""
        if chosen == "direct" or (chosen == "auto" and system.unknowns <= self.dense):
            return self._direct(system)
        return Iterative()

    def _direct(self, system: ConstraintSystem) -> Direct:
        return Direct(RANK_ROUNDINGS * system.eps)

    def solve(
        self,
        system: ConstraintSystem,
        solver: Solver,
        prior: Prior,
        tolerance: float,
        start: Linearisation | None,
        probe: torch.Generator,
        report: Callable[[int, float], None],
        found: Solution | None = None,
        enough: ConstraintSystem | None = None,
    ) -> Solved:
        """The inputs of all samples.

        Args:
            start: where to linearise first; the middle of the prior if None.
            found: if the inputs were found otherwise.
            enough: those of the constraints that tell how well the inputs are determined; all if None.

        Raises:
            OutOfTime: the time was up.
        """
        if found is None:
            found = gauss_newton(system, solver, prior, tolerance, start, self.continuation, report)
            if system.smooth and system.unknowns <= self.differentiated:
                system, solver = system.differentiated(), self._direct(system)
                if found.distance > tolerance:  # slopes that bend much
                    other = differentiated_steps(system, prior, tolerance, report=report)
                    found = min(found, other, key=lambda each: each.distance)
        at, distance = system.linearise(found.x), found.distance
        if distance > tolerance:  # a last unit or two may still be on the wrong side
            at = system.linearise(refine_sides(system, found.x, tolerance))
            distance = system.distance(at)
        enough = enough or system
        by = at if enough is system else enough.linearise(at.x)
        sure = determine(enough, by, solver, probe)
        # By a factor also what is told of inputs that are not told in all: inequalities may tell the rest.
        if distance <= NEAR and (sure.rank == system.unknowns or isinstance(solver, Direct)):
            by, std = settle(enough, by, solver, sure)
            sure = replace(sure, std=std)
            at = by if enough is system else system.linearise(by.x)
            distance = system.distance(at)
        # At an input that is not the sample's the number is one of many: an estimate of it will do.
        if isinstance(solver, Iterative) and distance <= tolerance and sure.rank < system.unknowns <= self.counted:
            sure = determine(system, at, self._direct(system), probe)
        joint = self._report(system, found.steps, sure.rank, sure.condition, distance <= tolerance, str(prior))
        return Solved(at.x, sure.std, joint)

    def _narrowed(
        self,
        system: ConstraintSystem,
        found: Solved,
        limits: tuple[int, Tensor],
        value_range: tuple[float, float],
    ) -> Solved:
        """The same, where inequalities tell what equations leave open; as it is where they do not."""
        at, tolerance = system.linearise(found.x), self._direct(system).rank_tolerance
        try:
            told = narrowed(
                system,
                at,
                lambda there: psd.factor(Jacobian(system, there, {}).gram(), tolerance).null,
                found.std,
                limits,
                value_range,
            )
        except OutOfTime:
            return found
        if told is None:
            return found
        x, reach, count = told
        if system.distance(system.linearise(x)) > system.distance(at):  # it is no nearer than what agrees better
            reach, x = math.hypot(reach, float((x - at.x).square().mean().sqrt())), at.x
        report = replace(found.report, rank=system.unknowns - count, bounded=count, prior=WITHIN)
        return Solved(x, math.hypot(found.std, reach), report)

    def _refined(
        self,
        network: Network,
        observed: Observation,
        candidate: Candidate,
        system: ConstraintSystem,
        at: Linearisation,
        probe: torch.Generator,
    ) -> Candidate:
        """The input that the recursion found with virtual constraints, once more from all constraints together."""
        assert candidate.told is not None
        jacobian = Jacobian(system, at, {}, EVEN)
        residual, noise = (jacobian.weighted(rows) for rows in (system.residual(at), system.noise(probe)))
        try:
            x, std = Iterative(max_steps_refine=REFINED).refine(jacobian, residual, noise, at.x)
        except OutOfTime:  # it is found already, only not as precisely
            x, std = at.x, candidate.std
        condition = max(candidate.told.condition, *(layer.condition for layer in candidate.layers))
        joint = self._report(system, candidate.told.steps, system.unknowns, condition, True, None)
        return replace(candidate, value=x, std=std, joint=joint, twin=_twin(network, observed, x), known=None)

    @staticmethod
    def _report(
        system: ConstraintSystem, steps: int, rank: int, condition: float, converged: bool, prior: str | None
    ) -> JointReport:
        rows = system.weight_rows + system.gradient_rows
        return JointReport(names(system), system.unknowns, rows, rank, condition, steps, converged, prior)

    def _too_large(self, system: ConstraintSystem) -> str:
        count = system.unknowns
        return (
            f"solving {len(system.network.layers)} layers jointly by a factor takes dense matrices of {count} "
            f"unknowns, about {3 * 8 * count**2 / 2**30:.0f} GiB, more than is solved (largest={self.largest}): "
            "expected solver 'auto' or 'iterative'"
        )


def _by_routes(
    network: Network,
    candidate: Candidate,
    system: ConstraintSystem,
    gradients: dict[str, Tensor],
    tolerance: float,
    report: Callable[[int, float], None],
) -> Solution | None:
    """The input in front of the pool at which the recursion stopped; None if it stopped elsewhere."""
    if candidate.stop is None or candidate.stopped is None or not isinstance(candidate.stop.op, Pool):
        return None
    node = next(at for at, each in enumerate(network.nodes) if each.op is candidate.stop.op)
    alone = any(segment.nodes == range(node, node + 1) for segment in network.segments)  # not within a block
    route = route_of(network, node, 0) if alone else None
    if route is None or route.weight_name not in gradients:
        return None
    x, steps = _looked_for(route, candidate.stop), 0
    if x is None:
        observed = route.observed(candidate.stopped, gradients[route.weight_name], zeros_behind(network, node))
        found = solve_route(route, observed, system.eps, with_prior=True, report=report)
        if found is None:
            return None
        x, steps = found.x, found.steps
    at = system.linearise(x)
    told = Solution(x, system.distance(at), steps)
    if not route.part.front.nodes or not tolerance < told.distance <= NEAR:
        return told
    further = gauss_newton(system, Iterative(), None, tolerance, at, FROM_ROUTES, report)
    return further if further.distance < told.distance else told


def _looked_for(route: Route, stop: Stop) -> Tensor | None:
    """The input that belongs to what the recursion found of what the layer in front of a pool reads: nothing more is
    told where there is only what has an inverse in between."""
    if stop.input is not None:
        return stop.input
    x = stop.nearest
    for node in reversed(route.part.front.nodes):
        x = None if x is None else node.op.invert(x)
    return x


def _by_values(
    network: Network,
    candidate: Candidate,
    system: ConstraintSystem,
    gradients: dict[str, Tensor],
    centre: float,
    report: Callable[[int, float], None],
) -> tuple[ConstraintSystem, Solution | None, ConstraintSystem]:
    """The input from weight rows alone, where they are far more than its numbers: few steps of few products.

    Its own output then tells on which side of their kinks the values lie with which the recursion stopped: so near to
    them that it took some for the other side, which spoils gradient rows and not weight rows.

    Returns:
        The system with those sides; the input, None if it was not looked for or not found; and the rows that tell it.
    """
    start = system.output.value.new_full(system.in_shape, centre)
    found = input_by_values(system.network, system.output, system.eps, start, report)
    if found is None:
        return system, None, system
    values, solution = found
    told = sides_at(network, candidate.certain_id, system.output, values.linearise(solution.x).values[-1])
    system = ConstraintSystem(system.network, told, gradients, system.eps)
    return system, Solution(solution.x, system.distance(system.linearise(solution.x)), solution.steps), values


def names(system: ConstraintSystem) -> tuple[str, ...]:
    """Of the layers that are solved jointly."""
    front = system.network
    return tuple(layer.name for layer in front.layers) or tuple(node.op.name for node in front.nodes)


def _start(
    system: ConstraintSystem,
    candidate: Candidate,
    prior: Prior,
    value_range: tuple[float, float],
    probe: torch.Generator,
) -> Linearisation:
    """The middle of the prior, with the slopes that the recursion's own answers have where it went on: least squares,
    right in most signs."""
    like, (low, high) = system.output.value, value_range
    draw = torch.randn(system.in_shape, generator=probe, dtype=like.dtype, device=like.device)
    # Where nothing is known: near the middle of the range, and no two values alike, as a maximum asks for.
    drawn = (low + high) / 2 + 0.1 * (high - low) * draw
    guess = dict(enumerate(system.network.forward(drawn))) | dict(candidate.values)
    curved = any(not isinstance(node.op, Elementwise) and not node.op.linear for node in system.network.nodes)
    return system.linearise(drawn if curved else torch.full_like(drawn, prior.centre), guess)


def _twin(network: Network, observed: Observation, x: Tensor) -> Tensor | None:
    """What each number of the input may be as well, where an operation before the first layer gives the same for both;
    None if there is no such operation."""
    segments = list(takewhile(lambda each: not each.block and not _is_layer(network, each), network.segments))
    ops = [network.nodes[each.nodes[-1]].op for each in segments]
    if not any(isinstance(op, Elementwise) and isinstance(op.activation, NonMonotone) for op in ops):
        return None
    front = network.part(segments)
    value = front.forward(x)[-1]
    paths = Paths.begin(
        State(value, torch.zeros_like(value), None, torch.zeros_like(value)),
        torch.zeros(len(x), dtype=torch.long, device=x.device),
        x.new_zeros(len(x)),
    )
    [end, *_] = recurse(front, observed, paths)
    if end.stop is not None or end.twin is None:
        return None
    return end.twin.where((end.value - x).abs() <= (end.twin - x).abs(), end.value)


def _is_layer(network: Network, segment: Segment) -> bool:
    return isinstance(network.nodes[segment.nodes[-1]].op, Linear)


def _refused(system: ConstraintSystem, at: Linearisation) -> str | None:
    """Why torch cannot differentiate the operations; None if it can."""
    try:
        jacobian = Jacobian(system, at, {})
        jacobian.normal(probes(jacobian, 1))
    except (RuntimeError, NotImplementedError) as error:
        return str(error).strip().splitlines()[0]
    return None
