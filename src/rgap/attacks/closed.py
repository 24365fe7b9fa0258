"""R-GAP: the closed-form recursive attack (Zhu and Blaschko 2021, arXiv:2010.07733, Algorithm 1 and Section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from rgap.attacks.base import MIXTURE, BatchAttack
from rgap.attacks.batch import invert_batch
from rgap.attacks.capacity import updates_at_once
from rgap.attacks.last_layer import Begun, begin, obstacle, saturated
from rgap.attacks.local_steps import invert_steps
from rgap.attacks.progress import Reporter
from rgap.attacks.result import Outcome, Status
from rgap.attacks.verdict import answer, judge, range_misfit
from rgap.inversion.history import Candidate, Paths
from rgap.inversion.joint import JointSolve
from rgap.inversion.layer import Solver
from rgap.inversion.output import COVERS, OutputCandidates
from rgap.inversion.recursion import recurse
from rgap.inversion.refine import STEPS, refine_input, with_own_statistics
from rgap.inversion.state import Observation, State
from rgap.inversion.subspace.head import largest_batch
from rgap.inversion.subspace.peel import Search
from rgap.inversion.system import ConstraintSystem
from rgap.linalg.deadline import used
from rgap.nn.obstacles import Kind, NotAChain, Obstacle
from rgap.target import Target
from rgap.update import Update, tolerated

JOINT = JointSolve()
SEARCH = Search()


@dataclass(frozen=True)
class Recursive(BatchAttack):
    """From the last layer to the first, each layer's input is the least-squares solution of its constraints.

    Label and margin are inferred, and every root is followed. The certificate, the gradient recomputed through the
    model itself, decides which answers are given.

    Args:
        rank_tolerance: singular values below this fraction of the largest count as zero. The default follows the
            gradient's rounding eps as eps^(2/3): a direction that is kept is known to eps^(1/3) or better.
        visible: an estimated error above this fraction of the value range (or of the input's own spread) is called
            ill-conditioned, not exact.
        seed: of the random probe that estimates errors.
        solver: for what a layer's gradient alone does not determine: ``direct`` factors a dense matrix, ``iterative``
            takes conjugate gradients and memory linear in the unknowns, ``auto`` whichever needs fewer operations. The
            method of every layer is in the answer's `layers`.
    """

    rank_tolerance: float | None = None
    visible: float = 0.01
    seed: int = 0
    solver: Solver = "auto"
    virtual: ClassVar[bool] = False
    """Whether layers may tell what those behind them leave open."""

    def obstacle(self, target: Target, samples: int) -> str | None:
        found = obstacle(target)
        if found is not None:
            return f"the recursion cannot pass this model: {found}"
        try:
            updates_at_once(target.network, self.solver)
        except MemoryError as error:
            return str(error)
        return MIXTURE.format(samples) if samples > 1 else None

    def run_many(self, target: Target, updates: Sequence[Update]) -> list[Outcome]:
        """All updates at once, or as many as memory holds: those of one rounding share every solve."""
        _check(target)
        begun = [begin(target, update) for update in updates]
        outcomes = {at: each for at, each in enumerate(begun) if isinstance(each, Outcome)}
        starts = {at: each for at, each in enumerate(begun) if isinstance(each, Begun)}
        for eps in dict.fromkeys(each.update.precision for each in starts.values()):
            alike = [at for at, each in starts.items() if each.update.precision == eps]
            most = updates_at_once(target.network, self.solver)
            for first in range(0, len(alike), most):
                part = alike[first : first + most]
                for at, ends in zip(part, self._invert(target, [starts[at] for at in part], eps), strict=True):
                    outcomes[at] = self._outcome(target, starts[at], ends)
        return [outcomes[at] for at in range(len(updates))]

    def _invert(self, target: Target, starts: Sequence[Begun], eps: float) -> list[list[Candidate]]:
        """Of every update all candidates, followed to the input or to where they stop."""
        network = target.network
        outputs = [each.output for each in starts]
        if network.scalable:
            outputs = [each.select(each.one_per_direction) for each in outputs]
        of = [at for at, output in enumerate(outputs) for _ in output.labels]
        batch = OutputCandidates.concatenate(outputs)
        k, z = batch.k.reshape(-1, *network.shapes[-1]), batch.z.reshape(-1, *network.shapes[-1])
        gradients = {name: torch.stack([each.gradients[name] for each in starts]) for name in starts[0].gradients}
        rank_tolerance = eps ** (2 / 3) if self.rank_tolerance is None else self.rank_tolerance
        observed = Observation(gradients, eps, rank_tolerance, self.seed, self.solver)
        state = State(z, k, None, torch.zeros_like(z))
        paths = Paths.begin(state, torch.tensor(of, device=z.device), batch.k_error / COVERS)
        ends: list[list[Candidate]] = [[] for _ in starts]
        for end in recurse(network, observed, paths, Reporter(self.name, len(network.segments)), self.virtual):
            at, s = of[end.root], slice(end.root, end.root + 1)
            end = replace(end, cotangent=k[s], label=batch.labels[s], margin=float(batch.margins[end.root]))
            end = self.finish(target, observed.one(at), end)
            if end.stop is None and (end.joint is None or end.joint.converged):
                # The output's own value takes no part: of a margin it may be known badly.
                nothing = torch.zeros_like(z[s])
                output = State(z[s], end.cotangent, nothing, nothing)
                system = ConstraintSystem(network.own, output, starts[at].gradients, eps)
                together = end.joint is not None or any(layer.with_others for layer in end.layers)
                value, agrees = end.value, agreement(eps)
                if system.network.coupled:
                    value = with_own_statistics(system, value, end.std, agrees)
                end = replace(end, value=refine_input(system, value, agrees, STEPS if together else 0))
            ends[at] += _scaled(starts[at].output, end) if network.scalable and end.stop is None else [end]
        return ends

    def finish(self, target: Target, observed: Observation, candidate: Candidate) -> Candidate:
        """What is still done for a candidate after the recursion; `Closed` solves jointly what it left open.

        Args:
            observed: of the candidate's update alone.
        """
        return candidate

    def _outcome(self, target: Target, start: Begun, ends: Sequence[Candidate]) -> Outcome:
        """The verdict on one update's candidates."""
        assumptions, update, tolerance = start.assumptions, start.update, start.update.tolerance
        answers = [answer(target, update, end, end.label) for end in ends if end.stop is None]
        if not answers:
            stops = dict.fromkeys("; ".join(filter(None, (str(end.stop), end.note))) for end in ends)
            return Outcome(_failed(ends), "; ".join(stops), assumptions=assumptions)
        best = min(a.gradient_residual for a in answers)
        # Where none agrees, those that come as near as the nearest are no worse than it.
        good = [a for a in answers if a.gradient_residual <= max(tolerance, 3 * best)]
        good.sort(key=lambda a: range_misfit(a.inputs, target.value_range))
        if len(good) > 1 and target.value_range is not None:
            assumptions += (f"of {len(good)} answers the one that fits the value range {target.value_range} is first",)
        assumptions += tuple({a.joint.prior: None for a in good if a.joint is not None and a.joint.prior is not None})
        status, reason = judge(good, target, update, self.visible)
        if status is Status.NOT_CONVERGED:
            reason += saturated(target, start.output, update.precision, tolerance)
        if status in (Status.NOT_CONVERGED, Status.RANK_DEFICIENT) and good[0].joint is None:
            status = _failed(ends, status)
        return Outcome(status, reason, tuple(good), assumptions)


@dataclass(frozen=True)
class Closed(Recursive):
    """The recursion as far as it is exact, then all constraints of the layers in front of it jointly.

    On a network whose layers all have full rank it is `Recursive`. Where a layer leaves dimensions of its input free,
    everything after it is known exactly, and the layers from the input up to it are solved for the network's input.
    What no constraint determines, a prior does: it is listed in the assumptions, and how many dimensions it decided is
    in the answer's `joint` report.

    An update of several samples is told apart, sample by sample, where two Linear layers follow each other, or at the
    last layer (`rgap.inversion.subspace`); each sample has its own verdict in `Reconstruction.samples`.

    Args:
        joint: how those layers are solved jointly.
        search: how the samples of a batch are told apart.
    """

    joint: JointSolve = JOINT
    search: Search = SEARCH
    virtual: ClassVar[bool] = True

    def obstacle(self, target: Target, samples: int) -> str | None:
        if samples == 1:
            return super().obstacle(target, samples)
        found = obstacle(target)
        if found is not None:
            return f"the recursion cannot pass this model: {found}"
        most = largest_batch(target.network, target.loss)
        if samples > most:
            apart = f"no layer tells more than {most} apart" if most else "no layer tells two apart"
            return f"of {samples} samples in one update {apart}: too few outputs, or no two Linear layers in a row"
        return None

    def run_many(self, target: Target, updates: Sequence[Update]) -> list[Outcome]:
        """Updates of one sample together, and each one of several on its own."""
        _check(target)
        alone = [at for at, update in enumerate(updates) if update.samples(target) == 1]
        ones = super().run_many(target, [updates[at] for at in alone]) if alone else []
        outcomes = dict(zip(alone, ones, strict=True))
        for at, update in enumerate(updates):
            if at not in outcomes:
                eps = update.precision
                tolerance = eps ** (2 / 3) if self.rank_tolerance is None else self.rank_tolerance
                outcome = invert_batch(target, update, self.search, self.joint, agreement(eps), tolerance, self.visible)
                late = used() >= 1 and outcome.status is not Status.EXACT
                outcomes[at] = replace(outcome, status=Status.CUT_OFF) if late else outcome
        return [outcomes[at] for at in range(len(updates))]

    def follow_steps(self, target: Target, update: Update) -> Outcome | None:
        return invert_steps(target, update, self.search, self.visible)

    def finish(self, target: Target, observed: Observation, candidate: Candidate) -> Candidate:
        """Solve jointly from the input to the last value that is known for certain; nothing if the input is."""
        if candidate.stop is None and candidate.layers[0].open_since is None and candidate.told is None:
            return candidate
        report = Reporter(f"{self.name}, layers together, step", self.joint.continuation.max_steps)
        return self.joint(target.network, observed, candidate, target.value_range, agreement(observed.eps), report)


Virtual = Closed
"""The same, by the name of what it adds to the recursion: virtual constraints (Section 4)."""


def _failed(ends: Sequence[Candidate], status: Status = Status.NOT_CONVERGED) -> Status:
    """The status of candidates that did not lead to the input: cut off where there was no time for all of them."""
    return Status.CUT_OFF if any(end.cut_off for end in ends) else status


def _check(target: Target) -> None:
    """Raise NotAChain where the recursion has nowhere to begin."""
    found = obstacle(target)
    if found is not None:
        stops = [each for each in target.obstacles if each.kind is not Kind.PASSED]
        raise NotAChain(stops or [Obstacle("forward", found, Kind.SETTING, "")])


def agreement(eps: float) -> float:
    """A gradient residual below this leaves no unit to look for on the other side of its kink.

    It is some hundred roundings of the gradient, and not less than float64 solves reach on conditions of 1e6. Where the
    gradient is coarse, as that of a weight difference is, it is below what an answer is judged by.
    """
    return max(min(200 * eps, tolerated(eps) / 2), 1e-10)


def _scaled(output: OutputCandidates, end: Candidate) -> list[Candidate]:
    """All candidates along one's direction: in a network that scales their inputs are the same one, scaled."""
    size, length = output.k.flatten(1).norm(dim=1), float(end.cotangent.norm())
    along = (output.k.flatten(1) @ end.cotangent.flatten()) > 0
    return [
        end.scaled(length / float(size[twin]), output.labels[twin : twin + 1], float(output.margins[twin]))
        for twin in along.nonzero().flatten().tolist()
    ]
