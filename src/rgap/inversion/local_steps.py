"""Every sample behind the difference of weights that several local steps made, and the order of the minibatches.

At the weights before the first step only the first minibatch's samples satisfy the subspace condition. Once they are
found their step can be made, what it adds to the difference is taken away, and at the weights behind it the samples of
the second minibatch do. In a later epoch all samples are known and only have to be recognised. What the steps of the
samples that were found make, against what was sent, is the certificate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.subspace.head import told
from rgap.inversion.subspace.peel import Search
from rgap.inversion.subspace.span import Span
from rgap.inversion.subspace.step import FITS, Candidates, Place, find_step, layer_of
from rgap.inversion.unrolled import in_their_span
from rgap.inversion.walk import Client, Difference, Plan, Walk, Weights
from rgap.linalg.anderson import anderson
from rgap.nn.network import Network

AGREES = 1.2
"""Roundings by which a difference is missed where nothing but rounding is left of it (root mean square)."""
UNEXPLAINED = 2.0
"""Roundings above which all parameters decide together, and not the first layer's alone."""
MOST_COUNTS = 64
"""Numbers of samples that are tried, at the most, where the client's own does not explain the rank."""
REFINEMENTS = 30
"""Simulations of all steps, at the most."""


class Limit(Enum):
    """What keeps the samples behind several steps from being told apart."""

    PLACE = "the network has no two Linear layers in front"
    WIDTH = "more hidden vectors than the second layer tells apart"
    PRECISION = "steps too small for the rounding of the weights"
    SIZES = "the optimiser hides the sizes of gradients"
    SEARCH = "a sample was not found"
    TIME = "it takes longer than there is"


@dataclass(frozen=True)
class Bound:
    """Why the steps are not followed to their end: the numbers on both sides, and what would have to change."""

    limit: Limit
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class Recovered:
    """The samples behind several steps."""

    x: Tensor
    """(n, *input_shape)."""
    labels: Float[Tensor, " n"]
    error: Float[Tensor, " n"]
    """How far rounding may have moved each one's values (root mean square)."""
    order: tuple[tuple[int, ...], ...]
    """Of each step that was followed, the numbers of its samples."""
    misfit: float = torch.inf
    """Of the simulated difference to the one that was sent, in units of a parameter's own rounding; the worst one's."""
    missed: float = torch.inf
    """The norm of the difference between both."""
    certain: bool = False
    """Whether no other sample fits a step as well as one of its own."""
    samples: int = 0
    """How many there are, by the rank of the first layer's difference."""
    stop: Bound | None = None
    nearest: bool = False
    """Whether it is the nearest that was found, of all steps together, where their difference does not agree."""
    cut_off: bool = False
    """Whether the time was up."""
    assumption: str = ""
    """What decided where the steps did not."""


def recover(
    client: Client,
    plan: Callable[[int], Plan],
    samples: int,
    sent: Callable[[int], Difference],
    search: Search,
    report: Callable[[int, float], None],
) -> Recovered:
    """All samples, step by step.

    Args:
        plan: of so many samples.
        samples: as the client tells it. Where the rank of the first layer's difference is larger, that counts.
        sent: what was sent, after so many steps.
        report: is called with the number of samples that were found.
    """
    network = client.network(client.weights)
    if Place.layers(network, sent(1).sent) is None:
        return _stopped(client, Bound(Limit.PLACE, _no_place(network, sent(1).sent, plan(samples))))
    first = _counted(client, plan, samples, sent)
    if not first.biased:
        text = "without a bias in the first layer samples are known up to their scale only, and no step can be made"
        return _stopped(client, Bound(Limit.PLACE, text), first.rank)
    if first.full:
        text = f"the first layer's difference has full rank, {first.rank}: more samples than it tells apart"
        return _stopped(client, Bound(Limit.WIDTH, text), first.rank)
    steps = plan(max(samples, first.rank))
    difference = sent(steps.steps)
    bound = _bound(network, difference, steps, first.rank)
    if bound is not None:
        return _stopped(client, bound, first.rank)
    return _Recovery(client, steps, difference, search, first).run(report)


def _counted(client: Client, plan: Callable[[int], Plan], samples: int, sent: Callable[[int], Difference]) -> Span:
    """The first layer's spaces, after the steps of the fewest samples that explain its rank.

    They hang on how many steps there were: every one of them rounds the weights, and what weight decay moves is no part
    of any sample's. So a client that says too little is tried with more.
    """
    network, count = client.network(client.weights), samples
    for _ in range(MOST_COUNTS):
        steps = plan(count)
        difference, walk = sent(steps.steps), Walk(client, steps)
        moved = walk.without_decay(difference.sent)
        first = Place.of(network, client.loss, moved, difference.noise, None, 1).spaces.first
        more = count + steps.sizes[0] if steps.expansion[-1][0] else 2 * count
        most = min(first.layer.outputs, first.layer.unknowns)
        if first.rank <= count or more > most or plan(more).steps == steps.steps:
            break
        count = more
    return first


