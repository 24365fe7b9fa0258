"""Optimisation attacks: look for the input whose gradient matches the update. One loop, three settings.

- DLG: L. Zhu, Z. Liu and S. Han, *Deep Leakage from Gradients*, NeurIPS 2019.
- iDLG: B. Zhao, K. R. Mopuri and H. Bilen, *iDLG: Improved Deep Leakage from Gradients*, arXiv:2001.02610, 2020.
- Inverting Gradients: J. Geiping, H. Bauermeister, H. Droege and M. Moeller, NeurIPS 2020, arXiv:2003.14053.

All restarts, all candidate labels and all updates of one model are systems that are minimised together.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rgap.attacks.base import Answer, Attack, Reconstruction, Status, gradient_residual
from rgap.attacks.labels import candidates, one_hot
from rgap.attacks.minimise import LBFGS, Adam, Minima, Minimiser, Stop
from rgap.attacks.progress import Reporter
from rgap.checks import Preflight
from rgap.target import Target
from rgap.update import Update

Gradients = Mapping[str, Tensor]
Distance = Callable[[Gradients, Gradients], Tensor]


def squared(found: Gradients, given: Gradients) -> Tensor:
    """|found - given|^2 / |given|^2: DLG's distance, relative so that it means the same on every network."""
    apart = {name: found[name] - g for name, g in given.items()}
    return _inner(apart, apart) / _inner(given, given)


def _inner(a: Gradients, b: Gradients) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def _sent(found: Gradients, given: Gradients) -> Gradients:
    """Of a guess's gradient the parameters that the update holds."""
    return {name: found[name] for name in given}


def cosine(found: Gradients, given: Gradients) -> Tensor:
    """1 - cos of the angle between the two: blind to the gradient's size (Geiping et al. 2020, Eq. 4)."""
    return 1 - _inner(found, given) / (_inner(found, found) * _inner(given, given)).sqrt()


def total_variation(x: Float[Tensor, "b c h w"]) -> Tensor:
    """The mean difference of neighbours, down and across."""
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., 1:] - x[..., :-1]).abs().mean()


class Start(ABC):
    """Where the search begins."""

    @abstractmethod
    def draw(self, shape: tuple[int, ...], target: Target, generator: torch.Generator) -> Tensor:
        """A first guess of this shape (b, *input_shape), on the CPU."""


@dataclass(frozen=True)
class Normal(Start):
    """Independent normal values; by default around the middle of the value range, a quarter of it wide."""

    mean: float | None = None
    deviation: float | None = None

    def draw(self, shape: tuple[int, ...], target: Target, generator: torch.Generator) -> Tensor:
        low, high = target.value_range or (-2.0, 2.0)
        mean = (low + high) / 2 if self.mean is None else self.mean
        deviation = (high - low) / 4 if self.deviation is None else self.deviation
        return mean + deviation * torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Uniform(Start):
    """Independent values from the value range, or from 0 to 1 if it is not known."""

    def draw(self, shape: tuple[int, ...], target: Target, generator: torch.Generator) -> Tensor:
        low, high = target.value_range or (0.0, 1.0)
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Near(Start):
    """A given input, with a little noise.

    Args:
        inputs: (b, *input_shape).
        deviation: of the noise.
    """

    inputs: Tensor
    deviation: float = 0.0

    def draw(self, shape: tuple[int, ...], target: Target, generator: torch.Generator) -> Tensor:
        if tuple(self.inputs.shape) != shape:
            raise ValueError(f"got a start of shape {tuple(self.inputs.shape)}, expected {shape}")
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return self.inputs.detach().cpu().double() + self.deviation * noise


UNIFORM, NORMAL = Uniform(), Normal()
QUASI_NEWTON = LBFGS()
SIGNED_ADAM = Adam(rate=0.025, signed=True, decay=(3 / 8, 5 / 8, 7 / 8))


