"""Sides of single units by trial, near the sample, where one wrong side is hundreds of roundings.

What the steps miss with a unit on other sides, in some of them or in all, adds up over units. So each is tried alone,
and their combination is found by changes of one or two units at a time. The input then moves so that its units stand on
these sides, as the rows let it most easily: by what those values and the input have in common in the distribution of
what is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.smoother.sides import Doubt
from rgap.inversion.smoother.steps import KinkedSteps
from rgap.inversion.unrolled import made_by
from rgap.inversion.walk import Walk
from rgap.linalg.psd import cholesky_solve
from rgap.nn.soft import GivenSlopes

ROUNDS = 3
FAR = 4.0
"""Standard deviations that a unit is moved by, at the most."""
BEYOND = 0.1
"""Standard deviations that a unit is behind its kink where nothing else says how many."""
MOST = 400
"""Ways for units to stand, at the most; each takes memory of the size of all parameters."""


@dataclass(frozen=True)
class Way:
    """For one unit to stand otherwise: by how much its value moves, and its sides then."""

    unit: int
    """Among those in doubt."""
    shift: float
    above: list[bool]


@dataclass(frozen=True, eq=False)
class Trial:
    steps: KinkedSteps
    lower: Float[Tensor, "v v"]
    """The factor of what is known of the input."""

    def settled(self, x: Tensor, found: Sequence[Doubt]) -> tuple[Tensor, list[Tensor]]:
        """The input with units in doubt on the sides on which least is missed, and the slopes of all units there, as
        far as the input alone does not have them, (steps, *shape) of each activation."""
        units = [(j, unit) for j, doubt in enumerate(found) for unit in sorted(set(doubt.unit.tolist()))]
        if not units:
            return x, self._slopes(self._values(x, self._walk(x)))
        columns = self._columns(x, units)
        common = cholesky_solve(columns, self.lower)
        together = columns.mT @ common
        std = together.diagonal().sqrt()
        for _ in range(ROUNDS):
            walk = self._walk(x)
            z = self._values(x, walk)
            ways = self._ways(z, units, std)
            here, changes = self._changes(x, walk, z, units, ways)
            chosen = _least(here, changes, [way.unit for way in ways])
            shift = x.new_zeros(len(units))
            for at in chosen:
                shift[ways[at].unit] = ways[at].shift
            # Those that stay hold still.
            held = torch.linalg.lstsq(together / std / std[:, None], (shift / std)[:, None], driver="gelsd").solution
            tried = x + (common @ (held[:, 0] / std)).reshape(x.shape)
            if not chosen or not float(self._missed(tried).norm()) < float(here.norm()):
                slopes = self._slopes(z)
                for at in chosen:
                    self._turned(slopes, units[ways[at].unit], ways[at])
                return x, slopes
            x = tried
        return x, self._slopes(self._values(x, self._walk(x)))

    def _slopes(self, z: Sequence[Tensor]) -> list[Tensor]:
        return [torch.where(own > 0, torch.ones_like(own), b) for own, b in zip(z, self.steps.below, strict=True)]

    def _turned(self, slopes: list[Tensor], unit: tuple[int, int], way: Way) -> None:
        """One unit to other sides, in place."""
        j, at = unit
        below = float(self.steps.below[j].flatten()[at])
        slopes[j].flatten(1)[:, at] = torch.tensor([1.0 if above else below for above in way.above]).to(slopes[j])

    def _walk(self, x: Tensor) -> Walk:
        steps = self.steps
        return Walk(steps.client, steps.plan).all(x, steps.labels, ((0,),) * steps.plan.steps)

    def _missed(self, x: Tensor) -> Tensor:
        """By an input's own sides, in roundings."""
        walk = self._walk(x)
        difference, end = self.steps.difference.along(walk), walk.end
        missed = [(end[name] - difference.sent[name]) / difference.units(name) for name in self.steps.names]
        return torch.cat([each.flatten() for each in missed])

    def _values(self, x: Tensor, walk: Walk) -> list[Tensor]:
        """In front of each activation, in all steps."""
        steps = self.steps
        each = [steps.client.network(weights).forward(x) for weights in walk.trail[:-1]]
        return [torch.cat([values[steps.reads(at)] for values in each]) for at in steps.activations]

    def _columns(self, x: Tensor, units: Sequence[tuple[int, int]]) -> Float[Tensor, "v u"]:
        """How each unit's value moves with the input."""
        network, steps = self.steps.middle_network, self.steps
        values = network.forward(x)
        slopes, rows = network.slopes(values), []
        for j, unit in units:
            there = steps.reads(steps.activations[j])
            one = torch.zeros_like(values[there])
            one.view(-1)[unit] = 1.0
            pulled = network.vjp(values, slopes, {there: one})[0]
            assert pulled is not None
            rows.append(pulled.flatten())
        return torch.stack(rows, 1)

    def _ways(self, z: list[Tensor], units: Sequence[tuple[int, int]], std: Tensor) -> list[Way]:
        """All within reach. A unit that crosses its kink on the way may do so a step earlier or later, though it is
        known well where it begins: how far it moves hangs on its own sides. Then it stays."""
        found = []
        for at, (j, unit) in enumerate(units):
            own, scale = z[j].flatten(1)[:, unit].tolist(), float(std[at])
            cuts = sorted(-each for each in own)
            edges = [cuts[0] - BEYOND * scale, *((a + b) / 2 for a, b in pairwise(cuts)), cuts[-1] + BEYOND * scale]
            for shift in edges:
                above = [each + shift > 0 for each in own]
                turned = sum(after != (each > 0) for after, each in zip(above, own, strict=True))
                if turned and abs(shift) <= FAR * scale:
                    found.append(Way(at, shift, above))
                elif turned == 1:
                    found.append(Way(at, 0.0, above))
        return sorted(found, key=lambda way: abs(way.shift) / float(std[way.unit]))[:MOST]

    def _changes(
        self, x: Tensor, walk: Walk, z: list[Tensor], units: Sequence[tuple[int, int]], ways: Sequence[Way]
    ) -> tuple[Float[Tensor, " r"], Float[Tensor, "w r"]]:
        """What is missed now, and how each way changes that."""
        steps = self.steps
        difference = steps.difference.along(walk)
        each = {name: torch.as_tensor(difference.units(name)) for name in steps.names}
        made = made_by(
            steps.client, steps.plan, replace(difference, each=each), steps.labels, ((0,),) * steps.plan.steps
        )
        slopes = self._slopes(z)
        kinked = [j for j, below in enumerate(steps.below) if bool((below < 1).any())]

        def missed() -> Tensor:
            with GivenSlopes([slopes[j][t] for t in range(steps.plan.steps) for j in kinked]):
                return made(x)

        here, found = missed(), []
        for way in ways:
            j, unit = units[way.unit]
            kept = slopes[j].flatten(1)[:, unit].clone()
            self._turned(slopes, (j, unit), way)
            found.append((missed() - here).float())
            slopes[j].flatten(1)[:, unit] = kept
        return here, torch.stack(found) if found else here.new_zeros(0, len(here))


