"""Defences: each takes an update and gives the one that the client sends in its place.

A defence sees what is in the update and nothing else: neither the data nor the model. If that is a weight difference,
or a mean over several clients, then the difference or the mean is what is changed.

Every defence has one field that says how strong it is, `levels` to sweep it over from weak to strong, and a cost in
`gradient_error`. No defence but `DPSGD` gives a guarantee: that the attacks which were tried have failed is not one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from rgap.defences.base import Defence, Gradients, l2_norm
from rgap.defences.compression import DropBias, Freeze, Quantise, Sign, Soteria, TopK
from rgap.defences.noise import DPSGD, Clip, GaussianNoise, LaplaceNoise, Noise
from rgap.update import Update

__all__ = [
    "ALL", "DPSGD", "Clip", "Compose", "Defence", "DropBias", "Freeze", "GaussianNoise", "Gradients", "LaplaceNoise",
    "Noise", "Quantise", "Sign", "Soteria", "TopK", "by_name", "gradient_error",
]  # fmt: skip


@dataclass(frozen=True)
class Compose(Defence):
    """Several defences, one after the other. As a whole it is either on or off.

    Raises:
        ValueError: there is none.
    """

    defences: tuple[Defence, ...]
    about: ClassVar[str] = "Applies several defences one after the other."

    def __post_init__(self) -> None:
        if not self.defences:
            raise ValueError("got no defences to compose, expected at least one")

    @property
    def name(self) -> str:
        return " + ".join(defence.name for defence in self.defences)

    @property
    def random(self) -> bool:
        return any(defence.random for defence in self.defences)

    def run(self, gradients: Gradients, generator: torch.Generator | None) -> Gradients:
        for defence in self.defences:
            gradients = defence.run(gradients, generator)
        return gradients


ALL: tuple[type[Defence], ...] = (
    GaussianNoise, LaplaceNoise, Clip, DPSGD, TopK, Sign, Quantise, Freeze, DropBias, Soteria,
)  # fmt: skip
"""Every defence on its own; each can be made without arguments."""


def by_name(name: str, strength: float | None = None) -> Defence:
    """A defence of `ALL` by its name; upper and lower case, dashes and underscores do not matter: ``top-k`` is `TopK`.

    Raises:
        ValueError: no defence has this name, or not this strength.
    """
    known = {kind.__name__.lower(): kind for kind in ALL}
    kind = known.get(name.lower().replace("-", "").replace("_", ""))
    if kind is None:
        raise ValueError(f"got the defence {name!r}, expected one of {', '.join(kind.__name__ for kind in ALL)}")
    return kind() if strength is None else kind().with_strength(strength)


def gradient_error(before: Update, after: Update) -> float:
    """What a defence costs: |after - before| / |before|, L2 norms over all tensors.

    Returns:
        0 if nothing was changed; inf if something was made of a gradient that is all zero.

    Raises:
        ValueError: the two do not hold the same names and shapes.
    """
    got, expected = ({n: tuple(g.shape) for n, g in each.gradients.items()} for each in (after, before))
    if got != expected:
        raise ValueError(f"got gradients {got}, expected {expected} as before the defence")
    apart = l2_norm(after.gradients[name].double() - g.double() for name, g in before.gradients.items())
    length = l2_norm(before.gradients.values())
    if length == 0:
        return 0.0 if apart == 0 else math.inf
    return apart / length
