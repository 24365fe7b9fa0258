"""What is kept of each candidate on its way from the output to the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rgap.inversion.layer import LayerSystem
from rgap.inversion.report import JointReport, LayerReport
from rgap.inversion.state import State, Stop
from rgap.nn.activation import Activation
from rgap.nn.activations import Identity


@dataclass(frozen=True, eq=False)
class Open:
    """A layer that leaves something of its input open."""

    system: LayerSystem
    """Its constraints, for several candidates."""
    s: int
    """Which of them is the candidate's."""
    error: Float[Tensor, "1 c n"]
    """One draw of the error of what it tells."""


@dataclass(frozen=True)
class Told:
    """What layers left open, and those before them told (`rgap.inversion.null_space`)."""

    steps: int
    """Linearisations."""
    condition: float
    """The worst of the constraints that told it."""


@dataclass(frozen=True)
class History:
    """What one candidate has passed, and how far it is determined."""

    layers: tuple[LayerReport, ...] = ()
    """From the input to the output."""
    values: Mapping[int, Tensor] = field(default_factory=dict)
    """Of every value that was passed, by its value_id, the candidate's estimate (1, *shape)."""
    value_open: str | None = None
    """The rank-deficient layer, if any, whose free dimensions reach the present value."""
    cotangent_open: str | None = None
    """Likewise for the cotangent."""
    certain: tuple[int, State] | None = None
    """The last value up to which nothing was left open, with its value_id; set when something is."""
    open: Open | None = None
    """The layer just passed, if it leaves something open and nothing behind it does."""
    told: Told | None = None

    @property
    def open_since(self) -> str | None:
        """The layer whose free dimensions reach what is known here."""
        return self.value_open or self.cotangent_open

    def solved(self, report: LayerReport, value_id: int, state: State, layer: Open) -> History:
        """Behind a layer whose output had this state."""
        certain = self.certain
        if certain is None and (report.open_since or self.cotangent_open) is not None:
            certain = value_id, state
        return replace(
            self,
            layers=(report, *self.layers),
            values={**self.values, value_id: state.value},
            value_open=report.open_since,
            certain=certain,
            open=layer if report.open_since == report.name else None,
        )

    def completed(self, steps: int, condition: float) -> History:
        """What the layer just passed left open is known."""
        report = replace(self.layers[0], open_since=None)
        if self.told is not None:
            steps, condition = steps + self.told.steps, max(condition, self.told.condition)
        told = Told(steps, max(condition, report.condition))
        return replace(self, layers=(report, *self.layers[1:]), value_open=None, open=None, told=told)

    def passed_block(self, reports: Sequence[LayerReport]) -> History:
        return replace(self, layers=(*reports, *self.layers))

    def passed_activation(self, activation: Activation) -> History:
        """The slopes that enter the next cotangent are known as far as the value is."""
        if isinstance(activation, Identity):
            return self
        return replace(self, cotangent_open=self.cotangent_open or self.value_open)


@dataclass(frozen=True)
class Candidate:
    """One candidate at the end of the recursion."""

    root: int
    """Which of the candidates at the output it comes from."""
    value: Tensor
    """(1, *shape): the network's input, or the value where the recursion stopped."""
    std: float
    """Of its error, the root mean square."""
    layers: tuple[LayerReport, ...]
    values: Mapping[int, Tensor]
    """Of every value that the recursion passed, by its value_id, an estimate (1, *shape); least squares where a layer
    left dimensions open."""
    certain_id: int
    """The value_id of the last value, from the output, up to which nothing was left open."""
    certain: State
    """What is known of that value."""
    stop: Stop | None = None
    """Why it did not get to the input; None if it did."""
    cotangent: Tensor = field(default_factory=lambda: torch.zeros(0))
    """(1, *shape): the gradient of the loss with respect to the network's output, the paper's k_d."""
    label: Tensor = field(default_factory=lambda: torch.zeros(0))
    margin: float = float("nan")
    joint: JointReport | None = None
    note: str = ""
    cut_off: bool = False
    """Whether the time was up before what was left open was solved."""
    twin: Tensor | None = None
    """What the value may be as well, each number on its own; None if it is decided."""
    known: Tensor | None = None
    """Which of its numbers are known at all; None means all of them."""
    stopped: State | None = None
    """What is known where the recursion stopped; None if it did not."""
    told: Told | None = None
    """What was left open behind the present value and is known all the same; the last certain value is behind it."""

    def scaled(self, factor: float, label: Tensor, margin: float) -> Candidate:
        """The same direction for another candidate, in a network that scales."""
        return replace(self, value=factor * self.value, label=label, margin=margin, std=abs(factor) * self.std)


