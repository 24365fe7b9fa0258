"""The closed form on a gradient of several samples: every sample, with a verdict of its own."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.attacks.base import certify
from rgap.attacks.hidden import HIDDEN, along_hidden, norms_over_maps
from rgap.attacks.progress import Reporter
from rgap.attacks.result import Answer, BatchFeatures, Outcome, Sample, Status
from rgap.attacks.statistics_missed import statistics_missed
from rgap.attacks.verdict import EXPLAINED, SOLVED, STATISTICS, mirrored, range_misfit
from rgap.inversion.batch import Features, Inputs, back, find_features
from rgap.inversion.joint import JointSolve
from rgap.inversion.subspace.head import largest_batch
from rgap.inversion.subspace.peel import Search
from rgap.linalg.deadline import OutOfTime
from rgap.target import Target
from rgap.update import Update

ORDER = "a gradient does not tell the order of its samples: they come in the order in which they were found"
WHOSE = "{} clients' gradients were averaged: a mean does not tell which sample is whose"


def invert_batch(
    target: Target,
    update: Update,
    search: Search,
    joint: JointSolve,
    tolerance: float,
    rank_tolerance: float,
    visible: float,
) -> Outcome:
    """The samples of one update of several, as far as they can be told apart.

    Args:
        tolerance: distance of the gradients in front of the features at which they agree.
        visible: as in `Recursive`.
    """
    # A gradient that was zeroed, as a defence does with those of biases, is as good as none.
    gradients = {name: g.double().to(target.device) for name, g in update.gradients.items() if bool(g.any())}
    if not gradients:
        return Outcome(Status.GRADIENT_ZERO, "all gradients are zero: every sample's loss is saturated")
    count, clients = update.samples(target), update.header.protocol.clients
    report = Reporter("Closed", count)
    found = find_features(target.network, target.loss, gradients, update.precision, count, search, report)
    assumptions = [ORDER, WHOSE.format(clients)] if clients > 1 else [ORDER]
    if found is None:
        return Outcome(Status.NOT_CONVERGED, nowhere(target, count), assumptions=(ORDER,))
    if not len(found.samples):
        reason = f"none of {found.count} samples was told apart in front of {found.layer}"
        return Outcome(Status.NOT_CONVERGED, reason, assumptions=tuple(assumptions))
    told = found.residual(gradients)
    if found.complete and not told <= update.tolerance:
        reason = f"the {found.found} samples in front of {found.layer} give its gradient to {told:.1e} only"
        return Outcome(Status.NOT_CONVERGED, reason, assumptions=tuple(assumptions))
    together = Reporter("Closed, layers together, step", joint.continuation.max_steps)
    try:
        inputs = back(
            target.network,
            found,
            gradients,
            update.precision,
            rank_tolerance,
            tolerance,
            target.value_range,
            joint,
            together,
        )
    except OutOfTime:
        inputs = "the time was up"
    features = _features(found)
    if isinstance(inputs, str):
        reason = f"{_of(found.found, found.count)} and what {found.layer} reads of them, but no inputs: {inputs}"
        return Outcome(Status.PARTIAL, reason, (), tuple(assumptions), features)
    return _verdict(target, update, found, inputs, visible, tuple(assumptions), features)


def nowhere(target: Target, count: int) -> str:
    """Why samples cannot be told apart anywhere in the network."""
    most = largest_batch(target.network, target.loss)
    return (
        f"nowhere in the network do {count} samples leave two Linear layers' gradients, or the last one's, rank to "
        f"spare: one gradient would tell up to {most} samples apart here, by count"
    )


def _of(some: int, count: int) -> str:
    return f"the labels of all {count} samples" if some == count else f"the labels of {some} of {count} samples"


def _features(found: Features) -> BatchFeatures:
    times = torch.tensor(found.times, device=found.samples.x.device)
    shape = found.spaces.head.network.input_shape
    values = found.samples.x.reshape(-1, *shape).repeat_interleave(times, 0)
    return BatchFeatures(found.layer, values, found.samples.labels.repeat_interleave(times))


def _verdict(
    target: Target,
    update: Update,
    found: Features,
    inputs: Inputs,
    visible: float,
    assumptions: tuple[str, ...],
    features: BatchFeatures,
) -> Outcome:
    x, labels, error, ambiguous = _scaled(target, found, inputs)
    times = torch.tensor(found.times, device=x.device)
    x, labels = x.repeat_interleave(times, 0), labels.repeat_interleave(times)
    error, ambiguous = error.repeat_interleave(times), ambiguous.repeat_interleave(times)
    # The gradient is the mean over all samples, the recomputed one over those that were found.
    part = len(x) / found.count
    mean = Update({name: g / part for name, g in update.gradients.items()}, update.header)
    x, error = along_hidden(target, mean, x, labels, error)
    checked = certify(target, mean, x, labels, factors=False)
    agrees, rms = checked.residual <= update.tolerance, float(error.square().mean().sqrt())
    explained = 1 + rms / float(x.square().mean().sqrt().clamp(min=1e-300)) / update.precision
    unexplained = checked.roundings / explained
    low, high = target.value_range or (float(x.min()), float(x.max()))
    missed = agrees and checked.residual > SOLVED and unexplained > EXPLAINED
    doubt = f"is missed by {unexplained:.0f} times what rounding explains" if missed else _doubt(target, x, rms)
    samples = []
    for at in range(len(x)):
        status, reason = _of_sample(found, inputs, agrees, bool(error[at] <= visible * (high - low)))
        if status is Status.EXACT and doubt is not None:
            status, reason = Status.REPRODUCED, f"the gradient {doubt}"
        if status is Status.EXACT and range_misfit(x[at], target.value_range)[0]:
            status, reason = Status.REPRODUCED, f"some of its values are outside the value range {target.value_range}"
        if status is Status.EXACT and ambiguous[at]:
            status, reason = Status.AMBIGUOUS, "another scale and label give the same gradient inside the value range"
        samples.append(Sample(status, float(labels[at]), float(error[at]), reason))
    certified = sum(sample.status is Status.EXACT for sample in samples)
    answer = Answer(
        x,
        labels,
        float("nan"),
        checked.residual,
        rms,
        inputs.layers,
        inputs.joint,
        parameter=checked.parameter,
        unexplained=unexplained,
        samples=tuple(samples),
    )
    told = f"gradient residual {checked.residual:.1e}, estimated error {rms:.1e}"
    if certified == found.count and agrees:
        status, reason = Status.EXACT, f"all {found.count} samples; {told}"
    elif certified:
        left = "what is left of the gradient is rounding" if agrees else "the others are left in the gradient"
        status, reason = Status.PARTIAL, f"{certified} of {found.count} samples are certified; {left}; {told}"
    else:
        worst = samples[0]
        status, reason = worst.status, f"{len(samples)} of {found.count} samples: {worst.reason}; {told}"
    return Outcome(status, reason, (answer,), assumptions, features)


def _of_sample(found: Features, inputs: Inputs, agrees: bool, sharp: bool) -> tuple[Status, str]:
    """One sample's status, before its scale is looked at."""
    joint = inputs.joint
    if joint is not None and joint.free:
        left = f"{' and '.join(joint.layers)} jointly leave {joint.free} of {joint.unknowns} dimensions free"
        return Status.RANK_DEFICIENT, left
    opened = next((layer for layer in inputs.layers if layer.open_since is not None), None)
    if joint is None and opened is not None and not agrees:
        return Status.RANK_DEFICIENT, f"{opened.name} leaves {opened.free} of {opened.unknowns} dimensions free"
    if not agrees and (found.complete or found.spaces.head.value_id != 0):
        return Status.NOT_CONVERGED, "the recomputed gradient does not agree"
    if not sharp:
        return Status.ILL_CONDITIONED, "rounding may have moved it visibly"
    if agrees:
        return Status.EXACT, "the gradient of all samples agrees"
    return Status.EXACT, f"its own gradient is a part of that of {found.layer}, of rank one, to rounding"