@dataclass(frozen=True)
class Matching(Attack):
    """Minimise the distance between the update and the gradient at a guess, over the guess.

    Args:
        distance: between two gradients; `squared` or `cosine`, or any function of two mappings of tensors.
        minimiser: `LBFGS` or `Adam`.
        variation: weight of the total variation of the guess, a prior for pictures; without effect on other inputs.
        boxed: keep every guess in the value range, where it is known; for Adam alone.
        optimise_label: optimise a distribution over labels with the input; else the label is inferred beforehand, and
            where several are possible each is tried (see `rgap.attacks.labels`).
        start: where the search begins.
        restarts: how many starts; the one with the least loss is the answer.
        scout: after so many iterations only the start with the least loss goes on, for `iterations` more; 0:
            all go on to the end.
        iterations: at the most, for each start.
        tolerance: the relative gradient residual at which a start has arrived.
        patience: end a start whose loss fell by less than a tenth in so many iterations.
        dtype: to compute in; float32 is faster, and loses the last digits of small losses.
        at_once: how many systems are evaluated together; it bounds the memory.
        seed: of the starts.
    """

    partial: ClassVar[bool] = True

    distance: Distance = squared
    minimiser: Minimiser = QUASI_NEWTON
    variation: float = 0.0
    boxed: bool = False
    optimise_label: bool = True
    start: Start = UNIFORM
    restarts: int = 1
    scout: int = 0
    iterations: int = 300
    tolerance: float = 1e-6
    patience: int | None = None
    dtype: torch.dtype = torch.float64
    at_once: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("restarts", self.restarts), ("iterations", self.iterations), ("at_once", self.at_once)):
            if value < 1:
                raise ValueError(f"{name} is {value}: expected 1 or more")

    def obstacle(self, target: Target, samples: int) -> str | None:
        if not target.loss.labels and (self.optimise_label or samples > 1):
            return f"the labels of the {target.loss.name} loss cannot be listed, so that none can be chosen"
        return self._not_batched(target)

    def _not_batched(self, target: Target) -> str | None:
        """Why torch.func does not take the model; None if it does."""
        gradient = target.gradient_function(self.dtype)
        x = torch.zeros(1, 1, *target.input_shape, dtype=self.dtype, device=target.device)
        weights = torch.full((1, 1, len(target.loss.labels) or 1), 0.5, dtype=self.dtype, device=target.device)

        def size(x: Tensor, weights: Tensor) -> Tensor:
            return torch.stack([g.square().sum() for g in gradient(x, weights).values()]).sum()

        try:
            torch.func.vmap(torch.func.grad(size), randomness="different")(x, weights)
        except (RuntimeError, NotImplementedError) as error:
            return f"torch.func does not take this model: {str(error).strip().splitlines()[0]}"
        return None

    def run(self, target: Target, update: Update, checks: Preflight) -> Reconstruction:
        return self.run_many(target, [update], [checks])[0]

    def run_many(self, target: Target, updates: Sequence[Update], checks: Sequence[Preflight]) -> list[Reconstruction]:
        """All updates whose batches have the same size, and that hold the same parameters, are attacked together."""
        kinds = [(update.samples(target), tuple(update.gradients)) for update in updates]
        found: dict[int, Reconstruction] = {}
        for kind in dict.fromkeys(kinds):
            same = [at for at, each in enumerate(kinds) if each == kind]
            alive = [at for at in same if updates[at].norm > 0]
            for at in set(same) - set(alive):
                found[at] = self._nothing(target, updates[at], checks[at])
            if alive:
                results = self._minimise(target, [updates[at] for at in alive], kind[0])
                for at, result in zip(alive, results, strict=True):
                    found[at] = self._judge(target, updates[at], checks[at], result)
        return [found[at] for at in range(len(updates))]

    def _minimise(self, target: Target, updates: Sequence[Update], batch: int) -> list[_Results]:
        """Set up one system for each update, candidate label and restart, and minimise all of them."""
        device, shape = target.device, (batch, *target.input_shape)
        # Of labels that cannot be listed there is one number each.
        values, labels = math.prod(shape), len(target.loss.labels) or 1
        owners: list[int] = []  # the update that a system belongs to
        points: list[Tensor] = []
        weights: list[Tensor] = []
        assumptions = []
        for owner, update in enumerate(updates):
            inferred = None if self.optimise_label else candidates(target, update)
            assumptions.append(inferred.assumption if inferred else "a distribution over labels is optimised")
            for choice in [None] if inferred is None else inferred.labels:
                for restart in range(self.restarts):
                    generator = torch.Generator().manual_seed(self.seed + restart)
                    x = self.start.draw(shape, target, generator).reshape(-1)
                    if choice is None:
                        x = torch.cat([x, torch.randn(batch * labels, generator=generator, dtype=x.dtype)])
                        weights.append(torch.zeros(batch, labels))
                    else:
                        weights.append(one_hot(target.loss, choice))
                    owners.append(owner)
                    points.append(x)
        given = {
            name: torch.stack([update.gradients[name].to(device, self.dtype) for update in updates])
            for name in updates[0].gradients
        }
        gradient = target.gradient_function(self.dtype)
        known = torch.stack(weights).to(device, self.dtype)
        owned = torch.tensor(owners, device=device)
        picture = len(target.input_shape) == 3 and min(target.input_shape[1:]) > 1

        def loss(point: Tensor, known: Tensor, given: Gradients) -> Tensor:
            x = point[:values].reshape(shape)
            chosen = point[values:].reshape(batch, labels).softmax(1) if self.optimise_label else known
            apart = self.distance(_sent(gradient(x, chosen), given), given)
            return apart + self.variation * total_variation(x) if self.variation and picture else apart

        # One update is shared by all systems, several are handed out to theirs.
        single = len(updates) == 1
        batched = torch.func.vmap(
            torch.func.grad_and_value(loss),
            in_dims=(0, 0, None if single else 0),
            chunk_size=self.at_once,
            randomness="different",
        )

        def objective(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
            own = {name: g[0] if single else g[owned[which]] for name, g in given.items()}
            slope, value = batched(x, known[which], own)
            return value, slope

        def into_range(points: Tensor) -> None:
            points[:, :values].clamp_(*(target.value_range or (-math.inf, math.inf)))

        # A start that has arrived must reproduce the gradient, however finely that was sent.
        goal = min(self.tolerance, *(update.tolerance for update in updates))

        def minimise(which: Tensor, x: Tensor, iterations: int) -> Minima:
            """The systems `which`, from x."""
            stop = Stop(iterations, goal**2, self.patience)
            watch = Reporter(self.name, iterations)
            project = into_range if self.boxed and target.value_range is not None else None
            return self.minimiser(lambda x, at: objective(x, which[at]), x, stop, watch, project)

        systems, x = torch.arange(len(owners), device=device), torch.stack(points).to(device, self.dtype)
        if self.scout and len(owners) > len(updates):
            scouts = minimise(systems, x, self.scout)
            systems = torch.stack([_least(scouts.value, owned == owner) for owner in range(len(updates))])
            x = scouts.x[systems]
        minima = minimise(systems, x, self.iterations)
        prior = (
            ("neighbouring values of the input are similar (total variation)",) if self.variation and picture else ()
        )
        found = []
        for owner, said in enumerate(assumptions):
            own = (owned[systems] == owner).nonzero().flatten().tolist()
            count = f"the best of {owners.count(owner)} starts by its loss" if owners.count(owner) > 1 else "one start"
            found.append(self._collect(target, minima, own, known[systems], shape, (said, *prior, count)))
        return found

    def _collect(
        self,
        target: Target,
        minima: Minima,
        systems: list[int],
        known: Tensor,
        shape: tuple[int, ...],
        assumptions: tuple[str, ...],
    ) -> _Results:
        """Inputs and labels of one update's systems, the least loss first."""
        values, classes = math.prod(shape), torch.tensor(target.loss.labels, dtype=torch.float64)
        order = sorted(systems, key=lambda s: float(minima.value[s]))
        inputs, labels = [], []
        for s in order:
            inputs.append(minima.x[s, :values].reshape(shape).double())
            scores = minima.x[s, values:].reshape(shape[0], -1) if self.optimise_label else known[s]
            told = classes[scores.argmax(1).cpu()] if len(classes) else scores[:, 0].double()
            labels.append(told.to(inputs[-1].device))
        return _Results(
            inputs,
            labels,
            [float(minima.value[s]) for s in order],
            [int(minima.iterations[s]) for s in order],
            [minima.ended[s] for s in order],
            assumptions,
        )

    def _judge(self, target: Target, update: Update, checks: Preflight, results: _Results) -> Reconstruction:
        """Certificates of the best start, and of every other one that reproduces the gradient at another input."""
        tolerance = update.tolerance
        low, high = target.value_range or (0.0, 1.0)
        answers: list[Answer] = []
        for at, (x, y) in enumerate(zip(results.inputs, results.labels, strict=True)):
            if math.isinf(results.losses[at]):
                continue
            residual = gradient_residual(target, update, x, y)
            new = all(_apart(x, a.inputs) > 0.01 * (high - low) for a in answers)
            if not answers or (residual <= tolerance and new):
                answers.append(Answer(x, y, math.nan, residual, math.nan))
        answers = [a for a in answers if a.gradient_residual <= tolerance] or answers
        steps = f"after {results.iterations[0]} iterations: {results.ended[0]}"
        if not answers:
            status, reason = Status.NOT_CONVERGED, f"the loss was never finite, {steps}"
        else:
            residual = answers[0].gradient_residual
            reason = f"gradient residual {residual:.1e}, loss {results.losses[0]:.1e} {steps}"
            reproduced = residual <= tolerance
            status = Status.REPRODUCED if reproduced else Status.NOT_CONVERGED
            if reproduced and len(answers) > 1:
                status, reason = Status.AMBIGUOUS, f"{len(answers)} inputs reproduce the gradient; {reason}"
        return Reconstruction(
            self.name, status, reason, tuple(answers), results.assumptions, checks, tolerance, target.value_range
        )

    def _nothing(self, target: Target, update: Update, checks: Preflight) -> Reconstruction:
        return Reconstruction(
            self.name,
            Status.GRADIENT_ZERO,
            "all gradients are zero",
            (),
            (),
            checks,
            update.tolerance,
            target.value_range,
        )


def _apart(a: Float[Tensor, "b ..."], b: Float[Tensor, "b ..."]) -> float:
    """Root mean square distance of two batches, which have no order."""
    each = (a[:, None] - b[None]).flatten(2).square().mean(2).cpu().nan_to_num(nan=1e300, posinf=1e300)
    rows, columns = linear_sum_assignment(each.numpy())
    return float(each[rows, columns].mean().sqrt())


def _least(value: Float[Tensor, " s"], among: Bool[Tensor, " s"]) -> Int[Tensor, ""]:
    """The number of the system with the least value; never one outside `among`."""
    return torch.where(among, value.nan_to_num(nan=math.inf, posinf=torch.finfo(value.dtype).max), math.inf).argmin()


@dataclass(frozen=True)
class _Results:
    """What the minimiser left of one update, the least loss first."""

    inputs: list[Tensor]
    labels: list[Tensor]
    losses: list[float]
    iterations: list[int]
    ended: list[str]
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class DLG(Matching):
    """Deep Leakage from Gradients: squared distance, L-BFGS, the label optimised with the input."""


@dataclass(frozen=True)
class IDLG(Matching):
    """Improved Deep Leakage from Gradients: DLG, with the label inferred beforehand."""

    optimise_label: bool = False

    @property
    def name(self) -> str:
        return "iDLG"


@dataclass(frozen=True)
class InvertingGradients(Matching):
    """Inverting Gradients: cosine distance, total variation, and the signs of the gradient in Adam.

    The label is inferred beforehand. Every guess is kept in the value range, where it is known. The rate falls to a
    tenth at 3/8, 5/8 and 7/8 of the iterations. Rate and variation are meant for values from 0 to 1: the authors divide
    pictures by a standard deviation of about a quarter, and their rate of 0.1 is 0.025 here.
    """

    distance: Distance = cosine
    minimiser: Minimiser = SIGNED_ADAM
    variation: float = 1e-2
    boxed: bool = True
    optimise_label: bool = False
    start: Start = NORMAL
    iterations: int = 4800
    dtype: torch.dtype = torch.float32
