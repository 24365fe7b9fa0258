"""Figure 4 of R-GAP: twin data, two inputs that give the same gradient.

<W, grad W> = mu * dl/dmu (Eq. 11) is not monotonic in the margin mu: two margins mu1 and mu2 belong to one value of it.
A network that scales, piecewise linear and without biases, has margin mu1 at x and mu2 at (mu2 / mu1) x. Every layer's
gradient k x' is the same at both, since k falls by the factor by which x grows.

Source: J. Zhu and M. Blaschko, *R-GAP: Recursive Gradient Attack on Privacy*, ICLR 2021, arXiv:2010.07733, Section 3.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure, SubFigure
from rich.table import Table
from torch import Tensor, nn

from rgap import losses, models
from rgap.attacks import IDLG, Recursive
from rgap.attacks.base import gradient_residual
from rgap.attacks.start import Near
from rgap.nn import network as traced
from rgap.nn.losses import MarginLoss
from rgap.picture import show
from rgap.reproductions.base import Job, Options, Reproduction, of
from rgap.store import Row
from rgap.target import Target
from rgap.update import Update, capture

VALUE_RANGE = (0.0, 1.0)
PICTURE, TWIN, RANDOM = "picture", "twin", "random"
"""Where a search starts."""
ARRIVED, NEARER = 1e-6, 2.0
"""A search has arrived where the relative gradient residual is at most ARRIVED and it is NEARER times nearer than its
start was."""
START_SEED = 1_000_000
"""Added to the seed for the starts: drawn from the weights' own seed, starts and weights would be correlated."""
SHOWN = 3
"""Pictures of each network that are drawn."""


def twin_factor(loss: MarginLoss, margin: float) -> float:
    """mu2 / mu1, where mu1 is the margin and mu2 the other margin with the same mu * dl/dmu.

    Raises:
        ValueError: no other margin has it.
    """
    product = margin * float(loss.slope(torch.tensor(margin, dtype=torch.float64)))
    roots = loss.roots(product)
    if len(roots) < 2:
        raise ValueError(f"under {loss.name} loss a margin of {margin:g} has no twin: expected one above 0")
    return max(roots, key=lambda mu: abs(mu - margin)) / margin


def between(loss: MarginLoss, margin: float, scale: float) -> float:
    """The probability of the true label with which scale * x gives the gradient of x, x having this margin.

    With label 1 of probability w, dl/d(output) is w l'(s mu) - (1 - w) l'(-s mu) at s x, and must be l'(mu) / s. From x
    to its twin the w that solves this is a probability: all inputs between them give one gradient.
    """
    slope = loss.slope(torch.tensor([margin, scale * margin, -scale * margin], dtype=torch.float64))
    here, there, opposite = slope.tolist()
    return float((here / scale + opposite) / (there + opposite))


def moderate(model: nn.Module, x: Tensor, margin: float) -> float:
    """Scale the last layer so that |output| at x is the margin, in place; returns the output before."""
    last = list(model.parameters())[-1]
    with torch.no_grad():
        output = float(model(x))
        last.mul_(margin / abs(output))
    return output


def flipped(network: traced.Network, a: Tensor, b: Tensor) -> int:
    """How many units stand on different sides of their kinks at two inputs (1, *input_shape)."""
    read = [network.nodes[node_id].reads[0] for node_id, _ in network.activations]
    sides = [[values[value_id] > 0 for value_id in read] for values in map(network.forward, (a, b))]
    return sum(int((one != other).sum()) for one, other in zip(*sides, strict=True))


