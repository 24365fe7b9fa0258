"""The closed form on a weight difference of several local steps: every sample, and the order of the minibatches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rgap.attacks.labels import one_hot
from rgap.attacks.last_layer import Begun, begin, obstacle
from rgap.attacks.progress import Reporter
from rgap.attacks.result import Answer, Outcome, Sample, Status
from rgap.attacks.smoothed_steps import smoothed
from rgap.attacks.steps_behind import steps_behind_front
from rgap.attacks.verdict import EXPLAINED, mirrored, range_misfit
from rgap.inversion.local_steps import UNEXPLAINED, Recovered, recover
from rgap.inversion.output import OutputCandidates
from rgap.inversion.prior import Prior
from rgap.inversion.step_bounds import Bound, Limit
from rgap.inversion.subspace.peel import Search
from rgap.inversion.unrolled import SOFTENING, Met, meet
from rgap.inversion.walk import Client, Difference, Plan, Weights
from rgap.protocol import Protocol
from rgap.target import Target
from rgap.update import Update

FOLLOWED = "the local steps are as the protocol says: {} steps by {} at rate {:g}"
ORDER = "samples come in the order of the first epoch, and within a minibatch in the order in which they were found"
COUNT = "the update says {} samples of a client, the rank of the first layer's difference is {}: so many are taken"
MOST_STEPS = 2000
"""Steps that are followed one by one; their gradients are kept."""
MOST_UNROLLED = 64
"""Steps that are differentiated; every one keeps its own graph."""
MOST_VALUES = 512
"""Of a sample whose steps are differentiated: by each of them, some twenty times. Chains with kinks may have more."""


def invert_steps(target: Target, update: Update, search: Search, visible: float) -> Outcome | None:
    """The samples of a client, step by step; with a bound and no answer where they are not told apart; None where there
    is one step only.

    Args:
        visible: as in `Recursive`.
    """
    protocol, told = update.header.protocol, update.samples_of_one(target)
    told = max(told, protocol.minibatch or 1)
    bound = _outside(protocol, told)
    if bound is not None:
        return _without(bound)
    sent = {name: d.double().to(target.device) for name, d in update.gradients.items()}
    if any(name not in sent for name in target.parameters) or not any(bool(d.any()) for d in sent.values()):
        return None
    try:
        target.network  # noqa: B018
    except NotImplementedError:
        return None
    client = client_of(target)
    eps = max(float(torch.finfo(w.dtype).eps) for w in target.parameters.values())
    own = max([float(torch.finfo(update.dtype).eps), update.header.precision or 0.0])

    def after(steps: int) -> Difference:
        return Difference.of(sent, client.weights, eps, own, steps)

    found = recover(client, lambda n: plan_of(protocol, n), told, after, search, Reporter("Closed", told))
    if found.stop is None and len(found.order) == 1:
        return None
    plan = plan_of(protocol, told)
    if found.stop is not None and found.stop.limit is Limit.PLACE:
        behind = steps_behind_front(target, client, plan, after(plan.steps), search)
        if behind is not None:
            return _verdict(target, update, behind, told, visible) if isinstance(behind, Recovered) else behind
    if not len(found.x) and told == 1 and 1 < plan.steps <= MOST_UNROLLED and obstacle(target) is None:
        begun = begin(target, update.to_gradient(target)[0])
        if isinstance(begun, Begun):
            difference = after(plan.steps)
            found = (
                _together(target, begun.output, client, plan, difference)
                or smoothed(target, begun.output, client, plan, difference)
                or found
            )
    return _verdict(target, update, found, told, visible)


def _together(
    target: Target, output: OutputCandidates, client: Client, plan: Plan, difference: Difference
) -> Recovered | None:
    """The one sample of all steps, from all parameters together; None where none agrees, or its values are too many.

    Its label is one of those that the last layer's gradient allows, taken as a single step's.
    """
    if math.prod(target.input_shape) > MOST_VALUES:
        return None
    low, high = target.value_range or (0.0, 0.0)
    prior, order = Prior(target.input_shape, (low + high) / 2), ((0,),) * plan.steps
    met: list[tuple[Met, Tensor]] = []
    for value in dict.fromkeys(output.labels.tolist()):
        label = output.labels.new_full((1,), value, dtype=torch.float64)
        x = label.new_full((1, *target.input_shape), prior.centre)
        report = Reporter("Closed, all steps together, step", SOFTENING.soft + SOFTENING.sharp)
        try:
            found = meet(client, plan, difference, x, label, order, prior, UNEXPLAINED, report=report)
        except (RuntimeError, ValueError, IndexError, TypeError):  # torch does not differentiate what the model does
            return None
        if found.misfit <= EXPLAINED:
            met.append((found, label))
    if not met:
        return None
    found, labels = met[0]
    missed = difference.missed(found.walk)
    error = labels.new_full((1,), found.std * max(1.0, found.misfit))
    return Recovered(found.x, labels, error, order, found.misfit, missed, len(met) == 1, 1)


def client_of(target: Target) -> Client:
    """What a target's server can compute for a client of its."""
    smooth = target.gradient_function(torch.float64)

    def gradient(at: Weights, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return target.gradient(x, labels, weights=at)

    def differentiable(at: Weights, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return smooth(x, one_hot(target.loss, labels).to(x), dict(at))

    weights = {name: w.double() for name, w in target.parameters.items()}
    return Client(target.loss, target.input_shape, weights, target.network_at, gradient, differentiable)


def plan_of(protocol: Protocol, samples: int) -> Plan:
    """The steps of a client of so many samples."""
    sizes = protocol.minibatches(samples)
    factors = [size if protocol.summed else 1 for size in sizes]

    def expansion(before: int | None) -> tuple[float, tuple[float, ...]]:
        decay, c = protocol.expansion(samples, before)
        return decay, tuple(each * factor for each, factor in zip(c, factors, strict=False))

    return Plan(
        sizes,
        len(sizes) // protocol.passes,
        tuple(expansion(before) for before in (*range(len(sizes)), None)),
        protocol.shuffled and protocol.minibatch is not None,
        protocol.clip_norm,
        protocol.proximal,
    )


def _mirrored(target: Target, x: Tensor, label: Tensor) -> bool:
    """Whether the value range leaves open which sign a sample has."""
    if mirrored(target, x, label) is None:
        return False
    own, other = (range_misfit(each[0], target.value_range) for each in (x, -x))
    return own[0] == other[0]


def _outside(protocol: Protocol, samples: int) -> Bound | None:
    """Why the steps of a protocol are not followed at all."""
    if not protocol.linear:
        return Bound(
            Limit.SIZES,
            f"{protocol.optimiser.value} divides every gradient by its own size: the difference has full rank, and "
            "little but signs is left of a gradient; a client with sgd, with or without momentum, would be read",
        )
    if protocol.clients > 1:
        return Bound(Limit.PLACE, f"the mean over {protocol.clients} clients mixes steps at different weights")
    if protocol.clip_norm is not None and protocol.summed:
        return Bound(Limit.SIZES, "the sum over a minibatch was clipped: the share of a sample in it is not known")
    steps = len(protocol.minibatches(samples))
    if steps > MOST_STEPS:
        return Bound(Limit.WIDTH, f"{steps} local steps, of which {MOST_STEPS} would be followed")
    return None


def _without(bound: Bound) -> Outcome:
    return Outcome(Status.NOT_CONVERGED, str(bound), bound=bound)


def _verdict(target: Target, update: Update, found: Recovered, told: int, visible: float) -> Outcome:
    if not len(found.x):
        assert found.stop is not None
        return _without(found.stop)
    protocol = update.header.protocol
    steps = len(protocol.minibatches(found.samples))
    assumptions = [FOLLOWED.format(steps, protocol.optimiser.value, protocol.learning_rate or 0.0), ORDER]
    if found.samples != told:
        assumptions.append(COUNT.format(told, found.samples))
    if found.assumption:
        assumptions.append(found.assumption)
    low, high = target.value_range or (float(found.x.min()), float(found.x.max()))
    agrees = found.misfit <= EXPLAINED
    samples = []
    for at, label in enumerate(found.labels.tolist()):
        status, reason = Status.EXACT, "all steps together give the difference that was sent"
        if not agrees and found.nearest:
            status, reason = Status.NOT_CONVERGED, "it is the nearest that was found"
            if found.cut_off:
                status, reason = Status.CUT_OFF, "it is the nearest when the time was up"
        elif not agrees:
            status, reason = Status.REPRODUCED, "it fits its step; all steps together do not give the difference"
        elif not found.error[at] <= visible * (high - low):
            status, reason = Status.ILL_CONDITIONED, "rounding may have moved it visibly"
        elif range_misfit(found.x[at], target.value_range)[0]:
            status, reason = Status.REPRODUCED, f"some of its values are outside the value range {target.value_range}"
        elif not found.certain:
            status, reason = Status.REPRODUCED, "another order of the samples fits the steps about as well"
        elif _mirrored(target, found.x[at : at + 1], found.labels[at : at + 1]):
            status, reason = Status.AMBIGUOUS, "with its sign changed and another label it gives the same steps"
        samples.append(Sample(status, label, float(found.error[at]), reason))
    certified = sum(sample.status is Status.EXACT for sample in samples)
    size = sum(float(d.double().square().sum()) for d in update.gradients.values()) ** 0.5
    rms = float(found.error.square().mean().sqrt())
    answer = Answer(
        found.x,
        found.labels,
        float("nan"),
        found.missed / size if size else found.missed,
        rms,
        unexplained=found.misfit,
        samples=tuple(samples),
    )
    of = f"{len(found.x)} of {found.samples} samples in {len(found.order)} of {steps} steps"
    if found.stop is not None:
        status, reason = Status.PARTIAL, f"{of}; {found.stop}"
    elif certified == len(samples):
        status = Status.EXACT
        reason = f"{of}: what they make of the weights is what was sent, to {found.misfit:.1f} roundings"
    else:
        worst = next(sample for sample in samples if sample.status is not Status.EXACT)
        status = Status.PARTIAL if certified else worst.status
        reason = f"{of}: {worst.reason}; the difference is missed by {found.misfit:.1f} roundings"
    return Outcome(status, reason, (answer,), tuple(assumptions), None, found.order, found.stop)
