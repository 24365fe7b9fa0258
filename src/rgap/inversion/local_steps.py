"""Every sample behind the difference of weights that several local steps made, and the order of the minibatches.

At the weights before the first step only the first minibatch's samples satisfy the subspace condition. Once they are
found their step can be made, what it adds to the difference is taken away, and at the weights behind it the samples of
the second minibatch do. In a later epoch all samples are known and only have to be recognised. What the steps of the
samples that were found make, against what was sent, is the certificate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.all_steps import AGREES, AllSteps, Together, alike
from rgap.inversion.orders import reordered
from rgap.inversion.step_bounds import Bound, Limit, counted_bound, no_place
from rgap.inversion.step_sides import with_other_sides
from rgap.inversion.steps_by_labels import begun_by_labels
from rgap.inversion.subspace.peel import Search
from rgap.inversion.subspace.span import Span
from rgap.inversion.subspace.step import FITS, NEAR, Candidates, Place, find_step, layer_of
from rgap.inversion.unrolled import in_their_span, rounding_moves, spanned
from rgap.inversion.walk import Client, Difference, Plan, Sides, Walk

UNEXPLAINED = 2.0
"""Roundings above which all parameters decide together, and not the first layer's alone."""
INSIDE = 4.0
"""The same in coordinates of the samples' space, where that space's own error counts for more."""
ASTRAY = 1e4
"""Roundings above which it is not the samples' values that are missed."""
MISSED = 100.0
"""Roundings above which samples or their order are wrong."""
SOLVES = 10
"""Steps of a solve for samples that are nearly known."""
VISIBLE = 5e-3
"""Of a sample's size, above which a step's own estimate of its error is looked into."""
CAREFUL = 3.0
"""Times what a draw of independent roundings moves samples: those of several steps are not independent."""
TRIES = 4
"""Of other sides, for each step."""
MOST_COUNTS = 64
"""Numbers of samples that are tried, at the most, where the client's own does not explain the rank."""


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
    sides: Sides = field(default_factory=dict)
    """Of units that stand at their kinks."""


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
        return _stopped(client, Bound(Limit.PLACE, no_place(network, sent(1).sent, plan(samples))))
    first = _counted(client, plan, samples, sent)
    if not first.biased:
        text = "without a bias in the first layer samples are known up to their scale only, and no step can be made"
        return _stopped(client, Bound(Limit.PLACE, text), first.rank)
    if first.full:
        text = f"the first layer's difference has full rank, {first.rank}: more samples than it tells apart"
        return _stopped(client, Bound(Limit.WIDTH, text), first.rank)
    steps = plan(max(samples, first.rank))
    difference = sent(steps.steps)
    bound = counted_bound(network, difference, steps, first.rank)
    if bound is not None:
        return _stopped(client, bound, first.rank)
    x_part = first.v[:-1]
    q: Tensor = torch.linalg.qr(x_part)[0]
    small = spanned(client, difference, first.layer, q)
    if small is None:
        return _Recovery(client, steps, difference, search, first).run(report)
    network = small[0].network(small[0].weights)
    segments = Place.layers(network, difference.sent)
    assert segments is not None
    inside = replace(first, layer=layer_of(network, segments[0]), v=torch.cat([q.mT @ x_part, first.v[-1:]]))
    found = _Recovery(small[0], steps, small[1], search, inside).run(report)
    return _whole(client, steps, difference, found, q)


