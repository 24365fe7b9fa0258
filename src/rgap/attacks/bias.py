"""The input of a Linear layer with a bias, read off its gradient (Eq. 3; Phong et al. 2018).

Whatever follows the layer, and whatever the loss is, only changes k. Layers in front of it are inverted one by one.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rgap.attacks.base import AS_ONE, MIXTURE, Attack
from rgap.attacks.features import layer_input, nonzero
from rgap.attacks.labels import of_one
from rgap.attacks.progress import Reporter
from rgap.attacks.result import Outcome, Status
from rgap.attacks.verdict import answer, judge
from rgap.inversion.bias import Source, cotangent, obstacle_before, sources
from rgap.inversion.history import Candidate, Paths
from rgap.inversion.recursion import recurse
from rgap.inversion.report import LayerReport
from rgap.inversion.state import Observation, State
from rgap.nn.losses import MarginLoss
from rgap.nn.network import Network
from rgap.target import Target
from rgap.update import Update


@dataclass(frozen=True)
class _Obstacle:
    """Why the input is not found from a layer."""

    reason: str


FEW = 4
"""Labels at the most for each of which the whole gradient is recomputed."""


@dataclass(frozen=True)
class Bias(Attack):
    """Divide the gradient of a Linear layer's weight by that of its bias, and invert the layers in front of it.

    It takes the Linear layer nearest to the input that has a bias, one position and a gradient. In front of it there
    may be a chain of layers, trained or frozen; behind it, anything.

    Args:
        rank_tolerance: singular values below this fraction of the largest count as zero; as in `Recursive`.
        visible: an estimated error above this fraction of the value range (or of the input's own spread) is called
            ill-conditioned, not exact.
        seed: of the random probe that estimates errors.
    """

    rank_tolerance: float | None = None
    visible: float = 0.01
    seed: int = 0
    partial: ClassVar[bool] = True

    def obstacle(self, target: Target, samples: int) -> str | None:
        found = _usable(target, set(target.parameters))
        if isinstance(found, _Obstacle):
            return found.reason
        return MIXTURE.format(samples) if samples > 1 else None

    def run(self, target: Target, update: Update) -> Outcome:
        gradients = nonzero(target, update)
        sent = {n: g.double().to(target.device) for n, g in update.gradients.items() if n in gradients or g.dim() > 1}
        if len(sent) > len(gradients) and gradients:
            # A weight's gradient is zero where its layer reads zeros; or it was withheld.
            found = self._found(target, update, sent)
            if found.status is Status.EXACT:
                return found
        return self._found(target, update, gradients)

    def _found(self, target: Target, update: Update, gradients: dict[str, Tensor]) -> Outcome:
        """By the gradients that are given, of those that were sent."""
        withheld = _withheld(target, update, set(gradients))
        if withheld is not None:
            return withheld
        usable = _usable(target, set(gradients))
        if isinstance(usable, _Obstacle):
            return Outcome(Status.NOT_CONVERGED, usable.reason)
        reasons: dict[str, None] = {}
        for source in usable:
            found = self._invert(target.network, source, gradients, update.precision)
            if not isinstance(found, _Obstacle):
                return self._outcome(target, update, source, found)
            reasons[found.reason] = None
        return Outcome(Status.NOT_CONVERGED, "; ".join(reasons))

    def _outcome(self, target: Target, update: Update, source: Source, found: Candidate) -> Outcome:
        """With the label under which the recomputed gradient comes nearest, and the verdict."""
        inputs = found.value.reshape(1, *target.input_shape)
        labels, assumption = _labels(target, update, inputs)
        labels = labels if len(labels) <= FEW else _nearest(target, update, inputs, labels)
        margins = [_margin(target, inputs, label) for label in labels]
        answers = [
            answer(target, update, replace(found, margin=margin), label)
            for label, margin in zip(labels, margins, strict=True)
        ]
        tolerance = update.tolerance
        best = min(answers, key=lambda a: (a.gradient_residual > tolerance, a.factor != 1, a.gradient_residual))
        assumptions: tuple[str, ...] = (_assumed(source, found.layers), assumption)
        if update.samples(target) != 1:
            assumptions = (AS_ONE, *assumptions)
        status, reason = judge([best], target, update, self.visible)
        return Outcome(status, reason, (best,), assumptions)

    def _invert(
        self, network: Network, source: Source, gradients: dict[str, Tensor], eps: float
    ) -> Candidate | _Obstacle:
        """The model's input from what the source's layer reads; or why there is none."""
        rank_tolerance = eps ** (2 / 3) if self.rank_tolerance is None else self.rank_tolerance
        found = layer_input(network, source, gradients, eps, rank_tolerance, self.seed)
        if isinstance(found, str):
            return _Obstacle(found)
        entry, x = found.value_id, found.x
        if entry == 0:
            return Candidate(0, x, found.std, (found.report,), {}, 0, State(x, x, None, x))
        before = cotangent(network, entry, gradients)
        std = x.new_full((1,) * x.dim(), found.std)
        state = State(x, torch.zeros_like(x) if before is None else before, None, std)
        # Where the cotangent goes on by a way that is not known, the layers in front have weight constraints only.
        known = {} if before is None else {name: g[None] for name, g in gradients.items()}
        front = network.up_to(entry)
        paths = Paths.begin(state, torch.zeros(1, dtype=torch.long, device=x.device), x.new_zeros(1))
        report = Reporter(self.name, len(front.segments))
        [end, *_] = recurse(front, Observation(known, eps, rank_tolerance, self.seed), paths, report)
        if end.stop is not None:
            return _Obstacle(str(end.stop))
        return replace(end, layers=(*end.layers, found.report))


def _labels(target: Target, update: Update, inputs: Tensor) -> tuple[tuple[Tensor, ...], str]:
    """The labels that may belong to the inputs, and where they come from."""
    try:
        possible = of_one(target, update)
    except ValueError:  # any number is a label, and the last layer tells none
        return _by_size(target, update, inputs), "the label is the one with which the gradient has the update's size"
    return possible.labels, possible.assumption


def _nearest(target: Target, update: Update, inputs: Tensor, labels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of many labels those whose gradient of one parameter comes nearest, as it is or but for a factor."""
    name, grad = list(nonzero(target, update).items())[-1]
    given = grad.flatten()
    [found] = target.label_gradients(inputs, torch.stack(labels), name)
    found = found.flatten(1)
    length = found.norm(dim=1).clamp(min=torch.finfo(found.dtype).tiny)
    order = (*(found - given).norm(dim=1).argsort()[:FEW], *(-(found @ given / length).abs()).argsort()[:FEW])
    return tuple(labels[at] for at in dict.fromkeys(map(int, order)))


def _by_size(target: Target, update: Update, inputs: Tensor) -> tuple[Tensor, ...]:
    """The label with which the last cotangent, whose direction any other label tells, has the right length."""
    loss, found = target.loss, []
    with torch.no_grad():
        outputs = target.outputs(inputs).double().reshape(1, -1)
    for label in torch.tensor(loss.examples, dtype=torch.float64, device=inputs.device)[:, None]:
        gradient = target.gradient(inputs, label)
        length = sum(float(gradient[name].double().square().sum()) for name in update.gradients)
        along = sum(float((gradient[n].double() * g.to(inputs.device)).sum()) for n, g in update.gradients.items())
        if length > 0:
            label = loss.label_from(outputs, along / length * loss.output_gradient(outputs, label))
        found.append(label)
    return tuple(label for label in found if label is not None)


def _margin(target: Target, inputs: Tensor, label: Tensor) -> float:
    if not isinstance(target.loss, MarginLoss):
        return math.nan
    with torch.no_grad():
        return float(label) * float(target.outputs(inputs))


def _assumed(source: Source, layers: tuple[LayerReport, ...]) -> str:
    """Where the input comes from."""
    name = source.layer.name
    if source.simple:
        origin = f"the input of {name} is grad W / grad b, the mean of its rows"
        if source.parameter != source.layer.bias_name:
            origin = f"{origin}, with the gradient of {source.parameter} for that of b"
    else:
        origin = f"the gradient of {source.parameter} is k of {name}, whose gradient rows alone tell its input"
    front = layers[:-1]
    if not front:
        return origin
    by_weights = [each.name for each in front if not each.gradient_rows]
    alone = f", {' and '.join(by_weights)} by weights alone" if by_weights else ""
    return f"{origin}; {' and '.join(each.name for each in front)} in front of it inverted{alone}"


def _network(target: Target) -> Network | None:
    """None if the model cannot be followed."""
    try:
        return target.network
    except NotImplementedError:
        return None


def _usable(target: Target, available: Collection[str]) -> list[Source] | _Obstacle:
    """The layers whose cotangent is known and that the input reaches on one way, the nearest first.

    Args:
        available: names of the gradients that can be used.
    """
    network = _network(target)
    found = [] if network is None else list(sources(network, available))
    if network is None or not found:
        layers = ", ".join(use.name for use in target.graph.uses) or "not known"
        return _Obstacle(
            f"no Linear layer with a bias and one position whose gradients were sent; the model's layers are {layers}"
        )
    between = [(each, obstacle_before(network, network.nodes[each.value_id - 1].reads[0])) for each in found]
    open_ones = [source for source, reason in between if reason is None]
    if open_ones:
        return open_ones
    names = " or ".join(source.layer.name for source, _ in between)
    reasons = "; ".join(dict.fromkeys(reason for _, reason in between if reason is not None))
    return _Obstacle(f"the input does not reach {names} through layers alone: {reasons}")


def _withheld(target: Target, update: Update, nonzero: Collection[str]) -> Outcome | None:
    """How the attack ends where the gradients that it needs were sent, and are zero."""
    network = _network(target)
    if network is None:
        return None
    sent = list(sources(network, set(update.gradients)))
    if not sent or any(True for _ in sources(network, nonzero)):
        return None
    names = " and ".join(dict.fromkeys(source.parameter for source in sent))
    if update.norm == 0:
        return Outcome(Status.GRADIENT_ZERO, "all gradients are zero: a saturated loss, or units that are all dead")
    if any(source.layer.weight_name in nonzero for source in sent):
        reason = f"the gradient of {names} was withheld: it is zero, that of the weight is not"
    else:
        reason = f"the gradients of {names}, or of their weights, are zero: dead units or inputs of zero"
    return Outcome(Status.NOT_CONVERGED, reason)
