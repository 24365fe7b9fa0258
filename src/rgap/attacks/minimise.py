"""Minimisers of many independent functions at once: each row of x is one system with a minimum of its own.

A row that ends, at its minimum, by divergence or because no step lowers it any more, is not evaluated again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Objective = Callable[[Float[Tensor, "a d"], Int[Tensor, " a"]], tuple[Float[Tensor, " a"], Float[Tensor, "a d"]]]
"""Values and gradients at x of the systems whose numbers are given."""
Watch = Callable[[int, float], None]
"""Called after each iteration with its number and the least value."""
Project = Callable[[Float[Tensor, "a d"]], None]


@dataclass(frozen=True)
class Stop:
    """When a system ends.

    Args:
        iterations: at the most.
        value: as soon as its value is so low.
        patience: after so many iterations in which the value fell by less than a tenth altogether; None: never.
    """

    iterations: int
    value: float = 0.0
    patience: int | None = None


@dataclass(frozen=True)
class Minima:
    """The best point of every system."""

    x: Float[Tensor, "s d"]
    value: Float[Tensor, " s"]
    """Infinite where the function was never finite."""
    iterations: Int[Tensor, " s"]
    """How many each system took."""
    ended: tuple[str, ...]
    """Why each system ended, in a few words."""


class Minimiser(ABC):
    """Minimises s systems from s starting points."""

    @abstractmethod
    def __call__(
        self, f: Objective, x: Float[Tensor, "s d"], stop: Stop, watch: Watch, project: Project | None = None
    ) -> Minima:
        """Minimise.

        Args:
            f: the functions.
            x: where each begins.
            stop: when each ends.
            watch: is told of each iteration.
            project: changes points in place to points that are allowed, after every step.

        Raises:
            ValueError: this minimiser cannot keep to what is allowed.
        """


class _Record:
    """The best point of each system so far, and which systems go on."""

    def __init__(self, x: Tensor, stop: Stop):
        self.stop = stop
        self.x = x.clone()
        self.value = x.new_full((len(x),), math.inf)
        self.mark = self.value.clone()
        self.marked_at = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.iterations = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.ended = [""] * len(x)

    def note(self, which: Tensor, x: Tensor, value: Tensor, iteration: int) -> Bool[Tensor, " a"]:
        """Take up an iteration of the systems `which`; tells which of them go on."""
        self.iterations[which] = iteration
        better = (value < self.value[which]) & value.isfinite()
        at = which[better]
        self.x[at], self.value[at] = x[better], value[better]
        fell = ~(self.value[which] > 0.9 * self.mark[which])
        at = which[fell]
        self.mark[at], self.marked_at[at] = self.value[at], iteration
        on = torch.ones_like(better)
        on &= self._end(which, ~value.isfinite(), on, "diverged")
        on &= self._end(which, value <= self.stop.value, on, "reached the value asked for")
        if self.stop.patience is not None:
            stuck = iteration - self.marked_at[which] >= self.stop.patience
            on &= self._end(which, stuck, on, f"did not fall by a tenth in {self.stop.patience} iterations")
        return on

    def end(self, which: Tensor, why: str) -> None:
        for s in which.tolist():
            self.ended[s] = self.ended[s] or why

    def _end(self, which: Tensor, over: Tensor, on: Tensor, why: str) -> Tensor:
        self.end(which[over & on], why)
        return ~over

    def minima(self) -> Minima:
        ended = tuple(why or "no more were allowed" for why in self.ended)
        return Minima(self.x, self.value, self.iterations, ended)


@dataclass(frozen=True)
class Adam(Minimiser):
    """Adam (Kingma and Ba 2015), its rate lowered to a tenth at fixed fractions of the iterations.

    Args:
        rate: the step size.
        signed: only the signs of the gradient are used (Geiping et al. 2020, Section 5).
        decay: the fractions at which the rate falls.
    """

    rate: float = 0.1
    signed: bool = False
    decay: tuple[float, ...] = ()

    def __call__(self, f: Objective, x: Tensor, stop: Stop, watch: Watch, project: Project | None = None) -> Minima:
        record = _Record(x, stop)
        which = torch.arange(len(x), device=x.device)
        point = x.clone()
        if project is not None:
            project(point)
        optimiser = torch.optim.Adam([point], lr=self.rate)
        falls = [math.ceil(fraction * stop.iterations) for fraction in self.decay]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, falls, gamma=0.1)
        on = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for iteration in range(stop.iterations + 1):
            active = which[on]
            value, gradient = f(point[active], active)
            on[active] = record.note(active, point[active], value, iteration)
            watch(iteration, float(record.value.min()))
            if not on.any():
                break
            point.grad = torch.zeros_like(point)
            point.grad[active] = gradient.sign() if self.signed else gradient
            held = point[~on].clone()
            optimiser.step()
            schedule.step()
            point[~on] = held
            if project is not None:
                project(point)
        return record.minima()


@dataclass(frozen=True)
class LBFGS(Minimiser):
    """L-BFGS (Liu and Nocedal 1989), with a bisection for the weak Wolfe conditions.

    Gradients of networks with kinks jump; this line search is the one that is known to work there (Lewis and Overton,
    *Nonsmooth optimization via quasi-Newton methods*, Mathematical Programming 141, 2013).

    Args:
        history: how many steps the curvature is taken from.
        trials: of one line search.
        decrease, curvature: constants of the two conditions.
    """

    history: int = 20
    trials: int = 25
    decrease: float = 1e-4
    curvature: float = 0.9

    def __call__(self, f: Objective, x: Tensor, stop: Stop, watch: Watch, project: Project | None = None) -> Minima:
        if project is not None:
            raise ValueError("L-BFGS cannot keep a guess in the value range: use Adam, or boxed=False")
        record = _Record(x, stop)
        which = torch.arange(len(x), device=x.device)
        value, gradient = f(x, which)
        on = record.note(which, x, value, 0)
        steps, turns, inverse = [x.new_zeros(0, *x.shape) for _ in range(2)] + [x.new_zeros(0, len(x))]
        for iteration in range(1, stop.iterations + 1):
            which, x, value, gradient = which[on], x[on], value[on], gradient[on]
            steps, turns, inverse = steps[:, on], turns[:, on], inverse[:, on]
            if not len(which):
                break
            direction = self._direction(gradient, steps, turns, inverse)
            moved, new_value, new_gradient, found = self._search(f, which, x, value, gradient, direction)
            step, turn = moved - x, new_gradient - gradient
            along = (step * turn).sum(1)
            curved = found & (along > 1e-10 * step.norm(dim=1) * turn.norm(dim=1))
            pair = torch.where(curved, 1 / along, torch.zeros_like(along))  # a pair of weight 0 changes nothing
            steps, turns, inverse = (
                torch.cat([old, new[None]])[-self.history :]
                for old, new in ((steps, step), (turns, turn), (inverse, pair))
            )
            x, value, gradient = moved, new_value, new_gradient
            on = record.note(which, x, value, iteration) & found
            record.end(which[~found], "no step lowers the loss any more")
            watch(iteration, float(record.value.min()))
        return record.minima()

    def _direction(self, gradient: Tensor, steps: Tensor, turns: Tensor, inverse: Tensor) -> Tensor:
        """Minus the inverse Hessian that the history tells of, times the gradient (the two-loop recursion)."""
        size = gradient.norm(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
        scale = 1 / size
        q, shares = gradient.clone(), []
        for s, y, rho in zip(reversed(steps), reversed(turns), reversed(inverse), strict=True):
            shares.append(rho * (s * q).sum(1))
            q -= shares[-1][:, None] * y
        for y, rho in zip(turns, inverse, strict=True):  # the latest pair that counts sets the scale
            scale = torch.where(rho > 0, 1 / (rho * y.square().sum(1)).clamp(min=torch.finfo(y.dtype).tiny), scale)
        q *= scale[:, None]
        for s, y, rho, share in zip(steps, turns, inverse, reversed(shares), strict=True):
            q += (share - rho * (y * q).sum(1))[:, None] * s
        downhill = (q * gradient).sum(1) > 0
        return -torch.where(downhill[:, None], q, gradient / size[:, None])

    def _search(
        self, f: Objective, which: Tensor, x: Tensor, value: Tensor, gradient: Tensor, direction: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Bool[Tensor, " a"]]:
        """The point reached by each system, its value and gradient, and whether it lies lower."""
        slope = (gradient * direction).sum(1)
        low, high, length = torch.zeros_like(value), torch.full_like(value, math.inf), torch.ones_like(value)
        best, best_value, best_gradient = x.clone(), value.clone(), gradient.clone()
        found = torch.zeros_like(value, dtype=torch.bool)
        search = torch.arange(len(x), device=x.device)
        for _ in range(self.trials):
            at = x[search] + length[search, None] * direction[search]
            new, new_gradient = f(at, which[search])
            enough = new <= value[search] + self.decrease * length[search] * slope[search]
            fell = enough & (new < value[search])  # False for NaN
            flat = (new_gradient * direction[search]).sum(1) >= self.curvature * slope[search]
            down = search[fell]
            best[down], best_value[down], best_gradient[down] = at[fell], new[fell], new_gradient[fell]
            found[down], low[down] = True, length[down]
            up = search[~fell]
            high[up] = length[up]
            search = search[~(fell & flat)]
            if not len(search):
                break
            half = (low[search] + high[search]) / 2
            length[search] = torch.where(high[search].isinf(), 2 * low[search], half)
        return best, best_value, best_gradient, found
