"""What every defence has in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.update import Update

Gradients = dict[str, Tensor]
"""By parameter name, in float64."""


@dataclass(frozen=True)
class Defence(ABC):
    """``Update -> Update``. Authors write `run`, and name the field that is the strength."""

    about: ClassVar[str]
    """What it does, in one sentence."""
    strength_name: ClassVar[str] = ""
    """The field that says how strong the defence is; empty for a defence that is either on or off."""
    levels: ClassVar[tuple[float, ...]] = (1.0,)
    """Strengths for a sweep, from weak to strong."""

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def random(self) -> bool:
        """Whether it needs a generator."""
        return False

    @property
    def strength(self) -> float:
        """The value of the field `strength_name`; 1 for a defence that is either on or off."""
        return float(getattr(self, self.strength_name)) if self.strength_name else 1.0

    def with_strength(self, value: float) -> Defence:
        """The same defence with another strength.

        Raises:
            ValueError: this defence does not have such a strength; says which it expects.
        """
        if not self.strength_name:
            if value != 1:
                raise ValueError(f"{self.name} is either on or off: got strength {value}, expected 1")
            return self
        if not isinstance(getattr(self, self.strength_name), int):
            return replace(self, **{self.strength_name: float(value)})
        if not float(value).is_integer():
            raise ValueError(f"got {self.strength_name}={value} for {self.name}, expected a whole number")
        return replace(self, **{self.strength_name: round(value)})

    @final
    def __call__(self, update: Update, generator: torch.Generator | None = None) -> Update:
        """Defend one update; it is left as it is.

        Args:
            generator: of everything random; the same state gives the same result.

        Returns:
            An update with the names, shapes, types and header of the one given. Values beyond the range of their type
            become its largest.

        Raises:
            ValueError: the defence is random and got no generator, or it does not fit the update.
        """
        if self.random and generator is None:
            raise ValueError(
                f"{self.name} is random: got no generator, expected a torch.Generator, such as "
                "torch.Generator().manual_seed(0)"
            )
        found = self.run({n: g.to(torch.float64, copy=True) for n, g in update.gradients.items()}, generator)
        got, expected = ({n: tuple(g.shape) for n, g in each.items()} for each in (found, update.gradients))
        if got != expected:
            raise ValueError(f"{self.name} changed names or shapes: got {got}, expected {expected} as it was given")
        kept = {}
        for name, given in update.gradients.items():
            limits = torch.finfo(given.dtype)
            kept[name] = found[name].clamp(limits.min, limits.max).to(given)
        return Update(kept, update.header)

    @abstractmethod
    def run(self, gradients: Gradients, generator: torch.Generator | None) -> Gradients:
        """The defence itself, in float64 on copies; the same names and shapes come back, in the same order.

        Args:
            generator: given if `random` says that it is needed.
        """


def largest_magnitude(values: Float[Tensor, "..."]) -> float:
    return float(values.abs().amax()) if values.numel() else 0.0


def l2_norm(gradients: Iterable[Tensor]) -> float:
    """The Euclidean norm over several tensors, whose squares may overflow."""
    tensors = [g.double() for g in gradients]
    largest = max(largest_magnitude(g) for g in tensors)
    if largest == 0:
        return 0.0
    return largest * math.sqrt(sum(float((g / largest).square().sum()) for g in tensors))


def not_negative(**values: float | int) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"got {name}={value}, expected 0 or more, and finite")


def positive(**values: float | int) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"got {name}={value}, expected more than 0, and finite")
