"""All local steps together, once every sample is nearly known: their values, who was in which step, and sides of units.

Each sample that was found carries the errors of those before it. What the steps of all samples make, against what was
sent, corrects them: k hardly depends on x, so X moves by (sum over t of c_t K_t)^+ (what the first layer misses). What
that cannot explain is due to two samples of one epoch that stand in each other's step, or to units that stand so near
their kinks that the samples' errors decide the side. Both are told by trial: of one such error the rest is thousands of
roundings. In the space that the samples span a client of n samples is a network of n inputs, so a trial is cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from math import prod

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rgap.inversion.step_sides import in_doubt
from rgap.inversion.subspace.step import Place
from rgap.inversion.walk import Client, Difference, Order, Plan, Sides, Unit, Walk, Weights, given_sides, kinks
from rgap.linalg import deadline
from rgap.linalg.anderson import anderson
from rgap.nn.layers import Layer
from rgap.nn.network import Network
from rgap.nn.ops import Linear

AGREES = 1.2
"""Roundings by which a difference is missed where nothing but rounding is left of it (root mean square)."""
REFINEMENTS = 30
"""Simulations of all steps, at the most."""
ROUNDS = 8
MOST_SIDES = 96
"""Units in doubt that are tried at once."""
MOST_TRIALS = 12
"""Exchanges of two samples, or units on other sides, that are simulated: those that promise most."""
LOWER = 0.02
"""By which a trial has to lower the logarithm of what is missed, all parameters together."""
REWEIGHTED, OUTLYING = 4, 3.0
"""Solves, in which rows count less that are missed by so many times the median."""
ALIKE = 2.0
"""Times by which a sample that is not of a step misses the second row space more than those of it do, at the least, or
it is tried in their place."""
MOST_TRIED = 400
"""Exchanges of samples that were alike, of which each has to be told apart from the order that is certified."""
APART = 50.0
"""Times the misfit that an exchange must miss more than."""


@dataclass(frozen=True, eq=False)
class Together:
    """What is thought of a client's steps."""

    x: Float[Tensor, "n u"]
    order: tuple[tuple[int, ...], ...]
    sides: Sides
    misfit: float


