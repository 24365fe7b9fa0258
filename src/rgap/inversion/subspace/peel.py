"""Finding the samples of a batch one after another: roots of the condition, their labels, and what is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.subspace.condition import Condition, RowCondition
from rgap.inversion.subspace.head import Spaces
from rgap.inversion.subspace.identify import SLACK, Samples, identify, likeliest
from rgap.linalg import deadline
from rgap.linalg.levenberg_marquardt import affordable, levenberg_marquardt

SAME = 1e-4
"""Two inputs that differ by less than this part of their size are one root."""


@dataclass(frozen=True)
class Search:
    """How roots are looked for.

    Args:
        starts: in each round, half of them from the gradient's rows where it has a bias.
        rounds: without a new sample before the search ends.
        max_steps: of Levenberg and Marquardt from every start.
        seed: of the random starts.
    """

    starts: int = 64
    rounds: int = 6
    max_steps: int = 60
    seed: int = 0

    def __call__(
        self, spaces: Spaces, count: int, report: Callable[[int, float], None] = lambda done, loss: None
    ) -> Samples:
        """All samples that are found.

        Args:
            count: the number of samples.
            report: is called with the number of samples that were found.
        """
        generator = torch.Generator(device=spaces.first.v.device).manual_seed(self.seed)
        found = [Samples.none(spaces.first.v.new_zeros(0, spaces.head.layer.unknowns))]
        failed = 0
        while spaces.left > 0 and failed < self.rounds and deadline.used() < 1:
            spaces = spaces.reduced()
            x = self._roots(spaces, generator, self.starts * 2 ** min(failed, 2))
            new = identify(spaces, x, count)
            failed = 0 if len(new) else failed + 1
            if len(new):
                new = new.select(range(min(len(new), spaces.left)))
                spaces = spaces.without(new.x, new.labels, new.share)
                found.append(new)
            report(sum(map(len, found)), float("nan"))
        return Samples.concatenate(found)

    def _roots(self, spaces: Spaces, generator: torch.Generator, starts: int) -> Float[Tensor, "s n"]:
        """Inputs that satisfy the condition as far as rounding lets them, each once, the best first."""
        wide = max(shape.numel() for shape in map(torch.Size, spaces.head.network.shapes[1:]))
        starts = affordable(starts, wide * max(1, spaces.left))
        labels = _labels(spaces, starts, generator)
        condition = spaces.condition(labels)
        t = self._starts(condition, starts, generator)
        t, off = self._solve(condition, t)
        if isinstance(condition, RowCondition) and spaces.smooth:
            # Where the second layer's spaces are known worse than the first one's, the cotangent decides.
            x = _distinct(condition.inputs(t[off <= 1]), spaces.left)
            condition = spaces.cotangent_condition(likeliest(spaces, x))
            t, off = self._solve(condition, condition.unknowns_of(condition.first.row(x)))
        order = off.argsort()
        x = condition.inputs(t[order[off[order] <= 1]])
        if spaces.head.scalable:
            x = torch.nn.functional.normalize(x)
        return _distinct(x, spaces.left)

    def _solve(self, condition: Condition, t: Float[Tensor, "s d"]) -> tuple[Float[Tensor, "s d"], Float[Tensor, " s"]]:
        """Where starts end, and by how much each misses the condition, in units of what rounding explains."""
        if not len(t):
            return t, t.new_zeros(0)
        if condition.unknowns:
            t, cost = levenberg_marquardt(condition, t, self.max_steps, found=1e-17)
        else:
            cost = condition.cost(t)
        return t, (cost / (SLACK**2 * condition.allowed(t))).nan_to_num(nan=torch.inf)

    def _starts(self, condition: Condition, starts: int, generator: torch.Generator) -> Float[Tensor, "s d"]:
        rows = condition.origin.new_zeros(0, condition.unknowns)
        if isinstance(condition, RowCondition) and condition.unknowns:
            rows = row_starts(condition, starts // 2)
        random = random_starts(condition, starts - len(rows), generator)
        return torch.cat([rows, random])


def _labels(spaces: Spaces, starts: int, generator: torch.Generator) -> Float[Tensor, " s"]:
    """Of the starts: every label about as often as every other."""
    labels = torch.tensor(spaces.head.loss.labels or (0.0,), dtype=spaces.first.v.dtype)
    order = torch.randperm(starts, generator=generator)
    return labels.repeat(-(-starts // len(labels)))[:starts][order].to(spaces.first.v.device)


def row_starts(condition: RowCondition, most: int) -> Float[Tensor, "s d"]:
    """The rows of the gradient, each over its bias's gradient: the inputs of the samples for which the unit fires, in
    part. A unit that fires for one of them gives that one away (J. Geiping et al., arXiv:2003.14053, Prop. 3.1)."""
    first = condition.first
    a = first.u @ first.core
    if first.biased:
        last = a @ first.v[-1]
        a = a[last.abs() > 1e-9 * a.norm(dim=1)]
        a = a / (a @ first.v[-1])[:, None]
    else:
        a = torch.cat([a, -a])
        a = a[a.norm(dim=1) > 0]
    t = (a - condition.origin) @ condition.basis
    cost = condition.cost(t).nan_to_num(nan=torch.inf)
    order = cost.argsort()[: 4 * most]
    return _distinct(t[order], most)


def random_starts(condition: Condition, count: int, generator: torch.Generator) -> Float[Tensor, "s d"]:
    """In random directions, at distances that the samples' own may have.

    The shortest a with a last coordinate of 1 is some mean of the samples: they are as far from it as it is long, and
    up to sqrt(b) times that where they are orthogonal. Without a bias the size of z decides, which makes activations
    bend.
    """
    like, d = condition.origin, condition.unknowns

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=like.dtype, device=like.device)

    way = draw(count, d)
    way = way / way.norm(dim=1, keepdim=True).clamp(min=1e-30)
    part = torch.rand(count, 1, generator=generator, dtype=like.dtype, device=like.device)
    if condition.first.biased:
        low, high = 0.3, 2 * (d + 1) ** 0.5
        size = like.norm() * low * (high / low) ** part
    else:
        spread = (way @ condition.weight.mT).square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
        size = 0.1 * 100**part / spread
    start: Tensor = way * size
    return start


def _distinct(x: Float[Tensor, "s n"], most: int) -> Float[Tensor, "a n"]:
    """The first of those that are nearly the same, and no more than so many."""
    kept: list[int] = []
    apart = torch.cdist(x, x) if len(x) else x.new_zeros(0, 0)
    near = apart <= SAME * x.norm(dim=1)
    for at in range(len(x)):
        if len(kept) < most and not any(bool(near[at, other]) for other in kept):
            kept.append(at)
    return x[kept]
