"""The inputs behind features that were told apart step by step, where the layers in front move meanwhile.

Features and cotangents of every sample are known, each at the weights of its own step. So are those of each layer in
front, one after the other: its weight rows are each step's own, and its gradient rows add up to what was sent. What its
weights are before each step is known once its inputs are, and hardly changes them; so both are found in turn, beginning
on the line between the two ends (Zhu, Yao and Blaschko, arXiv:2306.00127, take a point of it). All layers together then
give the last digits, and the steps, simulated on the inputs, are the certificate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.all_steps import AllSteps, Together
from rgap.inversion.estimate import inverted
from rgap.inversion.head_steps import HeadClient
from rgap.inversion.local_steps import Recovered
from rgap.inversion.recursion import before_activation
from rgap.inversion.state import State
from rgap.inversion.steps_system import StepsJacobian, StepsSystem
from rgap.inversion.system import ConstraintSystem, Linearisation, Rows
from rgap.inversion.walk import Client, Difference, Plan, Sides, Walk, Weights
from rgap.linalg import deadline
from rgap.linalg.least_squares import Direct, Iterative, Solver
from rgap.nn.network import Network
from rgap.nn.ops import Elementwise, Linear
from rgap.nn.pools import Pool

MOST, PATIENCE = 30, 5
"""Linearisations, and those without progress after which the search ends."""
OWN, SETTLING = 8, 4
"""Linearisations of each layer alone, and with those behind it, at the most, on the way to the input."""
DOUBT, MARGIN, MOST_DOUBTED = 4, 8, 512
"""Units in doubt for each that changed its side, and of each step at the least; with more of them all together
gradient rows wait."""
LARGEST = 2**27
"""Numbers that the gradients of units in doubt may take."""
DENSE = 1_500
"""Unknowns up to which a matrix is factored."""
SETTLED = 1e-7
"""Of what a layer reads, below which a move changes no more than rounding."""
PRECISE = Iterative(rtol=1e-6, max_steps=4000)
"""For layers one by one: what one leaves the next one sharpens."""
LOST, SLOW = 0.02, 0.7
"""A layer whose input moves by more than this part of itself, and than that part of the move before, is not told."""
RANK_TOLERANCE = 1e-7
"""Of a factored matrix."""
EPS = 1e-15
"""Of features that are known exactly."""
HALVINGS = 5
PROGRESS = 0.7
"""A misfit that is less than this part of the least so far."""
FEW, NEAR = 4, 1e-3
"""Changes of sides, and the move relative to the inputs, up to which single units are tried on their other sides."""
UNEXPLAINED = 5.0
"""Roundings below which steps that change nothing more are the last."""


def passable(network: Network, steps: int) -> str | None:
    """Why nothing is solved for in front of the features; None if it is."""
    pool = next((node.op for node in network.nodes if isinstance(node.op, Pool)), None)
    if pool is not None:
        return f"the pool {pool.name} is not passed behind several steps"
    if any(segment.block for segment in network.segments):
        return "blocks of layers are not passed behind several steps"
    if network.coupled:
        return "batch norm in training mode is not passed behind several steps"
    entries = MARGIN * steps * sum(layer.weight.numel() for layer in network.layers)
    if entries > LARGEST:
        return (
            f"what units in doubt do to the weights of {steps} steps is {entries / 1e9:.1f} billion numbers, of which "
            f"{LARGEST / 1e9:.1f} are formed"
        )
    return None


@dataclass(frozen=True, eq=False)
class _Front:
    client: Client
    plan: Plan
    difference: Difference
    head: HeadClient
    features: Recovered
    moved: Float[Tensor, "d n u"]
    """Some draws of the features' errors."""

    @cached_property
    def network(self) -> Network:
        return self.client.network(self.client.weights).up_to(self.head.value_id)

    @property
    def rows(self) -> list[int]:
        """The samples in the order of their steps."""
        return [each for members in self.features.order for each in members]

    @cached_property
    def sent(self) -> Weights:
        """The difference without decay: what gradients made of the weights."""
        return Walk(self.client, self.plan).without_decay(self.difference.sent)

    @cached_property
    def output(self) -> tuple[int, State]:
        """The features, and what is known of them, in the order of the steps."""
        features, rows, shape = self.features, self.rows, self.network.shapes[-1]
        h = features.x.flatten(1)
        k = self.head.cotangents(self.plan, h, features.labels, features.order)
        std = self.moved.square().mean((0, 2))[:, None].sqrt().expand(h.shape)
        value, k, std = (each[rows].reshape(-1, *shape) for each in (h, k, std))
        return len(self.network.nodes), State(value, k, None, std)

    def before(self, value_id: int) -> int:
        """What the last layer in front of a value reads."""
        for segment in reversed(self.network.segments):
            if segment.exit <= value_id and isinstance(self.network.nodes[segment.nodes[-1]].op, Linear):
                return segment.entry
        return 0

    def system(self, trail: Sequence[Weights], entry: int = 0, output: tuple[int, State] | None = None) -> StepsSystem:
        """All constraints between two values, with the weights before each step.

        Args:
            output: the second one's id, and what is known of it; what is known of the features if None.
        """
        found, first, (end, state) = [], 0, self.output if output is None else output
        for members, weights in zip(self.features.order, trail, strict=False):
            whole = self.client.network(weights)
            part = whole.part([each for each in whole.segments if entry <= each.entry and each.exit <= end])
            own = state.select(torch.arange(first, first + len(members), device=state.value.device))
            found.append(ConstraintSystem(part.own, own, self.sent, self.eps(part)))
            first += len(members)
        return StepsSystem(tuple(found))

    def eps(self, network: Network) -> float:
        """The rounding of the differences in front, relative to them: that of the layer which it hides most of."""
        found = 0.0
        for layer in network.layers:
            d = self.difference.sent.get(layer.weight_name)
            if d is not None and bool(d.any()):
                found = max(found, self.difference.noise[layer.weight_name] / float(d.square().mean().sqrt()))
        return found

    @cached_property
    def scale(self) -> list[float]:
        """What each layer's gradient rows weigh, squared, by their noise and that of the features."""
        value, std = self.output[1].value, self.output[1].std
        own = max(float(std.square().mean()), (EPS * float(value.square().mean().sqrt())) ** 2)
        system = self.system(self.trail(self.even()))
        return [own / self.difference.noise[layer.weight_name] ** 2 for layer in system.systems[0].layers]

    def together(self, x: Float[Tensor, "n ..."], sides: Sides) -> Together:
        """What is thought of the steps.

        Args:
            x: in the order of the steps.
        """
        at = Together(self.placed(x).flatten(1), self.features.order, sides, torch.inf)
        walk = self.steps.walk(at)
        return replace(at, misfit=self.difference.along(walk).misfit(walk))

    @cached_property
    def steps(self) -> AllSteps:
        return AllSteps(self.client, self.plan, self.difference, self.network.layers[0], self.features.labels)

    def placed(self, x: Tensor) -> Tensor:
        """From the order of the steps to that of the samples."""
        found = torch.empty_like(x)
        found[self.rows] = x
        return found

    def even(self) -> list[dict[str, Tensor]]:
        """Gradients of the steps, as if they were all the same."""
        every = sum(self.plan.expansion[-1][1])
        return [{name: d / every for name, d in self.sent.items()}] * self.plan.steps

    def closed(self, gradients: Sequence[Weights]) -> list[dict[str, Tensor]]:
        """Gradients of the steps with what they miss of the difference shared out evenly."""
        end = self.plan.expansion[-1][1]
        more = {}
        for name, d in self.sent.items():
            made = sum((c * own[name] for c, own in zip(end, gradients, strict=True)), torch.zeros_like(d))
            more[name] = (d - made) / sum(end)
        return [{name: own[name] + more[name] for name in more} for own in gradients]

    def trail(self, gradients: Sequence[Weights]) -> list[dict[str, Tensor]]:
        """The weights before each step."""
        return Walk(self.client, self.plan, gradients=tuple(gradients)).trail

    def with_own(
        self, gradients: Sequence[Weights], system: StepsSystem, at: Sequence[Linearisation], by: StepsJacobian
    ) -> list[dict[str, Tensor]]:
        """Gradients of the steps, those of a system's layers as its values make them. What units in doubt explain of
        what is missed is their own step's."""
        made = [own.made(there) for own, there in zip(system.systems, at, strict=True)]
        found, explained = [], by.explained(system.missed(made))
        for step, (own, there) in enumerate(zip(system.systems, at, strict=True)):
            new = own.made_biases(there)
            for layer, first, more in zip(own.layers, made[step], explained[step], strict=True):
                name = layer.weight_name
                new[name] = layer.unpack_weight(first + more, self.sent[name].shape)[0]
            c = self.plan.expansion[-1][1][step]
            found.append({**gradients[step], **{name: each / c for name, each in new.items()}})
        return self.closed(found)


