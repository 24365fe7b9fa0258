"""The search of an optimisation attack: one system for each update, candidate label and restart, all at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rgap.attacks.distance import NEGLIGIBLE, Gradients, moments, relative, squared, total_variation
from rgap.attacks.known import Known
from rgap.attacks.labels import Candidates, candidates, one_hot
from rgap.attacks.minimise import Minima, Termination
from rgap.attacks.polish import improve
from rgap.attacks.progress import Reporter
from rgap.attacks.simulate import LocalSteps
from rgap.attacks.slopes import refused, slopes, together
from rgap.linalg import deadline
from rgap.target import GradientFunction, Target
from rgap.update import Update

if TYPE_CHECKING:
    from rgap.attacks.matching import Matching

INNER = 64
"""Products with the Jacobian, and with its transpose, in the first Gauss-Newton step at the end; each doubles them."""
SMALL = 1e-2
"""Of gradients below this part of all of them no more is asked than of one that large."""


@dataclass(frozen=True)
class Found:
    """What the minimiser left of one update, the least loss first."""

    inputs: list[Tensor]
    labels: list[Tensor]
    losses: list[float]
    iterations: list[int]
    ended: list[str]
    assumptions: tuple[str, ...]
    cut_off: bool
    """Whether the time was up before it ended."""


class Search:
    """Systems whose unknowns are an input and, unless it is inferred, a distribution over labels."""

    def __init__(
        self,
        attack: Matching,
        target: Target,
        updates: Sequence[Update],
        batch: int,
        aids: Sequence[Known] = (),
        client: LocalSteps | None = None,
    ):
        """
        Args:
            updates: that hold the same parameters, each of a batch of this size.
            aids: what is known of each beside its gradient, of the same layers.
            client: whose weight differences the updates are; None: they are gradients.
        """
        self.attack, self.target, self.updates = attack, target, updates
        self.aids, self.client = aids or [Known()] * len(updates), client
        self.shape = (batch, *target.input_shape)
        self.values = math.prod(self.shape)
        # Of labels that cannot be listed there is one number each.
        self.labels = len(target.loss.labels) or 1
        picture = len(target.input_shape) == 3 and min(target.input_shape[1:]) > 1
        self.variation = attack.variation if picture else 0.0
        self.assumptions: list[str] = []
        self._begin()

    def _begin(self) -> None:
        """Where each system starts, the label weights that it keeps to, and the update that it belongs to."""
        attack, target, (batch, *_) = self.attack, self.target, self.shape
        owners: list[int] = []
        points: list[Tensor] = []
        weights: list[Tensor] = []
        for owner, update in enumerate(self.updates):
            fixed = self.aids[owner].labels
            inferred = None if attack.optimise_label or fixed is not None else candidates(target, update)
            self.assumptions.append(self._about_labels(fixed, inferred))
            choices: Sequence[Tensor | None] = [None] if inferred is None else inferred.labels
            for choice in choices if fixed is None or attack.optimise_label else [fixed.double()]:
                for restart in range(attack.restarts):
                    generator = torch.Generator().manual_seed(attack.seed + restart)
                    x = attack.start.draw(self.shape, target, generator).reshape(-1)
                    if choice is None:
                        x = torch.cat([x, torch.randn(batch * self.labels, generator=generator, dtype=x.dtype)])
                        weights.append(torch.zeros(batch, self.labels))
                    else:
                        weights.append(one_hot(target.loss, choice))
                    owners.append(owner)
                    points.append(x)
        self.points = torch.stack(points).to(target.device, attack.dtype)
        self.weights = torch.stack(weights).to(target.device, attack.dtype)
        self.owned = torch.tensor(owners, device=target.device)

    @staticmethod
    def _about_labels(fixed: Tensor | None, inferred: Candidates | None) -> str:
        if inferred is not None:
            return inferred.assumption
        return "a distribution over labels is optimised" if fixed is None else "each sample's label is fixed"

    def run(self) -> list[Found]:
        """What was found for each update."""
        objective, scout = self._objective(), self.attack.scout
        systems, x = torch.arange(len(self.owned), device=self.owned.device), self.points
        if scout and len(systems) > len(self.updates):
            scouts = self._minimise(objective, systems, x, scout)
            best = [_least(scouts.value, self.owned == owner) for owner in range(len(self.updates))]
            systems = torch.stack(best)
            x = scouts.x[systems]
        minima = self._minimise(objective, systems, x, self.attack.iterations)
        return [self._collect(minima, systems, owner) for owner in range(len(self.updates))]

    def _objective(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Values and gradients of the systems whose numbers are given."""
        attack, values, shape = self.attack, self.values, self.shape
        given = {
            name: torch.stack([each[name].to(self.target.device, attack.dtype) for each in self._given()])
            for name in self._given()[0]
        }

        def loss_of(gradient: GradientFunction) -> Callable[..., Tensor]:
            model = self._model(gradient, attack.dtype)

            def loss(point: Tensor, known: Tensor, given: Gradients) -> Tensor:
                x = point[:values].reshape(shape)
                chosen = point[values:].reshape(shape[0], -1).softmax(1) if attack.optimise_label else known
                return self._loss(x, model(x, chosen), given)

            return loss

        # One update is shared by all systems, several are handed out to theirs.
        single = len(self.updates) == 1
        reads = self.aids[0].modules
        batched = slopes(self.target, attack.dtype, loss_of, (False, single), attack.at_once, reads)

        def some(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
            own = {name: g[0] if single else g[self.owned[which]] for name, g in given.items()}
            slope, value = batched(x, self.weights[which], own)
            return value, slope

        at_once = together(self.target, attack.dtype, attack.at_once)

        def objective(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
            """Where the time is up before all systems are evaluated the others count as infinite."""
            value, slope = x.new_full((len(x),), math.inf), torch.zeros_like(x)
            for at in torch.split(torch.arange(len(x), device=x.device), at_once):
                value[at], slope[at] = some(x[at], which[at])
                if deadline.used() >= 1:
                    break
            if attack.consensus:
                more = self._consensus(x, self.owned[which])
                value, slope = value + more.square().sum(1) / (2 * attack.consensus), slope + more
            return value, slope

        return objective

    def _given(self) -> list[Gradients]:
        """Of each update the gradient and what else is known."""
        return [
            {**update.gradients, **aid.values, **aid.statistics}
            for update, aid in zip(self.updates, self.aids, strict=True)
        ]

    def _model(self, gradient: GradientFunction, dtype: torch.dtype) -> GradientFunction:
        """What a client with an input sends."""
        return gradient if self.client is None else self.client.difference(self.target, gradient, dtype)

    def _loss(self, x: Tensor, found: Gradients, given: Gradients) -> Tensor:
        attack, aid = self.attack, self.aids[0]
        names = self.updates[0].gradients
        loss = attack.distance({n: found[n] for n in names}, {n: given[n] for n in names})
        for name in aid.values:
            loss = loss + attack.features * relative(found[name].flatten(1), given[name])
        for name in aid.statistics:
            loss = loss + attack.statistics * relative(moments(found[name]), given[name])
        return loss + self.variation * total_variation(x, attack.opponents) if self.variation else loss

    def _consensus(self, x: Tensor, owned: Tensor) -> Tensor:
        """The slope of consensus / 2 times the squared distance from the mean of all starts of the same update."""
        same = (owned[:, None] == owned[None]).to(x)
        apart = x - (same / same.sum(1, keepdim=True)) @ x
        apart[:, self.values :] = 0
        return self.attack.consensus * apart

    def finish(self, owner: int, x: Tensor, labels: Tensor) -> Tensor:
        """What Gauss-Newton steps in float64 make of an input of one update, towards its gradient and what else is
        known of it."""
        if refused(self.target, torch.float64):
            return x
        aid, steps = self.aids[owner], self.attack.finish
        given = {name: t.to(self.target.device).double() for name, t in self._given()[owner].items()}
        model = self._model(self.target.gradient_function(torch.float64, reads=aid.modules), torch.float64)
        weights = one_hot(self.target.loss, labels).to(self.target.device).double()
        whole = sum(float(given[name].square().sum()) for name in self.updates[owner].gradients)
        sizes = {name: math.sqrt(float(t.square().sum()) + NEGLIGIBLE * whole) for name, t in given.items()}

        def residual(point: Tensor) -> Tensor:
            found = model(point.reshape(self.shape), weights)
            found |= {name: moments(found[name]) for name in aid.statistics}
            return torch.cat([((found[n].reshape(-1) - t.reshape(-1)) / sizes[n]) for n, t in given.items()])

        start = x.reshape(-1).double().to(self.target.device)
        report = Reporter(f"{self.attack.name}, Gauss-Newton", steps)
        return improve(residual, start, steps, INNER, report)[0].reshape(self.shape)

    def residual(self, inputs: Tensor, labels: Tensor) -> float:
        """The relative distance of what inputs and labels give from the first update."""
        model = self._model(self.target.gradient_function(torch.float64, plain=True), torch.float64)
        found = model(inputs.to(self.target.device), one_hot(self.target.loss, labels).to(self.target.device))
        given = {name: g.double().to(self.target.device) for name, g in self.updates[0].gradients.items()}
        return float(squared({name: found[name].detach() for name in given}, given).sqrt())

    def _minimise(
        self,
        objective: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        systems: Int[Tensor, " s"],
        x: Float[Tensor, "s d"],
        iterations: int,
    ) -> Minima:
        """Some of the systems, from x."""
        attack, value_range = self.attack, self.target.value_range

        def into_range(points: Tensor) -> None:
            points[:, : self.values].clamp_(*(value_range or (-math.inf, math.inf)))

        # A start that has arrived must reproduce the gradient, however finely that was sent.
        goal = min(attack.tolerance, *(_goal(update) for update in self.updates))
        stop = Termination(iterations, goal**2, attack.patience)
        watch = Reporter(attack.name, iterations)
        project = into_range if attack.boxed and value_range is not None else None
        return attack.minimiser(lambda x, at: objective(x, systems[at]), x, stop, watch, project)

    def _collect(self, minima: Minima, systems: Int[Tensor, " s"], owner: int) -> Found:
        """Inputs and labels of one update's systems, the least loss first."""
        classes = torch.tensor(self.target.loss.labels, dtype=torch.float64)
        own = (self.owned[systems] == owner).nonzero().flatten().tolist()
        order = sorted(own, key=lambda s: float(minima.value[s]))
        inputs, labels = [], []
        for s in order:
            inputs.append(minima.x[s, : self.values].reshape(self.shape).double())
            optimised = minima.x[s, self.values :].reshape(self.shape[0], -1)
            scores = optimised if self.attack.optimise_label else self.weights[systems[s]]
            label = classes[scores.argmax(1).cpu()] if len(classes) else scores[:, 0].double()
            labels.append(label.to(inputs[-1].device))
        count = int((self.owned == owner).sum())
        smooth = ("neighbouring values of the input are similar (total variation)",) if self.variation else ()
        together = ("starts are drawn towards their mean",) if self.attack.consensus and count > 1 else ()
        starts = f"the best of {count} starts by its loss" if count > 1 else "one start"
        return Found(
            inputs,
            labels,
            [float(minima.value[s]) for s in order],
            [int(minima.iterations[s]) for s in order],
            [minima.ended[s] for s in order],
            (self.assumptions[owner], *self.aids[owner].assumptions, *smooth, starts, *together),
            minima.cut_off,
        )


def _least(value: Float[Tensor, " s"], among: Bool[Tensor, " s"]) -> Int[Tensor, ""]:
    """The number of the system with the least value; never one outside `among`."""
    return torch.where(among, value.nan_to_num(nan=math.inf, posinf=torch.finfo(value.dtype).max), math.inf).argmin()


def _goal(update: Update) -> float:
    """The distance at which the parameters of small gradients agree as well, as far as that can be asked for."""
    norm = update.norm
    sizes = [float(g.double().norm()) for g in update.gradients.values()]
    least = min((size for size in sizes if size > 0), default=norm)
    return update.tolerance * max(least / norm, SMALL) if norm else update.tolerance
