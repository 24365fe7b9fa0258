"""Figure 5 of R-GAP: Gaussian noise on the gradient, against the width of the network.

Source: J. Zhu and M. Blaschko, *R-GAP: Recursive Gradient Attack on Privacy*, ICLR 2021, arXiv:2010.07733, Appendix.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from rgap import losses, models
from rgap.attacks import Recursive, Status
from rgap.models.chains import CHANNELS, six_convolutions
from rgap.reproductions.base import Job, Options, Reproduction, labels, of
from rgap.store import Row
from rgap.target import Target
from rgap.update import Update, capture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VALUE_RANGE = (0.0, 1.0)
LEVELS = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
VISIBLE = 1e-3
"""An MSE below this, 30 dB, counts as recovered."""
NOISE_SEED = 1_000_000
"""Added to the seed for the noise: drawn from the weights' own seed, noise and weights would be correlated."""


def wide_cnn6(width: float, seed: int, slope: float = 0.2) -> nn.Sequential:
    """CNN6 for 32 x 32 colour pictures with `width` times the channels; with 1 it is `models.cnn6`, weights and all.

    Args:
        slope: of LeakyReLU on the negative side.
    """
    channels = [round(width * c) for c in CHANNELS]
    return six_convolutions(channels, activation=partial(nn.LeakyReLU, slope), seed=seed)


def straight_cnn6(width: float, seed: int) -> nn.Sequential:
    """The same without kinks: no unit has another side to change to."""
    return wide_cnn6(width, seed, slope=1.0)


def wide_fcn3(width: float, seed: int) -> nn.Sequential:
    """FCN3 for 28 x 28 grey pictures with `width` times the hidden units."""
    return models.fcn3(hidden=(round(1000 * width), round(100 * width)), seed=seed)


@dataclass(frozen=True)
class Network:
    """A network that comes in several widths."""

    name: str
    build: Callable[[float, int], nn.Module]
    """From a width, 1 as the paper has it, and a seed."""
    shape: tuple[int, int, int]
    widths: tuple[float, ...]


NETWORKS = (
    Network("CNN6", wide_cnn6, (3, 32, 32), (1.0, 1.5, 2.0, 4.0)),
    Network("CNN6 without kinks", straight_cnn6, (3, 32, 32), (1.0, 2.0)),
    Network("FCN3", wide_fcn3, (1, 28, 28), (0.25, 1.0, 4.0)),
)
"""CNN6 would be rank-deficient below width 1; a Linear layer is of full rank at any width."""


def noisy(update: Update, level: float, generator: torch.Generator) -> Update:
    """The update with Gaussian noise of standard deviation level * (root mean square of the parameter's gradient)."""
    return Update(
        {
            name: g + level * g.square().mean().sqrt() * torch.randn(g.shape, generator=generator, dtype=g.dtype)
            for name, g in update.gradients.items()
        },
        update.header,
    )


def apart_from_brightness(found: Tensor, truth: Tensor) -> float:
    """MSE after multiplication by the factor that makes it least."""
    size = float(found.square().sum())
    factor = float((found * truth).sum()) / size if size else 0.0
    return float((factor * found - truth).square().mean())


def averaged(x: Tensor, units: int) -> float:
    """MSE / level^2 of x behind a Linear layer whose k is known: mean(x^2) / units.

    grad W = k x' of shape (units, n) has root mean square |k| |x| / sqrt(units n), and x = grad W' k / |k|^2 leaves
    1 / |k| of its noise.
    """
    return float(x.square().mean()) / units


