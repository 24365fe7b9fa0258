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

from rgap.linalg import deadline

Objective = Callable[[Float[Tensor, "a d"], Int[Tensor, " a"]], tuple[Float[Tensor, " a"], Float[Tensor, "a d"]]]
"""Values and gradients at x of the systems whose numbers are given."""
Watch = Callable[[int, float], None]
"""Called after each iteration with its number and the least value."""
Project = Callable[[Float[Tensor, "a d"]], None]


@dataclass(frozen=True)
class Termination:
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
    cut_off: bool = False
    """Whether the time was up before all had ended."""


class Minimiser(ABC):
    """Minimises s systems from s starting points."""

    @abstractmethod
    def __call__(
        self, f: Objective, x: Float[Tensor, "s d"], stop: Termination, watch: Watch, project: Project | None = None
    ) -> Minima:
        """Minimise.

        Args:
            f: the functions.
            x: where each begins.
            stop: when each ends.
            watch: is called with each iteration.
            project: changes points, in their memory, to points that are allowed, after every step.

        Raises:
            ValueError: this minimiser cannot keep to what is allowed.
        """


class Record:
    """The best point of each system so far, and which systems go on."""

    def __init__(self, x: Tensor, stop: Termination):
        self.stop = stop
        self.x = x.clone()
        self.value = x.new_full((len(x),), math.inf)
        self.mark = self.value.clone()
        self.marked_at = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.iterations = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.ended = [""] * len(x)
        self.cut_off = False

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
        if deadline.used() >= 1 and bool(on.any()):
            self.cut_off = True
            on &= self._end(which, torch.ones_like(on), on, "the time was up")
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
        return Minima(self.x, self.value, self.iterations, ended, self.cut_off)


@dataclass(frozen=True)
class Adam(Minimiser):
    """Adam (Kingma and Ba 2015), its rate a function of how many of the iterations, or of the time, have passed.

    Args:
        rate: the step size.
        signed: only the signs of the gradient are used (Geiping et al. 2020, Section 5).
        decay: the fractions of the iterations at which the rate falls to a tenth.
        cosine: the rate falls to zero as a cosine does.
        warmup: iterations in which it rises from nothing.
        noise: normal noise that each step adds, in units of the rate (Langevin).
    """

    rate: float = 0.1
    signed: bool = False
    decay: tuple[float, ...] = ()
    cosine: bool = False
    warmup: int = 0
    noise: float = 0.0

    def __call__(
        self, f: Objective, x: Tensor, stop: Termination, watch: Watch, project: Project | None = None
    ) -> Minima:
        record = Record(x, stop)
        which = torch.arange(len(x), device=x.device)
        point = x.clone()
        if project is not None:
            project(point)
        optimiser = torch.optim.Adam([point], lr=self.rate)
        generator = torch.Generator().manual_seed(0)
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
            rate = self._rate(iteration, stop.iterations)
            optimiser.param_groups[0]["lr"] = rate
            optimiser.step()
            if self.noise:
                # The same for all systems: what one of them does is to depend on no other.
                point += rate * self.noise * torch.randn(point.shape[1], generator=generator).to(point)
            point[~on] = held
            if project is not None:
                project(point)
        return record.minima()

    def _rate(self, iteration: int, iterations: int) -> float:
        # Where the time runs out before the iterations do, the rate falls with it.
        passed = max(iteration / max(1, iterations), deadline.used())
        rate = self.rate * 0.1 ** sum(passed >= fraction for fraction in self.decay)
        if self.cosine:
            rate *= (1 + math.cos(math.pi * min(passed, 1.0))) / 2
        return rate * min(1.0, (iteration + 1) / self.warmup) if self.warmup else rate