@dataclass(frozen=True, eq=False)
class Paths:
    """Where s candidates of several updates stand, all at the same value of the network."""

    state: State
    root: Int[Tensor, " s"]
    """Which of the candidates at the output each comes from: several are branches of one."""
    update: Int[Tensor, " s"]
    """Which update each is of."""
    cotangent_error: Float[Tensor, " s"]
    """How far rounding may have moved the whole cotangent, relative to it, as one factor of all its values."""
    cotangent_scatter: Float[Tensor, " s"]
    """How far each of its values on its own, root mean square, relative to theirs."""
    history: tuple[History, ...]

    @staticmethod
    def begin(state: State, update: Int[Tensor, " s"], cotangent_error: Float[Tensor, " s"]) -> Paths:
        count = len(state.value)
        root = torch.arange(count, device=state.value.device)
        return Paths(state, root, update, cotangent_error, torch.zeros_like(cotangent_error), (History(),) * count)

    def select(self, index: Int[Tensor, " t"]) -> Paths:
        """The paths at an index; one that is named twice branches."""
        return Paths(
            self.state.select(index),
            self.root[index],
            self.update[index],
            self.cotangent_error[index],
            self.cotangent_scatter[index],
            tuple(self.history[s] for s in index.tolist()),
        )

    @property
    def updates(self) -> list[int]:
        """Those of which there are candidates."""
        found: list[int] = torch.unique(self.update).tolist()
        return found

    def of(self, update: int) -> Paths:
        """The candidates of one update."""
        return self.select((self.update == update).nonzero().flatten())

    def scattered(self, more: float | Float[Tensor, " s"]) -> Paths:
        """The values of the cotangent moved on their own by that much more, relatively."""
        return replace(self, cotangent_scatter=(self.cotangent_scatter.square() + more**2).sqrt())

    def at(self, value_id: int) -> Paths:
        """The same paths, their present values noted."""
        history = tuple(
            replace(each, values={**each.values, value_id: self.state.value[s : s + 1]})
            for s, each in enumerate(self.history)
        )
        return replace(self, history=history)

    def plausible(self, residual: Float[Tensor, " s"]) -> Paths:
        """Those that go on, by how badly each one's constraints are met.

        Of the branches of one candidate, the one that satisfies its constraints best; of different ones of an update,
        all but those that contradict theirs while another satisfies them: those cannot be the sample.
        """
        rivals = torch.where(self.root[:, None] == self.root, residual, torch.inf)
        best = rivals.argmin(1) == torch.arange(len(residual), device=residual.device)
        least = torch.where(self.update[:, None] == self.update, residual, torch.inf).amin(1)
        alive: Bool[Tensor, " s"] = best & (residual <= (1e3 * least).clamp(min=1e-2))
        return self.select(alive.nonzero().flatten())

    def candidates(self, value_id: int, stop: Stop | None = None) -> list[Candidate]:
        """The candidates at the end of their ways."""
        found = []
        for s, history in enumerate(self.history):
            here = self.state.one(s)
            certain_id, certain = history.certain or (value_id, here)
            found.append(
                Candidate(
                    int(self.root[s]),
                    here.value,
                    float(here.rms_std[0]),
                    history.layers,
                    history.values,
                    certain_id,
                    certain,
                    stop,
                    twin=None if here.alternative is None else here.alternative.value,
                    known=None if here.row_weight is None else here.row_weight > 0,
                    stopped=None if stop is None else here,
                    told=history.told,
                )
            )
        return found
