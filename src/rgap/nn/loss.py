"""What a loss is to an attack: its labels, its outputs, and one sample's value; all else follows from these."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.linalg.roots import find_roots

WIDEST = 1e6
"""No label and no gradient of an output is looked for beyond, unless the loss says more."""
PROBES = 8
"""Draws of signs, and labels, that show how far rounding moves the gradient of an output."""


class Loss(ABC):
    """A loss of a model's outputs and labels, averaged over the batch.

    A loss of one's own says `labels`, `outputs` and `per_sample`. What attacks ask beyond that is found by automatic
    differentiation and on grids; a loss that knows more overrides it.
    """

    name: ClassVar[str]
    """What update files, messages and the command line call it; made of the class's own name where it says none."""
    ending: ClassVar[str] = ""
    """A function that belongs to the loss where the model does it last, such as ``log_softmax``: outputs are then what
    it takes, in all but `per_sample`, `__call__` and `expected`, which take what the model gives."""

    @property
    def aid(self) -> str:
        """What an attacker is taken to know of the labels, for people; empty if it is nothing."""
        return ""

    def __init_subclass__(cls, **arguments: object) -> None:
        super().__init_subclass__(**arguments)
        if "name" not in vars(cls):
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__).lower()

    @property
    @abstractmethod
    def labels(self) -> tuple[float, ...]:
        """Every label there is; () where any real number is one."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """The number of values the model must give for one sample."""

    @abstractmethod
    def per_sample(self, outputs: Float[Tensor, "s outputs"], labels: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
        """The loss of each of s samples on its own; differentiable in the outputs."""

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a batch: outputs (b, outputs), labels (b,)."""
        return self.per_sample(outputs.reshape(-1, self.outputs), labels.reshape(-1).to(outputs)).mean()

    def expected(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """The mean over a batch whose labels are not certain: weights (b, labels), each row a distribution.

        Where labels cannot be listed the weights are the labels themselves, (b, 1).
        """
        outputs = outputs.reshape(-1, self.outputs)
        if not self.labels:
            return self(outputs, weights)
        each = [self.per_sample(outputs, outputs.new_full((len(outputs),), label)) for label in self.labels]
        return (weights * torch.stack(each, 1)).sum(1).mean()

    @property
    def examples(self) -> tuple[float, ...]:
        """Labels to try a model with."""
        return self.labels or (0.0, 1.0)

    def check_labels(self, labels: Tensor) -> None:
        """Raise ValueError for a label the loss does not know."""
        every = set(self.labels)
        values = labels.reshape(-1).tolist()
        wrong = [float(y) for y in values if (y not in every if every else not math.isfinite(y))]
        if wrong:
            raise ValueError(f"got label {wrong[0]:g}, expected {self._expected(wrong)}")

    def _expected(self, wrong: list[float]) -> str:
        """What a label must be, for a message."""
        if not self.labels:
            return f"a number for the {self.name} loss"
        return f"one of {', '.join(f'{label:g}' for label in self.labels)} for the {self.name} loss"

    def misfit(self, outputs: Tensor) -> str:
        """Why the loss does not take such outputs of a model; empty if it does."""
        return ""

    # The gradient of the outputs, k, and what follows from it.

    def output_gradient(
        self, outputs: Float[Tensor, "s outputs"], labels: Float[Tensor, " s"]
    ) -> Float[Tensor, "s outputs"]:
        """k: the gradient of one sample's loss with respect to its outputs, for s samples on their own."""
        found: Tensor = torch.func.grad(lambda each: self.per_sample(each, labels).sum())(outputs)
        return found

    @property
    def gradient_bound(self) -> float:
        """No k is longer."""
        return WIDEST

    def gradient_rounding(
        self,
        outputs: Float[Tensor, "s outputs"],
        labels: Float[Tensor, " s"],
        shift: Float[Tensor, " s"],
        precision: float,
    ) -> Float[Tensor, "s outputs"]:
        """How far rounding may move each value of k, beyond the relative rounding of k itself.

        Args:
            shift: how far rounding may have moved each sample's outputs.
            precision: relative rounding of what k is a difference of.
        """
        k = self.output_gradient(outputs, labels)
        others = [torch.full_like(labels, label) for label in self.examples[:PROBES]]
        size = torch.stack([self.output_gradient(outputs, each) for each in (labels, *others)]).abs().amax((0, 2))
        draw = torch.Generator().manual_seed(0)
        signs = (torch.randint(2, (PROBES, *outputs.shape), generator=draw) * 2 - 1).to(outputs)
        change = torch.stack([self.output_gradient(outputs + shift[:, None] * each, labels) - k for each in signs])
        return precision * size[:, None] + change.abs().amax(0)

    def label_from(
        self, outputs: Float[Tensor, "s outputs"], k: Float[Tensor, "s outputs"]
    ) -> Float[Tensor, " s"] | None:
        """The label that each sample's outputs and k tell; None where each of `labels` is to be tried."""
        if self.labels:
            return None
        return torch.cat([self._solved_label(z, g) for z, g in zip(outputs[:, None], k[:, None], strict=True)])

    def _solved_label(self, z: Float[Tensor, "1 outputs"], k: Float[Tensor, "1 outputs"]) -> Float[Tensor, " 1"]:
        """The least label that gives k; where none does, the one that comes nearest."""
        size = torch.logspace(-9, 6, 601, dtype=z.dtype, device=z.device)
        grid = torch.cat([-size.flip(0), size.new_zeros(1), size])

        def left(labels: Tensor) -> Tensor:
            return self.output_gradient(z.expand(len(labels), -1), labels) - k

        ends = left(grid[[0, -1]])
        along = torch.nn.functional.normalize(ends[1] - ends[0], dim=0)
        found, _ = find_roots(lambda labels: left(labels) @ along, grid)
        return found.sort().values[:1] if len(found) else grid[left(grid).norm(dim=1).argmin()][None]

    def possible_labels(self, direction: Float[Tensor, " outputs"], precision: float) -> Float[Tensor, " t"]:
        """Of `labels` those that the direction of k leaves, whatever its sign.

        Args:
            precision: of the direction, whose length is one.
        """
        return torch.tensor(self.labels).to(direction)

    def projection(self, direction: Float[Tensor, " outputs"], label: Float[Tensor, ""]) -> Float[Tensor, " outputs"]:
        """What k is best projected on where its direction is known and its length is not."""
        return direction