def inputs_by_steps(
    client: Client,
    plan: Plan,
    difference: Difference,
    head: HeadClient,
    features: Recovered,
    moved: Float[Tensor, "d n u"],
    report: Callable[[int, float], None] = lambda step, misfit: None,
) -> Recovered | None:
    """The inputs of samples whose features are known, or the nearest that were found; None where a layer's rows do not
    tell what it reads.

    Args:
        features: of all samples, with their order.
        moved: some draws of their errors.
        report: is called with the number of linearisations and the least misfit.
    """
    return _Search(_Front(client, plan, difference, head, features, moved)).run(report)


@dataclass(frozen=True, eq=False)
class _Search:
    front: _Front

    def run(self, report: Callable[[int, float], None]) -> Recovered | None:
        front, progress, few = self.front, 0, False
        count: int | None = MARGIN
        begun = self._begun()
        if begun is None:
            return None
        x, gradients = begun
        found = at = front.together(x, {})
        for step in range(MOST):
            if deadline.used() >= 1:
                break
            system, scale = front.system(front.trail(gradients)), front.scale if few else None
            before, (there, changed, by) = x, stepped(system, x, front.output[1], count, scale)
            x, gradients = of_all(there), front.with_own(gradients, system, there, by)
            count, few = doubted(system, changed), changed <= FEW
            at = front.together(x, at.sides)
            if few and at.misfit > UNEXPLAINED and float((x - before).norm()) < NEAR * float(x.norm()):
                error = front.placed((x - before).flatten(1).square().mean(1).sqrt())
                at = front.steps.other_sides(at, error)
            report(step + 1, min(at.misfit, found.misfit))
            lower = at.misfit < PROGRESS * found.misfit
            found, progress = min(at, found, key=lambda each: each.misfit), step if lower else progress
            if step - progress >= PATIENCE or (scale and not changed and not lower and found.misfit <= UNEXPLAINED):
                break
        return self._told(found)

    def _begun(self) -> tuple[Float[Tensor, "n ..."], list[dict[str, Tensor]]] | None:
        """Inputs, and gradients of the steps: from the last layer to the first what each reads, from its own rows, then
        from those of all behind it; None where these do not tell it."""
        front = self.front
        gradients, known = front.even(), front.output
        while known[0]:
            entry, state = front.before(known[0]), known[1]
            x = state.value.new_zeros(len(state.value), *front.network.shapes[entry])
            move = torch.inf
            for _ in range(OWN):
                system, before = front.system(front.trail(gradients), entry, known), x
                at, _, by = stepped(system, x, state, MARGIN, precise=True)
                x, gradients = of_all(at), front.with_own(gradients, system, at, by)
                if not bool(x.isfinite().all() and x.any()):
                    return None
                last, move = move, float((x - before).norm() / x.norm())
                if x.numel() > DENSE and move > LOST and move > SLOW * last:
                    return None
                if move < SETTLED:
                    break
            for _ in range(SETTLING):
                system = front.system(front.trail(gradients), entry)
                before, (at, changed, by) = x, stepped(system, x, front.output[1], MARGIN)
                x, gradients = of_all(at), front.with_own(gradients, system, at, by)
                if not changed:
                    break
            none = torch.zeros_like
            k = torch.cat([none(each.x) if each.cotangents[0] is None else each.cotangents[0] for each in at])
            std = (x - before).square().mean().sqrt().expand(x.shape)
            known = entry, State(x, k, None, std)
        return known[1].value, gradients

    def _told(self, at: Together) -> Recovered:
        """What is known of the inputs."""
        front, walk = self.front, self.front.steps.walk(at)
        x = at.x.reshape(-1, *front.client.input_shape)
        error = x.new_full((len(x),), torch.inf)
        if at.misfit <= UNEXPLAINED and not deadline.used() >= 1:
            error = front.placed(self._error(walk, x[front.rows])) * max(1.0, at.misfit)
        missed = front.difference.missed(walk)
        return replace(front.features, x=x, error=error, misfit=at.misfit, missed=missed, sides=at.sides)

    def _error(self, walk: Walk, x: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
        """How far noise moves each input's values, root mean square; infinite where dimensions are free."""
        system = self.front.system(walk.trail)
        at = sided(system, x, self.front.output[1])
        jacobian = StepsJacobian(system, at, 0)
        draw = torch.Generator(device=x.device).manual_seed(0)
        # Each solve takes long where no matrix is factored.
        draws = self.front.moved if jacobian.unknowns <= DENSE else self.front.moved[:1]
        noise = [jacobian.weighted(self._noise(walk, system, at, moved, draw)) for moved in draws]
        sure = solver(jacobian).determine(jacobian, noise[0], noise[0])
        if sure.rank < jacobian.unknowns or sure.move is None:
            return x.new_full((len(x),), torch.inf)
        moves = [sure.move, *(solver(jacobian).move(jacobian, each, sure) for each in noise[1:])]
        return torch.stack([move.flatten(1).square().mean(1) for move in moves]).mean(0).sqrt()

    def _noise(
        self, walk: Walk, system: StepsSystem, at: list[Linearisation], moved: Tensor, draw: torch.Generator
    ) -> Rows:
        """One draw: the features' errors, with what they do to cotangents, and the rounding of the weights."""
        front, h = self.front, self.front.features.x.flatten(1)

        def normal(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=draw, dtype=like.dtype, device=like.device)

        drawn = replace(front.features, x=h + moved)
        moved_front = replace(front, features=drawn)
        other, x = moved_front.system(walk.trail), of_all(at)
        here, there = system.residual(at), other.residual(sided(other, x, moved_front.output[1]))
        noise = front.difference.noise
        gradient = tuple(
            other_own - own + noise[layer.weight_name] * normal(own)
            for own, other_own, layer in zip(here.gradient, there.gradient, system.systems[0].layers, strict=True)
        )
        return Rows(there.weight - here.weight, gradient)


def doubted(system: StepsSystem, changed: int) -> int | None:
    """Units in doubt of each step where so many changed their sides; None where gradient rows have to wait."""
    many = DOUBT * changed + MARGIN
    return max(MARGIN, many // len(system.systems)) if many <= MOST_DOUBTED else None


def solver(jacobian: StepsJacobian, precise: bool = False) -> Solver:
    return Direct(RANK_TOLERANCE) if jacobian.unknowns <= DENSE else PRECISE if precise else Iterative()


def stepped(
    system: StepsSystem,
    x: Float[Tensor, "n ..."],
    output: State,
    count: int | None,
    scale: Sequence[float] | None = None,
    precise: bool = False,
) -> tuple[list[Linearisation], int, StepsJacobian]:
    """Where one linearised solve leads, halved where it leads astray, how many units changed their sides, and what was
    solved with.

    Args:
        output: what is known of the output, which tells sides in front of it better than x does.
        count, scale: as of `StepsJacobian`.
        precise: whether the solve is to leave next to nothing.
    """
    at = sided(system, x, output)
    jacobian = StepsJacobian(system, at, count, scale)
    missed = jacobian.weighted(system.residual(at))
    move, size = solver(jacobian, precise).step(jacobian, missed, torch.zeros_like(x), None), float(missed.norm())
    for halving in range(HALVINGS):
        there = sided(system, x + move * 0.5**halving, output)
        if float(jacobian.weighted(system.residual(there)).norm()) < size:
            break
    return there, system.changed(at, there), jacobian


def of_all(at: Sequence[Linearisation]) -> Float[Tensor, "n ..."]:
    """The inputs of all steps."""
    return torch.cat([each.x for each in at])


def sided(system: StepsSystem, x: Tensor, output: State) -> list[Linearisation]:
    """Linearised where activations have the sides that the output's values tell."""
    guesses, first = [], 0
    for own in system.systems:
        state, guess = output.select(torch.arange(first, first + own.samples, device=x.device)), dict[int, Tensor]()
        for at in reversed(range(len(own.network.nodes))):
            op = own.network.nodes[at].op
            if isinstance(op, Linear) or own.network.nodes[at].reads != (at,):
                break
            before = before_activation(op.activation, state)[0] if isinstance(op, Elementwise) else inverted(op, state)
            if before is None:
                break
            state = replace(before, alternative=None)
            guess[at] = state.value
        guesses.append(guess)
        first += own.samples
    return system.linearise(x, guesses)
