"""A whole batch from one gradient: each sample's features by their spaces, and from there back to the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.by_values import input_by_values
from rgap.inversion.gauss_newton import Continuation, Solution, gauss_newton
from rgap.inversion.joint import JointSolve, names
from rgap.inversion.prior import Prior
from rgap.inversion.read_together import read_together
from rgap.inversion.refine import refined, with_own_statistics
from rgap.inversion.refine_sides import refine_sides
from rgap.inversion.report import JointReport, LayerReport
from rgap.inversion.samples import Passed, layer_by_layer
from rgap.inversion.state import Cause, Observation, State
from rgap.inversion.subspace.head import Spaces, spaces
from rgap.inversion.subspace.identify import Samples
from rgap.inversion.subspace.pattern import by_patterns
from rgap.inversion.subspace.peel import Search
from rgap.inversion.subspace.together import by_labels
from rgap.inversion.system import ConstraintSystem, Linearisation
from rgap.linalg.deadline import OutOfTime
from rgap.nn.losses import Loss
from rgap.nn.network import Network
from rgap.nn.ops import Linear
from rgap.nn.pools import Pool

LAST = Continuation(max_steps=4, doubt=(4,))
"""Steps from inputs that are nearly right."""
BLURRED = 1e-2
"""As what rounding a cotangent behind a batch norm counts at the most."""


@dataclass(frozen=True, eq=False)
class Features:
    """What is known of the samples of a batch in front of one layer."""

    spaces: Spaces
    """Of the gradient as it was sent."""
    samples: Samples
    count: int
    """The number of samples that the gradient is the mean of."""

    @property
    def layer(self) -> str:
        """The layer that reads them."""
        return self.spaces.head.layer.name

    @property
    def times(self) -> list[int]:
        """How many samples each one stands for: those that are the same are found once."""
        return [max(1, round(share * self.count)) for share in self.samples.share.tolist()]

    @property
    def found(self) -> int:
        return sum(self.times)

    @property
    def complete(self) -> bool:
        """Whether nothing is left in the spaces."""
        return len(self.samples) == self.spaces.left

    @cached_property
    def error(self) -> Float[Tensor, " b"]:
        """How far rounding may have moved each one's values (root mean square)."""
        samples, spaces = self.samples, self.spaces
        if samples.error is not None:
            return samples.error
        if spaces.second is None and not spaces.smooth:
            k = spaces.head.k(spaces.head.values(samples.x), samples.labels)
            return spaces.first.error(k * samples.share[:, None])
        condition = spaces.cotangent_condition(samples.labels) if spaces.smooth else spaces.condition(samples.labels)
        # Where the scale is told by the loss alone the condition holds at any.
        size = samples.x.norm(dim=1) if spaces.head.scalable else torch.ones_like(samples.share)
        row = condition.first.row(samples.x / size[:, None])
        return condition.error(condition.unknowns_of(row)) * size

    def residual(self, gradients: Mapping[str, Tensor]) -> float:
        """The largest relative distance of a layer's gradient, from the features on, to what the samples give."""
        head, samples = self.spaces.head, self.samples
        values = head.values(samples.x)
        ks = head.cotangents(values, samples.labels)
        share = torch.tensor(self.times).to(samples.x) / self.count
        worst = 0.0
        for node_id, node in enumerate(head.network.nodes):
            op, k = node.op, ks[node_id + 1]
            if not isinstance(op, Linear) or not op.has_gradient or k is None:
                continue
            if op.layer.weight_name not in gradients:
                continue
            layer = op.layer.side_by_side(len(share))
            k = k * share.reshape(-1, *[1] * (k.dim() - 1))
            found = layer.grad_weight(layer.pack_input(values[node.reads[0]]), layer.pack_output(k))
            given = layer.pack_weight(gradients[layer.weight_name][None])
            worst = max(worst, float((found - given).norm() / given.norm().clamp(min=1e-300)))
        return worst

    @property
    def scatter(self) -> float:
        """How far the features' errors move their cotangents, relatively."""
        head, samples = self.spaces.head, self.samples
        generator = torch.Generator(device=samples.x.device).manual_seed(0)
        draw = torch.randn(samples.x.shape, generator=generator, dtype=samples.x.dtype, device=samples.x.device)
        k, moved = (head.k(head.values(x), samples.labels) for x in (samples.x, samples.x + self.error[:, None] * draw))
        return float((moved - k).norm() / k.norm().clamp(min=torch.finfo(k.dtype).tiny))

    @property
    def state(self) -> State:
        """Value and cotangent of each one in the mean's gradient."""
        head, samples = self.spaces.head, self.samples
        values = head.values(samples.x)
        k = head.cotangents(values, samples.labels)[0]
        assert k is not None
        share = torch.tensor(self.times).to(k) / self.count
        wide = [-1, *[1] * (k.dim() - 1)]
        return State(values[0], k * share.reshape(wide), None, self.error.reshape(wide).expand(k.shape))


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of all samples that were found."""

    x: Float[Tensor, "b ..."]
    error: Float[Tensor, " b"]
    layers: tuple[LayerReport, ...] = ()
    """That were passed on the way to them."""
    joint: JointReport | None = None
    """If layers were solved jointly."""


def find_features(
    network: Network,
    loss: Loss,
    gradients: Mapping[str, Tensor],
    eps: float,
    count: int,
    search: Search,
    report: Callable[[int, float], None],
) -> Features | None:
    """The samples at the first place that gives them all, else at the one that gives the most; None if there is none.

    Args:
        count: the number of samples as the client tells it. Where the gradient's rank is larger, that counts.
    """
    best: Features | None = None
    for place in spaces(network, loss, gradients, eps):
        there = max(count, place.left)
        if place.second is None and not place.smooth:
            samples = by_patterns(place.reduced(), there, 4 * search.starts, search.rounds, search.seed)
        else:
            samples = search(place, there, report)
        if len(samples) < place.left:
            samples = by_labels(place, gradients, eps, there) or samples
        found = Features(place, samples, there)
        if best is None or len(found.samples) > len(best.samples):
            best = found
        if best.complete:
            break
    return best


def back(
    network: Network,
    features: Features,
    gradients: Mapping[str, Tensor],
    eps: float,
    rank_tolerance: float,
    tolerance: float,
    value_range: tuple[float, float] | None,
    solve: JointSolve,
    report: Callable[[int, float], None] = lambda step, distance: None,
) -> Inputs | str:
    """The inputs behind features of all samples, layer by layer or jointly; or why not.

    Args:
        tolerance: distance of the gradients at which they agree.
        solve: how layers are solved jointly.
        report: is called with the number of steps and what they miss.
    """
    head = features.spaces.head
    if network.coupled and len(features.samples) != features.count:
        return "batch norm in training mode mixes all samples, and some are missing or the same"
    if head.value_id == 0:
        return Inputs(features.samples.x.reshape(-1, *network.input_shape), features.error)
    front = network.up_to(head.value_id)
    if front.layers and not features.complete:
        return "all samples share the gradients of the layers in front, and some samples are missing"
    state, scatter = features.state, features.scatter
    if any(isinstance(node.op, Pool) for node in front.nodes) and features.complete:
        ahead = read_together(front, state, gradients, eps)
        if ahead is not None and ahead[0] == 0:
            return Inputs(ahead[1].value, ahead[1].rms_std)
        if ahead is not None:
            front, state, scatter = front.up_to(ahead[0]), ahead[1], eps
    system = ConstraintSystem(front.own, state, gradients, eps)
    free = system.unknowns - system.rank_at_most
    if front.layers and free > 0 and not any(isinstance(node.op, Pool) for node in front.nodes):
        which = " and ".join(names(system))
        return f"{which} leave {free} of {system.unknowns} dimensions free at least, whatever the attack"
    observed = Observation({name: grad[None] for name, grad in gradients.items()}, eps, rank_tolerance)
    passed = layer_by_layer(front, state, observed, report, scatter)
    if not front.layers:
        return str(passed.stop) if passed.stop else Inputs(passed.state.value, features.error)
    if passed.stop is None:
        passed = _last_digits(system, passed, tolerance)
    whole = _Front(front, passed, gradients, eps, tolerance, value_range, solve, report)
    if passed.stop is not None or system.distance(system.linearise(passed.state.value)) > tolerance:
        told = whole.by_values()
        if told is not None:
            return told
    # Where every layer determines its inputs, there is nothing that all of them together would add. Where one does not,
    # gradients that agree say nothing of what is free.
    if passed.stop is None and passed.certain[0] == 0:
        return Inputs(passed.state.value, passed.state.rms_std, passed.layers)
    if passed.stop is not None and passed.stop.cause is Cause.LOSSY:
        return str(passed.stop)
    return whole.jointly()


def _last_digits(system: ConstraintSystem, passed: Passed, tolerance: float) -> Passed:
    """The inputs once more from all constraints; a last unit or two may still be on the wrong side."""
    x = refine_sides(system, passed.state.value, tolerance)
    if passed.certain[0] == 0 and system.network.coupled:
        x = with_own_statistics(system, x, float(passed.state.rms_std.max()), tolerance)
    elif passed.certain[0] == 0 and len(passed.layers) > 1:
        x = refined(system, x, tolerance)[0]
    return passed.moved(x)


@dataclass(frozen=True, eq=False)
class _Front:
    """The layers that were passed one by one, to be solved as a whole."""

    network: Network
    passed: Passed
    gradients: Mapping[str, Tensor]
    eps: float
    tolerance: float
    value_range: tuple[float, float] | None
    solve: JointSolve
    report: Callable[[int, float], None]

    def by_values(self) -> Inputs | None:
        """The inputs from weight rows alone, where a value that is known has many times as many numbers: no activation
        is inverted, so that nothing is asked for which of two inputs an output has; None if no such value tells
        them."""
        passed, network = self.passed, self.network
        for value_id, state in {len(network.nodes): passed.output, passed.certain[0]: passed.certain[1]}.items():
            if value_id == 0:
                continue
            part = network.up_to(value_id)
            try:
                found = input_by_values(part, state, self.eps, report=self.report)
                if found is None:
                    continue
                system = ConstraintSystem(part, state, self.gradients, self._rounding(value_id))
                # All rows from there: they know the last digits.
                start, solver = system.linearise(found[1].x), self.solve.solver(system, "auto")
                at_end = gauss_newton(system, solver, None, self.tolerance, start, LAST, self.report)
                told = self._together(system, None, at_end)
            except OutOfTime:
                return None
            if told.joint is not None and told.joint.converged:
                return told
        return None

    def jointly(self) -> Inputs | str:
        """The layers up to the last value that is certain together, from what they gave one by one."""
        value_id, state = self.passed.certain
        system = ConstraintSystem(self.network.up_to(value_id), state, self.gradients, self._rounding(value_id))
        if not system.nodes:
            return str(self.passed.stop or "no gradient in front of the features was sent")
        start = None if self.passed.stop else system.linearise(self.passed.state.value)
        try:
            return self._together(system, start, None)
        except OutOfTime:
            return "the layers in front were not solved jointly: the time was up"

    def _rounding(self, value_id: int) -> float:
        """Of gradients in front of a value: what cotangents are off by behind a batch norm, which takes most of them
        away, counts as theirs."""
        blurred = self.network.told_precision and value_id == self.passed.certain[0]
        return max(self.eps, min(self.passed.certain_scatter, BLURRED)) if blurred else self.eps

    def _together(self, system: ConstraintSystem, start: Linearisation | None, found: Solution | None) -> Inputs:
        """From all constraints, or where they were solved already: how well they determine what was found."""
        prior = Prior(system.network.input_shape, sum(self.value_range or (0.0, 0.0)) / 2)
        probe = torch.Generator(device=self.network.device).manual_seed(0)
        solver = self.solve.solver(system, "auto")
        told = self.solve.solve(system, solver, prior, self.tolerance, start, probe, self.report, found)
        network, x = system.network.own, told.x
        if network.coupled:
            own = ConstraintSystem(network, system.output, self.gradients, self.eps)
            x = with_own_statistics(own, x, told.std, self.tolerance)
        return Inputs(x, x.new_full((len(x),), told.std), self.passed.layers, told.report)
