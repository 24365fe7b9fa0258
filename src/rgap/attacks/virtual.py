"""R-GAP with virtual constraints: where the recursion breaks off, the layers in front are solved jointly."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rgap.attacks import joint, kinks
from rgap.attacks.branched import MOST_BYTES, At, Branched
from rgap.attacks.fading import Fading, Joint, Prior, determined, solve, told_by_a_draw
from rgap.inversion.history import Candidate
from rgap.inversion.report import JointReport
from rgap.inversion.state import Observation
from rgap.nn.ops import Linear
from rgap.target import Target

RANK_ROUNDINGS = 8
"""Singular values of the joint constraints below so many roundings of the gradient count as zero."""


DENSE, COUNTED = 2_000, 8_192
"""Unknowns above which a chain's joint constraints are solved by products alone, and up to which free dimensions are
counted by a factor."""


def solve_jointly(
    target: Target, observed: Observation, end: Candidate, fading: Fading, largest: int, tolerance: float
) -> Candidate:
    """All constraints from the input to the last value that is known for certain, solved together."""
    eps, probe, solver = observed.eps, observed.probe(0, target.device), observed.solver
    gradients = {name: g[0] for name, g in observed.gradients.items()}
    network = target.network
    front = network.part([segment for segment in network.segments if segment.exit <= end.certain_id])
    plain = not target.graph.obstacles
    widest = max(math.prod(shape) for shape in front.shapes) if plain else math.prod(target.input_shape)
    rows = 0 if plain else sum(layer.gradient_rows for layer in front.layers)
    iterative = plain and (solver == "iterative" or (solver == "auto" and widest > DENSE))
    if not iterative and (widest > largest or 8 * widest * rows > MOST_BYTES):
        need = (3 * 8 * widest**2 + 8 * widest * rows) / 2**30
        note = (
            f"solving {len(front.layers)} layers jointly takes dense matrices of {widest} unknowns, about "
            f"{need:.0f} GiB with {rows} gradient rows, more than is solved (largest={largest})"
        )
        return replace(end, note=note)
    if plain:
        depth = max(at for at, layer in enumerate(end.layers) if layer.open_since is not None)
        last, certain = network.layers[depth], end.certain
        row_weight = None if certain.row_weight is None else last.pack_output(certain.row_weight)
        known = joint.Known(last.pack_output(certain.cotangent), last.pack_output(certain.value), row_weight)
        chained = joint.Problem(target.chain, depth, known, gradients)
        problem: Joint = chained
        begin: Any = chained.at(_start(end, target, depth), [])
        z_error = last.pack_output(certain.std.expand(certain.value.shape))
    else:
        problem = branched = Branched(front, end.certain, gradients)
        z_error = end.certain.std.expand(end.certain.value.shape)
        begin = _begun(branched, _noise(target, end.certain.value, probe))
        if isinstance(begin, str):
            return replace(end, note=begin)
    # A chain's layers keep channels in front, whatever the module does.
    first = network.layers[0]

    def whole(x: Tensor) -> Tensor:
        return (first.unpack_input(x) if plain else x).reshape(1, *target.input_shape)

    def packed(x: Tensor) -> Tensor:
        return first.pack_input(x) if plain else x

    prior, assumed = _prior(target)
    found = solve(problem, begin, prior, fading, tolerance, iterative)
    x, misfit = found.x, found.misfit
    if misfit > tolerance:  # a last unit or two may still be on the wrong side
        x = packed(kinks.settle(network, gradients, whole(x), end.cotangent, tolerance))
        misfit = problem.misfit(problem.forward(x))
    sure = None
    if iterative and isinstance(problem, joint.Problem):
        sure = told_by_a_draw(problem, x, z_error, eps, probe)
    if sure is None or sure.rank < problem.unknowns <= COUNTED:
        sure = determined(problem, x, z_error, eps, probe, RANK_ROUNDINGS * eps)
    report = JointReport(
        layers=tuple(layer.name for layer in problem.layers),
        unknowns=problem.unknowns,
        rows=problem.rows,
        rank=sure.rank,
        condition=sure.condition,
        steps=found.steps,
        converged=misfit <= tolerance,
        prior=assumed,
    )
    return replace(end, value=whole(x), std=sure.error, joint=report, stop=None)


def _prior(target: Target) -> tuple[Prior, str]:
    low, high = target.value_range or (0.0, 0.0)
    prior = Prior(target.input_shape, (low + high) / 2)
    if prior.smooth:
        return prior, "where constraints are missing, neighbouring values of the input are similar"
    return prior, f"where constraints are missing, values of the input are near {prior.centre:g}"


def _start(end: Candidate, target: Target, depth: int) -> list[Tensor]:
    """z of the layers in front, from the recursion's own inputs: least squares, right in most signs."""
    chain, network = target.chain, target.network
    reads = [node.reads[0] for node in network.nodes if isinstance(node.op, Linear)]
    found = []
    for at in range(depth):
        layer, after = chain[at], chain[at + 1]
        estimate = network.layers[at + 1].pack_input(end.values[reads[at + 1]])
        x = layer.pack_output(after.unpack_input(estimate))
        found.append(layer.activation.invert(x, torch.zeros(1, dtype=x.dtype, device=x.device)).z)
    return found


def _noise(target: Target, like: Tensor, probe: torch.Generator) -> Tensor:
    """An input that nothing is known of: near the middle of the range, and no two values alike."""
    low, high = target.value_range or (-1.0, 1.0)
    draw = torch.randn(1, *target.input_shape, generator=probe, dtype=like.dtype, device=like.device)
    return (low + high) / 2 + 0.1 * (high - low) * draw


def _begun(problem: Branched, x: Tensor) -> At | str:
    """The operations linearised at an input, or why torch cannot push a move of the input through them."""
    try:
        at = problem.forward(x)
        problem.network.jvp(at.values, at.by_place, torch.zeros_like(at.x))
        problem.ks(at)
    except (RuntimeError, NotImplementedError) as error:
        return f"what is in front is not solved jointly: {str(error).strip().splitlines()[0]}"
    return at