def _doubt(target: Target, x: Float[Tensor, "b ..."], error: float) -> str | None:
    """Why inputs with the gradient that was sent are not called exact; None where nothing is against it."""
    statistics = statistics_missed(target, x, error)
    if statistics > EXPLAINED:
        return f"agrees, {STATISTICS.format(statistics)}"
    return f"agrees, {HIDDEN}" if len(x) > 1 and norms_over_maps(target.network) else None


def _scaled(
    target: Target, found: Features, inputs: Inputs
) -> tuple[Float[Tensor, "b ..."], Float[Tensor, " b"], Float[Tensor, " b"], Tensor]:
    """Of each sample the scale that fits the value range better, where two give the same gradient: inputs, labels,
    errors, and whether both fit."""
    x, labels, error = inputs.x.clone(), found.samples.labels.clone(), inputs.error.clone()
    ambiguous = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for at, (label, factor) in enumerate(found.samples.others):
        if factor == 1 or not target.network.scalable:
            opposite = mirrored(target, x[at : at + 1], labels[at : at + 1])
            if opposite is None:
                continue
            label, factor = opposite, -1.0
        own, other = (range_misfit(each, target.value_range) for each in (x[at], x[at] * factor))
        ambiguous[at] = own[0] == other[0]
        if other < own:
            x[at], labels[at], error[at] = x[at] * factor, label, error[at] * abs(factor)
    return x, labels, error, ambiguous