@dataclass(frozen=True, eq=False)
class AllSteps:
    """The steps of a client."""

    client: Client
    plan: Plan
    difference: Difference
    layer: Layer
    """The first one, which reads the samples."""
    labels: Float[Tensor, " n"]

    def settle(self, begun: Together, error: Float[Tensor, " n"], enough: float) -> Together:
        """The nearest to what was sent.

        Args:
            error: of each sample's values, root mean square.
            enough: a misfit that is rounding.
        """
        at = self._at(begun, self.walk(begun))
        for _ in range(ROUNDS):
            if at.misfit > AGREES:
                at = self._refined(at)
            if at.misfit <= enough or deadline.used() >= 1:
                break
            other = self.other_sides(self._exchanged(at), error)
            if other is at:
                # No outliers are left to be weighed less.
                last = self._refined(at, 1)
                return last if last.misfit < at.misfit else at
            at = other
        return at

    def told_apart(self, at: Together, close: Sequence[tuple[int, int, int]]) -> bool:
        """Whether no exchange of two samples that were alike in some step gives what was sent.

        Args:
            close: a step, a sample that was taken for one of it, and one that was not.
        """
        walk, epoch = self.walk(at), self.plan.epoch
        exchanges = set[tuple[int, int, int, int]]()
        for step, *pair in close:
            first = step // epoch * epoch
            where = {each: t for t in range(first, first + epoch) for each in at.order[t] if each in pair}
            if len(set(where.values())) == 2:
                (i, one), (j, two) = where.items()
                exchanges.add((one, i, two, j))
        if len(exchanges) > MOST_TRIED:
            return False
        tried = (self._instead(at, walk, exchanged(at.order, *each)) for each in exchanges)
        return all(deadline.used() < 1 and self.difference.misfit(each) > APART * at.misfit for each in tried)

    def _instead(self, at: Together, walk: Walk, order: tuple[tuple[int, ...], ...]) -> Walk:
        """The steps in another order, from the first one that is different."""
        same = next((t for t, (one, two) in enumerate(zip(at.order, order, strict=True)) if one != two), len(order))
        return walk.instead(at.sides, same).all(self._inputs(at.x), self.labels, order[same:])

    def _at(self, at: Together, walk: Walk) -> Together:
        return replace(at, misfit=self.difference.misfit(walk))

    def _inputs(self, x: Float[Tensor, "s u"]) -> Tensor:
        return x.reshape(-1, *self.client.input_shape)

    def walk(self, at: Together) -> Walk:
        return Walk(self.client, self.plan, sides=at.sides).all(self._inputs(at.x), self.labels, at.order)

    def _refined(self, at: Together, reweighted: int = REWEIGHTED) -> Together:
        """With the samples moved by what the first layer's weights miss."""
        name, layer = self.layer.weight_name, self.layer

        def move(flat: Float[Tensor, " u"]) -> tuple[Float[Tensor, " u"], float]:
            x = flat.reshape(at.x.shape)
            walk = self.walk(replace(at, x=x))
            k = whole_cotangents(walk, self._inputs(x), self.labels, at.order, behind_first(self.client))
            missed = layer.pack_weight((self.difference.sent[name] - walk.end[name])[None])[0, 0]
            by = self._solved(k.mT, missed, reweighted)
            return by.flatten(), self._typical(walk) if reweighted > 1 else self.difference.misfit(walk)

        flat, _ = anderson(move, at.x.flatten(), REFINEMENTS, AGREES)
        there = replace(at, x=flat.reshape(at.x.shape))
        return self._at(there, self.walk(there))

    def _solved(self, a: Float[Tensor, "o n"], b: Float[Tensor, "o m"], reweighted: int) -> Float[Tensor, "n m"]:
        """Least squares, in which rows that are missed by far more than most count little where there are kinks: each
        is of a unit, and one on its wrong side would move its sample by far more than all others' errors."""
        weight, rounds = a.new_ones(len(a), 1), reweighted if self.kinked else 1
        for _ in range(rounds):
            found: Tensor = torch.linalg.lstsq(weight * a, weight * b).solution
            left = (b - a @ found).norm(dim=1, keepdim=True)
            typical = left.median().clamp(min=torch.finfo(left.dtype).tiny)
            weight = 1 / (left / (OUTLYING * typical)).clamp(min=1).square()
        return found

    def _typical(self, walk: Walk) -> float:
        """What is missed, in roundings, but where there are kinks by most units."""
        if not self.kinked:
            return self.difference.misfit(walk)
        rows = [each.square().mean(1).median().sqrt() for each in self._missed(walk).values() if each.dim() == 2]
        return float(torch.stack(rows).max())

    # What is missed

    def _missed(self, walk: Walk) -> dict[str, Tensor]:
        end, noise = walk.end, self.difference.noise
        return {name: (end[name] - d) / noise[name] for name, d in self.difference.sent.items() if noise[name]}

    @staticmethod
    def _merit(missed: dict[str, Tensor]) -> Tensor:
        """The logarithms of what all parameters miss, added: however large one's share is, each counts."""
        return torch.stack([each.square().mean().log() / 2 for each in missed.values()]).sum()

    def _lowered(
        self,
        at: Together,
        others: Callable[[Together, Walk], list[Together]],
        follow: Callable[[Together, Walk, Together], Walk],
    ) -> Together:
        """The best of others in its place, as long as less is missed then.

        Args:
            others: to be tried, at what is thought of the steps and with their walk.
            follow: the walk of one of them.
        """
        walk = self.walk(at)
        merit = float(self._merit(self._missed(walk)))
        while deadline.used() < 1:
            tried = others(at, walk)
            walks = [follow(at, walk, each) for each in tried]
            merits = [float(self._merit(self._missed(each))) for each in walks]
            best = min(range(len(tried)), key=merits.__getitem__, default=None)
            if best is None or not merits[best] < merit - LOWER:
                break
            merit, walk = merits[best], walks[best]
            at = self._at(tried[best], walk)
        return at

    # Who was in which step

    def _exchanged(self, at: Together) -> Together:
        """With two samples of an epoch in each other's step, as long as less is missed then."""
        if not self.plan.shuffled:
            return at
        return self._lowered(
            at,
            lambda at, walk: [replace(at, order=order) for order in self._exchanges(at, walk)],
            lambda at, walk, other: self._instead(at, walk, other.order),
        )

    def _exchanges(self, at: Together, walk: Walk) -> list[tuple[tuple[int, ...], ...]]:
        """Orders with two samples exchanged: those by which the derivative says that least is missed."""
        gains = self._gains(at, walk)
        found = list[tuple[float, int, int, int, int]]()
        for one, two in combinations(range(len(at.order)), 2):
            if one // self.plan.epoch == two // self.plan.epoch:
                for i in at.order[one]:
                    for j in at.order[two]:
                        by = gains[one, j] - gains[one, i] + gains[two, i] - gains[two, j]
                        found.append((float(by), one, i, two, j))
        return [exchanged(at.order, *each[1:]) for each in sorted(found)[:MOST_TRIALS] if each[0] < 0]

    def _gains(self, at: Together, walk: Walk) -> Float[Tensor, "steps n"]:
        """By how much the merit moves with how much each sample counts in each step."""
        zeros = [{name: torch.zeros_like(w) for name, w in self.client.weights.items()} for _ in at.order]

        def merit(more: list[dict[str, Tensor]]) -> Tensor:
            each = iter(more)

            def gradient(weights: Weights, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
                own = next(each)
                return {n: g + own[n] for n, g in self.client.differentiable(weights, x, labels).items()}

            walk = Walk(replace(self.client, gradient=gradient), self.plan, sides=at.sides)
            return self._merit(self._missed(walk.all(self._inputs(at.x), self.labels, at.order)))

        slopes = torch.func.grad(merit)(zeros)
        gains = at.x.new_zeros(len(at.order), len(at.x))
        for step, weights in enumerate(walk.trail[:-1]):
            for i in range(len(at.x)):
                own = self.client.gradient(weights, self._inputs(at.x[[i]]), self.labels[[i]])
                gains[step, i] = sum(float((own[n] * s).sum()) for n, s in slopes[step].items()) / self.plan.sizes[step]
        return gains

    # Sides

    def other_sides(self, at: Together, error: Float[Tensor, " n"]) -> Together:
        """With units in doubt on their other sides, one by one, as long as less is missed then.

        A unit on its wrong side moves the weights of all later steps, and with them others over their kinks: so each is
        simulated, of those whose own step's gradient explains most.
        """
        return self._lowered(
            at,
            lambda at, walk: [replace(at, sides=sides) for sides in self._sides(at, walk, error)],
            lambda at, walk, other: self.walk(other),
        )

    def _sides(self, at: Together, walk: Walk, error: Float[Tensor, " n"]) -> list[Sides]:
        """With one unit more on its other side: those that promise most."""
        missed = self._missed(walk)
        found = self._doubts(at, walk, error, missed)
        if not found:
            return []
        sizes = [each.numel() for each in missed.values()]
        left = torch.cat([each.flatten() for each in missed.values()])
        merits = list[float]()
        for each in found.items():
            parts = torch.split(left + self._effect(at, walk, *each, missed), sizes)
            merits.append(float(self._merit(dict(zip(missed, parts, strict=True)))))
        order = sorted(range(len(found)), key=merits.__getitem__)[:MOST_TRIALS]
        ways, before = list(found.items()), float(self._merit(missed))
        return [{**at.sides, ways[each][0]: ways[each][1]} for each in order if merits[each] < before]

    def _effect(
        self, at: Together, walk: Walk, unit: Unit, above: bool, missed: dict[str, Tensor]
    ) -> Float[Tensor, " rows"]:
        """By how much the difference moves, in its units, with a unit on its other side: by its own step's gradient."""
        step, own, trail = unit.step, [unit.sample], walk.trail
        ways = []
        for sides in (at.sides, {**at.sides, unit: above}):
            with given_sides(sides, step, own):
                ways.append(self.client.gradient(trail[step], self._inputs(at.x[own]), self.labels[own]))
        c = self.plan.expansion[-1][1][step] / self.plan.sizes[step] * walk.factors[step]
        return torch.cat([(c * (ways[1][n] - ways[0][n]) / self.difference.noise[n]).flatten() for n in missed])

    def _doubts(
        self, at: Together, walk: Walk, error: Float[Tensor, " n"], missed: dict[str, Tensor]
    ) -> dict[Unit, bool]:
        """The units nearest to their kinks, in the samples' errors, each with the side that it is not on: of those
        whose weights are missed by more than most."""
        trail, outlying, found = walk.trail, self._outlying(missed), list[tuple[float, Unit, bool]]()
        for step, members in enumerate(at.order):
            found += in_doubt(self.client, trail[step], at.x, members, error, step, at.sides)
        outside = (each for each in found if outlying[each[1].activation][each[1].unit])
        return {which: above for _, which, above in sorted(outside, key=lambda each: each[0])[:MOST_SIDES]}

    def _outlying(self, missed: dict[str, Tensor]) -> list[Bool[Tensor, " m"]]:
        """Of each kinked activation which units' weights are missed by more than most."""
        network, found = self._network, list[Tensor]()
        for node in kinks(network):
            value = network.nodes[node].reads[0]
            op, shape = network.nodes[value - 1].op, network.shapes[value]
            name = op.layer.weight_name if isinstance(op, Linear) else ""
            if name in missed and len(shape) == 1:
                rows = missed[name].square().mean(1).sqrt()
                found.append(rows > OUTLYING * rows.median())
            else:
                found.append(torch.ones(prod(shape), dtype=torch.bool, device=network.device))
        return found

    @cached_property
    def _network(self) -> Network:
        return self.client.network(self.client.weights)

    @property
    def kinked(self) -> bool:
        return bool(kinks(self._network))


def behind_first(client: Client) -> int:
    """The value behind the first of the layers that tell steps apart."""
    segments = Place.layers(client.network(client.weights), client.weights)
    assert segments is not None
    return segments[0].exit


def cotangents(
    client: Client, weights: Weights, x: Tensor, labels: Float[Tensor, " s"], value_id: int
) -> Float[Tensor, "s o"]:
    """Of one value of some samples; zero where none comes to it."""
    network = client.network(weights)
    values = network.forward(x)
    k = client.loss.output_gradient(values[-1].reshape(len(x), -1), labels).reshape(values[-1].shape)
    found = network.vjp(values, network.slopes(values), {len(values) - 1: k})[value_id]
    return (torch.zeros_like(values[value_id]) if found is None else found).flatten(1)


def whole_cotangents(
    walk: Walk, x: Tensor, labels: Float[Tensor, " n"], order: Order, value_id: int
) -> Float[Tensor, "n o"]:
    """Of each sample at one value, all its steps together, as the difference counts them."""
    c, trail = walk.plan.expansion[-1][1], walk.trail
    found = x.new_zeros(len(x), prod(walk.client.network(walk.client.weights).shapes[value_id]))
    for step, members in enumerate(order):
        rows = list(members)
        own = cotangents(walk.client, trail[step], x[rows], labels[rows], value_id)
        found[rows] += c[step] * walk.factors[step] / len(rows) * own
    return found


def exchanged(order: Sequence[tuple[int, ...]], one: int, i: int, two: int, j: int) -> tuple[tuple[int, ...], ...]:
    new = list(order)
    new[one] = tuple(j if each == i else each for each in order[one])
    new[two] = tuple(i if each == j else each for each in order[two])
    return tuple(new)


def alike(off: Float[Tensor, " s"], by: list[int], own: int) -> list[tuple[int, int]]:
    """Of samples by how far off they are those of a step, each with others that are not and fit it about as well."""
    return [(i, j) for i in by[:own] for j in by[own:] if not bool(off[j] > ALIKE * off[i])]
