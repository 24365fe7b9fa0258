"""Through a mean with kinks in front of its layer, or a maximum behind another, from the network's own input.

What the layer reads is not free then: it comes of far fewer numbers, and its few outputs alive tell them, if no side is
wrong. What is to be found is which side of its kink each value of these outputs lies on, and the values in front on
theirs; those change with every step, and with them the rows. So

- slopes in front are means over how far the last step moved each value: steps that take the present ones for all there
  are go to and fro between two patterns of sides for ever, beside the input;
- rows are weighed by what an error of what the layer reads does to all of them together (`rgap.inversion.read_weight`),
  which shows weak directions as well as strong ones, and in few products;
- as soon as little is missed, sides are taken as they stand, an output that misses more than most counts less, and each
  solve is precise. From the right sides in the layer that comes to the input in some eight steps; of a few wrong ones
  each spoils one output.

Of maxima routes take the place of sides. Slopes in front are means from the first step on, over more: with the present
ones as far a way takes three times as many steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.inversion.prior import Prior
from rgap.inversion.read_weight import ByReadings, can_weigh
from rgap.inversion.route_rows import ASTRAY, LEAST, Annealing, Decided, Observed, Point, Pooled, Step
from rgap.inversion.routed import GradientWeight
from rgap.inversion.routes import ROUNDING, Unpooled
from rgap.inversion.windows import DECIDED, normal
from rgap.linalg import deadline
from rgap.nn.pools import MaxPool

# b samples, o outputs, q places in doubt, i what a place reads.

COARSE = Annealing(
    cooling=1.0, fading=0.9, max_steps=150, patience=25, solve_rtol=0.05, solve_steps=40, single=False, diverges=30.0
)
"""In small steps, no colder than what is missed: solves to the end are led astray by wrong sides. In float64: rows that
miss little are weighed too differently for float32."""
PRECISE = Annealing(solve_rtol=1e-3, solve_steps=100, single=False)
"""With decided sides."""
MAXIMA = replace(COARSE, temperature=1.5, fading=0.95, patience=12, progress=0.9, single=True)
"""Of maxima: colder or warmer it comes to rest earlier, with a larger part of the input moved by a window and the
routes of that part with it."""
NEARLY = 1e-2
"""Below this part missed slopes are means, rows are weighed by what is read, and decided sides are tried."""
DOUBTED, DOUBTED_FIRST = 3.0, 10.0
"""So many times as far as the last step moved values in front, root mean square, they are in doubt; of maxima, whose
steps they are from the first one on."""
OWN = ((0.1, 1.0), (math.inf,))
"""Variance of an output's own rows besides, relative to what all miss, squared: of a side that is wrong beyond all
doubt, which would count most where rows show little. With less steps are longer, with more safer: in turn. Where that
leads astray the search begins anew, and weighs each output by itself."""
SPOILT = 4.0
"""An output that misses so many times more than half of the others, squared, has a side wrong."""
COLUMNS = 512
"""With more places in doubt rows are weighed each output by itself."""
SLOWLY = 0.95
"""Decided sides are followed while each solve leaves less than this part of what is missed."""


def find_through(
    part: Pooled,
    observed: Observed,
    prior: Prior,
    agrees: float,
    start: Float[Tensor, "b ..."],
    report: Callable[[int, float], None] = lambda step, missed: None,
) -> Unpooled:
    """The input and the sides, arguments and result as of `rgap.inversion.routes.find_routes`.

    Raises:
        OutOfTime: the time was up.
    """
    tries: list[Unpooled] = []
    ways = [(MAXIMA, OWN[-1])] if isinstance(part.pool, MaxPool) else [(COARSE, own) for own in OWN]
    for schedule, own in ways:
        tries.append(_search(part, observed, prior, agrees, start, report, schedule, own))
        if tries[-1].missed <= agrees:
            break
    return min(tries, key=lambda each: each.missed)


def _search(
    part: Pooled,
    observed: Observed,
    prior: Prior,
    agrees: float,
    start: Float[Tensor, "b ..."],
    report: Callable[[int, float], None],
    schedule: Annealing,
    own: tuple[float, ...],
) -> Unpooled:
    """One try, with such variances of outputs' own rows in turn."""
    nearly, far = (math.inf, DOUBTED_FIRST) if isinstance(part.pool, MaxPool) else (NEARLY, DOUBTED)
    x, weight, gradient_missed = start, schedule.prior, 1.0
    point: Point | None = None
    best: Unpooled | None = None
    before, lowest, last = math.inf, math.inf, 0
    for step in range(schedule.max_steps):
        deadline.check()
        came = point
        if came is None or came.missed >= nearly:
            point = Point(part, observed, x)
        else:
            point = Smooth(part, observed, x, came, far)
        at = Doubting(point, schedule.temperature, gradient_missed * schedule.gradient_share, schedule)
        at.own = own[step % len(own)]
        hard: Decided = Deciding(point, PRECISE)
        if hard.missed <= agrees or (hard.missed < NEARLY and step % schedule.every == 0):
            hard = _followed(hard, ROUNDING * agrees)
        if at.missed < schedule.progress * lowest:
            lowest, last = at.missed, step
        if best is None or hard.missed < best.missed:
            best, last = Unpooled(hard.point.x, hard.windows.slope, hard.missed, step), step
        report(step, hard.missed)
        late = step - last >= schedule.patience or at.missed > schedule.diverges * lowest
        if best.missed <= agrees or late or not at.missed < ASTRAY:
            break
        x, gradient_missed = at.solve(prior, weight), at.gradient_missed
        weight *= schedule.fading ** (schedule.quick if at.missed < before / 2 else 1.0)
        before = at.missed
    assert best is not None
    return best


