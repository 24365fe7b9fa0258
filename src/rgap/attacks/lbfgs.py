"""L-BFGS for many independent functions at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from rgap.attacks.minimise import Minima, Minimiser, Objective, Project, Record, Termination, Watch
from rgap.linalg import deadline


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

    def __call__(
        self, f: Objective, x: Tensor, stop: Termination, watch: Watch, project: Project | None = None
    ) -> Minima:
        if project is not None:
            raise ValueError("L-BFGS cannot keep a guess in the value range: use Adam, or boxed=False")
        record = Record(x, stop)
        which = torch.arange(len(x), device=x.device)
        value, gradient = f(x, which)
        on = record.note(which, x, value, 0)
        steps, differences, inverse = [x.new_zeros(0, *x.shape) for _ in range(2)] + [x.new_zeros(0, len(x))]
        for iteration in range(1, stop.iterations + 1):
            which, x, value, gradient = which[on], x[on], value[on], gradient[on]
            steps, differences, inverse = steps[:, on], differences[:, on], inverse[:, on]
            if not len(which):
                break
            direction = self._direction(gradient, steps, differences, inverse)
            moved, new_value, new_gradient, found = self._search(f, which, x, value, gradient, direction)
            step, difference = moved - x, new_gradient - gradient
            along = (step * difference).sum(1)
            curved = found & (along > 1e-10 * step.norm(dim=1) * difference.norm(dim=1))
            pair = torch.where(curved, 1 / along, torch.zeros_like(along))  # a pair of weight 0 changes nothing
            steps, differences, inverse = (
                torch.cat([old, new[None]])[-self.history :]
                for old, new in ((steps, step), (differences, difference), (inverse, pair))
            )
            x, value, gradient = moved, new_value, new_gradient
            on = record.note(which, x, value, iteration) & found
            record.end(which[~found], "no step lowers the loss any more")
            watch(iteration, float(record.value.min()))
        return record.minima()

    def _direction(self, gradient: Tensor, steps: Tensor, differences: Tensor, inverse: Tensor) -> Tensor:
        """Minus the inverse Hessian that the history gives, times the gradient (the two-loop recursion)."""
        size = gradient.norm(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
        scale = 1 / size
        q, shares = gradient.clone(), []
        for s, y, rho in zip(reversed(steps), reversed(differences), reversed(inverse), strict=True):
            shares.append(rho * (s * q).sum(1))
            q -= shares[-1][:, None] * y
        for y, rho in zip(differences, inverse, strict=True):  # the latest pair that counts sets the scale
            scale = torch.where(rho > 0, 1 / (rho * y.square().sum(1)).clamp(min=torch.finfo(y.dtype).tiny), scale)
        q *= scale[:, None]
        for s, y, rho, share in zip(steps, differences, inverse, reversed(shares), strict=True):
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
            if not len(search) or deadline.used() >= 1:
                break
            half = (low[search] + high[search]) / 2
            length[search] = torch.where(high[search].isinf(), 2 * low[search], half)
        return best, best_value, best_gradient, found
