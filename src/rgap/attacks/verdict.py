"""The status that answers in closed form deserve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.attacks.base import certify
from rgap.attacks.hidden import along_hidden
from rgap.attacks.result import Answer, Status
from rgap.attacks.statistics_missed import statistics_missed
from rgap.inversion.history import Candidate
from rgap.nn.losses import CrossEntropy
from rgap.target import Target
from rgap.update import Update

EXPLAINED = 5.0
"""So many times what rounding explains an answer may miss the update. Clean gradients stay at 1."""
SOLVED = 1e-12
"""A residual below is that of the solves in double precision, whatever the update's own rounding."""
STATED = 1 / 2
"""Of the error that moving every value by a whole step would cause: the nearest number is half a step away at most."""
USED = 1e-3
"""An input whose values differ by less than this part of the value range uses none of it."""

STATISTICS = "but the running statistics that were sent are missed by {:.0f} times what rounding explains"


def answer(target: Target, update: Update, end: Candidate, label: Tensor) -> Answer:
    """What a candidate stands for, with its certificate.

    Where the recomputed gradient misses the update by more than rounding explains, the error is that much larger.
    """
    x, label = end.value.reshape(1, *target.input_shape), label.to(end.value.device)
    x, undecided = _decided(x, end.twin, target.value_range)
    along, error = along_hidden(target, update, x, label, x.new_tensor([end.std]))
    # In a network that scales k is known up to its size, and another size is another input.
    k = None if target.network.scalable or not end.cotangent.numel() else end.cotangent
    found, std = certify(target, update, x, label, k=k), float(error[0])
    if along is not x:
        other = certify(target, update, along, label, k=k)
        x, found = (along, other) if other.residual < found.residual else (x, found)
    unexplained = found.roundings / (1 + _echo(x, std, update.precision))
    return Answer(
        x,
        label,
        end.margin,
        found.residual,
        STATED * std * (found.roundings if unexplained > 1 else 1.0),
        end.layers,
        end.joint,
        end.note,
        found.parameter,
        unexplained,
        found.factor,
        undecided,
        0 if end.known is None else int((~end.known).sum()),
        k_off=found.k_off,
    )


def _echo(x: Tensor, error: float, precision: float) -> float:
    """About how many roundings of the gradient an error of the input moves it by.

    By far fewer than the input itself: what rounding moves most is what the gradient hardly depends on.
    """
    size = float(x.square().mean().sqrt())
    return (error / size / precision) ** 0.25 if size else 0.0


def _decided(x: Tensor, twin: Tensor | None, value_range: tuple[float, float] | None) -> tuple[Tensor, int]:
    """Of two values that each number may have, the one inside the value range; and of how many numbers both are, or
    neither is."""
    if twin is None:
        return x, 0
    twin = twin.reshape(x.shape)
    undecided = twin != x
    if value_range is not None:
        inside, other = (_distance(each, value_range) == 0 for each in (x, twin))
        x = x.where(inside | ~other, twin)
        undecided &= inside == other
    return x, int(undecided.sum())


def judge(answers: Sequence[Answer], target: Target, update: Update, visible: float) -> tuple[Status, str]:
    """The status of the answers, the best one first, and why.

    Args:
        visible: an estimated error above this fraction of the value range, or of the input's own size, is no answer.
    """
    status, reason = _of_one(answers[0], target, update, visible)
    if status is Status.EXACT and len(answers) > 1:
        status, reason = _of_several(answers, target, reason)
    samples = update.samples(target)
    if samples > 1 and status in (Status.EXACT, Status.AMBIGUOUS, Status.REPRODUCED):
        return Status.REPRODUCED, f"one input that stands for {samples} samples; {reason}"
    return status, reason


def _of_one(best: Answer, target: Target, update: Update, visible: float) -> tuple[Status, str]:
    residual = f"gradient residual {best.gradient_residual:.1e}"
    left = _left_open(best)
    if left:
        return Status.RANK_DEFICIENT, f"{left}; {residual}" + (f"; {best.note}" if best.note else "")
    joint = best.joint
    if joint is not None and not joint.converged:
        determined = f"{' and '.join(joint.layers)} jointly determine the input"
        return Status.NOT_CONVERGED, f"{determined}, but {joint.steps} steps did not find it; {residual}"
    if not best.gradient_residual <= update.tolerance:
        return Status.NOT_CONVERGED, f"{residual} in {best.parameter}, tolerance {update.tolerance:.1e}"
    if best.factor != 1:
        residual = f"the update is {best.factor:.4g} times the gradient at this input; apart from that {residual}"
    if best.k_off:
        residual += f", with the k that was sent, of which {best.k_off:.1%} is the rounding of a loss nearly certain"
    low, high = target.value_range or (0.0, _width(best.inputs))
    if not best.error <= visible * (high - low):
        return Status.ILL_CONDITIONED, f"{residual}, but rounding may have moved each value by {best.error:.1e}"
    weaker = _weaker(best, target, update)
    if weaker:
        return Status.REPRODUCED, f"{residual}, {weaker}"
    if best.undecided:
        return Status.AMBIGUOUS, f"{residual}, but {best.undecided} values of the input may have another one each"
    return Status.EXACT, f"{residual}, estimated error {best.error:.1e}"


