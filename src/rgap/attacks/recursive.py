"""R-GAP: the closed-form recursive attack (Zhu and Blaschko 2021, arXiv:2010.07733, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.attacks import kinks
from rgap.attacks.base import (
    AS_ONE,
    MIXTURE,
    Answer,
    Attack,
    Reconstruction,
    Status,
    gradient_residual,
    judge,
)
from rgap.attacks.progress import Reporter
from rgap.checks import Preflight
from rgap.inversion.history import Candidate, Paths
from rgap.inversion.layer import Solver
from rgap.inversion.layer import bytes_needed as layer_bytes
from rgap.inversion.output import OutputCandidates, output_candidates
from rgap.inversion.recursion import recurse
from rgap.inversion.state import Observation, State
from rgap.memory import free, readable
from rgap.nn.activations import IDENTITY, Activation
from rgap.nn.chain import Kind, NotAChain, Obstacle
from rgap.nn.layers import Layer
from rgap.nn.losses import MarginLoss
from rgap.nn.network import Network
from rgap.nn.ops import Elementwise, Gather, Linear
from rgap.target import Target
from rgap.update import Update, tolerated

MOST, CANDIDATES = 64, 2
"""Updates that are followed at once, at the most; candidates that each may have on the way, about."""


def settled(eps: float) -> float:
    """A gradient residual below this leaves no unit to look for on the other side of its kink.

    It is some hundred roundings of the gradient, and not less than float64 solves reach on conditions of 1e6. Where the
    gradient is coarse, as that of a weight difference is, it is below what an answer is judged by.
    """
    return max(min(200 * eps, tolerated(eps) / 2), 1e-10)


@dataclass(frozen=True, eq=False)
class _Begun:
    """What is known of one update before the recursion."""

    gradients: dict[str, Tensor]
    start: OutputCandidates | None
    assumptions: tuple[str, ...]
    ended: tuple[Status, str] | None = None
    """Status and reason, if there is nothing to follow."""


@dataclass(frozen=True)
class Recursive(Attack):
    """From the last layer to the first, each layer's input is the least-squares solution of its constraints.

    Label and margin are inferred, and every root is followed. The certificate, the gradient recomputed through the
    model itself, decides which answers are given.

    Args:
        rank_tolerance: singular values below this fraction of the largest count as zero. The default follows the
            gradient's rounding eps as eps^(2/3): a direction that is kept is known to eps^(1/3) or better.
        visible: an estimated error above this fraction of the value range (or of the input's own spread) is called
            ill-conditioned, not exact.
        seed: of the random probe that estimates errors.
        solver: for what a layer's gradient alone does not tell: ``direct`` factors a dense matrix, ``iterative`` takes
            conjugate gradients and memory linear in the unknowns, ``auto`` whichever needs fewer operations. The
            method of every layer is in the answer's `layers`.
    """

    rank_tolerance: float | None = None
    visible: float = 0.01
    seed: int = 0
    solver: Solver = "auto"

    def obstacle(self, target: Target, samples: int) -> str | None:
        found = obstacle(target)
        if found is not None:
            return f"the recursion cannot pass this model: {found}"
        try:
            _together(target.network, self.solver)
        except MemoryError as error:
            return str(error)
        return MIXTURE.format(samples) if samples > 1 else None

    def run(self, target: Target, update: Update, checks: Preflight) -> Reconstruction:
        return self.run_many(target, [update], [checks])[0]

    def run_many(self, target: Target, updates: Sequence[Update], checks: Sequence[Preflight]) -> list[Reconstruction]:
        """All updates at once, or as many as memory holds: those of one rounding share every solve."""
        if not updates:
            return []
        found = obstacle(target)
        if found is not None:
            raise NotAChain(target.obstacles or [Obstacle("forward", found, Kind.SETTING, "")])
        begun = [self._begin(target, update) for update in updates]
        answers: dict[int, tuple[list[Answer], str]] = {}
        ready = [at for at, each in enumerate(begun) if each.ended is None]
        for eps in dict.fromkeys(updates[at].precision for at in ready):
            alike = [at for at in ready if updates[at].precision == eps]
            most = _together(target.network, self.solver)
            for start in range(0, len(alike), most):
                part = alike[start : start + most]
                together = self._follow(target, [updates[at] for at in part], [begun[at] for at in part], eps)
                answers.update(zip(part, together, strict=True))
        return [
            self._ended(target, update, each, check, *answers.get(at, ([], "")))
            for at, (update, each, check) in enumerate(zip(updates, begun, checks, strict=True))
        ]

    def _begin(self, target: Target, update: Update) -> _Begun:
        """What the last layer's gradient tells, and the cases in which it tells nothing."""
        network = target.network
        gradients = {name: g.double().to(target.device) for name, g in update.gradients.items()}
        assumptions: tuple[str, ...] = ()
        if target.batch_size != 1 or update.header.batch_size != 1:
            assumptions = (AS_ONE,)
        last = network.layers[-1]
        heard = [layer for layer in network.layers if layer.weight_name in gradients]
        empty = next((layer for layer in reversed(heard) if not gradients[layer.weight_name].any()), None)
        if empty is not None:
            cause = "the loss is saturated" if empty is last else "all units after it are dead"
            reason = f"the gradient of {empty.weight_name} is zero: {cause}"
            return _Begun(gradients, None, assumptions, (Status.GRADIENT_ZERO, reason))
        if network.scalable:
            assumptions += ("the gradient was not scaled: here a scaled one is that of a brighter or darker input",)
        start = output_candidates(last, _before(network), target.loss, gradients, update.precision)
        assumptions += start.assumptions
        if len(start.labels) == 0:
            reason = start.reason or f"under {target.loss.name} loss no sample gives this last gradient"
            return _Begun(gradients, None, assumptions, (Status.NOT_CONVERGED, reason))
        return _Begun(gradients, start, assumptions)

    def _ended(
        self,
        target: Target,
        update: Update,
        begun: _Begun,
        checks: Preflight,
        answers: list[Answer],
        stopped: str,
    ) -> Reconstruction:
        """The verdict on one update's answers."""
        assumptions, tolerance = begun.assumptions, update.tolerance

        def ended(status: Status, reason: str, answers: tuple[Answer, ...] = ()) -> Reconstruction:
            return Reconstruction(
                self.name, status, reason, answers, assumptions, checks, tolerance, target.value_range
            )

        if begun.start is None or begun.ended is not None:
            return ended(*(begun.ended or (Status.NOT_CONVERGED, "")))
        if not answers:
            return ended(Status.NOT_CONVERGED, stopped)
        best = min(a.gradient_residual for a in answers)
        # Where none agrees, those that come as near as the nearest are no worse than it.
        good = [a for a in answers if a.gradient_residual <= max(tolerance, 3 * best)]
        good.sort(key=lambda a: _misfit(a.inputs, target.value_range))
        if len(good) > 1 and target.value_range is not None:
            assumptions += (f"of {len(good)} answers the one that fits the value range {target.value_range} is first",)
        assumptions += tuple({a.joint.prior: None for a in good if a.joint is not None})
        status, reason = self._judge(good, target, tolerance)
        if status is Status.NOT_CONVERGED:
            reason += _saturated(target, begun.start, update.precision, tolerance)
        if update.samples(target) > 1 and status in (Status.EXACT, Status.AMBIGUOUS):
            status, reason = Status.REPRODUCED, f"one input that stands for {update.samples(target)} samples; {reason}"
        return ended(status, reason, tuple(good))

    def _follow(
        self, target: Target, updates: Sequence[Update], begun: Sequence[_Begun], eps: float
    ) -> list[tuple[list[Answer], str]]:
        """Of every update all candidates to their inputs, with certificates; and why none got there, if none did."""
        network = target.network
        starts = [each.start for each in begun if each.start is not None]
        followed = [start.select(start.one_per_direction) if network.scalable else start for start in starts]
        of = [at for at, heads in enumerate(followed) for _ in heads.labels]
        own = [s for heads in followed for s in range(len(heads.labels))]
        k = torch.cat([heads.k for heads in followed]).reshape(-1, *network.shapes[-1])
        z = torch.cat([heads.z for heads in followed]).reshape(-1, *network.shapes[-1])
        rank_tolerance = eps ** (2 / 3) if self.rank_tolerance is None else self.rank_tolerance
        gradients = {name: torch.stack([each.gradients[name] for each in begun]) for name in begun[0].gradients}
        observed = Observation(gradients, eps, rank_tolerance, self.seed, self.solver)
        ends: list[list[Candidate]] = [[] for _ in updates]
        stopped: list[dict[str, None]] = [{} for _ in updates]
        errors = torch.cat([heads.k_error for heads in followed])
        state = State(z, k, None, torch.zeros_like(z))
        paths = Paths.begin(state, torch.tensor(of, device=z.device), errors)
        reached = recurse(network, observed, paths, Reporter(self.name, len(network.segments)))
        for end in reached:
            s = end.root
            at, heads, start = of[s], followed[of[s]], starts[of[s]]
            label, margin = heads.labels[own[s] : own[s] + 1], float(heads.margins[own[s]])
            end = replace(end, cotangent=k[s : s + 1], label=label, margin=margin)
            end = self.finish(target, observed.one(at), end)
            if end.stop is not None:
                stopped[at]["; ".join(filter(None, (str(end.stop), end.note)))] = None
                continue
            if end.joint is None or end.joint.converged:
                x = kinks.settle(network, begun[at].gradients, end.value, end.cotangent, settled(eps))
                end = replace(end, value=x)
            if network.scalable:  # the other candidates' inputs are the same one, scaled: their gradients agree
                size, length = start.k.flatten(1).norm(dim=1), float(end.cotangent.norm())
                along = (start.k.flatten(1) @ end.cotangent.flatten()) > 0
                for twin in along.nonzero().flatten().tolist():
                    label, margin = start.labels[twin : twin + 1], float(start.margins[twin])
                    ends[at].append(end.scaled(length / float(size[twin]), label, margin))
            else:
                ends[at].append(end)
        found = []
        for at, update in enumerate(updates):
            answers = []
            for end in ends[at]:
                x = end.value.reshape(1, *target.input_shape)
                label = end.label.to(x.device)
                residual = gradient_residual(target, update, x, label)
                answers.append(Answer(x, label, end.margin, residual, end.std, end.layers, end.joint, end.note))
            found.append((answers, "; ".join(stopped[at])))
        return found

    def finish(
        self,
        target: Target,
        observed: Observation,
        candidate: Candidate,
    ) -> Candidate:
        """What is still done for a candidate after the recursion; `Closed` solves jointly what it left open.

        Args:
            observed: of the candidate's update alone.
        """
        return candidate

    def _judge(self, answers: list[Answer], target: Target, tolerance: float) -> tuple[Status, str]:
        """The status that the first answer deserves."""
        best = answers[0]
        residual, joint = f"gradient residual {best.gradient_residual:.1e}", best.joint
        if joint is not None and joint.free:
            together = f"{' and '.join(joint.layers)} together leave {joint.free} of {joint.unknowns} dimensions free"
            settled = "" if joint.converged else f", and {joint.steps} steps did not settle the rest"
            return Status.RANK_DEFICIENT, f"{together}{settled}; {residual}"
        if joint is not None and not joint.converged:
            together = f"{' and '.join(joint.layers)} together determine the input"
            return Status.NOT_CONVERGED, f"{together}, but {joint.steps} steps did not find it; {residual}"
        status, reason = judge(best, tolerance, target.value_range, self.visible)
        if status is not Status.EXACT or len(answers) == 1:
            return status, reason
        low, high = target.value_range or (float(best.inputs.min()), float(best.inputs.max()))
        inside = [a for a in answers if _outside(a.inputs, target.value_range) <= 10 * a.error + 1e-3 * (high - low)]
        if len(inside) == 1:
            return status, reason
        return Status.AMBIGUOUS, f"{len(answers)} inputs reproduce the gradient, {len(inside)} inside the value range"


def _saturated(target: Target, start: OutputCandidates, eps: float, tolerance: float) -> str:
    """What a nearly saturated loss did to the client's own gradient; empty if it did nothing that shows."""
    k = float(start.k.abs().max())
    if isinstance(target.loss, MarginLoss) or k == 0 or eps / k <= tolerance:
        return ""
    return f"; the loss is nearly saturated: k is {k:.1e}, and the rounding of 1 - p may be {min(eps / k, 1):.0%} of it"


def bytes_needed(network: Network, solver: Solver = "auto") -> tuple[int, int]:
    """About how much memory the recursion takes: for each candidate that is followed, and whatever their number.

    Each layer is let go of before the next one. What stays are gradients, weights, and what was found at each layer.
    """
    layers = network.layers
    parameters = sum(layer.weight.numel() for layer in layers)
    kept = sum(5 * layer.weight_rows + layer.unknowns for layer in layers)
    largest = max(layer_bytes(layer, solver) for layer in layers)
    return largest + 8 * (kept + 2 * parameters), 8 * 4 * parameters


def _together(network: Network, solver: Solver) -> int:
    """How many updates are followed at once.

    Raises:
        MemoryError: not even one can be.
    """
    each, shared = bytes_needed(network, solver)
    there = free(network.device)
    if each + shared > there:
        raise MemoryError(
            f"the recursion would take about {readable(each + shared)}, {readable(there)} are free: expected "
            "a smaller input, or solver='iterative'"
        )
    return max(1, min(MOST, int((there - shared) / 2 / (CANDIDATES * each))))


def obstacle(target: Target) -> str | None:
    """Why the recursion has nowhere to begin; None if it has."""
    try:
        network = target.network
    except NotImplementedError as error:
        return str(error)
    place = _last(network)
    if place is None:
        return f"{network.nodes[-1].op} is not a layer whose gradient is shared: the loss takes its raw output"
    if math.prod(network.shapes[-1]) != target.loss.outputs:
        return f"{math.prod(network.shapes[-1])} outputs a sample, the loss takes {target.loss.outputs}"
    return None


def _last(network: Network) -> Layer | None:
    """The layer whose raw output the loss takes."""
    for node in reversed(network.nodes):
        if isinstance(node.op, Linear):
            layer = node.op.layer
            return layer if node.op.has_gradient and layer.positions == 1 and layer.groups == 1 else None
        if not isinstance(node.op, Gather):
            return None
    return None


def _before(network: Network) -> Activation:
    """The activation in front of the last layer, the identity if there is another operation."""
    value = next(n.reads[0] for n in network.nodes if isinstance(n.op, Linear) and n.op.layer is network.layers[-1])
    while value and isinstance(network.nodes[value - 1].op, Gather):
        value = network.nodes[value - 1].reads[0]
    op = network.nodes[value - 1].op if value else None
    return op.activation if isinstance(op, Elementwise) else IDENTITY


def _outside(x: Tensor, value_range: tuple[float, float] | None) -> float:
    """Root mean square distance to the value range; 0 if it is not known."""
    if value_range is None:
        return 0.0
    return float((x - x.clamp(*value_range)).square().mean().sqrt())


def _misfit(x: Tensor, value_range: tuple[float, float] | None) -> tuple[float, float]:
    """How badly an input fits the range: first by what lies outside it, then by how little of it is used."""
    spread = float(x.max() - x.min())
    if value_range is None:
        return (0.0, 0.0)
    width = value_range[1] - value_range[0]
    outside = _outside(x, value_range) / width
    return (outside if outside > 1e-3 else 0.0, -min(spread / width, 1.0))
