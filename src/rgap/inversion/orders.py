"""Who was in which step of later epochs, where samples are nearly known and many of them stand in wrong steps.

An exchange of two samples of an epoch moves the whole difference by thousands of roundings, but errors of samples and
other exchanges move it as much, and orders from which no exchange leads on are many. So whole exchanges are given up on
the way: how much each sample counts in each step of the epochs in doubt may be any number, as long as all count once in
an epoch and steps keep their sizes. Then the difference is a smooth function of counts and samples, for which Gauss and
Newton's steps solve. What it ends in are whole numbers, and the order can be read off before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.func import jvp, vmap

from rgap.inversion.all_steps import AllSteps, Together
from rgap.inversion.counted import CountedSteps
from rgap.inversion.walk import Order, Plan
from rgap.linalg import deadline, psd

MOST = 2048
"""Numbers of all samples, and of all samples in all steps of later epochs, at the most."""
ROUNDS = 70
"""Linearisations."""
PATIENCE, SLOW = 10, 0.9
"""So many linearisations that leave more than this part of what was missed are the last."""
OWN = 0.3
"""Of the errors that samples are stated to have, those that they have."""
SAMPLES, COUNTS = 0.1, 0.5
"""How much less samples are held to where they were than moves are damped, and the size of a count."""
DAMPINGS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Times that of the step before, of which the best is taken."""
FIRST, LEAST, LARGEST = 0.1, 1e-3, 1e3
"""Dampings, in units of what is missed."""
SOLVES = 3
"""Of samples, once the order is known."""
CHUNK = 16
"""Directions at once."""


def reordered(
    steps: AllSteps, at: Together, error: Float[Tensor, " n"], close: Sequence[tuple[int, int, int]]
) -> Together:
    """With samples and the order of epochs in doubt such that less is missed; as it was where that is nothing to be
    tried.

    Args:
        error: of each sample's values, root mean square.
        close: a step, a sample that was taken for one of it, and one that fits it about as well.
    """
    plan = steps.plan
    later = len(at.x) * (plan.steps - plan.epoch)
    if not plan.shuffled or not later or max(later, at.x.numel()) > MOST:
        return at
    # In float32: it has to tell orders, of which the next one is thousands of roundings away.
    counted = CountedSteps.of(steps.client, plan, steps.difference, steps.labels, torch.float32)
    if counted is None:
        return at
    found = _Relaxed(counted, at.x.float(), OWN * error.float(), at.order[: _told(plan, close)])
    x, order = found.searched()
    found_at = replace(at, x=x.to(at.x), order=order)
    return replace(found_at, misfit=steps.difference.misfit(steps.walk(found_at)))