def _left_open(best: Answer) -> str:
    """Which dimensions of the input nothing determines; empty if all are determined."""
    joint = best.joint
    if joint is not None:
        if not joint.free:
            return ""
        converged = "" if joint.converged else f", and {joint.steps} steps did not settle the rest"
        names = " and ".join(joint.layers)
        return f"{names} jointly leave {joint.free} of {joint.unknowns} dimensions free{converged}"
    opened = best.layers[0].open_since if best.layers else None
    if opened is not None:
        layer = next(layer for layer in best.layers if layer.name == opened)
        return f"{layer.name} leaves {layer.free} of {layer.unknowns} dimensions free"
    if best.free:
        return f"what comes before {best.layers[0].name} hides {best.free} of {best.inputs.numel()} values"
    return ""


def _weaker(best: Answer, target: Target, update: Update) -> str:
    """Why an answer that reproduces the gradient need not be the client's; empty if nothing speaks against it."""
    if best.unexplained > EXPLAINED and best.gradient_residual > SOLVED:
        return (
            f"{best.unexplained:.0f} times what rounding explains: the gradient was computed more coarsely, changed, "
            "or is of several samples"
        )
    missed = statistics_missed(target, best.inputs, best.error)
    if missed > EXPLAINED:
        return STATISTICS.format(missed)
    value_range = target.value_range
    if value_range is not None and _outside(best, value_range):
        least, most = float(best.inputs.min()), float(best.inputs.max())
        return (
            f"but with values from {least:.3g} to {most:.3g}, outside the value range {value_range}: the gradient was "
            "scaled or changed, or the range is another one"
        )
    spent = (not target.loss.labels) + (best.factor != 1) + target.loss.outputs * (best.k_off != 0)
    if _numbers(target, update) <= best.inputs.numel() + spent:
        return "but so would any other gradient be: it holds no more numbers than the input has"
    return ""


def _numbers(target: Target, update: Update) -> int:
    """How many numbers the gradient of a sample is free to have."""
    count = sum(g.numel() for g in update.gradients.values() if g.any())
    if not isinstance(target.loss, CrossEntropy):
        return count
    use = target.graph.uses[-1]  # the rows of the last layer add up to zero
    last = [update.gradients.get(name or "") for name in (use.weight_name, use.bias_name)]
    return count - sum(g.numel() // target.loss.outputs for g in last if g is not None)


def _of_several(answers: Sequence[Answer], target: Target, reason: str) -> tuple[Status, str]:
    """Whether the value range tells the first of several answers that reproduce the gradient from the others."""
    best, value_range = answers[0], target.value_range
    inside = [each for each in answers if value_range is None or not _outside(each, value_range)]
    count = f"{len(answers)} inputs reproduce the gradient"
    if len(inside) != 1:
        return Status.AMBIGUOUS, f"{count}, {len(inside)} inside the value range"
    if value_range is not None and float(best.inputs.max() - best.inputs.min()) <= USED * _length(value_range):
        return Status.AMBIGUOUS, f"{count}; the only one inside the value range {value_range} uses none of it"
    return Status.EXACT, reason


def _width(x: Tensor) -> float:
    """The spread of an input, or its size if that is larger."""
    return max(float(x.max() - x.min()), float(x.square().mean().sqrt()))


def _length(value_range: tuple[float, float]) -> float:
    return value_range[1] - value_range[0]


def _distance(x: Tensor, value_range: tuple[float, float]) -> Tensor:
    return (x - x.clamp(*value_range)).abs()


def _rms_outside(x: Tensor, value_range: tuple[float, float]) -> float:
    """Root mean square distance to the value range."""
    return float(_distance(x, value_range).square().mean().sqrt())


def _outside(found: Answer, value_range: tuple[float, float]) -> bool:
    """Whether an answer lies farther outside the value range than its error explains."""
    return _rms_outside(found.inputs, value_range) > 10 * found.error + 1e-3 * _length(value_range)


def range_misfit(x: Tensor, value_range: tuple[float, float] | None) -> tuple[float, float]:
    """How badly an input fits the range: first by what lies outside it, then by how little of it is used."""
    if value_range is None:
        return (0.0, 0.0)
    outside = _rms_outside(x, value_range) / _length(value_range)
    return (outside if outside > 1e-3 else 0.0, -min(float(x.max() - x.min()) / _length(value_range), 1.0))


ODD = 1e-9
"""Relative difference below which two numbers are the same but for their sign."""


def mirrored(target: Target, x: Float[Tensor, "1 ..."], label: Float[Tensor, " 1"]) -> float | None:
    """The label with which -x gives the gradient of x, where every operation is an odd function; None if none does.

    A network of tanh without biases puts out -z for -x, and of two classes the other one's cotangent is then -k.
    """
    network, loss = target.network, target.loss
    values = network.forward(torch.cat([x, -x]))
    if not all(torch.allclose(value[1], -value[0], rtol=ODD, atol=ODD * float(value.abs().max())) for value in values):
        return None
    outputs = values[-1].flatten(1)
    k = loss.output_gradient(outputs[:1], label)
    for other in loss.labels or (-float(label),):
        there = loss.output_gradient(outputs[1:], label.new_tensor([other]))
        if float((there + k).norm()) <= ODD * float(k.norm()):
            return other
    return None
