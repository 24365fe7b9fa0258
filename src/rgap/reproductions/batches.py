"""What the recursion gives for the gradient of a batch: one linear combination of its pictures. Figures 6 and 7.

The gradient of a batch is the mean of its samples' gradients. A Linear layer reads K x = grad W with one k where there
were b of them, grad W = (1/b) sum_i k_i x_i', and its least-squares solution is

    x = sum_i c_i x_i    with    c_i = <k_i, k> / (b <k, k>),

exactly, since k is one column and leaves nothing for the weight rows to decide. At the last layer k_i is a number,
y_i l'(mu_i), and k belongs to the margin mu that solves mu l'(mu) = (1/b) sum_i mu_i l'(mu_i) (Eq. 11). Without
activations all k_i of a layer are parallel, so that the coefficients stay what they were, down to the input:
c_i = k_i / (b k) tells them from the margins alone. With LeakyReLU the k_i take the slopes of their own picture's
units, and k those of the combination's.

Source: J. Zhu and M. Blaschko, *R-GAP: Recursive Gradient Attack on Privacy*, ICLR 2021, arXiv:2010.07733, Figures 6
and 7.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rgap import models
from rgap.attacks import DLG, Adam, Matching, Recursive
from rgap.losses import Logistic, MarginLoss
from rgap.nn.network import Network
from rgap.nn.ops import Elementwise, Linear
from rgap.picture import grid, show
from rgap.reproductions.base import Job, Options, Reproduction, counted, labels, statuses
from rgap.store import Row
from rgap.target import Target
from rgap.update import capture

SHAPE = (1, 28, 28)
RANGE = (0.0, 1.0)
PHOTOGRAPHS = 25
"""How many `rgap.data.photographs` there are."""
DRAWN = 5
"""Batches in the picture."""
OPTIMISED = DLG(
    minimiser=Adam(0.05, signed=True, decay=(3 / 8, 5 / 8, 7 / 8)), boxed=True, dtype=torch.float32, iterations=1000
)


def by_margins(
    loss: MarginLoss, margins: Float[Tensor, " b"], signs: Float[Tensor, " b"], label: float, margin: float
) -> Float[Tensor, " b"]:
    """The coefficients k_i / (b k) of a network without activations; for others a first guess.

    Args:
        margins, signs: mu_i and y_i of each picture.
        label, margin: what the attack inferred.
    """
    k = signs * loss.slope(margins)
    return k / (len(k) * label * loss.slope(margins.new_tensor([margin])))


def by_slopes(
    network: Network,
    loss: MarginLoss,
    inputs: Float[Tensor, "b ..."],
    signs: Float[Tensor, " b"],
    label: float,
    margin: float,
) -> Float[Tensor, " b"]:
    """The coefficients <k_i, k> / (b <k, k>) at the input, layer after layer from the pictures themselves.

    Args:
        network: of Linear layers without biases, one behind the other.
        inputs, signs: the pictures and their labels.
        label, margin: what the attack inferred.
    """
    values = network.forward(inputs)
    end = len(network.nodes)
    start = signs * loss.slope(signs * values[end].reshape(-1))
    own = network.vjp(values, network.slopes(values), {end: start[:, None]})
    k = label * loss.slope(signs.new_tensor([[margin]]))
    shares, answer = signs, values[end][:1]
    for node_id in reversed(range(end)):
        op, value_id = network.nodes[node_id].op, network.nodes[node_id].reads[0]
        if isinstance(op, Linear):
            there = own[node_id + 1]
            assert there is not None, "a gradient gets to every layer"
            shares = (there * k).flatten(1).sum(1) / (len(signs) * k.square().sum())
            k = op.vjp(k, (values[value_id],))[0]
            answer = (shares @ values[value_id].flatten(1)).reshape(k.shape)
        elif isinstance(op, Elementwise):  # Eq. 6
            inverse = op.activation.invert(answer, answer.new_zeros(1))
            k, answer = k * inverse.slope, inverse.z
        else:
            inverted = op.invert(answer)
            assert inverted is not None, "only reshaping stands between Linear layers"
            k, answer = op.vjp(k, (values[value_id],))[0], inverted
    return shares


def measured(answer: Tensor, inputs: Float[Tensor, "b ..."]) -> tuple[Float[Tensor, " b"], float]:
    """The coefficients of the combination of inputs that comes nearest to an answer, and what it leaves of its energy.

    Returns:
        Least-squares coefficients, and |answer - combination|^2 / |answer|^2, which is 1 - R^2.
    """
    columns, value = inputs.double().flatten(1).mT, answer.double().reshape(-1, 1)
    found = torch.linalg.lstsq(columns, value).solution
    return found.flatten(), float((columns @ found - value).square().sum() / value.square().sum())


def assigned(found: Float[Tensor, "b ..."], truth: Float[Tensor, "b ..."]) -> tuple[list[int], list[float]]:
    """Which reconstruction is which picture: the assignment of least total error.

    Returns:
        For each picture the number of its reconstruction, and their mean squared difference.
    """
    apart = (found.double().flatten(1)[None] - truth.double().flatten(1)[:, None]).square().mean(2)
    _, columns = linear_sum_assignment(apart.cpu().numpy())
    order = [int(column) for column in columns]
    return order, [float(apart[at, column]) for at, column in enumerate(order)]


def batches(options: Options, count: int, size: int) -> list[Tensor]:
    """`count` batches of `size` different pictures, (size, 1, 28, 28).

    There are few built-in photographs: where they do not suffice, they are dealt out again in another order.
    """
    most = count * size if options.data is not None else PHOTOGRAPHS - PHOTOGRAPHS % size
    pool = options.grey(min(count * size, most)).inputs
    generator = torch.Generator().manual_seed(options.seed)
    rounds = math.ceil(count * size / len(pool))
    orders = [torch.arange(len(pool)), *(torch.randperm(len(pool), generator=generator) for _ in range(rounds - 1))]
    return list(torch.split(pool[torch.cat(orders)[: count * size]], size))


@dataclass(frozen=True)
class Batches(Reproduction):
    """FCN3 and batches of one size: the recursion and DLG on the same gradients.

    Args:
        matching: the optimisation attack.
        hidden: widths of the network.
    """

    size: ClassVar[int]
    """Pictures in a batch."""

    matching: Matching = OPTIMISED
    hidden: tuple[int, ...] = (1000, 100)

    def jobs(self, options: Options, count: int) -> Sequence[Job]:
        model = models.fcn3(math.prod(SHAPE), self.hidden, seed=options.seed)
        target = Target(model, Logistic(), SHAPE, RANGE, batch_size=self.size)
        matching = replace(self.matching, seed=options.seed)
        return [
            Job(f"batch {at}", partial(_attacked, target, inputs, matching))
            for at, inputs in enumerate(batches(options, count, self.size))
        ]

    def pictures(self, options: Options) -> str:
        return "built-in photographs, in grey" if options.data is None else "MNIST test pictures"

    def table(self, rows: Mapping[str, Row]) -> Table:
        found, first = self.summary(rows), next(iter(rows.values())).values
        recursion, matching = found["recursion"], found["matching"]
        table = self.new_table(("", "the paper", "ours"))
        least, middle, most = recursion["by_margins_ratio"]
        mse, worst = matching["mse"]
        for what, paper, ours in (
            ("R-GAP: status", "pictures only", counted(recursion["statuses"])),
            ("  gradient residual, median", "", f"{recursion['residual']:.2f}"),
            ("  energy that no combination of the pictures gives, worst", "", f"{recursion['unexplained']:.0e}"),
            ("  coefficients in the first batch: measured", "", _listed(first["measured"])),
            ("    foretold from margins and slopes", "", _listed(first["by_slopes"])),
            ("    foretold from margins alone", "", _listed(first["by_margins"])),
            ("  measured - foretold with slopes, greatest", "", f"{recursion['by_slopes_error']:.0e}"),
            ("  measured / foretold from margins alone", "", f"{least:.2f} to {most:.2f}, median {middle:.2f}"),
            ("  MSE to the nearest picture of the batch, median", "", f"{recursion['mse']:.1e}"),
            (f"{matching['attack']}: MSE, median and worst", "pictures only", f"{mse:.0e} and {worst:.0e}"),
            ("  batches whose labels came out right", "", f"{matching['labels_right']} of {len(rows)}"),
            ("seconds a batch, R-GAP and DLG", "", f"{recursion['seconds']:.2f}, {matching['seconds']:.1f}"),
        ):
            table.add_row(what, paper, ours)
        return table

    def summary(self, rows: Mapping[str, Row]) -> dict[str, Any]:
        found = [row.values for row in rows.values()]
        ratio = [m / p for each in found for m, p in zip(each["measured"], each["by_margins"], strict=True)]
        errors = [abs(m - p) for each in found for m, p in zip(each["measured"], each["by_slopes"], strict=True)]
        mse = [error for each in found for error in each["matching"]["mse"]]
        return {
            "batch_size": self.size,
            "recursion": {
                "statuses": statuses(each["status"] for each in found),
                "residual": statistics.median(each["residual"] for each in found),
                "unexplained": max(each["unexplained"] for each in found),
                "by_slopes_error": max(errors),
                "by_margins_ratio": [min(ratio), statistics.median(ratio), max(ratio)],
                "mse": statistics.median(each["mse_nearest"] for each in found),
                "seconds": statistics.median(each["seconds"] for each in found),
            },
            "matching": {
                "attack": found[0]["matching"]["attack"],
                "mse": [statistics.median(mse), max(mse)],
                "labels_right": sum(each["matching"]["labels_right"] for each in found),
                "seconds": statistics.median(each["matching"]["seconds"] for each in found),
            },
        }

    def remarks(self, rows: Mapping[str, Row]) -> Sequence[str]:
        return (
            "The paper shows pictures without numbers here.",
            "A batch's gradient gives R-GAP a linear combination of the pictures, with coefficients "
            "<k_i, k>/(b <k, k>) at each layer. Without activations they would be k_i/(b k), known from the margins "
            "alone; where pictures and combination have units on different sides of LeakyReLU, less is left of them.",
            "Pictures with labels -1 and 1 have opposite k_i at first: the combination is a difference of pictures. "
            "Among the labels and roots whose recomputed gradients come about as near as the nearest, R-GAP puts first "
            "the one that fits the value range; none reproduces the gradient, and its status says so.",
            "DLG runs with the signs of the gradient in Adam and keeps to the value range. L-BFGS, its own minimiser, "
            "ends at the kinks of this network after some tens of iterations, far from the pictures.",
        )

    def draw(self, rows: Mapping[str, Row]) -> Figure:
        shown = list(rows.values())[:DRAWN]
        width = 2 * self.size + 2
        figure, axes = grid(len(shown), width)
        for line, row in zip(axes, shown, strict=True):
            values, own = row.values, row.tensors
            for at in range(self.size):
                _place(line[at], own["truth"][at], RANGE, f"y = {values['labels'][at]:+.0f}")
                _place(line[self.size + 2 + at], own["matched"][at], RANGE, f"MSE {values['matching']['mse'][at]:.0e}")
            # Both on one scale, on which middle grey is 0.
            most = float(own["answer"].abs().max())
            _place(line[self.size], own["answer"], (-most, most), _listed(values["measured"], 3))
            _place(line[self.size + 1], own["foretold"], (-most, most), _listed(values["by_slopes"], 3))
        for at, word in (
            (0, "originals"),
            (self.size, "R-GAP,\nmeasured"),
            (self.size + 1, "mixture,\nforetold"),
            (self.size + 2, "DLG"),
        ):
            axes[0][at].annotate(
                word, (0.5, 1.0), (0, 26), xycoords="axes fraction", textcoords="offset points", ha="center",
                va="bottom", fontsize=9, fontweight="bold",
            )  # fmt: skip
        return figure


@dataclass(frozen=True)
class Figure6(Batches):
    """Batches of two."""

    name: ClassVar[str] = "figure6"
    size: ClassVar[int] = 2


@dataclass(frozen=True)
class Figure7(Batches):
    """Batches of five."""

    name: ClassVar[str] = "figure7"
    size: ClassVar[int] = 5


def _attacked(target: Target, inputs: Tensor, matching: Matching) -> Row:
    """One batch: both attacks, and what was to be expected of the first."""
    y = labels(len(inputs))
    update = capture(target, inputs, y)
    exact, signs = inputs.double(), y.double()
    network, loss = target.network, target.margin_loss
    # A mean of products that samples have is one that a sample can have: there is always a root, and an answer.
    found = Recursive()(target, update)
    best = found.answers[0]
    label, margin = float(best.labels[0]), best.margin
    margins = signs * network.forward(exact)[-1].reshape(-1)
    coefficients, unexplained = measured(best.inputs, exact)
    foretold = by_slopes(network, loss, exact, signs, label, margin)
    matched = matching(target, update)
    order, mse = assigned(matched.inputs, inputs)
    values = {
        "labels": y.tolist(),
        "margins": margins.tolist(),
        "status": found.status.value,
        "reason": found.reason,
        "label": label,
        "margin": margin,
        "residual": best.gradient_residual,
        "answers": [
            {"label": float(each.labels[0]), "margin": each.margin, "residual": each.gradient_residual}
            for each in found.answers
        ],
        "measured": coefficients.tolist(),
        "unexplained": unexplained,
        "by_slopes": foretold.tolist(),
        "by_margins": by_margins(loss, margins, signs, label, margin).tolist(),
        "mse_nearest": float((best.inputs - exact).flatten(1).square().mean(1).min()),
        "seconds": found.seconds,
        "matching": {
            "attack": matching.name,
            "mse": mse,
            "labels_right": matched.labels[order].tolist() == y.tolist(),
            "status": matched.status.value,
            "reason": matched.reason,
            "residual": matched.gradient_residual,
            "seconds": matched.seconds,
        },
    }
    tensors = {
        "truth": inputs,
        "answer": best.inputs[0].float(),
        "foretold": (foretold[:, None, None, None] * exact).sum(0).float(),
        "matched": matched.inputs[order].float(),
    }
    return Row(values, tensors)


def _place(ax: Axes, picture: Tensor, value_range: tuple[float, float], word: str) -> None:
    show(ax, picture, value_range)
    ax.set_title(word, fontsize=7, pad=2)


def _listed(numbers: Sequence[float], across: int | None = None) -> str:
    """Coefficients with their signs, `across` of them in a line."""
    across = len(numbers) if across is None else across
    lines = [numbers[at : at + across] for at in range(0, len(numbers), across)]
    return "\n".join(" ".join(f"{number:+.2f}" for number in line) for line in lines)