def _least(here: Tensor, changes: Tensor, unit: Sequence[int]) -> list[int]:
    """Which changes, one of each unit at the most, leave least of what is here: by exchanging one or two at a time."""
    if not unit:
        return []
    gram, right = (changes @ changes.mT).double(), (changes @ here.to(changes)).double()
    chosen = dict[int, int]()
    while True:
        now = list(chosen.values())
        slope = right + gram[:, now].sum(1)
        # Each option is an exchange for what its unit has, or that unit's return.
        options = [(unit[at], at) for at in range(len(unit))] + [(of, -1) for of in chosen]
        rows = torch.zeros(len(options), len(unit), dtype=torch.float64).to(gram)
        for row, (of, at) in zip(rows, options, strict=True):
            if of in chosen:
                row[chosen[of]] -= 1.0
            if at >= 0:
                row[at] += 1.0
        linear, square = 2 * rows @ slope, rows @ gram @ rows.mT
        alone = linear + square.diagonal()
        pairs = alone[:, None] + alone + 2 * square
        same = torch.tensor([[a == b for b, _ in options] for a, _ in options]).to(pairs.device)
        pairs = torch.where(same, torch.inf, pairs)
        worth = -1e-6 * float(here.square().sum())
        if float(alone.min()) <= float(pairs.min()) and float(alone.min()) < worth:
            taken = [int(alone.argmin())]
        elif float(pairs.min()) < worth:
            taken = list(divmod(int(pairs.argmin()), len(options)))
        else:
            return now
        for each in taken:
            of, at = options[each]
            chosen.pop(of, None)
            if at >= 0:
                chosen[of] = at
