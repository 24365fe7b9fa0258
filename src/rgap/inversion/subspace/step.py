"""The samples of one local step, by two consecutive Linear layers of which the first one reads the samples.

The first layer's weights move within the row space of all samples, however many steps there are. The second layer's
move within that of all hidden vectors, one for each sample and step: at the weights before a step only that step's
samples satisfy

    f(W x + c) lies in the row space of what is left of the second layer's difference, for x in that of the first one's.

The label is the one at which the cotangent lies in the second layer's column space; the first one's mixes the epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.subspace.condition import RowCondition
from rgap.inversion.subspace.head import Head, Spaces, told
from rgap.inversion.subspace.peel import Search, random_starts, row_starts
from rgap.inversion.subspace.span import Span
from rgap.linalg import deadline
from rgap.linalg.levenberg_marquardt import levenberg_marquardt
from rgap.linalg.svd import svd
from rgap.nn.layers import Layer
from rgap.nn.losses import Loss
from rgap.nn.network import Network, Segment
from rgap.nn.ops import Linear

ABOVE = 1.5
"""Times the norm of the rounding below which a singular value is none; that of weights is known well."""
SHOWS = 32
"""So many singular values that are rounding show how large it is."""
NEAR = 1e-2
"""Two inputs that differ by less than this part of their size are one candidate."""
TWICE = 7.0
"""Times its own error, within which a candidate is another sample again: rounding may leave some direction of one so
open that it is found at two places."""
FITS = 30.0
"""Times what rounding explains, squared, by which a sample may miss the row space."""
STRICT = (3.0, 3.0, 10.0, 10.0, FITS)
"""The same by attempt, where samples before left errors; else the first: mixtures of samples come near to fitting."""
SLACK = (1.0, 2.0, 2.0, 4.0, 4.0, 8.0)
"""By attempt: times what rounding explains, by which a cotangent may miss the column space. Later ones allow for the
errors of the samples before."""
LOOSE = (1e-4, 10.0)
"""The share of its size, squared, by which a candidate may miss the row space where no other fits, and the times by
which all others have to miss it more."""
APPROXIMATE = (0.1, 0.3)
"""A candidate that misses the row space and the column space by less than these shares of its size is about where a
sample of a later step is."""


@dataclass(frozen=True, eq=False)
class Place:
    """Two consecutive Linear layers, and the spaces of what is left of their differences before one step."""

    spaces: Spaces
    """The first span is that of the whole difference: it holds all samples. The second one is of what is left."""
    behind: Spaces
    """Of the second layer on its own."""
    left: Span
    """What is left of the first layer's difference, in the basis of the whole."""

    @staticmethod
    def layers(network: Network, gradients: Mapping[str, Tensor]) -> tuple[Segment, Segment] | None:
        """The first two Linear layers, if nothing that is trained stands before or between them."""
        trained = [each for each in network.segments if _trained(network, each)]
        two = trained[:2]
        if len(two) < 2 or not all(told(network, each, gradients) for each in two) or two[1].entry == two[0].exit:
            return None
        return two[0], two[1]

    @classmethod
    def of(
        cls,
        network: Network,
        loss: Loss,
        left: Mapping[str, Tensor],
        noise: Mapping[str, float],
        first: Span | None,
        most: int,
    ) -> Place:
        """Before a step.

        Args:
            network: at the weights before the step.
            left: what is left of the difference, in units of the step's gradient.
            noise: the standard deviation of each value of it, by parameter.
            first: of the first layer's whole difference; None if that is what is left.
            most: hidden vectors that are left in the second layer's difference, at the most.
        """
        segments = cls.layers(network, left)
        assert segments is not None
        (one, two), heads = segments, []
        for segment in segments:
            part = network.part([each for each in network.segments if each.entry >= segment.entry])
            heads.append(Head(part, loss, segment.entry, part.scalable))
        whole = _span(network, one, left, noise, None) if first is None else first
        whole = replace(whole, layer=layer_of(network, one))
        u, core = torch.linalg.qr(_gradient(network, one, left) @ whole.v)
        second = _span(network, two, left, noise, most)
        spaces = Spaces(heads[0], whole, second, two.entry - one.entry)
        return cls(spaces, Spaces(heads[1], second, None), replace(whole, u=u, core=core))

    @property
    def condition(self) -> RowCondition:
        found = self.spaces.condition(self.spaces.first.v.new_zeros(0))
        assert isinstance(found, RowCondition)
        return found

    @property
    def rank(self) -> int:
        """How many samples there are, all steps together."""
        return self.spaces.first.rank

    def misfit(self, x: Float[Tensor, "s n"]) -> tuple[Float[Tensor, " s"], Float[Tensor, " s"]]:
        """How far inputs miss the condition: squared, relative to what rounding explains and to their size."""
        condition = self.condition
        t = condition.unknowns_of(condition.first.row(x))
        cost = condition.cost(t).nan_to_num(nan=torch.inf)
        return cost / condition.allowed(t), cost

    def error(self, x: Float[Tensor, "s n"]) -> Float[Tensor, " s"]:
        """How far rounding may have moved each value of inputs (root mean square)."""
        condition = self.condition
        return condition.error(condition.unknowns_of(condition.first.row(x)))

    def twice(self, x: Float[Tensor, " n"], others: Float[Tensor, "s n"]) -> bool:
        """Whether rounding may have moved one of the others here."""
        off, error = (others - x).square().mean(1).sqrt(), self.error(x[None]).nan_to_num(posinf=0.0)
        return bool((off < TWICE * error).any())

    def solve(self, x: Float[Tensor, "s n"], max_steps: int) -> Float[Tensor, "s n"]:
        """Where inputs satisfy the condition best, from here."""
        condition = self.condition
        t = condition.unknowns_of(condition.first.row(x))
        if condition.unknowns and len(t):
            t, _ = levenberg_marquardt(condition, t, max_steps, found=1e-17)
        return condition.inputs(t)

    def labels(
        self, x: Float[Tensor, "s n"], size: int
    ) -> tuple[Float[Tensor, " s"], Float[Tensor, " s"], Float[Tensor, " s"]]:
        """Of each input the likeliest label, and by how much its cotangent misses the second layer's column space:
        relative to what rounding explains, and to its size.

        Args:
            size: how many samples the step is on: a real label is told by how much its sample counts in their mean.
        """
        head, span = self.behind.head, self.behind.first
        values = head.values(self.spaces.head.values(x)[self.spaces.second_at])
        if not head.loss.labels:
            unit = head.direction(values)
            inverse, _ = span.inverse_share(values[0].flatten(1), unit)
            label = head.loss.label_from(values[-1].flatten(1), (size / inverse)[:, None])
            assert label is not None
            return label, *self._off(unit)
        every = torch.tensor(head.loss.labels, dtype=x.dtype, device=x.device)
        off, share = x.new_zeros(len(every), len(x)), x.new_zeros(len(every), len(x))
        for at, each in enumerate(every):
            off[at], share[at] = self._off(head.k(values, each.expand(len(x))))
        share = share.nan_to_num(nan=torch.inf)
        best = share.argmin(0, keepdim=True)
        return every[best[0]], off.gather(0, best)[0], share.gather(0, best)[0]

    def _off(self, k: Float[Tensor, "s o"]) -> tuple[Float[Tensor, " s"], Float[Tensor, " s"]]:
        span = self.behind.first
        missed, size = span.outside(k).norm(dim=1), k.norm(dim=1).clamp(min=1e-300)
        return missed / (span.cotangent_uncertainty(k) + 1e-9 * size), missed / size

    def share(self, x: Float[Tensor, "s n"], labels: Float[Tensor, " s"]) -> float:
        """What each of these samples counts in the step's gradient, by the gradient itself (Wedderburn)."""
        head, span = self.behind.head, self.behind.first
        h = self.spaces.head.values(x)[self.spaces.second_at]
        inverse, _ = span.inverse_share(h.flatten(1), head.k(head.values(h), labels))
        return 1 / float(inverse.median())

    def without(self, x: Float[Tensor, "s n"], labels: Float[Tensor, " s"], share: float) -> Place:
        """Less these samples in this step, each with its share of the step's gradient."""
        spaces, shares = self.spaces, torch.full_like(labels, share)
        values = spaces.head.values(x)
        ks, at, second = spaces.head.cotangents(values, labels), spaces.second_at, spaces.second
        one, two = ks[1], ks[at + 1]
        assert second is not None
        assert one is not None
        assert two is not None
        second = second.without(values[at].flatten(1), two.flatten(1), shares).reduced()
        left = self.left.without(values[0].flatten(1), one.flatten(1), shares)
        return Place(replace(spaces, second=second), replace(self.behind, first=second), left)

    def apart(
        self, x: Float[Tensor, "e n"], labels: Float[Tensor, " e"], share: Float[Tensor, " e"], rank: int
    ) -> Place:
        """With the first space narrowed to about what these samples leave of it: where starts for others are."""
        left, head = self.left, self.spaces.head
        if len(x):
            left = left.without(x, head.k(head.values(x), labels), share)
        u, sizes, vt = svd(left.core, full=True)
        kept = slice(0, rank)
        left = replace(left, u=left.u @ u[:, kept], core=sizes[kept].diag(), v=left.v @ vt[kept].mT, rank=rank)
        return replace(self, spaces=replace(self.spaces, first=left))


