"""The status that answers in closed form deserve."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rgap.attacks.result import Answer, Status


def judge(
    answer: Answer, tolerance: float, value_range: tuple[float, float] | None, visible: float
) -> tuple[Status, str]:
    """The status of one answer in closed form, and why.

    Args:
        visible: an estimated error above this fraction of the value range, or of the input's own spread, is no answer.
    """
    residual = f"gradient residual {answer.gradient_residual:.1e}"
    opened = answer.layers[0].open_since if answer.joint is None else None
    if opened is not None:
        layer = next(layer for layer in answer.layers if layer.name == opened)
        note = f"; {answer.note}" if answer.note else ""
        left = f"{layer.name} leaves {layer.free} of {layer.unknowns} dimensions free"
        return Status.RANK_DEFICIENT, f"{left}; {residual}{note}"
    if not answer.gradient_residual <= tolerance:
        return Status.NOT_CONVERGED, f"{residual}, tolerance {tolerance:.1e}"
    low, high = value_range or (float(answer.inputs.min()), float(answer.inputs.max()))
    if not answer.error <= visible * (high - low):
        return Status.ILL_CONDITIONED, f"{residual}, but rounding may have moved each value by {answer.error:.1e}"
    return Status.EXACT, f"{residual}, estimated error {answer.error:.1e}"


def judge_joint(
    answers: Sequence[Answer], tolerance: float, value_range: tuple[float, float] | None, visible: float
) -> tuple[Status, str]:
    """The status of several answers, the best one first, some of which may come from a joint solve."""
    best = answers[0]
    residual, joint = f"gradient residual {best.gradient_residual:.1e}", best.joint
    if joint is not None and joint.free:
        left = f"{' and '.join(joint.layers)} jointly leave {joint.free} of {joint.unknowns} dimensions free"
        converged = "" if joint.converged else f", and {joint.steps} steps did not settle the rest"
        return Status.RANK_DEFICIENT, f"{left}{converged}; {residual}"
    if joint is not None and not joint.converged:
        determined = f"{' and '.join(joint.layers)} jointly determine the input"
        return Status.NOT_CONVERGED, f"{determined}, but {joint.steps} steps did not find it; {residual}"
    status, reason = judge(best, tolerance, value_range, visible)
    if status is not Status.EXACT or len(answers) == 1:
        return status, reason
    low, high = value_range or (float(best.inputs.min()), float(best.inputs.max()))
    inside = [a for a in answers if _outside(a.inputs, value_range) <= 10 * a.error + 1e-3 * (high - low)]
    if len(inside) == 1:
        return status, reason
    return Status.AMBIGUOUS, f"{len(answers)} inputs reproduce the gradient, {len(inside)} inside the value range"


def _outside(x: Tensor, value_range: tuple[float, float] | None) -> float:
    """Root mean square distance to the value range; 0 if it is not known."""
    if value_range is None:
        return 0.0
    return float((x - x.clamp(*value_range)).square().mean().sqrt())


def range_misfit(x: Tensor, value_range: tuple[float, float] | None) -> tuple[float, float]:
    """How badly an input fits the range: first by what lies outside it, then by how little of it is used."""
    if value_range is None:
        return (0.0, 0.0)
    width = value_range[1] - value_range[0]
    outside = _outside(x, value_range) / width
    return (outside if outside > 1e-3 else 0.0, -min(float(x.max() - x.min()) / width, 1.0))