@dataclass(frozen=True)
class Figure5(Reproduction):
    """Every width at every level of noise.

    Args:
        networks: and their widths.
        levels: of noise, relative to the root mean square of each parameter's gradient; ascending.
        small: the level, among them, at which the effect of width is measured: above float32's rounding, and so low
            that no unit changes its side.
    """

    name: ClassVar[str] = "figure5"

    networks: tuple[Network, ...] = NETWORKS
    levels: tuple[float, ...] = LEVELS
    small: float = 1e-6

    def jobs(self, options: Options, count: int) -> Sequence[Job]:
        return [
            Job(f"{network.name} x{width:g}, {at}", partial(self._attack, network, width, options, count, at))
            for network in self.networks
            for width in network.widths
            for at in range(count)
        ]

    def _attack(self, network: Network, width: float, options: Options, count: int, at: int) -> Row:
        """One picture through weights of its own, at every level of the same noise."""
        images = options.pictures(network.shape, count)
        x, y = images[at].inputs, labels(count)[at : at + 1]
        model = network.build(width, options.seed + at)
        target = Target(model, losses.Logistic(), network.shape, VALUE_RANGE)
        update = capture(target, x, y)
        first = target.network.layers[0]
        found: list[dict[str, Any]] = []
        for level in self.levels:
            generator = torch.Generator().manual_seed(NOISE_SEED + options.seed + at)
            answer = Recursive()(target, noisy(update, level, generator))
            one: dict[str, Any] = {"level": level, "status": answer.status.value, "seconds": answer.seconds}
            if answer.answers:
                one |= {
                    "mse": float((answer.inputs - x).square().mean()),
                    "apart": apart_from_brightness(answer.inputs, x.double()),
                    "stated error": answer.answers[0].error,
                    "residual": answer.gradient_residual,
                    "label right": float(answer.labels[0]) == float(y[0]),
                }
            found.append(one)
        values = {
            "network": network.name,
            "width": width,
            "levels": found,
            "grey": float(x.var(correction=0)),
            "averaged": averaged(x, first.outputs) if first.positions == 1 else None,
        }
        return Row(values)

    def median(self, rows: Mapping[str, Row], network: Network, width: float, level: float, what: str = "mse") -> float:
        """The median over pictures; no answer counts as infinite."""
        own: list[float] = [one.get(what, math.inf) for one in self._at(rows, network, width, level)]
        return statistics.median(own)

    def _at(self, rows: Mapping[str, Row], network: Network, width: float, level: float) -> list[Mapping[str, Any]]:
        at = self.levels.index(level)
        return [row.values["levels"][at] for row in of(rows, network=network.name, width=width)]

    def recovered(self, rows: Mapping[str, Row], network: Network, width: float, level: float) -> float:
        """The share of pictures whose MSE is below VISIBLE."""
        own = self._at(rows, network, width, level)
        return sum(bool(one.get("mse", math.inf) < VISIBLE) for one in own) / len(own)

    def gain(self, rows: Mapping[str, Row], network: Network, width: float, what: str = "mse") -> float:
        """MSE / level^2 at the small level: what the attack makes of noise."""
        return self.median(rows, network, width, self.small, what) / self.small**2

    def exponents(self, rows: Mapping[str, Row], network: Network, what: str = "mse") -> tuple[float, ...]:
        """The exponent of width in the gain, from each width to the next."""
        gains = [self.gain(rows, network, width, what) for width in network.widths]
        return tuple(
            math.log(b / a) / math.log(wide / narrow) if 0 < a < math.inf and 0 < b < math.inf else math.nan
            for (narrow, a), (wide, b) in pairwise(zip(network.widths, gains, strict=True))
        )

    def table(self, rows: Mapping[str, Row]) -> Table:
        levels = [f"{level:.0e}" if level else "0" for level in self.levels]
        numbers = (*levels, "MSE / noise²", "~ width^", "apart from brightness")
        table = self.new_table(("network", "width", "the paper"), numbers)
        for network in self.networks:
            for width, exponent in zip(network.widths, (None, *self.exponents(rows, network)), strict=True):
                table.add_row(
                    network.name,
                    f"{width:g}",
                    "pictures only",
                    *(f"{self.median(rows, network, width, level):.0e}" for level in self.levels),
                    f"{self.gain(rows, network, width):.1e}",
                    "" if exponent is None else f"{exponent:.1f}",
                    f"{self.gain(rows, network, width, 'apart'):.1e}",
                )
            table.add_section()
        return table

    def summary(self, rows: Mapping[str, Row]) -> dict[str, Any]:
        return {
            network.name: {
                "the paper": "pictures only; the wider, the better",
                "exponents of width": list(self.exponents(rows, network)),
                "exponents of width, apart from brightness": list(self.exponents(rows, network, "apart")),
                "widths": {
                    f"{width:g}": {
                        "MSE / noise^2": self.gain(rows, network, width),
                        "MSE / noise^2, apart from brightness": self.gain(rows, network, width, "apart"),
                        "levels": {
                            f"{level:g}": {
                                "median MSE": self.median(rows, network, width, level),
                                "recovered": self.recovered(rows, network, width, level),
                            }
                            for level in self.levels
                        },
                    }
                    for width in network.widths
                },
            }
            for network in self.networks
        }

    def draw(self, rows: Mapping[str, Row]) -> Figure:
        figure = Figure(figsize=(3.9 * (len(self.networks) + 1), 4.2), layout="constrained", dpi=150)
        axes = figure.subplots(1, len(self.networks) + 1, squeeze=False)[0]
        for ax, network in zip(axes, self.networks, strict=False):
            self._draw_levels(ax, rows, network)
        axes[0].set_ylabel("MSE, values in [0, 1]; line: median")
        self._draw_widths(axes[-1], rows)
        return figure

    def _draw_levels(self, ax: Axes, rows: Mapping[str, Row], network: Network) -> None:
        """MSE against noise, a curve for each width."""
        low, high = 1e-18, 1e4
        positive = [level for level in self.levels if level > 0]
        places = [level or positive[0] / 10 for level in self.levels]  # 0 has no place on a logarithmic axis
        for number, width in enumerate(network.widths):
            values = [self.median(rows, network, width, level) for level in self.levels]
            colour = f"C{number}"
            ax.plot(places, [min(max(v, low), high) for v in values], "o-", ms=4, color=colour, label=f"x {width:g}")
            for place, level in zip(places, self.levels, strict=True):
                own = [one.get("mse", high) for one in self._at(rows, network, width, level)]
                ax.scatter([place] * len(own), [min(max(v, low), high) for v in own], s=5, color=colour, alpha=0.35)
        grey = statistics.median(row.values["grey"] for row in of(rows, network=network.name))
        ax.axhline(grey, color="grey", ls=":", lw=1)
        ax.text(places[0], grey * 2, "an evenly grey picture", fontsize=7, color="grey")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(low / 3, 3 * high)
        ax.set_xticks(places, [f"{level:.0e}" if level else "0" for level in self.levels], fontsize=7)
        ax.minorticks_off()
        ax.set_xlabel("noise, relative to each parameter's gradient", fontsize=8)
        ax.set_title(network.name, fontsize=9)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7, title="width", title_fontsize=7, loc="lower right")

    def _draw_widths(self, ax: Axes, rows: Mapping[str, Row]) -> None:
        """What the attack makes of small noise, against width."""
        for number, network in enumerate(self.networks):
            colour, mark = f"C{number + 4}", "os^v"[number % 4]
            gains = [self.gain(rows, network, width) for width in network.widths]
            ax.plot(network.widths, gains, f"{mark}-", ms=4, color=colour, label=network.name)
            theory = self.theory(rows, network)
            if theory is not None:
                apart = [self.gain(rows, network, width, "apart") for width in network.widths]
                label = f"{network.name}, apart from brightness"
                ax.plot(network.widths, apart, f"{mark}--", ms=4, color=colour, label=label)
                ax.plot(network.widths, theory, ":", color="black", label="the same computed: mean of x² / units")
        ax.set_xscale("log")
        ax.set_yscale("log")
        widths = sorted({width for network in self.networks for width in network.widths})
        ax.set_xticks(widths, [f"{width:g}" for width in widths], fontsize=7)
        ax.minorticks_off()
        ax.set_xlabel("width", fontsize=8)
        ax.set_title(f"MSE / noise², at noise {self.small:g}", fontsize=9)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(0.0, 0.4))

    def theory(self, rows: Mapping[str, Row], network: Network) -> list[float] | None:
        """`averaged` at each width, the median over pictures; None if the first layer is not Linear."""
        own = [row.values for row in of(rows, network=network.name)]
        if any(values["averaged"] is None for values in own):
            return None
        return [
            statistics.median(values["averaged"] for values in own if values["width"] == width)
            for width in network.widths
        ]

    def remarks(self, rows: Mapping[str, Row]) -> Sequence[str]:
        ratios = [
            one["mse"] ** 0.5 / one["stated error"]
            for row in rows.values()
            for one in row.values["levels"]
            if one["level"] >= self.small and Status(one["status"]) is Status.EXACT
        ]
        understated = f" by a factor of up to {max(ratios):.0f}" if ratios else ""
        return (
            "The paper shows pictures only, of how noise averages out over the constraints of a wider network.",
            "The noise's standard deviation is the level times the root mean square of each parameter's gradient. "
            "Every picture has weights and noise of its own. Level 0 is float32's rounding. Nothing is told to the "
            "attack.",
            "Small noise: width helps. Behind a Linear layer the MSE, apart from brightness, falls with the number of "
            "units, as computed; brightness hangs on one equation, Eq. 11, which no width averages. CNN6 gains most "
            "from the first additional channels, which make its narrowest layers well-conditioned, less after that.",
            "Larger noise: width is no cure. As soon as a unit is taken to stand on the other side of its kink, the "
            "gradient constraints of all layers before it are wrong, and a wider network has more units that stand "
            "within the noise. Without kinks there is no such break: the error stays proportional to the noise.",
            "Where CNN6's picture is lost, wider networks give answers nearer to it, but none much nearer than an "
            "evenly grey picture.",
            f"The error that the attack states allows for rounding only: under noise it is too small{understated}.",
        )