def _told(plan: Plan, close: Sequence[tuple[int, int, int]]) -> int:
    """The steps before the first epoch in doubt, which has more pairs of samples that are alike than steps."""
    of = [step // plan.epoch * plan.epoch for step, _, _ in close]
    return min((first for first in of if first and of.count(first) > plan.epoch), default=plan.epoch)


@dataclass(frozen=True, eq=False)
class _Relaxed:
    steps: CountedSteps
    begun: Float[Tensor, "n u"]
    error: Float[Tensor, " n"]
    told: Order

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.steps.plan.sizes[len(self.told) :]

    @cached_property
    def _ways(self) -> Float[Tensor, "w later n"]:
        """Orthonormal directions of counts that leave each step's size, and each sample once in an epoch."""
        n, epoch, epochs = len(self.begun), self.steps.plan.epoch, len(self._sizes) // self.steps.plan.epoch
        one = torch.eye(epoch * n).reshape(-1, epoch, n)
        kept = [one.sum(2)]
        if self.steps.plan.samples == n:
            kept.append(one.sum(1)[:, 1:])
        own = psd.complement(torch.cat(kept, 1).double()).mT.to(self.begun)
        return torch.kron(torch.eye(epochs).to(own), own).reshape(-1, epochs * epoch, n)

    @cached_property
    def _by_samples(self) -> Float[Tensor, "v rows"]:
        """How rows move with each value of each sample, in units of its error, where all count alike."""
        units = torch.eye(self.begun.numel()).to(self.begun).reshape(-1, *self.begun.shape)
        moves = _along(lambda x: self._missed(x, self._even), self.begun, units)
        return (self.error.repeat_interleave(self.begun.shape[1])[:, None] * moves).double()

    @property
    def _even(self) -> Float[Tensor, "later n"]:
        n = len(self.begun)
        return self.begun.new_tensor(self._sizes)[:, None].expand(-1, n) / n

    def _missed(self, x: Tensor, counts: Tensor) -> Float[Tensor, " rows"]:
        return self.steps.missed(x, counts, self.told)

    def searched(self) -> tuple[Float[Tensor, "n u"], tuple[tuple[int, ...], ...]]:
        """Samples and the order of all steps."""
        at = _Point(self.begun, self._even, self._missed(self.begun, self._even).double(), FIRST)
        explained, order = torch.linalg.qr(self._by_samples.mT)[0], self._order(at.counts)
        best, trail = (torch.inf, order), list[float]()
        while len(trail) < ROUNDS and not deadline.used() >= 1:
            at = self._stepped(at)
            trail.append(float(at.missed.norm()))
            if len(trail) > PATIENCE and trail[-1] > SLOW * trail[-1 - PATIENCE]:
                break
            before, order = order, self._order(at.counts)
            rows = self._missed(at.x, self._members(order)).double()
            left = float((rows - explained @ (explained.mT @ rows)).norm())
            best = min(best, (left, order))
            if order == before and left < trail[-1]:
                break
        return self._solved(at.x, best[1]), (*self.told, *best[1])

    def _stepped(self, at: _Point) -> _Point:
        """The best of Gauss and Newton's steps with several dampings; without one that misses less, where it was, more
        damped."""
        n = self.begun.numel()
        by_counts = COUNTS * _along(lambda counts: self._missed(at.x, counts), at.counts, self._ways)
        by = torch.cat([self._by_samples, by_counts.double()])
        noise, gram, slope = float(at.missed.square().mean()), by @ by.mT, by @ at.missed
        away = ((at.x - self.begun) / self.error[:, None]).double().flatten()
        slope[:n] += noise * SAMPLES**2 * away
        held, found = noise * SAMPLES**2 * float(away.square().sum()), replace(at, damping=10 * at.damping)
        least = float(at.missed.square().sum()) + held
        for damping in (at.damping * each for each in DAMPINGS):
            matrix = gram.clone()
            matrix.diagonal().add_(noise * damping**2)
            matrix.diagonal()[:n].add_(noise * SAMPLES**2)
            move = -psd.factor(matrix, 0.0).solve(slope[:, None])[:, 0]
            x = at.x + self.error[:, None] * move[:n].reshape(at.x.shape).to(at.x)
            counts = at.counts + COUNTS * torch.einsum("w,wtn->tn", move[n:].to(at.x), self._ways)
            missed = self._missed(x, counts).double()
            size = float(missed.square().sum()) + noise * SAMPLES**2 * float((away + move[:n]).square().sum())
            if size < least:
                least, found = size, _Point(x, counts, missed, min(max(damping, LEAST), LARGEST))
        return found

    def _order(self, counts: Float[Tensor, "later n"]) -> tuple[tuple[int, ...], ...]:
        """The members of each step that have the largest counts, all in all."""
        sizes, epoch, order = self._sizes, self.steps.plan.epoch, list[tuple[int, ...]]()
        for first in range(0, len(sizes), epoch):
            own = torch.tensor(sizes[first : first + epoch])
            places = counts[first : first + epoch].double().cpu().repeat_interleave(own, 0)
            _, members = linear_sum_assignment(places.numpy(), maximize=True)
            each = iter(members.tolist())
            order += [tuple(sorted(islice(each, size))) for size in own.tolist()]
        return tuple(order)

    def _members(self, order: Order) -> Float[Tensor, "later n"]:
        counts = torch.zeros_like(self._even)
        for step, members in enumerate(order):
            counts[step, list(members)] = 1.0
        return counts

    def _solved(self, x: Float[Tensor, "n u"], order: Order) -> Float[Tensor, "n u"]:
        """The samples, once the order is known."""
        by, counts = self._by_samples, self._members(order)
        factor = psd.factor(by @ by.mT, 0.0)
        for _ in range(SOLVES):
            move = -factor.solve((by @ self._missed(x, counts).double())[:, None])
            x = x + self.error[:, None] * move.reshape(x.shape).to(x)
        return x


@dataclass(frozen=True, eq=False)
class _Point:
    x: Float[Tensor, "n u"]
    counts: Float[Tensor, "later n"]
    missed: Float[Tensor, " rows"]
    damping: float


def _along(of: Callable[[Tensor], Tensor], at: Tensor, directions: Tensor) -> Float[Tensor, "d rows"]:
    """How a function's value moves along each of some directions."""
    found: Tensor = vmap(lambda each: jvp(of, (at,), (each,))[1], chunk_size=CHUNK)(directions)
    return found