@dataclass(frozen=True, eq=False)
class Candidates:
    """Inputs with the labels that go with them."""

    x: Float[Tensor, "s n"]
    labels: Float[Tensor, " s"]

    def __len__(self) -> int:
        return len(self.x)

    @property
    def none(self) -> Candidates:
        return Candidates(self.x[:0], self.labels[:0])

    def and_(self, other: Candidates) -> Candidates:
        return Candidates(torch.cat([self.x, other.x]), torch.cat([self.labels, other.labels]))


def find_step(
    place: Place,
    count: int,
    size: int,
    clipped: bool,
    known: Candidates,
    near: Float[Tensor, "s n"],
    later: float,
    search: Search,
    generator: torch.Generator,
) -> tuple[Candidates, Float[Tensor, "a n"]]:
    """The samples of one step of the first epoch, as many as are found, and about where those of later steps are.

    Args:
        count: how many samples are to be found.
        size: how many the step is on.
        clipped: whether the share of a sample in the step's gradient is not known, because that was clipped.
        known: those of the steps before.
        near: about where samples are, from the steps before.
        later: how often a sample comes again, relative to this step's coefficient.
    """
    found = known.none
    for attempt in range(search.rounds + 2):
        if deadline.used() >= 1:
            break
        if attempt or not len(near):
            many = search.starts * (1 + attempt)
            away = near if attempt % 2 else near[:0]
            near = torch.cat([near, _starts(place, known.and_(found), away, size, later, attempt, many, generator)])
        near = place.solve(near, search.max_steps // 4 if attempt < 3 else search.max_steps)
        off, cost = place.misfit(near)
        order = off.argsort()
        near, off, cost = near[order], off[order], cost[order]
        labels, off_k, share = place.labels(near, size)
        taken, kept = list[int](), list[int]()
        strict = STRICT[min(attempt, len(STRICT) - 1) if len(known) else 0]
        for at in range(len(near)):
            others = torch.cat([known.x, found.x, near[[*taken, *kept]]])
            if bool(((others - near[at]).norm(dim=1) < NEAR * near[at].norm()).any()):
                continue
            fits = off[at] <= strict and share[at] < APPROXIMATE[0] and off_k[at] <= SLACK[min(attempt, len(SLACK) - 1)]
            if fits and place.twice(near[at], torch.cat([known.x, found.x, near[taken]])):
                continue
            if fits and len(found) + len(taken) < count:
                taken.append(at)
            elif cost[at] < APPROXIMATE[0] ** 2 and share[at] < APPROXIMATE[1]:
                kept.append(at)
        if taken:
            new = Candidates(near[taken], labels[taken])
            own = place.share(new.x, new.labels) if clipped else 1 / size
            found, place = found.and_(new), place.without(new.x, new.labels, own)
        near = near[kept[: max(0, place.rank - len(known) - len(found))]]
        if len(found) == count:
            break
    # Before the first step nothing was taken for being on a wrong side.
    loose = _nearly(place, near, count - len(found), size) if len(known) else known.none
    return found.and_(loose), near


def _nearly(place: Place, near: Float[Tensor, "s n"], count: int, size: int) -> Candidates:
    """The candidates that come nearest to fitting a step, where they are by far the nearest; else none.

    A unit of an earlier step that is taken for being on the wrong side of its kink spoils what all later ones read.
    """
    cost, (labels, _, share) = place.misfit(near)[1], place.labels(near, size)
    taken, rest = list[int](), torch.inf
    for at in cost.argsort().tolist():
        if bool(((near[taken] - near[at]).norm(dim=1) < 10 * NEAR * near[at].norm()).any()):
            continue
        if len(taken) == count:
            rest = float(cost[at])
            break
        taken.append(at)
    fits = all(cost[at] < LOOSE[0] and LOOSE[1] * cost[at] < rest and share[at] < APPROXIMATE[1] for at in taken)
    if not count or len(taken) < count or not fits:
        taken = []
    return Candidates(near[taken], labels[taken])


def _starts(
    place: Place,
    found: Candidates,
    near: Float[Tensor, "s n"],
    size: int,
    later: float,
    wider: int,
    many: int,
    generator: torch.Generator,
) -> Float[Tensor, "a n"]:
    """Where to look for samples that are not found yet, each once: some steps from rows of the gradient and from random
    points, in about the space that all others leave."""
    there = found.and_(Candidates(near, place.labels(near, size)[0]))
    share = torch.full_like(there.labels, later / size)
    share[len(found) :] += 1 / size
    rank = min(place.rank, max(1, place.rank - len(there) + wider))
    narrow = place.apart(there.x, there.labels, share, rank)
    condition = narrow.condition
    if not condition.unknowns:
        return condition.inputs(condition.origin.new_zeros(1, 0))
    rows = row_starts(condition, many * 3 // 4)
    t = torch.cat([rows, random_starts(condition, many - len(rows), generator)])
    x = narrow.solve(condition.inputs(t), 15)
    kept: list[int] = []
    close = torch.cdist(x, x) <= NEAR * x.norm(dim=1)
    for at in range(len(x)):
        if not bool(close[at, kept].any()):
            kept.append(at)
    return x[kept]


def _trained(network: Network, segment: Segment) -> bool:
    ops = (network.nodes[node].op for node in segment.nodes)
    return any(op.cotangent_parameter or (isinstance(op, Linear) and op.has_gradient) for op in ops)


def layer_of(network: Network, segment: Segment) -> Layer:
    """Of a segment that is one Linear layer."""
    op = network.nodes[segment.nodes[0]].op
    assert isinstance(op, Linear)
    return op.layer


def _gradient(network: Network, segment: Segment, left: Mapping[str, Tensor]) -> Float[Tensor, "o n"]:
    """A layer's, with that of its bias as the last column."""
    layer = layer_of(network, segment)
    weight = layer.pack_weight(left[layer.weight_name][None])[0, 0]
    bias = None if layer.bias_name is None else left.get(layer.bias_name)
    return weight if bias is None else torch.cat([weight, bias[:, None]], 1)


def _above(sizes: Float[Tensor, " r"], shape: tuple[int, ...], noise: float) -> tuple[int, float]:
    """How many singular values are above the rounding, and its spectral norm.

    Where what is left shows more than was foretold, that counts: weights without a gradient that decay alike in every
    step are off by the same error each time.

    Args:
        noise: standard deviation of each value's rounding, as foretold.
    """
    rows, columns = shape
    edge = rows**0.5 + columns**0.5
    norm = noise * edge
    rank = int((sizes > ABOVE * norm).sum())
    while len(sizes) - rank >= SHOWS:
        seen = edge * float(sizes[rank:].square().sum() / ((rows - rank) * (columns - rank))) ** 0.5
        if not seen > norm:
            break
        norm, before = seen, rank
        rank = int((sizes > ABOVE * norm).sum())
        if rank == before:
            break
    return rank, norm


def _span(
    network: Network, segment: Segment, left: Mapping[str, Tensor], noise: Mapping[str, float], most: int | None
) -> Span:
    """The spaces of what is left of a layer's difference, of no more dimensions than there are vectors in them."""
    layer, grad = layer_of(network, segment), _gradient(network, segment, left)
    q, r = torch.linalg.qr(grad.mT)
    u, sizes, small = svd(r.mT)
    rank, norm = _above(sizes, grad.shape, noise[layer.weight_name])
    if most is not None and rank > most:
        # What is above is left of samples that were taken, by the errors with which they were known.
        rank, norm = most, max(norm, float(sizes[most]))
    biased = grad.shape[1] > layer.unknowns
    return Span(layer, u[:, :rank], sizes[:rank].diag(), q @ small[:rank].mT, rank, norm, biased)