def _whole(client: Client, plan: Plan, difference: Difference, found: Recovered, q: Float[Tensor, "u n"]) -> Recovered:
    """Of coordinates in the samples' space the samples themselves, and what their steps make of all weights."""
    x = (found.x @ q.mT).reshape(-1, *client.input_shape)
    found = replace(found, x=x, error=found.error * (q.shape[1] / len(q)) ** 0.5)
    if len(found.order) < plan.steps:
        return found
    walk = Walk(client, plan, sides=found.sides).all(x, found.labels, found.order)
    return replace(found, misfit=difference.misfit(walk), missed=difference.missed(walk))


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
        unit, noise = self._noise(step)
        network, left = self.client.network(walk.weights), walk.left(self.difference.sent)
        first = replace(self.first, core=self.first.core / unit, noise=self.first.noise / unit)
        return Place.of(network, self.client.loss, left, noise, first, sum(plan.sizes[step:]))

    def _noise(self, step: int) -> tuple[float, dict[str, float]]:
        """How much a step counts in the difference, and each value's rounding in units of the step's gradient."""
        unit = abs(self.plan.expansion[-1][1][step])
        return unit, {name: each / unit for name, each in self.difference.noise.items()}

    def run(self, report: Callable[[int, float], None]) -> Recovered:
        plan, generator = self.plan, torch.Generator().manual_seed(self.search.seed)
        walk, order = Walk(self.client, plan), list[tuple[int, ...]]()
        like = self.first.v
        known = Candidates(like.new_zeros(0, self.first.layer.unknowns), like.new_zeros(0))
        near, error, close = known.x, like.new_zeros(0), list[tuple[int, int, int]]()
        tried: list[Sides] = [{}]
        while walk.step < plan.steps:
            step, place = walk.step, self.place(walk)
            free, missing = self._to_find(place, known, order, step)
            off = place.misfit(known.x[free])[0]
            own = plan.sizes[step] - missing
            by = off.argsort().tolist()
            members = tuple(free[each] for each in by[:own])
            found = known.none
            if missing:
                found, near = self._find(place, known, near, members, missing, step, generator)
                found = self._sharper(place, found, plan.sizes[step])
            sides = self._other_sides(
                walk, order, known, error, members, torch.cat([found.x, near[: missing - len(found)]]), place
            )
            if sides not in tried and len(tried) < TRIES * (step + 1):
                tried.append(sides)
                (walk, known), near = self._again(walk, sides, order, known), torch.cat([found.x, near])
                continue
            close += [(step, free[i], free[j]) for i, j in alike(off, by, own)]
            members += tuple(range(len(known), len(known) + len(found)))
            known, error = known.and_(found), torch.cat([error, place.error(found.x)])
            if missing:
                report(len(known), float("nan"))
                if len(found) < missing:
                    return self._by_labels() or self._short(known, error, order, place, len(members))
            order.append(members)
            walk = walk.all(self._inputs(known.x), known.labels, [members])
        return self._refined(known, error, tuple(order), walk, close)

    def _to_find(
        self, place: Place, known: Candidates, order: list[tuple[int, ...]], step: int
    ) -> tuple[list[int], int]:
        """The known samples of which some are those of a step, and how many of the step's are not known."""
        plan, epoch = self.plan, step // self.plan.epoch
        if not epoch:
            return [], plan.sizes[step]
        if not plan.shuffled:
            return list(order[step - plan.epoch]), 0
        used = {each for members in order[epoch * plan.epoch :] for each in members}
        free = [each for each in range(len(known)) if each not in used]
        best = place.misfit(known.x[free])[0].sort().values[: plan.sizes[step]]
        # A sample that the epochs before left out, to have no minibatch too small, is not known yet.
        strange = int((best > FITS).sum()) + max(0, plan.sizes[step] - len(free))
        return free, min(strange, self.first.rank - len(known))

    def _other_sides(
        self,
        walk: Walk,
        order: list[tuple[int, ...]],
        known: Candidates,
        error: Tensor,
        members: tuple[int, ...],
        near: Tensor,
        place: Place,
    ) -> Sides:
        """The walk's sides, with those of units that the samples of the next step tell: which are known, found, or
        near."""
        if not walk.step or not len(members) + len(near):
            return walk.sides
        own = torch.cat([known.x[list(members)], place.solve(near, SOLVES)])
        return with_other_sides(walk, order, known.x, known.labels, error, place, own)

    def _again(
        self, walk: Walk, sides: Sides, order: list[tuple[int, ...]], known: Candidates
    ) -> tuple[Walk, Candidates]:
        """The walk with other sides, and the samples that were found on it since, as they are at its weights."""
        first = min(each.step for each, above in sides.items() if walk.sides.get(each) is not above)
        x, labels, there = known.x.clone(), known.labels.clone(), walk.instead(sides, first)
        before = {each for members in order[: first + 1] for each in members}
        for members in order[first:]:
            new = [each for each in members if each not in before]
            if new:
                place, step = self.place(there), there.step
                own = Candidates(place.solve(x[new], SOLVES), labels[new])
                own = self._sharper(place, own, self.plan.sizes[step])
                x[new], labels[new] = own.x, own.labels
            before.update(members)
            there = there.all(self._inputs(x), labels, [members])
        return there, Candidates(x, labels)

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

    def _unexplained(self, misfit: float) -> Bound | None:
        """Why the steps of all samples do not make what was sent, where counts say it."""
        second = self._begun.spaces.second
        assert second is not None
        vectors = sum(self.plan.sizes)
        if misfit < MISSED or second.rank >= vectors:
            return None
        text = (
            f"all steps together miss the difference by {misfit:.0f} roundings: of {vectors} hidden vectors "
            f"{second.rank} are above the weights' rounding, and the order of later epochs is not told; larger steps "
            "or fewer epochs would be read, or weights in double precision"
        )
        return Bound(Limit.PRECISION, text)

    @cached_property
    def _begun(self) -> Place:
        """Before the first step."""
        return self.place(Walk(self.client, self.plan))

    def _sharper(self, place: Place, found: Candidates, size: int) -> Candidates:
        """Samples of a step by the row space of all steps, where that tells them better: what the steps before left of
        it holds the errors of theirs."""
        whole = replace(place, spaces=replace(place.spaces, second=self._begun.spaces.second))
        x = whole.solve(found.x, SOLVES)
        better = (whole.error(x) < place.error(found.x)) & (whole.misfit(x)[0] <= FITS)
        twice = (torch.cdist(x, x) < NEAR * x.norm(dim=1)).tril(-1).any(1)
        better &= ~twice
        x = torch.where(better[:, None], x, found.x)
        return Candidates(x, torch.where(better, place.labels(x, size)[0], found.labels)) if len(x) else found

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

    def _by_labels(self) -> Recovered | None:
        """All samples of one epoch, where their outputs are so much alike that these tell the labels."""
        walk = Walk(self.client, self.plan)
        one_epoch = self.plan.steps == self.plan.epoch
        begun = begun_by_labels(self._begun, self.plan, walk.left(self.difference.sent)) if one_epoch else None
        if begun is None:
            return None
        known, order = begun
        walk = walk.all(self._inputs(known.x), known.labels, order)
        every = [(step, i, j) for step, own in enumerate(order) for i in own for j in range(len(known)) if j not in own]
        free = replace(self, plan=replace(self.plan, shuffled=True))  # nothing tells the order of the first epoch
        found = free._refined(known, self._begun.error(known.x), order, walk, every)
        return found if found.misfit <= INSIDE else None

    def _settled(
        self, together: AllSteps, begun: Together, error: Tensor, close: list[tuple[int, int, int]]
    ) -> Together:
        """The nearest to what was sent; where that is far from it, with the order of later epochs found anew."""
        at = together.settle(begun, error, UNEXPLAINED)
        if at.misfit > MISSED and not together.kinked:
            other = together.settle(reordered(together, begun, error, close), error, UNEXPLAINED)
            at = other if other.misfit < at.misfit else at
        return at

    def _refined(
        self,
        known: Candidates,
        error: Tensor,
        order: tuple[tuple[int, ...], ...],
        walk: Walk,
        close: list[tuple[int, int, int]],
    ) -> Recovered:
        """All samples at once, in an order and with sides of units that give what was sent."""
        layer, labels = self.first.layer, known.labels
        together = AllSteps(self.client, self.plan, self.difference, layer, labels)
        at = Together(known.x, order, walk.sides, self.difference.misfit(walk))
        if at.misfit > AGREES and self.client.loss.labels:
            at = self._settled(together, at, error, close)
            walk = together.walk(at)
        if INSIDE < at.misfit < ASTRAY and not at.sides:
            x, other = in_their_span(together, at.x, at.order)
            there = Walk(self.client, self.plan).all(self._inputs(x), other, at.order)
            misfit = self.difference.misfit(there)
            if misfit < at.misfit:
                at, labels, walk = replace(at, x=x, misfit=misfit), other, there
        size = float(at.x.square().mean().sqrt())
        if at.misfit <= INSIDE and not at.sides and bool((error > VISIBLE * size).any()):
            # By each step's row space alone: all steps together tell them better by far.
            moved = rounding_moves(replace(together, labels=labels), at.x, at.order)
            error = error if moved is None else torch.minimum(error, CAREFUL * moved * max(1.0, at.misfit))
        certain = not close or (at.misfit <= INSIDE and together.told_apart(at, close))
        x, missed = self._inputs(at.x), self.difference.missed(walk)
        stop = self._unexplained(at.misfit)
        return Recovered(x, labels, error, at.order, at.misfit, missed, certain, self._samples, stop, sides=at.sides)
