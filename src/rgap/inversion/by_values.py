"""A network's input from weight rows alone, where they are many times its numbers.

Behind a few convolutions stand far more values than the picture has. They tell it in a handful of Gauss-Newton steps,
each of a few products, whatever the layers in between determine by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rgap.inversion.block_solve import BlockInput, joint_reports
from rgap.inversion.gauss_newton import Continuation, Solution, determine, gauss_newton, settle
from rgap.inversion.history import Paths
from rgap.inversion.report import VALUES
from rgap.inversion.sides import sides_at
from rgap.inversion.state import Observation, State
from rgap.inversion.system import ConstraintSystem, Linearisation
from rgap.linalg import deadline
from rgap.linalg.least_squares import Iterative
from rgap.nn.network import Network

MANY, LARGE = 4, 6_000
"""Weight rows for each number of the input, and values, with which this is tried."""
AGREES = 1e-6
"""What weight rows may miss, relatively, beyond their errors."""
SOLVER = Iterative(rtol=0.05, max_steps=100)
NEAR, LONG = 1e-3, Iterative(rtol=0.01, max_steps=1500)
"""What weight rows miss where the input is nearly found, and how its last digits are: of weights that training has left
some directions hardly show."""
SCHEDULE = Continuation(patience=4, doubt=(4,), max_steps=80, gain=0.8)
LAST = replace(SCHEDULE, patience=3, gain=0.5)
"""Of the latter: where precise solves are what is missing, a few of them show it."""


def input_by_values(
    front: Network,
    output: State,
    eps: float,
    start: Tensor | None = None,
    report: Callable[[int, float], None] = lambda step, missed: None,
) -> tuple[ConstraintSystem, Solution] | None:
    """The inputs of b samples, and the weight rows that tell them; None where they are too few or not met.

    Args:
        front: from the network's input to the value that is known.
        output: of the front, (b, *shape).
        eps: relative rounding of the gradients.
        start: (b, *input_shape); the best of some constants if None.
    """
    values = ConstraintSystem(front, output, {}, eps)
    if values.weight_rows < MANY * values.unknowns:
        return None
    if start is None:
        sizes = 2.0 ** torch.arange(-4, 4, dtype=output.value.dtype, device=output.value.device)
        starts = [output.value.new_full(values.in_shape, float(each)) for each in torch.cat([sizes, -sizes])]
        start = min(starts, key=lambda each: values.distance(values.linearise(each)))
    found = gauss_newton(values, SOLVER, None, AGREES, values.linearise(start), SCHEDULE, report)
    if AGREES < found.distance <= NEAR:
        found = gauss_newton(values, LONG, None, AGREES, values.linearise(found.x), LAST, report)
    return (values, found) if found.distance <= AGREES else None


def told_by_values(
    network: Network,
    value_id: int,
    observed: Observation,
    paths: Paths,
    report: Callable[[int, float], None] = lambda step, missed: None,
) -> Paths | None:
    """The candidates at the network's input, those whose values it meets; None if there are none.

    Args:
        value_id: of the value that is known.
    """
    if not paths.state.value[0].numel() > max(LARGE, MANY * math.prod(network.input_shape)):
        return None
    front = network.up_to(value_id)
    found: list[tuple[int, BlockInput]] = []
    for s, history in enumerate(paths.history):
        if (history.value_open or history.cotangent_open) is not None:
            continue
        deadline.check()
        state = paths.state.one(s)
        told = input_by_values(front, state, observed.eps, report=report)
        if told is None:
            continue
        values, solution = told
        at = values.linearise(solution.x)
        sure = determine(values, at, SOLVER, observed.probe(value_id, network.device))
        if sure.rank < values.unknowns:
            continue
        at, std = settle(values, at, SOLVER, sure)
        std *= max(1.0, _unexplained(values, at))
        gradients = {name: observed.gradient(name, paths.update[s : s + 1])[0] for name in observed.gradients}
        system = ConstraintSystem(front, sides_at(network, value_id, state, at.values[-1]), gradients, observed.eps)
        at = system.linearise(at.x)
        cotangent = torch.zeros_like(at.x) if at.cotangents[0] is None else at.cotangents[0]
        found.append((s, BlockInput(at.x, cotangent, std, joint_reports(system, at, sure, VALUES))))
    if not found:
        return None
    kept = paths.select(torch.tensor([s for s, _ in found], device=paths.root.device))
    states = [State(each.x, each.cotangent, None, torch.full_like(each.x, each.std)) for _, each in found]
    reports = [tuple(each.reports[node] for node in sorted(each.reports)) for _, each in found]
    histories = [each.passed_block(layers) for each, layers in zip(kept.history, reports, strict=True)]
    return replace(kept, state=State.concatenate(states), history=tuple(histories))


def _unexplained(values: ConstraintSystem, at: Linearisation) -> float:
    """So many times what the values' errors explain of what is missed: where a unit stayed on its wrong side, or a step
    led to and fro between two, that tells how far beside the input it is."""
    output, missed = values.output, values.residual(at).weight[0]
    std = output.std.expand(output.value.shape).maximum(values.eps * output.value.abs())
    size = float((std * values.row_weight).norm())
    return float((missed * values.row_weight).norm()) / size if size else 1.0
