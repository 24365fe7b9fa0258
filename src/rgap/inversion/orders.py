"""Who was in which step of later epochs, all exchanges at once, where samples are nearly known and nothing has kinks.

An exchange of two samples of an epoch moves the whole difference by thousands of roundings, but errors of samples and
other exchanges move it as much, so that none of them alone is told. Near what is thought of the steps the difference is
linear in the samples and in how much each of them counts in each step. With the samples solved for, what is left is a
quadratic function of exchanges, of which many are tried at no cost; those that lower it are simulated, and it begins
again there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import jvp, vmap

from rgap.inversion.all_steps import AllSteps, Together, exchanged
from rgap.inversion.walk import Client, Difference, Order, Walk, Weights
from rgap.linalg import deadline

SIDE = 64
"""Rows and columns, at the most, of what stands for a matrix."""
MOST = 2048
"""Numbers of all samples, and of all samples in all steps of later epochs, at the most."""
ROUNDS = 10
"""Linearisations."""
SURE = 2.0
"""By so much samples' errors are taken for larger than they are stated."""
UNMODELLED = 0.1
"""Part of what is missed that is taken for noise: the difference is not quite linear."""
PAIRS = 512
"""Exchanges that are tried two at a time, those that lower it most alone."""
LEAST = 1e-6
"""Of what is missed, squared, by which an exchange has to lower it."""
PARTS = (1, 2, 4)
"""All exchanges that promise something are simulated together, the first half of them, and the first quarter."""
STUCK = 0.95
"""Of what was missed: where the best of these misses more it is the last."""
TRIED = 24
"""Single exchanges, and as many pairs, that are simulated beside these."""
CHUNK = 16
"""Directions at once, each of the size of all parameters."""

Exchange = tuple[int, int, int, int]
"""A step, a sample of it, another step of the epoch, and a sample of that."""


def reordered(steps: AllSteps, at: Together, error: Float[Tensor, " n"]) -> Together:
    """With samples and the order of later epochs changed as long as less is missed; as it was where that is nothing to
    be tried.

    Args:
        error: of each sample's values, root mean square.
    """
    plan = steps.plan
    later = len(at.x) * (plan.steps - plan.epoch)
    if not plan.shuffled or plan.clip_norm is not None or not later or max(later, at.x.numel()) > MOST:
        return at
    found = _Orders(steps, at.x, SURE * error).searched(at)
    return replace(found, misfit=steps.difference.misfit(steps.walk(found)))


@dataclass(frozen=True, eq=False)
class Sketch:
    """Some thousand numbers for the values of all parameters, in roundings: each matrix between two random ones."""

    difference: Difference
    sides: dict[str, list[Tensor | None]]

    @classmethod
    def of(cls, difference: Difference) -> Sketch:
        draw, sides = torch.Generator().manual_seed(0), dict[str, list[Tensor | None]]()
        for name, d in difference.sent.items():
            if difference.noise[name]:
                sides[name] = [_side(size, draw, d) for size in (len(d), d[0].numel())]
        return cls(difference, sides)

    def __call__(self, values: Weights) -> Float[Tensor, " rows"]:
        parts = []
        for name, (left, right) in self.sides.items():
            own = values[name].reshape(len(values[name]), -1) / self.difference.noise[name]
            own = own if left is None else left @ own
            parts.append((own if right is None else own @ right.mT).flatten())
        return torch.cat(parts)


def _side(size: int, draw: torch.Generator, like: Tensor) -> Tensor | None:
    if size <= SIDE:
        return None
    found: Tensor = torch.randn(SIDE, size, generator=draw, dtype=like.dtype).to(like) / SIDE**0.5
    return found