def _stopped(client: Client, bound: Bound, samples: int = 0) -> Recovered:
    nothing = next(iter(client.weights.values())).new_zeros(0)
    return Recovered(nothing, nothing, nothing, (), samples=samples, stop=bound)


def _no_place(network: Network, sent: Weights, plan: Plan) -> str:
    """Why steps are not told apart, with what is nearest to it: the widest Linear layer that reads features."""
    text = f"{plan.steps} local steps are told apart where two Linear layers stand before all others that are trained"
    layers = [layer_of(network, segment) for segment in network.segments if told(network, segment, sent)]
    behind = [layer for layer in layers if layer is not network.layers[0]]
    if not behind:
        return text
    layer = max(behind, key=lambda each: min(each.outputs, each.unknowns))
    apart, vectors, epochs = min(layer.outputs, layer.unknowns) - 1, sum(plan.sizes), plan.steps // plan.epoch
    text += (
        f"; the difference of {layer.name}, behind others, tells up to {apart} vectors apart with {layer.unknowns} "
        f"inputs and {layer.outputs} outputs, and {plan.samples} samples in {epochs} epochs leave {vectors}, since the "
        "layers in front move in between"
    )
    if apart < vectors and (few := apart // epochs):
        text += f": up to {few} {'sample' if few == 1 else 'samples'} would leave it rank to spare"
    return text


def _bound(network: Network, difference: Difference, plan: Plan, rank: int) -> Bound | None:
    """What counts alone say against it."""
    segments = Place.layers(network, difference.sent)
    assert segments is not None
    second = layer_of(network, segments[1])
    biased = second.bias_name is not None
    # As many equations are left beside the second row space as there are unknowns in the first.
    width = min(second.unknowns + biased - rank + 1, second.outputs - 1)
    vectors = sum(plan.sizes)
    if vectors > width:
        text = (
            f"{plan.samples} samples in {plan.steps // plan.epoch} epochs leave {vectors} hidden vectors in "
            f"{second.name}'s difference, which tells up to {width} apart with {second.unknowns} inputs and "
            f"{second.outputs} outputs: fewer samples or epochs would be read, or a wider layer"
        )
        return Bound(Limit.WIDTH, text)
    if rank < plan.samples:
        text = (
            f"the first layer's difference has rank {rank} for {plan.samples} samples: some are the same, give no "
            "gradient, or moved the weights by less than their rounding"
        )
        return Bound(Limit.PRECISION, text)
    return None


@dataclass(frozen=True, eq=False)
class _Recovery:
    client: Client
    plan: Plan
    difference: Difference
    search: Search
    first: Span
    """Of the first layer's whole difference."""

    @property
    def _samples(self) -> int:
        return max(self.plan.samples, self.first.rank)

    def place(self, walk: Walk) -> Place:
        """Before the next step."""
        plan, step = self.plan, walk.step
        unit = abs(plan.expansion[-1][1][step])
        noise = {name: each / unit for name, each in self.difference.noise.items()}
        network, left = self.client.network(walk.weights), walk.left(self.difference.sent)
        first = replace(self.first, core=self.first.core / unit, noise=self.first.noise / unit)
        return Place.of(network, self.client.loss, left, noise, first, sum(plan.sizes[step:]))

    def run(self, report: Callable[[int, float], None]) -> Recovered:
        plan, generator = self.plan, torch.Generator().manual_seed(self.search.seed)
        walk, order = Walk(self.client, plan), list[tuple[int, ...]]()
        like = self.first.v
        known = Candidates(like.new_zeros(0, self.first.layer.unknowns), like.new_zeros(0))
        near, error, certain = known.x, like.new_zeros(0), True
        while walk.step < plan.steps:
            step, place = walk.step, self.place(walk)
            epoch = step // plan.epoch
            used = {each for members in order[epoch * plan.epoch :] for each in members}
            free = [each for each in range(len(known)) if each not in used]
            if not epoch:
                members, missing = tuple[int, ...](), plan.sizes[step]
            elif not plan.shuffled:
                members, missing = order[step - plan.epoch], 0
            else:
                off = place.misfit(known.x[free])[0]
                by = off.argsort()
                # A sample that the epochs before left out, to have no minibatch too small, is not known yet.
                strange = int((off[by[: plan.sizes[step]]] > FITS).sum()) + max(0, plan.sizes[step] - len(free))
                missing = min(strange, self.first.rank - len(known))
                own = plan.sizes[step] - missing
                members = tuple(free[each] for each in by[:own].tolist())
                rest = off[by[own:]]
                certain &= not len(rest) or not own or bool(rest[0] > 2 * off[by[own - 1]])
            if missing:
                found, near = self._find(place, known, near, members, missing, step, generator)
                members += tuple(range(len(known), len(known) + len(found)))
                known, error = known.and_(found), torch.cat([error, place.error(found.x)])
                report(len(known), float("nan"))
                if len(found) < missing:
                    return self._short(known, error, order, place, len(members))
            order.append(members)
            walk = walk.all(self._inputs(known.x), known.labels, [members])
        return self._refined(known, error, tuple(order), walk, certain)

    def _find(
        self,
        place: Place,
        known: Candidates,
        near: Tensor,
        members: tuple[int, ...],
        missing: int,
        step: int,
        generator: torch.Generator,
    ) -> tuple[Candidates, Tensor]:
        """The samples of a step that are not known yet, as `find_step` has them, beside those that are."""
        size, clipped, at = self.plan.sizes[step], self.plan.clip_norm is not None, list(members)
        if at:
            x, labels = known.x[at], known.labels[at]
            place = place.without(x, labels, place.share(x, labels) if clipped else 1 / size)
        return find_step(place, missing, size, clipped, known, near, self._later(step), self.search, generator)

    def _inputs(self, x: Float[Tensor, "n u"]) -> Tensor:
        return x.reshape(-1, *self.client.input_shape)

    def _later(self, step: int) -> float:
        """About how often a sample of this step comes again, with the coefficients of the epochs to come."""
        c = self.plan.expansion[-1][1]
        return sum(c[self.plan.epoch :]) / self.plan.epoch / c[step]

    def _short(
        self, known: Candidates, error: Tensor, order: list[tuple[int, ...]], place: Place, found: int
    ) -> Recovered:
        """What was found, where samples of a step were not."""
        plan, step, second = self.plan, len(order), place.spaces.second
        assert second is not None
        ahead = sum(plan.sizes[step:])
        text = f"step {step + 1} of {plan.steps}: {found} of {plan.sizes[step]} samples were found"
        limit = Limit.SEARCH
        if second.rank < ahead:
            limit = Limit.PRECISION
            text += (
                f"; of {ahead} hidden vectors that are left {second.rank} are above the weights' rounding: larger "
                "steps would be read, or weights in double precision"
            )
        x = self._inputs(known.x)
        return Recovered(x, known.labels, error, tuple(order), samples=self._samples, stop=Bound(limit, text))

    def _refined(
        self, known: Candidates, error: Tensor, order: tuple[tuple[int, ...], ...], walk: Walk, certain: bool
    ) -> Recovered:
        """All samples at once: X = (sum over t of c_t K_t)^+ (first layer's difference), K_t at the steps of X."""
        layer, c, labels = self.first.layer, self.plan.expansion[-1][1], known.labels

        def move(flat: Float[Tensor, " u"]) -> tuple[Float[Tensor, " u"], float]:
            x = flat.reshape(known.x.shape)
            walk, k = Walk(self.client, self.plan), x.new_zeros(len(x), layer.outputs)
            for step, members in enumerate(order):
                at = list(members)
                own = self._cotangents(walk, x[at], labels[at])
                walk = walk.all(self._inputs(x), labels, [members])
                k[at] += c[step] * walk.factors[-1] / len(at) * own
            name = layer.weight_name
            missed = layer.pack_weight((self.difference.sent[name] - walk.end[name])[None])[0, 0]
            by: Tensor = torch.linalg.lstsq(k.mT, missed).solution
            return by.flatten(), self.difference.misfit(walk)

        misfit, x = self.difference.misfit(walk), known.x
        if misfit > AGREES and self.client.loss.labels:
            flat, misfit = anderson(move, x.flatten(), REFINEMENTS, AGREES)
            x = flat.reshape(x.shape)
            walk = Walk(self.client, self.plan).all(self._inputs(x), labels, order)
        if misfit > UNEXPLAINED:
            better, relabelled = in_their_span(self.client, self.plan, self.difference, layer, x, labels, order)
            there = Walk(self.client, self.plan).all(self._inputs(better), relabelled, order)
            if self.difference.misfit(there) < misfit:
                x, labels, walk, misfit = better, relabelled, there, self.difference.misfit(there)
        missed = self.difference.missed(walk)
        return Recovered(self._inputs(x), labels, error, order, misfit, missed, certain, self._samples)

    def _cotangents(self, walk: Walk, x: Float[Tensor, "s u"], labels: Float[Tensor, " s"]) -> Float[Tensor, "s o"]:
        """Of some samples, behind the first layer."""
        network = self.client.network(walk.weights)
        values = network.forward(self._inputs(x))
        k = self.client.loss.output_gradient(values[-1].reshape(len(x), -1), labels).reshape(values[-1].shape)
        segments = Place.layers(network, self.difference.sent)
        assert segments is not None
        found = network.vjp(values, network.slopes(values), {len(values) - 1: k})[segments[0].exit]
        assert found is not None
        return found.flatten(1)