def distance(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth|."""
    return float((found - truth).norm() / truth.norm())


@dataclass(frozen=True)
class Network:
    """A network that scales, with the pictures it takes."""

    name: str
    build: Callable[..., nn.Module]
    """From a seed."""
    shape: tuple[int, int, int]


NETWORKS = (
    Network("CNN6", models.cnn6, (3, 32, 32)),
    Network("FCN3", partial(models.fcn3, hidden=(100, 30)), (1, 28, 28)),
)


@dataclass(frozen=True)
class Case:
    """One picture and its twin."""

    target: Target
    update: Update
    picture: Tensor
    twin: Tensor
    label: Tensor
    factor: float
    factor_as_drawn: float
    """What the factor would be with the last layer as it was drawn."""


@dataclass(frozen=True)
class Figure4(Reproduction):
    """Twins, and what the attacks make of their gradient.

    Args:
        networks: each with every picture.
        margin: |output| at the picture; the last layer's weights are scaled to it.
        deviations: how far from the picture or the twin a search starts, relative to its root mean square.
        shown: the deviation whose results are drawn, one of them.
        iterations: of each search.
    """

    name: ClassVar[str] = "figure4"

    networks: tuple[Network, ...] = NETWORKS
    margin: float = 0.7
    deviations: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    shown: float = 1e-5
    iterations: int = 300

    def jobs(self, options: Options, count: int) -> Sequence[Job]:
        return [
            Job(f"{network.name}, {at}", partial(self._job, network, options, count, at))
            for network in self.networks
            for at in range(count)
        ]

    def case(self, network: Network, options: Options, count: int, at: int) -> Case:
        """The picture's gradient in float64, labelled as the network sees it, and its twin."""
        loss = losses.Logistic()
        x = options.pictures(network.shape, count)[at].inputs.double()
        model = network.build(seed=options.seed).double()
        output = moderate(model, x, self.margin)
        y = torch.tensor([math.copysign(1.0, output)])
        target = Target(model, loss, network.shape, VALUE_RANGE)
        factor = twin_factor(loss, self.margin)
        as_drawn = twin_factor(loss, abs(output))
        return Case(target, capture(target, x, y), x, factor * x, y, factor, as_drawn)

    def _job(self, network: Network, options: Options, count: int, at: int) -> Row:
        case = self.case(network, options, count, at)
        values: dict[str, Any] = {
            "network": network.name,
            "label": float(case.label),
            "factor": case.factor,
            "factor as drawn": case.factor_as_drawn,
            "difference": gradient_residual(case.target, case.update, case.twin, case.label),
            "between": self._between(case),
            "recursive": self._recursive(case),
        }
        generator = torch.Generator().manual_seed(START_SEED + options.seed + at)
        tensors = {PICTURE: case.picture, TWIN: case.twin}
        searches = [self._search_near(case, *one, generator, tensors) for one in self._near]
        start = torch.rand(case.picture.shape, generator=generator, dtype=torch.float64)
        searches.append({"from": RANDOM} | self._search(case, start, tensors, RANDOM))
        return Row(values | {"searches": searches}, {key: t.float() for key, t in tensors.items()})

    def _recursive(self, case: Case) -> dict[str, Any]:
        found = Recursive()(case.target, case.update)
        twins = [distance(twin.inputs, case.twin) for twin in found.twins]
        return {
            "status": found.status.value,
            "picture": distance(found.inputs, case.picture),
            "twins": len(twins),
            "twin": min(twins, default=math.nan),
        }

    def _between(self, case: Case) -> float:
        """The relative gradient difference at the middle of picture and twin, with an uncertain label."""
        loss, scale = case.target.margin_loss, (1 + case.factor) / 2
        share = between(loss, self.margin, scale)
        shares = [share if y == float(case.label) else 1 - share for y in loss.labels]
        weights = torch.tensor([shares], dtype=torch.float64)
        found = case.target.gradient_function(torch.float64)(scale * case.picture, weights)
        return Update({n: found[n] - g for n, g in case.update.gradients.items()}).norm / case.update.norm

    def _search_near(
        self, case: Case, goal: str, deviation: float, generator: torch.Generator, tensors: dict[str, Tensor]
    ) -> dict[str, Any]:
        centre = case.picture if goal == PICTURE else case.twin
        noise = torch.randn(centre.shape, generator=generator, dtype=torch.float64)
        start = centre + deviation * float(centre.square().mean().sqrt()) * noise
        key = goal if deviation == self.shown else None
        found = self._search(case, start, tensors, key)
        left, first = found[f"to {goal}"], distance(start, centre)
        arrived = found["residual"] <= ARRIVED and left * NEARER <= first
        units = flipped(case.target.network, start, centre)
        return {"from": goal, "deviation": deviation, "flipped": units, "arrived": arrived} | found

    def _search(self, case: Case, start: Tensor, tensors: dict[str, Tensor], keep: str | None) -> dict[str, Any]:
        """iDLG from a start; its result goes among the tensors."""
        attack = IDLG(start=Near(start), iterations=self.iterations, tolerance=1e-8)
        found = attack(case.target, case.update)
        if keep is not None:
            tensors[f"found from {keep}"] = found.inputs
        return {
            "to picture": distance(found.inputs, case.picture),
            "to twin": distance(found.inputs, case.twin),
            "residual": found.gradient_residual,
        }

    def table(self, rows: Mapping[str, Row]) -> Table:
        summary = self.summary(rows)
        table = self.new_table(("", "paper"), tuple(summary))
        own = list(summary.values())
        table.add_row("twin / picture", "pictures only", *(f"{one['twin / picture']:.2f}" for one in own))
        gap = "R-GAP, distance to the"
        for name in ("difference of the two gradients", f"{gap} picture", f"{gap} twin"):
            table.add_row(name, "-", *(f"{one[name]:.0e}" for one in own))
        near = [_near_name(*one) for one in self._near]
        for name in ("R-GAP finds both, the picture first", *near, "no unit flipped", "some unit flipped"):
            table.add_row(name, "-", *(_counted(one[name]) for one in own))
        table.add_row("DLG from random, least residual", "-", *(f"{one['random, least residual']:.0e}" for one in own))
        return table

    @property
    def _near(self) -> list[tuple[str, float]]:
        """Where the searches start that do not start at random: near what, and how near."""
        return list(itertools.product((PICTURE, TWIN), self.deviations))

    def summary(self, rows: Mapping[str, Row]) -> dict[str, Any]:
        return {network.name: self._summary(of(rows, network=network.name)) for network in self.networks}

    def _summary(self, rows: Sequence[Row]) -> dict[str, Any]:
        """One network's figures; of distances and differences the largest."""
        own = [row.values for row in rows]
        searches = [one for values in own for one in values["searches"]]
        near = [one for one in searches if one["from"] != RANDOM]
        random = [one for one in searches if one["from"] == RANDOM]
        recursive = [values["recursive"] for values in own]
        both = sum(_found_both(one) for one in recursive)
        return {
            "pictures": len(own),
            "twin / picture": statistics.median(values["factor"] for values in own),
            "twin / picture, last layer as drawn": statistics.median(values["factor as drawn"] for values in own),
            "difference of the two gradients": max(values["difference"] for values in own),
            "difference midway, label uncertain": max(values["between"] for values in own),
            "R-GAP finds both, the picture first": {"arrived": both, "of": len(own)},
            "R-GAP, distance to the picture": max(one["picture"] for one in recursive),
            "R-GAP, distance to the twin": max(math.inf if one["twin"] is None else one["twin"] for one in recursive),
            **{
                _near_name(*start): _arrived(one for one in near if (one["from"], one["deviation"]) == start)
                for start in self._near
            },
            "no unit flipped": _arrived(one for one in near if not one["flipped"]),
            "some unit flipped": _arrived(one for one in near if one["flipped"]),
            "random, least residual": min(one["residual"] for one in random),
            "random, least distance to the picture": min(one["to picture"] for one in random),
            "random, least distance to the twin": min(one["to twin"] for one in random),
        }

    def draw(self, rows: Mapping[str, Row]) -> Figure:
        shown = [row for network in self.networks for row in of(rows, network=network.name)[:SHOWN]]
        figure = Figure(figsize=(13.5, 0.6 + 1.45 * len(shown)), layout="constrained", dpi=150)
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(9.0, 4.5))[0]
        self._draw_pictures(left, shown)
        self._draw_shares(right, rows)
        return figure

    def _draw_pictures(self, figure: SubFigure, shown: Sequence[Row]) -> None:
        axes = figure.subplots(len(shown), 6, squeeze=False)
        near = f"DLG from {self.shown:.0e}\nof the"
        for number, (line, row) in enumerate(zip(axes, shown, strict=True)):
            values, tensors = row.values, row.tensors
            twin_range = (0.0, VALUE_RANGE[1] * values["factor"])
            searches = {
                one["from"]: one for one in values["searches"] if one.get("deviation", self.shown) == self.shown
            }
            apart = f"gradients differ by {values['difference']:.0e}"
            columns = (
                ("picture", tensors[PICTURE], VALUE_RANGE, ""),
                ("twin", tensors[TWIN], VALUE_RANGE, f"{values['factor']:.2f} times as bright"),
                ("twin,\nin its own range", tensors[TWIN], twin_range, apart),
                (f"{near} picture", tensors[f"found from {PICTURE}"], VALUE_RANGE, _apart(searches[PICTURE])),
                (f"{near} twin, own range", tensors[f"found from {TWIN}"], twin_range, _apart(searches[TWIN])),
                ("DLG from\nrandom values", tensors[f"found from {RANDOM}"], VALUE_RANGE, _apart(searches[RANDOM])),
            )
            for ax, (title, picture, value_range, below) in zip(line, columns, strict=True):
                show(ax, picture[0], value_range)
                ax.set_xticks([])
                ax.set_yticks([])
                ax.set_xlabel(below, fontsize=6)
                if number == 0:
                    ax.set_title(title, fontsize=8)
            line[0].set_ylabel(values["network"], fontsize=8)

    def _draw_shares(self, figure: SubFigure, rows: Mapping[str, Row]) -> None:
        """How near a search must start."""
        above, below = figure.subplots(2, 1, sharex=True, squeeze=False)[:, 0]
        for number, (name, found) in enumerate(self.summary(rows).items()):
            for goal, style in ((PICTURE, "o-"), (TWIN, "s--")):
                own = [found[_near_name(goal, deviation)] for deviation in self.deviations]
                colour, label = f"C{number}", f"{name}, from near the {goal}"
                shares, flips = [one["arrived"] / one["of"] for one in own], [one["flipped"] for one in own]
                above.plot(self.deviations, shares, style, color=colour, label=label, ms=5)
                below.plot(self.deviations, flips, style, color=colour, label=label, ms=5)
        above.set_ylabel("share of searches\nthat arrive", fontsize=8)
        above.set_title("how near DLG must start", fontsize=9)
        below.legend(fontsize=7, loc="upper left")
        below.set_yscale("symlog", linthresh=0.1)
        below.set_ylim(bottom=0)
        below.set_ylabel("units on the other\nside of their kink, mean", fontsize=8)
        below.set_xlabel("distance of the start, relative to the picture or twin", fontsize=8)
        for ax in (above, below):
            ax.set_xscale("log")
            ax.grid(alpha=0.3)

    def remarks(self, rows: Mapping[str, Row]) -> Sequence[str]:
        summary = self.summary(rows)
        drawn = ", ".join(f"{one['twin / picture, last layer as drawn']:.0f} on {n}" for n, one in summary.items())
        midway = max(one["difference midway, label uncertain"] for one in summary.values())
        return (
            "The paper shows pictures only, and not how its twins were found. Ours are computed: mu2 / mu1 times the "
            "picture.",
            f"For each picture the last layer's weights are scaled so that |output| is {self.margin:g}, and the label "
            "is the output's sign. As drawn, mu is near 0, and the twin is brighter by a large factor (median: "
            f"{drawn}). A negative margin has no twin.",
            "R-GAP returns both. The value range puts the picture first; nothing else tells the two apart.",
            "DLG is L-BFGS in float64 with the label inferred (iDLG: both labels are tried). With the label optimised, "
            "as published, picture and twin are the ends of a segment of solutions: every input between them gives the "
            f"same gradient with an uncertain label (midway the gradients differ by {midway:.0e}).",
            f"A search has arrived if the gradient residual is at most {ARRIVED:g} and it has come at least {NEARER:g} "
            "times nearer than it started.",
            "The gradient jumps where a unit of LeakyReLU changes its side, and L-BFGS ends there. It finds the twin "
            "as well as the picture where hardly any unit stands on another side at the start than at the goal. How "
            "near that is depends on the number of units.",
            "CNN6 is also ill-conditioned: even without a flipped unit the search comes nearer only slowly.",
        )


def _found_both(recursive: Mapping[str, Any]) -> bool:
    """Whether the first answer is the picture and another one the twin."""
    return recursive["twin"] is not None and max(recursive["picture"], recursive["twin"]) < 1e-6


def _near_name(goal: str, deviation: float) -> str:
    return f"DLG from {deviation:.0e} of the {goal}"


def _arrived(searches: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How many searches arrived, of how many, and the mean number of units that were flipped at their starts."""
    own = list(searches)
    flipped = statistics.fmean(one["flipped"] for one in own) if own else None
    return {"arrived": sum(one["arrived"] for one in own), "of": len(own), "flipped": flipped}


def _counted(found: Mapping[str, Any]) -> str:
    units = f" ({found['flipped']:.1f} units flipped)" if found.get("flipped") else ""
    return f"{found['arrived']} of {found['of']}{units}"


def _apart(search: Mapping[str, Any]) -> str:
    return f"{search['to picture']:.0e} to picture,\n{search['to twin']:.0e} to twin"