@dataclass(frozen=True, eq=False)
class _Samples:
    """What samples move, taken out of rows as far as their errors allow."""

    by: Float[Tensor, "v rows"]
    """Of each value, in units of its error."""
    factor: Float[Tensor, "v v"]
    noise: float

    @classmethod
    def of(cls, by: Float[Tensor, "v rows"], noise: float) -> _Samples:
        matrix = by @ by.mT
        matrix.diagonal().add_(noise**2)
        return cls(by, torch.linalg.cholesky(matrix), noise)

    def values(self, rows: Float[Tensor, "s rows"], away: Float[Tensor, " v"] | float = 0.0) -> Float[Tensor, "s v"]:
        """Of samples that explain rows, and are so far from where they began, in units of their errors."""
        return torch.cholesky_solve((rows @ self.by.mT + self.noise**2 * away).mT, self.factor).mT

    def out_of(self, rows: Float[Tensor, "s rows"]) -> Float[Tensor, "s rows"]:
        return rows - self.values(rows) @ self.by


@dataclass(frozen=True, eq=False)
class _Orders:
    steps: AllSteps
    begun: Float[Tensor, "n u"]
    error: Float[Tensor, " n"]

    @cached_property
    def _client(self) -> Client:
        return replace(self.steps.client, gradient=self.steps.client.differentiable)

    @cached_property
    def _sketch(self) -> Sketch:
        return Sketch.of(self.steps.difference)

    def _walk(self, x: Float[Tensor, "n u"], order: Order) -> Walk:
        return Walk(self._client, self.steps.plan).all(x, self.steps.labels, order)

    def _missed(self, walk: Walk) -> Float[Tensor, " rows"]:
        return self._sketch({name: end - self.steps.difference.sent[name] for name, end in walk.end.items()})

    def searched(self, at: Together) -> Together:
        x, by = at.x, None
        order: Order = at.order
        for _ in range(ROUNDS):
            walk = self._walk(x, order)
            missed = self._missed(walk)
            if by is None:
                by = self._by_samples(walk, x, order)
            samples = _Samples.of(by, UNMODELLED * float(missed.square().mean().sqrt()))
            counts = samples.out_of(self._by_counts(walk, x, order))
            way, others = descended(order, self.steps.plan.epoch, counts, samples.out_of(missed[None])[0])
            if deadline.used() >= 1:
                break
            some = [*(way[len(way) // part - 1] for part in PARTS if len(way) >= part), *others]
            tried = {order: missed} | {each: self._missed(self._walk(x, each)) for each in some}
            left = {each: float(samples.out_of(rows[None]).norm()) for each, rows in tried.items()}
            new = min(left, key=left.__getitem__)
            away = ((x - self.begun) / self.error[:, None]).flatten()
            x = self._moved(x, samples.values(tried[new][None], away)[0], new, float(tried[new].norm()))
            stuck, order = new == order or left[new] > STUCK * left[order], new
            if stuck:
                break
        return replace(at, x=x, order=tuple(order))

    def _moved(
        self, x: Float[Tensor, "n u"], by: Float[Tensor, " v"], order: Order, before: float
    ) -> Float[Tensor, "n u"]:
        """Samples moved by what was missed, less far where more is missed then."""
        move = by.reshape(x.shape) * self.error[:, None]
        for part in (1.0, 0.5, 0.25):
            if float(self._missed(self._walk(x - part * move, order)).norm()) < before:
                return x - part * move
        return x

    def _by_samples(self, walk: Walk, x: Float[Tensor, "n u"], order: Order) -> Float[Tensor, "v rows"]:
        """How rows move with each value of each sample, in units of its error: at the mean weights of all steps, which
        a sample's own values hardly move."""
        trail, labels, plan = walk.trail[:-1], self.steps.labels, walk.plan
        mean = {name: torch.stack([each[name] for each in trail]).mean(0) for name in trail[0]}
        units = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        c, counts, found = plan.expansion[-1][1], x.new_zeros(len(x)), list[Tensor]()
        for step, members in enumerate(order):
            counts[list(members)] += c[step] / plan.sizes[step]
        for i in range(len(x)):

            def rows(own: Tensor, i: int = i) -> Tensor:
                return self._sketch(self._client.gradient(mean, own[None], labels[i : i + 1]))

            found.append(counts[i] * self.error[i] * _along(rows, x[i], units))
        return torch.cat(found)

    def _by_counts(self, walk: Walk, x: Float[Tensor, "n u"], order: Order) -> Float[Tensor, "c rows"]:
        """How rows move with how much each sample counts in each step of the later epochs, step by step."""
        trail, labels, plan, found = walk.trail, self.steps.labels, walk.plan, list[Tensor]()
        for step in range(plan.epoch, plan.steps):

            def own(one: Tensor, label: Tensor, step: int = step) -> dict[str, Tensor]:
                return self._client.gradient(trail[step], one[None], label[None])

            def rest(more: Weights, step: int = step) -> Tensor:
                here = {name: g + more[name] / plan.sizes[step] for name, g in walk.gradients[step].items()}
                before = walk.instead(walk.sides, step)
                there = replace(before, gradients=(*before.gradients, here), factors=(*before.factors, 1.0))
                return self._sketch(there.all(x, labels, order[step + 1 :]).end)

            gradients = vmap(own)(x, labels)
            found.append(
                _along(rest, {name: torch.zeros_like(g) for name, g in walk.gradients[step].items()}, gradients)
            )
        return torch.cat(found)


def _along(of: Callable[..., Tensor], at: object, directions: object) -> Tensor:
    """How a function's value moves along each of some directions."""
    found: Tensor = vmap(lambda each: jvp(of, (at,), (each,))[1], chunk_size=CHUNK)(directions)
    return found


def descended(
    order: Order, epoch: int, counts: Float[Tensor, "c rows"], missed: Float[Tensor, " rows"]
) -> tuple[list[Order], list[Order]]:
    """Orders of which each misses less than the one before: by the best exchange, or the best two, of samples between
    steps of one of the later epochs. And those that are one such move away, the most promising first.

    Args:
        epoch: steps of each.
        counts: how what is missed moves with how much each sample counts in each step of the later epochs.
    """
    samples, way, first = len(counts) // (len(order) - epoch), list[Order](), list[Order]()
    gram, slope = counts @ counts.mT, counts @ missed
    least = -LEAST * float(missed.square().sum())
    while True:
        options = _options(order, epoch)
        at = _places(options, epoch, samples).to(counts.device)
        by = torch.zeros(len(options), len(counts), dtype=counts.dtype, device=counts.device)
        by.scatter_(1, at, by.new_tensor([1.0, -1.0, 1.0, -1.0]).expand(len(options), 4))
        alone = 2 * by @ slope + ((by @ gram) * by).sum(1)
        best = alone.argsort()[:PAIRS]
        some = by[best]
        both = alone[best][:, None] + alone[best] + 2 * some @ gram @ some.mT
        apart = (some != 0).to(both)
        both = torch.where(apart @ apart.mT > 0, torch.inf, both).triu(1)
        moves = [[each] for each in best[:TRIED].tolist()]
        for pair in both.flatten().argsort()[:TRIED].tolist():
            moves.append([int(best[each]) for each in divmod(pair, len(best))])
        new = [_with(order, [options[each] for each in move]) for move in moves]
        first = first or new
        worth = [float(alone[best[0]]), float(both.min())]
        if not min(worth) < least:
            return way, first
        at_best = 0 if worth[0] <= worth[1] else min(TRIED, len(best))
        slope = slope + gram @ by[moves[at_best]].sum(0)
        order = new[at_best]
        way.append(order)


def _with(order: Order, exchanges: list[Exchange]) -> Order:
    for each in exchanges:
        order = exchanged(order, *each)
    return order


def _options(order: Order, epoch: int) -> list[Exchange]:
    found = list[Exchange]()
    for one, two in combinations(range(epoch, len(order)), 2):
        if one // epoch == two // epoch:
            found += [(one, i, two, j) for i in order[one] for j in order[two]]
    return found


def _places(options: list[Exchange], epoch: int, samples: int) -> Int[Tensor, "e _"]:
    """Where each exchange adds, takes away, adds and takes away among samples in all steps of later epochs."""
    one, i, two, j = torch.tensor(options).mT
    first, second = (one - epoch) * samples, (two - epoch) * samples
    return torch.stack([first + j, first + i, second + i, second + j], 1)