def _followed(step: Decided, enough: float) -> Decided:
    """As far as decided sides lead."""
    best = step
    while True:
        deadline.check()
        point = step.point
        tried = Deciding(Smooth(point.part, point.observed, step.solve(None, 0.0), point), PRECISE)
        best = tried if tried.missed < best.missed else best
        if tried.missed <= enough or not (
            tried.missed < SLOWLY * step.missed or tried.point.missed < SLOWLY * point.missed
        ):
            return best
        step = tried


class Smooth(Point):
    """With slopes in front that are means over what their values may be."""

    def __init__(self, part: Pooled, observed: Observed, x: Tensor, before: Point, far: float = DOUBTED):
        super().__init__(part, observed, x)
        self.slopes = dict(self.slopes)
        for node, activation in part.front.activations:
            if activation.kinked:
                value = part.front.nodes[node].reads[0]
                z = self.values[value]
                moved = (z - before.values[value]).square().mean(tuple(range(2, z.dim())), keepdim=True).sqrt()
                self.slopes[node] = activation.slope(z[..., None] + far * moved[..., None] * normal(z)).mean(-1)


class Doubting(Step):
    """Rows weighed by what is read, but for what places in doubt do to them."""

    own = 1.0
    """As `OWN`."""

    def weigher(self) -> GradientWeight | None:
        layer, size = self.point.part.layer, self.point.observed.grad.square().mean(2).flatten()
        if not (self.missed < NEARLY and self.own < math.inf and can_weigh(layer, self.k)):
            return super().weigher()
        doubted = self._doubted()
        if doubted is None:
            return super().weigher()
        own = (LEAST**2 + self.own * self.gradient_missed**2) * size
        return ByReadings(layer, self.k, _error(self, self.gradient_missed), own, *doubted)

    def _doubted(self) -> tuple[Int[Tensor, " q"], Float[Tensor, "q i"]] | None:
        """The outputs of all places whose slopes are in doubt, and what each may do to its output's gradient rows; None
        if they are too many."""
        point, pool, spread = self.point, self.point.part.pool, self.windows.spread
        k = point.observed.cotangent[..., None]
        b, o, m, w = ((spread > DECIDED * self.windows.slope.amax()) & (k != 0)).nonzero(as_tuple=True)
        if len(b) > COLUMNS:
            return None
        return o, point.reads(b, o, pool.windows[m, w]) * (spread * k)[b, o, m, w][:, None]


class Deciding(Decided):
    """The same with sides as they stand: outputs that miss more than most count less."""

    def __init__(self, point: Point, schedule: Annealing):
        super().__init__(point, schedule)
        self.weighs = can_weigh(point.part.layer, self.k)
        if self.weighs:
            size, variance = (each.square().mean(2).flatten() for each in (point.observed.grad, self.left))
            alive = size > 0
            missed = max(point.missed, float((variance / size)[alive].median()) ** 0.5 if bool(alive.any()) else 1.0)
            self.variance = (point.spread * max(missed, LEAST)) ** 2
            self.own = (variance - SPOILT * missed**2 * size).clamp(min=0) + LEAST**2 * size
            self.error = _error(self, missed)

    def weigher(self) -> GradientWeight:
        if not self.weighs:
            return super().weigher()
        none = self.k.new_zeros(0, dtype=torch.long), self.k.new_zeros(0, self.left.shape[2])
        return ByReadings(self.point.part.layer, self.k, self.error, self.own, *none)


def _error(step: Step, missed: float) -> float:
    """The variance of what the layer reads, where such a part is missed."""
    return float(step.point.read.square().mean()) * max(step.point.missed, missed, LEAST) ** 2
